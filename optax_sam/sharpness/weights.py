"""Which leaves are weights, and not running statistics, functions or counters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.masks import Mask, resolve_mask
from optax_sam.trees import wide

NNX = (
    "Split the model: graphdef, weights, rest = nnx.split(model, nnx.Param, ...);"
    " measure loss_fn = lambda weights, batch: loss(nnx.merge(graphdef, weights, rest),"
    " batch) at weights, after model.eval()."
)
LINEN = (
    'Pass variables["params"], with loss_fn = lambda params, batch: loss('
    '{**variables, "params": params}, batch); or leave the others out with'
    ' mask=lambda variables: {name: name == "params" for name in variables}.'
)
EQUINOX = (
    "Pass the arrays: params, static = eqx.partition(model,"
    " eqx.is_inexact_array); loss_fn = lambda params, batch:"
    " loss(eqx.combine(params, static), batch), with any eqx.nn.State inside loss."
)


def weights_of(params: Any, mask: Mask) -> Any:
    """The leaves that the mask selects, in float32 or wider; ``None`` for all others.

    A measure needs at least one of them.
    """
    structure: Any = jax.tree.structure(params)
    kept = iter(structure.flatten_up_to(resolve_mask(mask, params)))
    found: list[Any] = []
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)[0]
    for path, node in nodes:
        leaves = jax.tree.leaves(node)
        at = f"The parameter at {jax.tree_util.keystr(path) or 'the root'}"
        for leaf in leaves:
            found.append(_weight(at, path, node, leaf) if next(kept) else None)
    if not sum(x.size for x in found if x is not None):
        raise ValueError(
            "There is no parameter to look at: "
            + (
                "params is empty."
                if mask is None
                else "the mask selects nothing. To"
                " look at all of them, leave out mask=."
            )
        )
    return jax.tree.unflatten(structure, found)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or a number, and no function or name."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float))


def arrays(tree: Any) -> Any:
    """The leaves that are arrays, and ``None`` in the place of the others."""
    return jax.tree.map(lambda x: x if is_array(x) else None, tree)


def zeros(leaf: Any) -> Any:
    """Zeros for a leaf that stays in place, or the leaf if it is no array."""
    return jnp.zeros_like(leaf) if is_array(leaf) else leaf


def fill(chosen: Any, others: Any) -> Any:
    """A pytree whose leaves that are ``None`` are taken from another one."""
    pick = lambda other, x: other if x is None else x
    return jax.tree.map(pick, others, chosen)


def _weight(at: str, path: Any, node: Any, leaf: Any) -> jax.Array:
    names = [getattr(key, "key", None) for key in path]
    kinds = _kinds(node)
    if _is_variable(node) and not kinds & {"Param", "State"}:
        raise ValueError(f"{at} is a {min(kinds, key=len)}, not a weight. {NNX}")
    if "batch_stats" in names:
        raise ValueError(
            f"{at} is a running statistic of BatchNorm, not a weight. {LINEN}"
        )
    if "State" in kinds or (callable(leaf) and not hasattr(leaf, "dtype")):
        raise ValueError(f"{at} is a {type(node).__name__}, not a weight. {EQUINOX}")
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        raise ValueError(
            f"{at} is {leaf!r}, not a weight. Leave it out of params, and let loss_fn"
            " close over it: lambda params, batch: loss({**params, **rest}, batch)."
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{at} has dtype {dtype}, but a measure needs real floats. Leave it out"
            " with mask=lambda params: jax.tree.map(lambda x: jnp.issubdtype(x.dtype,"
            " jnp.floating), params)."
        )
    # A half-precision weight would round the offsets away that are measured here.
    return wide(jnp.asarray(leaf))


def _is_variable(x: Any) -> bool:
    """Whether it is a variable of NNX or a state of Equinox, of whatever version."""
    module = type(x).__module__
    if module.startswith("flax.nnx"):
        return any(c.__name__ in ("Variable", "VariableState") for c in type(x).__mro__)
    return module.startswith("equinox.nn") and type(x).__name__ == "State"


def _kinds(x: Any) -> set[str]:
    """The names of the classes of a variable, up to the class of all variables."""
    kind = getattr(x, "type", type(x)) if _is_variable(x) else type(x)
    names = [c.__name__ for c in getattr(kind, "__mro__", ())]
    return set(names[: names.index("Variable")] if "Variable" in names else names[:1])
