"""Sharpness-aware minimization for JAX, as pure Optax gradient transformations."""

from optax_sam import ascent, blend, when
from optax_sam.dispatch import dispatch
from optax_sam.engine import SharpnessAwareState, sharpness_aware
from optax_sam.methods.asam import asam
from optax_sam.methods.sam import sam
from optax_sam.methods.vsam import vsam
from optax_sam.readers import ascends_next, ascent_plan, metrics, static_args
from optax_sam.trajectory.loss import trajectory_loss
from optax_sam.trajectory.mesa import MESAState, mesa, mesa_params
from optax_sam.trajectory.saf import SAFState, saf, saf_past_logits
from optax_sam.version import __version__

__all__ = [
    "MESAState",
    "SAFState",
    "SharpnessAwareState",
    "__version__",
    "asam",
    "ascends_next",
    "ascent",
    "ascent_plan",
    "blend",
    "dispatch",
    "mesa",
    "mesa_params",
    "metrics",
    "saf",
    "saf_past_logits",
    "sam",
    "sharpness_aware",
    "static_args",
    "trajectory_loss",
    "vsam",
    "when",
]
