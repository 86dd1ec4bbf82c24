"""Sharpness-aware minimization for JAX, as pure Optax gradient transformations."""

from optax_sam import ascent, blend, when
from optax_sam.decay import decay_after
from optax_sam.dispatch import dispatch
from optax_sam.engine import SharpnessAwareState, sharpness_aware
from optax_sam.methods.asam import asam
from optax_sam.methods.msam import MSAMState, msam, msam_eval_params
from optax_sam.methods.sam import sam
from optax_sam.methods.vsam import vsam
from optax_sam.readers import ascends_next, ascent_plan, metrics, static_args
from optax_sam.version import __version__

__all__ = [
    "MSAMState",
    "SharpnessAwareState",
    "__version__",
    "asam",
    "ascends_next",
    "ascent",
    "ascent_plan",
    "blend",
    "decay_after",
    "dispatch",
    "metrics",
    "msam",
    "msam_eval_params",
    "sam",
    "sharpness_aware",
    "static_args",
    "vsam",
    "when",
]
