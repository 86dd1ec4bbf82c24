"""Weight decay after the step, as in some authors' AdamW."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.checks import with_gradients
from optax_sam.masks import Mask, resolve_mask
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import add, wide

__all__ = ["DecayAfterState", "decay_after"]


class DecayAfterState(NamedTuple):
    """State of :func:`decay_after`.

    Attributes:
      count: number of steps taken, () int32; drives the schedule.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax


def decay_after(
    rate: optax.ScalarOrSchedule, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Decays the weights after the step; ``optax.adamw`` decays them before it.

    .. math::
      w \leftarrow (1 - r)\,(w + u), \qquad
      \text{so the update becomes } u - r\,(w + u)

    Args:
      rate: ``r``, learning rate times weight decay, in ``[0, 1]``, or a schedule.
      mask: the leaves that decay: a bool, a pytree of bools like the parameters or a
        prefix of it, or a function from the parameters to one; ``None`` means all.

    Returns:
      A transformation to put after the learning rate. It needs ``params``.

    Raises:
      ValueError: if ``rate`` is out of its range; on ``update``, if ``params`` is
        missing or the mask does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax.sgd(0.5), optax_sam.decay_after(0.1))
      >>> w = jnp.array([3.0])
      >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates))  # 0.9 * (3 - 0.5 * 2)
      [1.8]
    """
    rate = check_schedule("rate", rate, 0.0, 1.0)

    def init(params: Any) -> DecayAfterState:
        del params
        return DecayAfterState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: DecayAfterState, params: Any = None, **extra: Any
    ) -> tuple[Any, DecayAfterState]:
        del extra
        if params is None:
            raise ValueError(
                "decay_after needs the parameters that it decays:"
                " tx.update(grads, opt_state, params)."
            )
        params, _ = with_gradients(updates, params)
        rate_now = at(rate, state.count)

        def decayed(u: Any, w: Any, decays: bool) -> Any:
            if not decays:
                return u
            u, w = jnp.asarray(u), jnp.asarray(w)
            after = add(w, u)
            return (wide(u) - rate_now.astype(after.dtype) * after).astype(u.dtype)

        chosen = resolve_mask(mask, params)
        return (
            jax.tree.map(decayed, updates, params, chosen),
            DecayAfterState(optax.safe_increment(state.count)),
        )

    return optax.GradientTransformationExtraArgs(init, update)
