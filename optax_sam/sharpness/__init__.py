"""Measures of how flat a minimum is; see docs/sharpness.md."""

from optax_sam.sharpness.objective import stack_batches
from optax_sam.sharpness.operators import Operator, hessian_operator, hvp

__all__ = [
    "Operator",
    "hessian_operator",
    "hvp",
    "stack_batches",
]
