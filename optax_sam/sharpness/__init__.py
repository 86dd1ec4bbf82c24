"""Measures of how flat a minimum is; see docs/measures/sharpness.md."""

from optax_sam.sharpness.directions import filter_normalized_direction
from optax_sam.sharpness.geodesic import geodesic_sharpness
from optax_sam.sharpness.gl_pairs import GLBlock, GLPair, attention_gl_pairs, gl_pair
from optax_sam.sharpness.hessian import (
    EigenResult,
    eigenvalues_of,
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
)
from optax_sam.sharpness.kendall import (
    GranulatedKendall,
    KendallInterval,
    granulated_kendall,
    kendall_interval,
    kendall_tau,
)
from optax_sam.sharpness.keskar import KeskarSharpness, keskar_sharpness
from optax_sam.sharpness.landscape import interpolate_loss, loss_line, loss_surface
from optax_sam.sharpness.live import sam_metrics, sam_stability_edge
from optax_sam.sharpness.logits import normalize_logits
from optax_sam.sharpness.objective import stack_batches
from optax_sam.sharpness.operators import Operator, hessian_operator, hvp
from optax_sam.sharpness.pac_bayes import (
    PacBayesFlatness,
    pac_bayes_bound,
    pac_bayes_flatness,
)
from optax_sam.sharpness.perturbation import (
    AverageSharpness,
    SamSharpness,
    average_sharpness,
    sam_sharpness,
)
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
from optax_sam.sharpness.worst_case import SharpnessResult, worst_case_sharpness

__all__ = [
    "AverageSharpness",
    "CountedLoss",
    "EigenResult",
    "Estimate",
    "GLBlock",
    "GLPair",
    "GranulatedKendall",
    "KendallInterval",
    "KeskarSharpness",
    "Operator",
    "PacBayesFlatness",
    "Probe",
    "ProbeState",
    "Quadrature",
    "RenyiResult",
    "SamSharpness",
    "SharpnessResult",
    "SpectralDensity",
    "SpectralSumResult",
    "accumulate",
    "attention_gl_pairs",
    "average_sharpness",
    "deflated_quadrature",
    "diagonal_of",
    "eigenvalues_of",
    "filter_normalized_direction",
    "frobenius_norm_of",
    "geodesic_sharpness",
    "gl_pair",
    "granulated_kendall",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_operator",
    "hessian_trace",
    "hvp",
    "interpolate_loss",
    "kendall_interval",
    "kendall_tau",
    "keskar_sharpness",
    "loss_line",
    "loss_surface",
    "normalize_logits",
    "pac_bayes_bound",
    "pac_bayes_flatness",
    "progress",
    "renyi_entropy",
    "renyi_entropy_of",
    "renyi_sharpness",
    "sam_metrics",
    "sam_sharpness",
    "sam_stability_edge",
    "spectral_density",
    "spectral_density_of",
    "spectral_sum",
    "spectral_sum_of",
    "stack_batches",
    "to_scalars",
    "trace_of",
    "worst_case_sharpness",
]
