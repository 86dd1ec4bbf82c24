"""Measures of how flat a minimum is; see docs/sharpness.md."""

from optax_sam.sharpness.hessian import (
    EigenResult,
    eigenvalues_of,
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
)
from optax_sam.sharpness.live import sam_metrics, sam_stability_edge
from optax_sam.sharpness.objective import stack_batches
from optax_sam.sharpness.operators import Operator, hessian_operator, hvp
from optax_sam.sharpness.probes import (
    Estimate,
    diagonal_of,
    frobenius_norm_of,
    trace_of,
)
from optax_sam.sharpness.progress_bar import CountedLoss, progress
from optax_sam.sharpness.renyi import (
    RenyiResult,
    renyi_entropy,
    renyi_entropy_of,
    renyi_sharpness,
)
from optax_sam.sharpness.scalars import to_scalars
from optax_sam.sharpness.spectrum import (
    Quadrature,
    SpectralDensity,
    SpectralSumResult,
    deflated_quadrature,
    spectral_density,
    spectral_density_of,
    spectral_sum,
    spectral_sum_of,
)
from optax_sam.sharpness.stream import accumulate
from optax_sam.sharpness.tracking import Probe, ProbeState

__all__ = [
    "CountedLoss",
    "EigenResult",
    "Estimate",
    "Operator",
    "Probe",
    "ProbeState",
    "Quadrature",
    "RenyiResult",
    "SpectralDensity",
    "SpectralSumResult",
    "accumulate",
    "deflated_quadrature",
    "diagonal_of",
    "eigenvalues_of",
    "frobenius_norm_of",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_operator",
    "hessian_trace",
    "hvp",
    "progress",
    "renyi_entropy",
    "renyi_entropy_of",
    "renyi_sharpness",
    "sam_metrics",
    "sam_stability_edge",
    "spectral_density",
    "spectral_density_of",
    "spectral_sum",
    "spectral_sum_of",
    "stack_batches",
    "to_scalars",
    "trace_of",
]
