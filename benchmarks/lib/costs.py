"""The cost of a method in gradients, as :func:`optax_sam.summary` counts it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import optax_sam

FORWARD = 1 / 3  # the cost of a forward pass, in gradients
EXAMPLES = 128  # the batch size for which the summary counts; it matters for ESAM
# These methods do not use the gradient at the parameters. A loop that reports the loss
# there, or needs BatchNorm's statistics, still pays for its forward pass.
WITHOUT_FIRST = {"random_sam", "sampa"}
BASE = optax.sgd(0.1, momentum=0.9)
PARAMS = {"w": jnp.ones((3, 2)), "norm": {"scale": jnp.ones(2)}}


class Cost(NamedTuple):
    """The cost of a step.

    Attributes:
      gradients: gradients of a perturbed step.
      skipped: gradients of an unperturbed step; ``None`` if all steps are equal.
      forwards: forward passes in addition to the gradients.
    """

    gradients: float
    skipped: float | None = None
    forwards: float = 0

    @property
    def whole(self) -> float:
        """The gradients of a perturbed step, with its forward passes."""
        return self.gradients + FORWARD * self.forwards

    def mean(self, rate: Any) -> Any:
        """Gradients per step, for this share of perturbed steps."""
        if self.skipped is None:
            return self.whole + 0 * rate
        return self.skipped + (self.whole - self.skipped) * rate


@functools.cache
def cost(
    tx: Any, first: float = 1.0, second: float | None = None, forwards: int = 0
) -> Cost:
    """The cost of a step with a whole optimizer.

    Args:
      tx: the optimizer.
      first: the share of the batch for the gradient at the parameters.
      second: the share of the batch for ESAM's perturbed gradient, see :func:`kept`.
      forwards: further forward passes of the training loop.
    """
    found = optax_sam.summary(tx, PARAMS)
    others = found.gradients - 1 if second is None else second
    forwards += found.forward_passes
    return Cost(first + others, found.gradients_when_skipped, forwards)


def kept(gamma: float, batch_size: int) -> float:
    """The share of a batch that ESAM's perturbed gradient uses."""
    return (int(gamma * batch_size) - 1) / batch_size
