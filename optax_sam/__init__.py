"""Sharpness-aware minimization for JAX, as pure Optax gradient transformations."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optax_sam import ascent, blend, when
from optax_sam.ascent_batch import ascent_batch
from optax_sam.decay import decay_after
from optax_sam.dispatch import dispatch
from optax_sam.engine import SharpnessAwareState, sharpness_aware
from optax_sam.loss_scale import update_loss_scale
from optax_sam.methods.ae_looksam import ae_looksam
from optax_sam.methods.ae_sam import ae_sam
from optax_sam.methods.amp import amp
from optax_sam.methods.asam import asam
from optax_sam.methods.esam import esam
from optax_sam.methods.fisher_sam import fisher_sam
from optax_sam.methods.friendly_sam import friendly_sam
from optax_sam.methods.gam import gam
from optax_sam.methods.gnp import gnp
from optax_sam.methods.gsam import gsam, rho_from_lr
from optax_sam.methods.look_layer_sam import look_layer_sam
from optax_sam.methods.looksam import looksam
from optax_sam.methods.msam import MSAMState, msam, msam_eval_params
from optax_sam.methods.random_sam import random_sam
from optax_sam.methods.renyi_sam import renyi_sam
from optax_sam.methods.sam import sam
from optax_sam.methods.sam_on import sam_on
from optax_sam.methods.sampa import SAMPaState, sampa
from optax_sam.methods.stable_sam import stable_sam
from optax_sam.methods.vsam import vsam
from optax_sam.methods.wsam import WSAMState, wsam
from optax_sam.micro_sharpness import micro_sharpness
from optax_sam.readers import ascends_next, ascent_plan, metrics, static_args
from optax_sam.replica_drift import replica_drift
from optax_sam.roles import Role, roles, roles_table
from optax_sam.summary import Summary, summary
from optax_sam.trajectory.loss import trajectory_loss
from optax_sam.trajectory.mesa import MESAState, mesa, mesa_params
from optax_sam.trajectory.saf import SAFState, saf, saf_past_logits
from optax_sam.value_and_grad import value_and_grad
from optax_sam.version import __version__

__all__ = [
    "MESAState",
    "MSAMState",
    "Role",
    "SAFState",
    "SAMPaState",
    "SharpnessAwareState",
    "Summary",
    "WSAMState",
    "__version__",
    "ae_looksam",
    "ae_sam",
    "amp",
    "asam",
    "ascends_next",
    "ascent",
    "ascent_batch",
    "ascent_plan",
    "blend",
    "decay_after",
    "dispatch",
    "esam",
    "fisher_sam",
    "friendly_sam",
    "gam",
    "gnp",
    "gsam",
    "look_layer_sam",
    "looksam",
    "mesa",
    "mesa_params",
    "metrics",
    "micro_sharpness",
    "msam",
    "msam_eval_params",
    "random_sam",
    "renyi_sam",
    "replica_drift",
    "rho_from_lr",
    "roles",
    "roles_table",
    "saf",
    "saf_past_logits",
    "sam",
    "sam_on",
    "sampa",
    "sharpness_aware",
    "stable_sam",
    "static_args",
    "summary",
    "trajectory_loss",
    "update_loss_scale",
    "value_and_grad",
    "vsam",
    "when",
    "wsam",
]

if TYPE_CHECKING:
    from optax_sam import equinox as equinox
    from optax_sam import linen as linen
    from optax_sam import nnx as nnx
    from optax_sam import plots as plots
    from optax_sam import sharpness as sharpness
else:  # a type checker would find every name

    def __getattr__(name: str) -> Any:
        """The parts that need an extra are imported where they are first used."""
        if name in ("equinox", "linen", "nnx", "plots", "sharpness"):
            return import_module(f"optax_sam.{name}")
        raise AttributeError(f"module 'optax_sam' has no attribute {name!r}")
