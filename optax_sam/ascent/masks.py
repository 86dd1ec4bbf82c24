"""A rule on some leaves only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import Mask, resolve_mask
from optax_sam.ascent.rule import OwnGradient
from optax_sam.roles import named_leaves, resolve_roles


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


def normalization_layers(params: Any, *, roles: Any = None) -> Any:
    """The mask of the normalization layers, as ``sam_on`` perturbs them.

    Their leaves are the gains and offsets that :func:`optax_sam.roles` finds: those of
    a layer without a kernel whose name contains ``norm``, or ``bn`` or ``ln`` as a
    word, in any case, or that has a parameter ``scale``, as those of Flax do whatever
    they are called, or a gain beside an offset of its shape.

    Args:
      params: a pytree of parameters whose leaves are named by dicts or attributes.
      roles: what each leaf is, a pytree of :class:`optax_sam.Role` or a function from
        the parameters to one; ``None`` means :func:`optax_sam.roles`.

    Returns:
      A tree of bools like the parameters.

    Raises:
      ValueError: if there is no such layer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> layer = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2))}, "ln_f": layer}
      >>> print(optax_sam.ascent.normalization_layers(params)["ln_f"])
      {'bias': True, 'scale': True}

      All the others:

      >>> no_norm = lambda params: jax.tree.map(
      ...     lambda chosen: not chosen, optax_sam.ascent.normalization_layers(params))
      >>> print(no_norm(params)["Dense_0"])
      {'kernel': True}
    """
    in_norm = lambda role: role.kind in ("gain", "offset")
    chosen = jax.tree.map(in_norm, resolve_roles(roles, params))
    if not any(jax.tree.leaves(chosen)):
        names = [name or "the root" for name in named_leaves(params)]
        raise ValueError(
            "No normalization layer was found, by a name with norm or bn or a"
            " parameter called scale, among"
            f" {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
            " Say which leaves to perturb: mask= a tree of bools like the parameters,"
            " or a function that makes one from them; or roles=, see"
            " optax_sam.roles_table."
        )
    return chosen
