"""Measures of how flat a minimum is; see docs/sharpness.md."""

from optax_sam.sharpness.logits import normalize_logits
from optax_sam.sharpness.objective import stack_batches
from optax_sam.sharpness.operators import Operator, hessian_operator, hvp
from optax_sam.sharpness.perturbation import (
    AverageSharpness,
    SamSharpness,
    average_sharpness,
    sam_sharpness,
)
from optax_sam.sharpness.worst_case import SharpnessResult, worst_case_sharpness

__all__ = [
    "AverageSharpness",
    "Operator",
    "SamSharpness",
    "SharpnessResult",
    "average_sharpness",
    "hessian_operator",
    "hvp",
    "normalize_logits",
    "sam_sharpness",
    "stack_batches",
    "worst_case_sharpness",
]
