"""A rule that starts after a number of unperturbed steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.parts import Step, When, always, metrics_of, plan_of, refreshed
from optax_sam.schedules import check_integer


class AfterState(NamedTuple):
    """State of :func:`after`.

    Attributes:
      count: number of steps taken, () int32.
      num_steps: the step at which the rule that follows begins, () int32.
      rule: state of the rule that follows. Its clock starts at its first step.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    num_steps: jax.Array
    rule: Any

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields that the current rule rewrites in a state of other settings."""
        return ("num_steps",)

    @property
    def left(self) -> jax.Array:
        """Unperturbed steps to come, () int32."""
        return jnp.maximum(self.num_steps - self.count, 0)

    @property
    def ascends(self) -> jax.Array:
        """Whether the next step is perturbed, () bool."""
        return (self.left == 0) & self.rule.ascends

    def plan(self) -> tuple[jax.Array, jax.Array]:
        """The decisions of the next steps, and how many of them are known."""
        decisions, known = plan_of(self.rule)
        decisions = jnp.asarray(decisions)
        later = jnp.arange(len(decisions)) - self.left
        decisions = (later >= 0) & decisions[jnp.maximum(later, 0)]
        return decisions, jnp.minimum(known + self.left, len(decisions))

    def metrics(self) -> dict[str, jax.Array]:
        """The scalars of the rule, to log."""
        return metrics_of(self.rule)


def after(num_steps: int, rule: When = always()) -> When:
    """Follows another rule after a number of unperturbed steps.

    Args:
      num_steps: unperturbed steps at the start of the training run, at least 0.
      rule: the rule that follows. Its schedules start at its first step.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if ``num_steps`` is negative or ``rule`` is no rule.

    Examples:
      >>> import optax_sam
      >>> late = optax_sam.when.after(2, optax_sam.when.every_k(2))
      >>> state = optax_sam.sam(0.05, when=late).init({"w": 1.0})
      >>> print(optax_sam.ascent_plan(state)[:6])
      [False False  True False  True False]
    """
    check_integer("num_steps", num_steps, 0)
    if not isinstance(rule, When):
        raise ValueError(f"rule must be a rule of optax_sam.when; got {rule!r}.")

    def init(params: Any) -> AfterState:
        start = jnp.array(num_steps, jnp.int32)
        return AfterState(jnp.zeros((), jnp.int32), start, rule.init(params))

    def choose(left: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(left == 0, x, y), new, old)

    def since(step: Step) -> Step:
        return step._replace(count=jnp.maximum(step.count - num_steps, 0))

    def now(state: AfterState, g: Any, step: Step) -> tuple[jax.Array, AfterState]:
        decision, moved = rule.now(state.rule, g, since(step))
        decision = (state.left == 0) & jnp.asarray(decision)
        return decision, state._replace(rule=choose(state.left, moved, state.rule))

    def observe(state: AfterState, g: Any, g_s: Any, step: Step) -> AfterState:
        return state._replace(rule=rule.observe(state.rule, g, g_s, since(step)))

    def advance(state: AfterState, ascended: jax.Array) -> AfterState:
        moved = rule.advance(state.rule, ascended)
        return AfterState(
            count=optax.safe_increment(state.count),
            # The setting of the current rule, also in a state that has another setting.
            num_steps=jnp.array(num_steps, jnp.int32),
            rule=choose(state.left, moved, refreshed(state.rule, moved)),
        )

    call = f"when.after({num_steps}, {rule})"
    return When(init, now, observe, advance, call)
