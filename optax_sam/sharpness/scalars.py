"""Converts any result to a flat dict of floats, as loggers take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam import schedules


def to_scalars(
    result: Any, prefix: str = "sharpness/", *, max_size: int = 32
) -> dict[str, float]:
    """Converts a result of any measure to a flat dict of floats, for any logger.

    Names are paths: fields, keys, positions, and indices of arrays, with ``/`` between
    them. Flags become 0 or 1. ``None`` and values that are not numbers (strings,
    functions, keys) are left out. A field of a result, or an entry of a dict, is left
    out as a whole if some array in it has more than ``max_size`` numbers. This drops
    eigenvectors, perturbations, grids and pytrees like the parameters, including their
    small biases. It keeps results with a few numbers for each layer.

    Args:
      result: a number, an array, a result of a measure, or a dict, list or pytree of
        these.
      prefix: the start of all names. For a single number it is the name, without a
        last ``/``.
      max_size: the largest size of an array, at least 1.

    Returns:
      Names and Python floats. It waits for the device, once; do not ``jit`` it.

    Raises:
      ValueError: if it is called inside ``jit``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> top = {"eigenvalues": jnp.array([5.0, 2.0]), "converged": jnp.array(True)}
      >>> sharpness.to_scalars(top | {"eigenvectors": jnp.ones((2, 100))})
      {'sharpness/eigenvalues/0': 5.0, 'sharpness/eigenvalues/1': 2.0,
       'sharpness/converged': 1.0}
    """
    kept = small(result, max_size)
    if any(isinstance(x, jax.core.Tracer) for x in kept.values()):
        raise ValueError(
            "to_scalars makes Python floats, so it cannot run inside jit. Return the"
            " result from the jitted function, and call to_scalars on what it returns."
        )
    values: dict[str, float] = {}
    arrays = jax.device_get(list(kept.values()))
    for name, array in zip(kept, arrays, strict=True):
        whole = (prefix + name) if name else prefix.removesuffix("/")
        for index, value in np.ndenumerate(np.asarray(array)):
            values["/".join([whole, *map(str, index)])] = float(value)
    return values


def small(result: Any, max_size: int = 32) -> dict[str, Any]:
    """The arrays of a result that are to be logged, by their paths."""
    schedules.check_integer("max_size", max_size, 1)
    kept: dict[str, Any] = {}
    for path, part in _parts(result, ()):
        leaves = [
            (keys, x)
            for keys, x in jax.tree_util.tree_leaves_with_path(part)
            if _is_numeric(x)
        ]
        if all(jnp.size(x) <= max_size for _, x in leaves):
            for keys, x in leaves:
                inside = jax.tree_util.keystr(keys, simple=True, separator="/")
                kept["/".join(filter(None, [*path, inside]))] = x
    return kept


def _is_result(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _parts(result: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The units that are kept or left out: each field of each result in the pytree."""
    children: Iterable[tuple[str, Any]]
    if _is_result(result):
        children = zip(result._fields, result, strict=True)
    elif isinstance(result, dict) and (not path or _holds_results(result)):
        children = ((str(key), x) for key, x in result.items())
    elif isinstance(result, (list, tuple)) and _holds_results(result):
        children = ((str(i), x) for i, x in enumerate(result))
    else:
        yield path, result
        return
    for name, child in children:
        yield from _parts(child, (*path, name))


def _holds_results(tree: Any) -> bool:
    return any(map(_is_result, jax.tree.leaves(tree, is_leaf=_is_result)))


def _is_numeric(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, (bool, int, float))
    return any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.bool, jnp.integer, jnp.floating)
    )
