"""Sharpness-aware minimization for JAX, as pure Optax gradient transformations."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optax_sam import ascent, blend, methods, when
from optax_sam.ascent_batch import ascent_batch
from optax_sam.decay import decay_after
from optax_sam.dispatch import dispatch
from optax_sam.engine import SharpnessAwareState, sharpness_aware
from optax_sam.functional import functional_value_and_grad
from optax_sam.loss_scale import update_loss_scale
from optax_sam.methods import *  # noqa: F403
from optax_sam.micro_sharpness import micro_sharpness
from optax_sam.readers import ascends_next, ascent_plan, metrics, static_args
from optax_sam.replica_drift import replica_drift
from optax_sam.roles import Role, roles, roles_table
from optax_sam.summary import Summary, summary
from optax_sam.value_and_grad import value_and_grad
from optax_sam.version import __version__

__all__ = [
    "Role",
    "SharpnessAwareState",
    "Summary",
    "__version__",
    "ascends_next",
    "ascent",
    "ascent_batch",
    "ascent_plan",
    "blend",
    "decay_after",
    "dispatch",
    "functional_value_and_grad",
    "metrics",
    "micro_sharpness",
    "replica_drift",
    "roles",
    "roles_table",
    "sharpness_aware",
    "static_args",
    "summary",
    "update_loss_scale",
    "value_and_grad",
    "when",
]
__all__ += (name for name in vars(methods) if not name.startswith("_"))

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
