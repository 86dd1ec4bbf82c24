"""Measures of how flat a minimum is; see docs/measures/sharpness.md."""

from optax_sam.sharpness.data import stack_batches
from optax_sam.sharpness.directions import filter_normalized_direction
from optax_sam.sharpness.eigen import EigenResult, eigenvalues
from optax_sam.sharpness.eigen_lines import EigenLines, loss_along_eigenvectors
from optax_sam.sharpness.geodesic import geodesic_sharpness
from optax_sam.sharpness.gl_pairs import (
    GLBlock,
    GLPair,
    attention_gl_pairs,
    gl_pair,
    lora_gl_pairs,
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
from optax_sam.sharpness.logits import chunked_cross_entropy, normalize_logits
from optax_sam.sharpness.memory import Memory, memory
from optax_sam.sharpness.operators import (
    Operator,
    empirical_fisher,
    fisher,
    ggn,
    hessian,
    hvp,
    of_hessian,
    to_scipy,
)
from optax_sam.sharpness.pac_bayes import (
    PacBayesFlatness,
    pac_bayes_bound,
    pac_bayes_flatness,
)
from optax_sam.sharpness.path import PathProjection, project_path
from optax_sam.sharpness.perturbation import (
    AverageSharpness,
    SamSharpness,
    average_sharpness,
    sam_sharpness,
)
from optax_sam.sharpness.probes import (
    Estimate,
    diagonal,
    frobenius_norm,
    trace,
)
from optax_sam.sharpness.progress_bar import CountedLoss, progress
from optax_sam.sharpness.renyi import (
    RenyiResult,
    renyi_entropy,
    renyi_sharpness,
)
from optax_sam.sharpness.scalars import to_scalars
from optax_sam.sharpness.spectrum import (
    Quadrature,
    SpectralDensity,
    SpectralSumResult,
    deflated_quadrature,
    spectral_density,
    spectral_sum,
    spectral_sum_of,  # noqa: F401
)
from optax_sam.sharpness.stream import accumulate
from optax_sam.sharpness.tracking import Probe, ProbeState
from optax_sam.sharpness.worst_case import SharpnessResult, worst_case_sharpness

hessian_eigenvalues = of_hessian(eigenvalues)
hessian_trace = of_hessian(trace)
hessian_diagonal = of_hessian(diagonal)
hessian_frobenius_norm = of_hessian(frobenius_norm)

# Older names, from when each estimator had a second function for operators.
hessian_operator = hessian
eigenvalues_of, trace_of, diagonal_of = eigenvalues, trace, diagonal
frobenius_norm_of, spectral_density_of = frobenius_norm, spectral_density
renyi_entropy_of = renyi_entropy

__all__ = [
    "AverageSharpness",
    "CountedLoss",
    "EigenLines",
    "EigenResult",
    "Estimate",
    "GLBlock",
    "GLPair",
    "GranulatedKendall",
    "KendallInterval",
    "KeskarSharpness",
    "Memory",
    "Operator",
    "PacBayesFlatness",
    "PathProjection",
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
    "chunked_cross_entropy",
    "deflated_quadrature",
    "diagonal",
    "eigenvalues",
    "empirical_fisher",
    "filter_normalized_direction",
    "fisher",
    "frobenius_norm",
    "geodesic_sharpness",
    "ggn",
    "gl_pair",
    "granulated_kendall",
    "hessian",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_trace",
    "hvp",
    "interpolate_loss",
    "kendall_interval",
    "kendall_tau",
    "keskar_sharpness",
    "lora_gl_pairs",
    "loss_along_eigenvectors",
    "loss_line",
    "loss_surface",
    "memory",
    "normalize_logits",
    "pac_bayes_bound",
    "pac_bayes_flatness",
    "progress",
    "project_path",
    "renyi_entropy",
    "renyi_sharpness",
    "sam_metrics",
    "sam_sharpness",
    "sam_stability_edge",
    "spectral_density",
    "spectral_sum",
    "stack_batches",
    "to_scalars",
    "to_scipy",
    "trace",
    "worst_case_sharpness",
]
