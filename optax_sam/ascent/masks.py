"""A rule on some leaves only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import Mask, resolve_mask
from optax_sam.ascent.rule import OwnGradient


def keep(tree: Any, chosen: Any) -> Any:
    """The tree with zeros where ``chosen`` is False."""
    return jax.tree.map(lambda x, kept: x if kept else jnp.zeros_like(x), tree, chosen)


def restrict(
    rule: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """The rule on some leaves only: the others stay in place and out of the norm.

    ``optax.masked`` will not do here: it lets the raw gradient through as offset.

    Args:
      rule: an ascent rule.
      mask: the leaves that move: a tree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.

    Returns:
      The restricted ascent rule.

    Raises:
      ValueError: (on update) if the mask holds anything but Python bools or has
        another structure than the parameters, or the rule takes its own first
        gradient.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.restrict(
      ...     optax_sam.ascent.l2(0.5), {"kernel": True, "bias": False})
      >>> g = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([7.0])}
      >>> e, _ = rule.update(g, rule.init(g), g)
      >>> print(e["kernel"], e["bias"])
      [0.3 0.4] [0.]
    """
    inner = optax.with_extra_args_support(rule)
    if mask is None:
        return inner

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        chosen = resolve_mask(mask, g if params is None else params)
        if grad_fn := extra.get("grad_fn"):
            extra["grad_fn"] = lambda p: keep(grad_fn(p), chosen)
        e, state = inner.update(keep(g, chosen), state, params, **extra)
        if isinstance(e, OwnGradient):
            raise ValueError(
                "A mask around a rule that takes its own first gradient would cut a"
                " part of that. Give the mask to the rule, as in"
                " ascent.smoothed(..., mask=mask)."
            )
        return keep(e, chosen), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
