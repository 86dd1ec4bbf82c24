"""What a part of a method may ask about the current step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from optax_sam.arguments import draw


class Step(NamedTuple):
    """The current step, as the engine shows it to ascents, rules and blends.

    Attributes:
      count: number of steps taken before this one, () int32; schedules are read here.
        ``None`` for a part that is used alone and needs no count.
      mean: averages a pytree over the devices of ``axis_name``; else the identity. What
        a part stores of a gradient must go through it, so that all devices store the
        same.
      axis_name: the mapped axis of the devices, or ``None``.
    """

    count: Any = None  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mean: Callable[[Any], Any] = lambda tree: tree
    axis_name: Any = None

    def key(self, raw: jax.Array) -> jax.Array:
        """The generator of this step, equal on all devices: a function, not a state.

        Args:
          raw: raw key data, (2,) uint32.

        Returns:
          A typed key.
        """
        return draw(raw, self.count)

    def device_key(self, raw: jax.Array) -> jax.Array:
        """The generator of this step on this device.

        Args:
          raw: raw key data, (2,) uint32.

        Returns:
          A typed key; without ``axis_name`` that of :meth:`key`.
        """
        key = self.key(raw)
        if self.axis_name is None:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
