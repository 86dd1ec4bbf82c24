"""What a method costs, in gradients, as :func:`optax_sam.summary` counts it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import optax_sam

FORWARD = 1 / 3  # what a forward pass costs of a gradient
EXAMPLES = 128  # of the batch for which the summary counts, which matters to ESAM
# They do without a gradient at the parameters, so that a loop that reports the loss
# there, or wants BatchNorm's statistics, leaves its forward pass.
WITHOUT_FIRST = {"random_sam", "sampa"}
BASE = optax.sgd(0.1, momentum=0.9)
PARAMS = {"w": jnp.ones((3, 2)), "norm": {"scale": jnp.ones(2)}}


class Cost(NamedTuple):
    """The price of a step.

    Attributes:
      gradients: of a step that ascends.
      skipped: gradients of one that does not; ``None`` if all are alike.
      forwards: forward passes beyond those of the gradients.
    """

    gradients: float
    skipped: float | None = None
    forwards: float = 0

    @property
    def whole(self) -> float:
        """Gradients of a step that ascends, with its forward passes."""
        return self.gradients + FORWARD * self.forwards

    def mean(self, rate: Any) -> Any:
        """Gradients per step, where so many of the steps ascend."""
        if self.skipped is None:
            return self.whole + 0 * rate
        return self.skipped + (self.whole - self.skipped) * rate


@functools.cache
def cost(
    tx: Any, first: float = 1.0, second: float | None = None, forwards: int = 0
) -> Cost:
    """That of a whole optimizer.

    Args:
      tx: the optimizer.
      first: the share of the batch that the gradient is of which ``update`` is given.
      second: likewise of ESAM's second one, see :func:`kept`.
      forwards: forward passes of the training loop beside those that are counted.
    """
    found = optax_sam.summary(tx, PARAMS)
    others = found.gradients - 1 if second is None else second
    forwards += found.forward_passes
    return Cost(first + others, found.gradients_when_skipped, forwards)


def kept(gamma: float, batch_size: int) -> float:
    """The share of a batch of which ESAM's second gradient is."""
    return (int(gamma * batch_size) - 1) / batch_size
