"""The rows of the protocol: each method with its tuned values.

The values of a row are numbers: the learning rate (``rate``), the weight decay
(``decay``) and the method's own values. All of them are tuned, and they may be traced,
so one program serves all settings. Numbers that cannot be traced (a period, a window)
are fixed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_sam
from benchmarks.lib import costs
from optax_sam import ascent, blend, when

Values = dict[str, Any]
WINDOW = 30  # vSAM's window: the tasks have too few steps for the default of 50
PUBLISHED_STEPS = 391 * 200  # steps of the papers' training runs on CIFAR


class Setting(NamedTuple):
    """The arguments of a method in addition to its values.

    Attributes:
      rate: the schedule of the learning rate.
      steps: the number of steps of the whole training run.
      batch_size: the number of examples in a step.
      examples: the number of examples in the training set.
      classes: the number of logits.
      key: the key for the draws of the method.
      ahead: whether a decision must be known before its step; see
        ``optax_sam.dispatch``.
    """

    rate: Callable[[Any], Any]
    steps: int
    batch_size: int
    examples: int
    classes: int
    key: Any
    ahead: bool


class Row(NamedTuple):
    """A method, and the start of its search.

    Attributes:
      member: makes the method from values and setting; it goes before weight decay and
        SGD. ``None`` for SGD.
      start: the method's own values at the start of the search.
      base: the optimizer: ``sgd``, ``adamw``, or a method that wraps SGD.
      length: epochs, relative to the task's.
      divisor: the gradient at ``w`` uses one example in this number.
      forwards: forward passes of the training step that the optimizer does not make.
      early: whether the row is SGD's search again, and also chooses the best epoch.
      what: a line for the page.
    """

    member: Callable[[Values, Setting], Any] | None = None
    start: dict[str, float] = {}
    base: str = "sgd"
    length: int = 1
    divisor: int = 1
    forwards: int = 0
    early: bool = False
    what: str = ""

    @property
    def ascends(self) -> bool:
        """Whether the row computes perturbed gradients."""
        return self.member not in (None, _saf)


def _every(k: int) -> Callable[[Values, Setting], Any]:
    return lambda v, s: optax_sam.sam(v["rho"], when=when.every_k(k))


def _late(share: float) -> Callable[[Values, Setting], Any]:
    rule = lambda s: when.after(round((1 - share) * s.steps))
    return lambda v, s: optax_sam.sam(v["rho"], when=rule(s))


def _vsam(**fixed: Any) -> Callable[[Values, Setting], Any]:
    # The authors' code warms up for 3 of 200 epochs. The rule needs two windows minus
    # one step.
    def member(v: Values, s: Setting) -> Any:
        warmup = max(2 * WINDOW - 1, round(3 / 200 * s.steps))
        return optax_sam.vsam(
            v["rho"], window=WINDOW, warmup_steps=warmup, key=s.key, **fixed
        )

    return member


def _saf(v: Values, s: Setting) -> Any:
    epochs = s.steps // (s.examples // s.batch_size)
    # The SAF code starts at epoch 5, or after 30 % of the epochs, and looks back three.
    start = min(5, round(0.3 * epochs))
    return optax_sam.saf(s.examples, s.classes, delay=min(3, start), start=start)


def _ae_sam(v: Values, s: Setting) -> Any:
    # The thresholds are as others report them. The gradient of the same step decides,
    # unless the two kinds of step are two programs.
    threshold = optax.linear_schedule(1.0, -1.0, s.steps)
    return optax_sam.ae_sam(v["rho"], threshold=threshold, lag=int(s.ahead))


def _random_sam(v: Values, s: Setting) -> Any:
    # R-SAM's code, for ViTs.
    sigma = optax.cosine_decay_schedule(5e-4, s.steps, alpha=5.0)
    return optax_sam.random_sam(v["rho"], sigma=sigma, gradient_weight=2.0, key=s.key)


def _gsam(v: Values, s: Setting) -> Any:
    # The radius falls with the learning rate, from rho to half of rho.
    share = lambda count: s.rate(count) / s.rate(0)
    return optax_sam.gsam(lambda i: v["rho"] * (1 + share(i)) / 2, alpha=v["alpha"])


def _renyi_sam(v: Values, s: Setting) -> Any:
    # The authors' README, for ResNet-20: 5 epochs of 200 are a warm-up.
    warmup = round(5 / 200 * s.steps)
    values = {"max_offset_norm": v["max_offset_norm"], "warmup_steps": warmup}
    return optax_sam.renyi_sam(v["rho"], alpha=1.2, **values)


RHO = {"rho": 0.1}
ROWS = {
    "SGD": Row(),
    "SGD 2x": Row(length=2, what="twice the epochs: as many gradients as SAM"),
    "SGD, early": Row(early=True, what="the best epoch of the search too"),
    "SAM": Row(lambda v, s: optax_sam.sam(v["rho"]), RHO),
    "SAM, last quarter": Row(_late(0.25), RHO, what="`when.after`, SGD until then"),
    "vSAM": Row(_vsam(), RHO, what="the authors' start"),
    "vSAM .33": Row(_vsam(initial_rate=0.33), RHO, what="`initial_rate=0.33`"),
    "vSAM .33 to .4": Row(
        _vsam(initial_rate=0.33, max_rate=0.4),
        RHO,
        what="`initial_rate=0.33, max_rate=0.4`",
    ),
    "MSAM": Row(start={"rho": 0.5}, base="msam"),
    "quarter-batch SAM": Row(lambda v, s: optax_sam.sam(v["rho"]), RHO, divisor=4),
    "SAM-5": Row(_every(5), RHO),
    "SAM-10": Row(_every(10), RHO),
    "vSAM-A": Row(_vsam(reuse_decay=0.0), RHO, what="no reuse"),
    "LookSAM-5": Row(
        lambda v, s: optax_sam.looksam(v["rho"], k=5, alpha=v["alpha"]),
        RHO | {"alpha": 0.2},
    ),
    "ASAM": Row(lambda v, s: optax_sam.asam(v["rho"]), {"rho": 0.5}),
    "GSAM": Row(_gsam, RHO | {"alpha": 0.01}),
    "ESAM": Row(lambda v, s: optax_sam.esam(v["rho"], gamma=0.5, key=s.key), RHO),
    "AE-SAM": Row(_ae_sam, RHO),
    "R-SAM": Row(_random_sam, RHO, forwards=1, what="random"),
    "RSAM": Row(_renyi_sam, {"rho": 0.5, "max_offset_norm": 0.2}, what="Rényi"),
    "SAF": Row(_saf, {"coefficient": 0.5}, what="no perturbed gradient"),
    "MESA": Row(start={"coefficient": 1.0}, base="mesa", what="no perturbed gradient"),
    "AdamW": Row(base="adamw"),
    # Fixed periods that perturb as often as vSAM is told to begin with.
    "SAM-3": Row(_every(3), RHO, what="a fixed period, no reuse"),
    "SAM-3, reuse": Row(
        lambda v, s: optax_sam.sharpness_aware(
            ascent.l2(v["rho"]), when.every_k(3), blend.reuse_difference()
        ),
        RHO,
        what="a fixed period, vSAM's reuse",
    ),
}
BASE_START = {"sgd": {"rate": 0.05, "decay": 5e-4}}
BASE_START |= {"adamw": {"rate": 1e-3, "decay": 1e-2}}


def start(row: Row, given: dict[str, float]) -> dict[str, float]:
    """The start of a row's search, with the method's own values first.

    Args:
      row: the row.
      given: other starts, from the task, for values of the row; a radius is meant for
        SAM.
    """
    found = row.start | BASE_START.get(row.base, BASE_START["sgd"])
    if row.base == "adamw":  # its learning rates have another scale
        return found
    # MSAM and ASAM need radii on other scales than SAM's.
    own = {"rho"} if found.get("rho") != RHO["rho"] else set()
    return found | {name: x for name, x in given.items() if name in found.keys() - own}


def optimizer(row: Row, v: Values, s: Setting) -> Any:
    """The whole optimizer; ``s.key`` decides its draws, in ``init`` alone."""
    if row.base == "adamw":
        adamw = optax.adamw(s.rate, weight_decay=v["decay"])
        return optax.with_extra_args_support(adamw)
    decay, sgd = optax.add_decayed_weights(v["decay"]), optax.sgd(s.rate, momentum=0.9)
    if row.base == "msam":
        return optax.chain(decay, optax_sam.msam(sgd, rho=v["rho"]))
    if row.base == "mesa":
        return optax.chain(decay, sgd, optax_sam.mesa(averaged(s.steps)))
    if row.member is None:
        return optax.with_extra_args_support(optax.chain(decay, sgd))
    return optax.chain(row.member(v, s), decay, sgd)


def cost(row: Row, tx: Any, batch_size: int, name: str) -> costs.Cost:
    """The cost of a step in gradients."""
    kept = costs.kept(0.5, batch_size) if name == "ESAM" else None
    return costs.cost(tx, 1 / row.divisor, kept, row.forwards)


def averaged(steps: int) -> float:
    """The decay of MESA's average: its authors' 0.9998, for a run of this length."""
    return max(0.0, 1 - 2e-4 * PUBLISHED_STEPS / steps)


def cosine(rate: Any, steps: int) -> Callable[[Any], Any]:
    """A cosine from the rate to zero."""
    return lambda count: rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2


def key(seed: int) -> jax.Array:
    """The key for the draws of a method."""
    return jax.random.key_data(jax.random.key(seed))
