"""The one list of methods that the batteries go through.

A new method enters with one entry here; the tests do not name methods otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam


def grad_fn_only(loss_fn, batch):
    """The extra arguments of most methods: the gradients on this step's batch."""
    return {"grad_fn": lambda params: jax.grad(loss_fn)(params, batch)}


def l2_norm(offset, params):
    """The norm in which an l2 ball is a ball."""
    del params
    return optax.tree.norm(offset)


def ellipsoid_norm(eta, everywhere=False):
    """ASAM's norm of an offset: ``||e / T||``."""

    def norm(offset, params):
        sizes = jax.tree.map(
            lambda w: jnp.abs(w) + eta if everywhere or w.ndim >= 2 else 1, params
        )
        return optax.tree.norm(jax.tree.map(jnp.divide, offset, sizes))

    return norm


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """What the tests have to know about a method.

    Attributes:
      name: of this entry.
      factory: the public function that builds it.
      settings: arguments that suit quick tests.
      calls: how often ``grad_fn`` runs on an ascended step.
      skips: whether it leaves some steps out.
      extra_args: ``(loss_fn, batch)`` to the extra arguments that ``update`` requires.
      norm: ``(offset, params)`` to the length that ``rho`` bounds.
      static: the arguments that ``inject_hyperparams`` must not trace.
      trees: how many trees like the parameters its state holds.
      small_bytes: the most that the rest of its state takes in float32.
    """

    name: str
    factory: Callable[..., Any]
    settings: Mapping[str, Any]
    calls: int = 1
    skips: bool = False
    extra_args: Callable[[Any, Any], dict] = grad_fn_only
    norm: Callable[[Any, Any], jax.Array] = l2_norm
    static: tuple[str, ...] = ()
    trees: int = 0
    small_bytes: int = 200

    def build(self, **changes):
        """The chain member."""
        return self.factory(**{**self.settings, **changes})

    def optimizer(self, base=None, **changes):
        """The whole optimizer: with SGD and momentum, if no other is given."""
        base = optax.sgd(0.1, momentum=0.9) if base is None else base
        return optax.chain(self.build(**changes), base)


def product(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    mask: Any = None,
    ascent_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A method that has no name: a raw product of the three axes."""
    return optax_sam.sharpness_aware(
        optax_sam.ascent.l2(rho),
        optax_sam.when.every_k(3, phase=1),
        optax_sam.blend.reuse_difference(0.7, max_reuse=1),
        mask=mask,
        ascent_dtype=ascent_dtype,
    )


_COMMON = ("mask", "axis_name", "ascent_dtype")
_SAM = {
    "factory": optax_sam.sam,
    "static": ("num_ascent_steps", "when", *_COMMON),
}
_ASAM = {"factory": optax_sam.asam, "static": ("adapt", "when", *_COMMON)}
_WINDOW = {"window": 4, "num_slices": 2, "warmup_steps": 7}
_VSAM = {
    "factory": optax_sam.vsam,
    "skips": True,
    "static": (
        "window",
        "num_slices",
        "warmup_steps",
        "max_reuse",
        "norm_mask",
        "force_quota",
        "key",
        *_COMMON,
    ),
    # Three windows, a dozen scalars beside two bools, and a key.
    "small_bytes": 3 * 4 * 6 + 4 * 14 + 8,
}

METHODS = (
    Method("sam", settings={"rho": 0.1}, **_SAM),
    Method(
        "sam_2_steps", settings={"rho": 0.1, "num_ascent_steps": 2}, calls=2, **_SAM
    ),
    Method(
        "sam_5",
        settings={"rho": 0.1, "when": optax_sam.when.every_k(5)},
        skips=True,
        **_SAM,
    ),
    Method(
        "ss_sam",
        settings={"rho": 0.1, "when": optax_sam.when.bernoulli(0.5, key=3)},
        skips=True,
        **_SAM,
    ),
    Method("asam", settings={"rho": 0.3}, norm=ellipsoid_norm(0.01), **_ASAM),
    Method(
        "asam_all_leaves",
        settings={"rho": 0.3, "adapt": True, "eta": 0.0},
        norm=ellipsoid_norm(0.0, everywhere=True),
        **_ASAM,
    ),
    Method("vsam", settings={"rho": 0.1, **_WINDOW}, trees=1, **_VSAM),
    Method("vsam_a", settings={"rho": 0.1, "reuse_decay": 0.0, **_WINDOW}, **_VSAM),
    Method(
        "vsam_without_catch_up",
        settings={
            "rho": 0.1,
            "window": 6,
            "num_slices": 3,
            "warmup_steps": 11,
            "sensitivity": 0.5,
            "force_quota": False,
            "key": 5,
        },
        trees=1,
        **_VSAM,
    ),
    Method(
        "product",
        product,
        {"rho": 0.1},
        skips=True,
        static=("mask", "ascent_dtype"),
        trees=1,
    ),
)
SKIPPING = tuple(method for method in METHODS if method.skips)
BY_NAME = {method.name: method for method in METHODS}
