"""The methods of the study of wrong labels, with their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

import optax_sam
from benchmarks.lib import costs, networks

model = networks.dense(256, 256)
BATCH_SIZE = 64
WINDOW = 30  # vSAM decides every 30 steps how many of the next 30 ascend


class Batch(NamedTuple):
    """Some examples, or an epoch of batches, with their places in the data set."""

    images: jax.Array
    labels: jax.Array
    indices: jax.Array


class Method(NamedTuple):
    """An optimizer and what the training needs to know about it.

    Attributes:
      settings: as the table shows them.
      optimizer: with all that is its own.
      divisor: the first gradient is taken of one example in so many.
      kept: the share of the batch that ESAM's second one is taken of.
      penalty: term of the loss, from the optimizer's state, the batch and its logits.
      eval_params: the parameters to test, from the optimizer's state and those trained.
    """

    settings: str
    optimizer: optax.GradientTransformation
    divisor: int = 1
    kept: float | None = None
    penalty: Callable[[Any, Batch, jax.Array], ArrayLike] = lambda *_: 0.0
    eval_params: Callable[[Any, Any], Any] = lambda opt_state, params: params

    @property
    def cost(self) -> costs.Cost:
        """What a step costs."""
        return costs.cost(self.optimizer, 1 / self.divisor, self.kept)


def saf_penalty(opt_state: Any, batch: Batch, logits: jax.Array) -> jax.Array:
    """Holds the logits near those of three epochs ago."""
    past, known = optax_sam.saf_past_logits(opt_state, batch.indices)
    return optax_sam.trajectory_loss(logits, past, coefficient=20.0, where=known)


def mesa_penalty(opt_state: Any, batch: Batch, logits: jax.Array) -> jax.Array:
    """Holds the logits near those at the averaged weights."""
    past = model.apply(optax_sam.mesa_params(opt_state), batch.images)
    return optax_sam.trajectory_loss(logits, past, coefficient=10.0)


def all_methods(steps: int, examples: int) -> dict[str, Method]:
    """The methods by name, for a run of some steps on a data set of some examples.

    Radii and coefficients are from small grids, judged on a part of the training set,
    see docs/results/demo.md. Methods that do not ascend on every step want larger
    ones.
    """
    lr = optax.cosine_decay_schedule(0.05, steps)
    decay, sgd = optax.add_decayed_weights(5e-4), optax.sgd(lr, momentum=0.9)
    falling = lambda start, end: optax.linear_schedule(start, end, steps)
    growing = optax.cosine_decay_schedule(5e-4, steps, alpha=5.0)
    rho_gsam = optax_sam.rho_from_lr(lr, rho_min=0.14, rho_max=0.7)
    every_5, half = optax_sam.when.every_k(5), optax_sam.when.bernoulli(0.5)
    wsam = optax_sam.wsam(optax.chain(decay, sgd), learning_rate=lr, rho=0.7, gamma=0.9)

    def ascending(settings: str, member: Any, **more: Any) -> Method:
        return Method(settings, optax.chain(member, decay, sgd), **more)

    def on_part(divisor: int, part: str) -> Method:
        settings = f"`rho` 1.0, along {part}"
        return ascending(settings, optax_sam.sam(rho=1.0), divisor=divisor)

    return {
        "SGD": Method("", optax.chain(decay, sgd)),
        "SAM": ascending("`rho` 0.5", optax_sam.sam(rho=0.5)),
        "SAM-5": ascending("`rho` 1.3", optax_sam.sam(rho=1.3, when=every_5)),
        "RST": ascending(
            "`rho` 1.0, half of the steps", optax_sam.sam(rho=1.0, when=half)
        ),
        "SAM 1/4": on_part(4, "a quarter of the batch"),
        "SAM 1/16": on_part(16, "a sixteenth of it"),
        "ASAM": ascending("`rho` 2.5", optax_sam.asam(rho=2.5)),
        "GSAM": ascending(
            "`rho` 0.7 to 0.14 with the learning rate, `alpha` 0.01",
            optax_sam.gsam(rho_gsam, alpha=0.01),
        ),
        "LookSAM": ascending(
            "`rho` 0.5, `alpha` 0.7", optax_sam.looksam(rho=0.5, alpha=0.7)
        ),
        "Look-LayerSAM": ascending(
            "`rho` 0.03, `alpha` 0.5", optax_sam.look_layer_sam(rho=0.03, alpha=0.5)
        ),
        "ESAM": ascending(
            "`rho` 0.3, `beta` 0.6, `gamma` 0.5",
            optax_sam.esam(rho=0.3, beta=0.6, gamma=0.5),
            kept=costs.kept(0.5, BATCH_SIZE),
        ),
        "AE-SAM": ascending(
            "`rho` 1.0, threshold 1 to -1",
            optax_sam.ae_sam(rho=1.0, threshold=falling(1.0, -1.0)),
        ),
        "AE-LookSAM": ascending(
            "`rho` 0.5, threshold 2 to 0, `alpha` 0.5",
            optax_sam.ae_looksam(rho=0.5, threshold=falling(2.0, 0.0), alpha=0.5),
        ),
        "vSAM": ascending(
            f"`rho` 0.7, window {WINDOW}", optax_sam.vsam(rho=0.7, window=WINDOW)
        ),
        "vSAM-A": ascending(
            f"`rho` 1.3, window {WINDOW}",
            optax_sam.vsam(rho=1.3, window=WINDOW, reuse_decay=0.0),
        ),
        "R-SAM": ascending(
            "random; `rho` 0.7, `sigma` 5e-4 to 25e-4",
            optax_sam.random_sam(rho=0.7, sigma=growing),
        ),
        "RSAM": ascending(
            "Rényi; `rho` 1.5, `max_offset_norm` 0.7",
            optax_sam.renyi_sam(rho=1.5, max_offset_norm=0.7),
        ),
        "GNP": ascending("`rho` 0.7, `alpha` 0.8", optax_sam.gnp(rho=0.7, alpha=0.8)),
        "G-RST": ascending(
            "`rho` 0.5, `alpha` 2, half of the steps",
            optax_sam.gnp(rho=0.5, alpha=2.0, when=half),
        ),
        "F-SAM": ascending(
            "`rho` 0.7, `decay` 0.9", optax_sam.friendly_sam(rho=0.7, decay=0.9)
        ),
        "WSAM": Method("`rho` 0.7, `gamma` 0.9", wsam),
        "Fisher SAM": ascending("`rho` 0.5", optax_sam.fisher_sam(rho=0.5)),
        "AMP": ascending("`epsilon` 0.5", optax_sam.amp(epsilon=0.5)),
        "GAM": ascending(
            "`grad_rho` 0.5, `norm_rho` 0.1", optax_sam.gam(0.5, norm_rho=0.1)
        ),
        "StableSAM": ascending("`rho` 0.5", optax_sam.stable_sam(rho=0.5)),
        "SAMPa": Method(
            "`rho` 0.7, `interpolation` 0.2",
            optax_sam.sampa(optax.chain(decay, sgd), rho=0.7, interpolation=0.2),
        ),
        "MSAM": Method(
            "`rho` 2.0",
            optax.chain(decay, optax_sam.msam(sgd, rho=2.0)),
            eval_params=optax_sam.msam_eval_params,
        ),
        "SAF": Method(
            "`coefficient` 20, `delay` 3, `start` 5",
            optax.chain(optax_sam.saf(examples, 10, delay=3, start=5), decay, sgd),
            penalty=saf_penalty,
        ),
        "MESA": Method(
            "`coefficient` 10, `decay` 0.995",
            optax.chain(decay, sgd, optax_sam.mesa(decay=0.995)),
            penalty=mesa_penalty,
        ),
    }
