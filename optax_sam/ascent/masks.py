"""A rule on some leaves only."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.arguments import Mask, resolve_nonempty_mask
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
        chosen = resolve_nonempty_mask(
            mask, g if params is None else params, name="mask"
        )
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


# As in BatchNorm_0, norm1, bn1 and conv_bn, and not as in subnet.
_NORM = re.compile(r"norm|(?<![a-z])bn(?![a-z])")


def normalization_layers(params: Any) -> Any:
    """The mask of the normalization layers, as ``sam_on`` perturbs them.

    A layer counts if its name contains ``norm``, or ``bn`` as a word, in any case, or
    if it has a parameter ``scale``, as those of Flax do whatever they are called.

    Args:
      params: a tree of parameters whose leaves are named by dicts or attributes.

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
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [path_names(path) for path, _ in leaves]
    with_scale = {tuple(name[:-1]) for name in names if name[-1:] == ["scale"]}

    def is_chosen(name: list[Any]) -> bool:
        # A layer at a position of a list is called as the list.
        called = [key for key in name[:-1] if isinstance(key, str)]
        layer = called[-1].lower() if called else ""
        return bool(_NORM.search(layer)) or tuple(name[:-1]) in with_scale

    chosen = [is_chosen(name) for name in names]
    if not any(chosen):
        have = ", ".join("/".join(map(str, x)) or "the root" for x in names[:5])
        raise ValueError(
            "No normalization layer was found, by a name with norm or bn or a"
            f" parameter called scale, among {have}{', ...' if len(names) > 5 else ''}."
            " Say which leaves to perturb: mask= a tree of bools like the parameters,"
            " or a function that makes one from them."
        )
    return jax.tree.unflatten(structure, chosen)


def path_names(path: Any) -> list[Any]:
    """The keys along a path: names of dict keys and attributes, and positions."""
    kinds = ("key", "name", "idx")
    names = [next((getattr(k, x) for x in kinds if hasattr(k, x)), k) for k in path]
    # The last one of an NNX variable, an attribute, is that of its array.
    of_array = path and getattr(path[-1], "name", None) in ("value", "raw_value")
    return names[:-1] if of_array else names
