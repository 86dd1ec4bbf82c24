"""Masks: the leaves on which a method or a part of it acts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam.parts import OwnGradient
from optax_sam.trees import keep

Mask = Any  # None, a bool, a (prefix) pytree of bools, or a function params -> mask


def resolve_mask(mask: Mask, tree: optax.Params, *, name: str = "mask") -> Any:
    """A bool for every leaf of ``tree``; ``None`` means all of them."""
    if mask is None:
        mask = True
    # A module of Equinox with bools for leaves can be called, too, but is no function.
    leaves = jax.tree.leaves(mask)
    is_tree = leaves and all(isinstance(x, (bool, np.bool_)) for x in leaves)
    if callable(mask) and not is_tree:
        mask = mask(tree)

    def fill(choice: Any, subtree: Any) -> Any:
        if not isinstance(choice, (bool, np.bool_)):
            raise ValueError(
                f"{name} must hold Python bools (True: included), known while tracing;"
                f" got {choice!r}."
            )
        return jax.tree.map(lambda _: bool(choice), subtree)

    try:
        return jax.tree.map(fill, mask, tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a bool, a pytree of bools that is the structure of the"
            " parameters or a prefix of it, or a function that makes one from the"
            f" parameters: {error}"
        ) from error


def resolve_nonempty_mask(mask: Mask, tree: optax.Params, *, name: str) -> Any:
    """As :func:`resolve_mask`, for a mask that must include some leaf.

    A plain ``False`` means no leaf, on purpose.
    """
    chosen = resolve_mask(mask, tree, name=name)
    sizes = [np.prod(jnp.shape(x)) for x in jax.tree.leaves(tree)]
    if mask is not False and any(sizes) and not any(jax.tree.leaves(chosen)):
        raise ValueError(
            f"{name} includes none of the {len(sizes)} leaves of the parameters, so"
            " the method would do nothing. True includes a leaf: for instance"
            f" {name}=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)."
        )
    return chosen


def restrict(
    rule: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """The rule on some leaves only: the others stay in place and out of the norm.

    ``optax.masked`` does not work here: it would pass the raw gradient on as offset.

    Args:
      rule: an ascent rule.
      mask: the leaves that move: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.

    Returns:
      The restricted ascent rule.

    Raises:
      ValueError: (on update) if the mask holds anything but Python bools or has
        a different structure from the parameters, or the rule computes another gradient
        at ``w``.

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

    def update(
        g: Any, state: Any, params: Any = None, /, **extra: Any
    ) -> tuple[Any, Any]:
        chosen = resolve_mask(mask, g if params is None else params)
        if grad_fn := extra.get("grad_fn"):
            extra["grad_fn"] = lambda p: keep(grad_fn(p), chosen)
        e, state = inner.update(keep(g, chosen), state, params, **extra)
        if isinstance(e, OwnGradient):
            raise ValueError(
                "This rule computes its own gradient, and a mask around the rule"
                " would drop a part of it. Give the mask to the rule, as in"
                " ascent.smoothed(..., mask=mask)."
            )
        return keep(e, chosen), state

    return type(inner)(inner.init, update)
