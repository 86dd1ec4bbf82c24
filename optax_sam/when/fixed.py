"""Rules that look at no gradient: every k-th step, with a probability."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.keys import check_key, raw_key, uniform
from optax_sam.parts import LOOKAHEAD, When
from optax_sam.schedules import at, check_integer, check_schedule, shown


class EveryKState(NamedTuple):
    """State of :func:`every_k`.

    Attributes:
      ascends: whether the next step is perturbed, () bool.
      position: the next step's place in its period, () int32 in ``[0, k)``.
      period: the period ``k``, () int32.
    """

    ascends: jax.Array
    position: jax.Array
    period: jax.Array

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields that the current rule rewrites in a state of other settings."""
        return ("period",)

    def plan(self) -> tuple[jax.Array, int]:
        """The decisions of the next steps, and how many of them are known."""
        ahead = self.position + jnp.arange(LOOKAHEAD, dtype=jnp.int32)
        return _first(self.ascends, ahead % self.period == 0), LOOKAHEAD


def _first(ascends: jax.Array, decisions: jax.Array) -> jax.Array:
    """A plan that begins with a decision already made, perhaps by another rule."""
    return decisions.at[0].set(ascends)


def every_k(k: int, phase: int = 0) -> When:
    r"""Perturbs on every k-th step, as SAM-5 and SAM-10.

    Step :math:`t = 0, 1, \dots` is perturbed where :math:`(t + \text{phase}) \bmod k =
    0`. The average cost is :math:`1 + 1/k` gradients per step.

    Args:
      k: the period in steps, at least 1.
      phase: the place in the period at which the training run starts, at least 0 and
        below ``k``: 0 perturbs on the first step of each period, 1 on the last.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if ``k`` or ``phase`` is out of range.

    Examples:
      >>> import optax, optax_sam
      >>> sam_5 = optax_sam.sam(0.05, when=optax_sam.when.every_k(5))
      >>> state = sam_5.init({"w": 1.0})
      >>> print(optax_sam.ascent_plan(state)[:6])
      [ True False False False False  True]
    """
    check_integer("k", k, 1)
    check_integer("phase", phase, 0)
    if phase >= k:
        raise ValueError(f"phase must be below k = {k}; got {phase}.")

    def init(params: Any) -> EveryKState:
        return EveryKState(
            ascends=jnp.array(phase == 0),
            position=jnp.array(phase, jnp.int32),
            period=jnp.array(k, jnp.int32),
        )

    def advance(state: EveryKState, ascended: jax.Array) -> EveryKState:
        position = (state.position + 1) % k
        # The period of the current rule, also in a state that has another period.
        return EveryKState(position == 0, position, jnp.array(k, jnp.int32))

    return When(init, advance=advance, call=f"when.every_k({k}, phase={phase})")


class BernoulliState(NamedTuple):
    """State of :func:`bernoulli`.

    Attributes:
      ascends: whether the next step is perturbed, () bool.
      count: number of steps taken, () int32.
      key: raw key data, (2,) uint32; the draw of a step is a function of it and
        ``count``.
      probability: the next step's probability, () float.
      known: for how many steps that probability is known to hold, () int32.
    """

    ascends: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    key: jax.Array
    probability: jax.Array
    known: jax.Array

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields that the current rule rewrites in a state of other settings."""
        return ("probability", "known")

    def plan(self) -> tuple[jax.Array, jax.Array]:
        """The decisions of the next steps, and how many of them are known."""
        ahead = self.count + jnp.arange(LOOKAHEAD, dtype=jnp.int32)
        draws = jax.vmap(uniform, in_axes=(None, 0))(self.key, ahead)
        return _first(self.ascends, draws < self.probability), self.known


def bernoulli(p: optax.ScalarOrSchedule = 0.5, key: ArrayLike = 0) -> When:
    r"""Perturbs on each step with probability ``p``, as SS-SAM and RST.

    Step :math:`t` is perturbed where :math:`u_t < p_t`, with :math:`u_t` uniform on
    :math:`[0, 1)`. The draw uses no gradient and is equal on all devices. The average
    cost is :math:`1 + p` gradients per step.

    Args:
      p: probability in ``[0, 1]``, or a schedule of the step.
      key: an int, a key from ``jax.random.key``, or raw key data.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if ``p`` is not in ``[0, 1]`` or ``key`` is no key.

    Examples:
      >>> import optax_sam
      >>> ss_sam = optax_sam.sam(0.05, when=optax_sam.when.bernoulli(0.5, key=7))

    References:
      Zhao et al., `SS-SAM <https://arxiv.org/abs/2203.09962>`_, 2022
    """
    p = check_schedule("p", p, 0.0, 1.0)
    check_key(key)

    # Decisions read ahead follow the current rule, also in the state of another rule.
    # An array may be another one on the next step, as under inject_hyperparams.
    known = 1 if callable(p) or isinstance(p, jax.Array) else LOOKAHEAD

    def decide(state: BernoulliState) -> BernoulliState:
        probability = at(p, state.count).astype(state.probability.dtype)
        return state._replace(
            ascends=uniform(state.key, state.count) < probability,
            probability=probability,
            known=jnp.array(known, jnp.int32),
        )

    def init(params: Any) -> BernoulliState:
        return decide(
            BernoulliState(
                ascends=jnp.array(False),
                count=jnp.zeros((), jnp.int32),
                key=raw_key(key),
                probability=jnp.zeros((), float),
                known=jnp.array(known, jnp.int32),
            )
        )

    def advance(state: BernoulliState, ascended: jax.Array) -> BernoulliState:
        return decide(state._replace(count=optax.safe_increment(state.count)))

    return When(init, advance=advance, call=f"when.bernoulli({shown(p)})")
