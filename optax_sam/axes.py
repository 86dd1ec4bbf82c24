"""Mapped axes: which arrays vary over one, and which are averaged over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.checks import check_gradients, is_perturbable, place


def varying(x: Any) -> Any:
    """The mapped axes over which JAX knows that ``x`` varies."""
    kind = jax.typeof(x)  # renamed twice since JAX 0.8
    for name in ("manual_axis_type", "mat"):
        if hasattr(kind, name):
            return getattr(kind, name).varying
    return kind.vma


def vary(tree: Any, axis_name: Any) -> Any:
    """Marks a pytree as varying over the mapped axes, if JAX keeps track of that.

    Perturbed weights are then local to a device, with any perturbation.
    """
    for name in _tracked(axis_name):
        cast = lambda x: jax.lax.pcast(x, name, to="varying")  # noqa: B023
        tree = jax.tree.map(lambda x: x if name in varying(x) else cast(x), tree)  # noqa: B023
    return tree


def _tracked(axis_name: Any) -> list[Any]:
    """The mapped axes over which JAX tracks what varies.

    If ``axis_index`` does not vary, JAX tracks nothing (check_vma=False, pmap).
    """
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    given = [name for name in names if name is not None]
    return [name for name in given if name in varying(jax.lax.axis_index(name))]


def check_varies(method: str, what: str, tree: Any, axis_name: Any) -> None:
    """Refuses a gradient that JAX has already summed over ``axis_name``."""
    for name in _tracked(axis_name):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if name not in varying(leaf):
                raise ValueError(
                    f"{method}: axis_name={name!r} asks for one perturbation per"
                    f" device, but {what} at {place(path)} is the same on all of them."
                    " Under shard_map, jax.grad at replicated parameters is already"
                    " summed over the axis. Take the gradient at parameters that vary:"
                    f' local = jax.lax.pcast(params, {name!r}, to="varying");'
                    " tx.update(grad_fn(local), opt_state, params, grad_fn=grad_fn)."
                    " The perturbed weights that grad_fn gets vary already. grad_fn"
                    " must not average over the devices; the method does."
                )


def check_returned(method: str, grads: Any, params: Any, axis_name: Any) -> None:
    """Raises unless what ``grad_fn`` returned are gradients that can be used."""
    check_gradients(method, "what grad_fn returned", grads, params)
    if axis_name is not None:
        check_varies(method, "what grad_fn returned", grads, axis_name)


def check_same(
    method: str,
    state: Any,
    decision: Any,
    find: Callable[[Any], Any],
    g: Any,
    axis_name: Any,
) -> None:
    """Refuses rules that decide or store something else on each device.

    ``find(g)`` is the decision, and states after the step. It is traced alone, on an
    axis of the same name, with a gradient for each device; JAX then knows which results
    differ. If JAX tracks what varies, it refuses such states itself, but not a decision
    that varies where the ``state`` before does not.
    """
    axes = mapped_axes(axis_name)
    for name in axes.tracked:
        known = [x for x in jax.tree.leaves(state) if name in varying(x)]
        if not known and name in varying(jnp.asarray(decision)):
            _refuse_other(method, "the decision", name)
    if axes.tracked:
        return
    for name in axes.names:
        on_axis = functools.partial(jax.vmap, axis_name=name)
        size = jax.lax.axis_size(name)
        of_all = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)  # noqa: B023
        stacked = jax.tree.map(of_all, g)

        def differs(find: Callable[[Any], Any]) -> bool:
            try:
                jax.eval_shape(on_axis(find, out_axes=None), stacked)  # noqa: B023
            except Exception as error:  # another one says nothing about devices
                return "out_axes" in str(error)
            return False

        if differs(find):
            found = jax.eval_shape(on_axis(find), stacked)
            paths = jax.tree_util.tree_flatten_with_path(found)[0]
            for i, ((_, *path), _) in enumerate(paths):
                if differs(lambda g: jax.tree.leaves(find(g))[i]):  # noqa: B023
                    where = f"state{jax.tree_util.keystr(tuple(path))}"
                    _refuse_other(method, where if path else "the decision", name)


def _refuse_other(method: str, what: str, name: Any) -> NoReturn:
    raise ValueError(
        f"{method}: {what} would differ between the devices of axis_name={name!r},"
        " because a rule takes it from the gradient of one device. In the rule, pass"
        " what comes from a gradient through step.mean, such as step.mean(norm(g))."
    )


class Axes(NamedTuple):
    """The mapped axes to average over, and those along which JAX tracks what varies."""

    names: tuple[Any, ...] = ()
    tracked: tuple[Any, ...] = ()


def mapped_axes(axis_name: Any) -> Axes:
    """Looks ``axis_name`` up where the step is traced."""
    if axis_name is None:
        return Axes()
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)

    def is_tracked(name: Any) -> bool:
        try:
            return name in varying(jax.lax.axis_index(name))
        except (NameError, KeyError, TypeError) as error:
            raise ValueError(
                f"axis_name={axis_name!r} averages over a mapped axis, but there is no"
                f" axis {name!r}. Call value_and_grad in a step inside"
                f" jax.shard_map(step, mesh=mesh, ...), whose mesh has this axis, or"
                f" jax.pmap(step, axis_name={name!r}). Under plain jit with sharded"
                " arrays leave axis_name out: gradients then cover all rows."
            ) from error

    return Axes(names, tuple(filter(is_tracked, names)))


def on_device(tree: Any, axes: Axes) -> Any:
    """Marks a pytree as local to this device, if JAX tracks what varies."""
    return vary(jax.tree.map(jnp.asarray, tree), axes.tracked)


def mean(x: Any, axes: Axes) -> Any:
    """The mean over the axes along which ``x`` may vary."""
    known = varying(jnp.asarray(x)) if axes.tracked else ()
    over = tuple(n for n in axes.names if n not in axes.tracked or n in known)
    return jax.lax.pmean(x, over) if over else x


def mean_of_floats(tree: Any, axes: Axes) -> Any:
    """A pytree whose floats are averaged over the axes."""
    return jax.tree.map(lambda x: mean(x, axes) if is_perturbable(x) else x, tree)


def mean_of_aux(
    aux: Any, args: list[Any], axes: Axes, outside: Callable[[], list[Any]]
) -> Any:
    """The floats of ``aux`` averaged over the axes, except rows of examples.

    An array with the leading axis of an input has a row per example, and a mean over
    the devices would mix examples. Statistics go in and out. So an input with the shape
    of a result does not show the axis of the batch, unless there is no other input.
    Running statistics can have the length of the batch by chance. So they are
    recognized by the name of Flax's collection, by the names of an argument of the same
    shape, or by being in an object of an argument's type.

    Args:
      aux: the pytree.
      args: the arguments of the loss, except the parameters.
      axes: the axes to average over.
      outside: gives the arrays that the loss takes from outside.
    """
    if not axes.names:
        return aux
    types = tuple({type(x) for x in args if not isinstance(x, _PLAIN)})
    is_object = lambda x: isinstance(x, types)
    flatten = jax.tree_util.tree_flatten_with_path
    returned, structure = flatten(aux, is_leaf=is_object)
    types = tuple({type(x) for _, x in returned if is_object(x)})  # those that return
    given, _ = flatten(args, is_leaf=is_object)
    both = {_key(*leaf) for leaf in given} & {_key(*leaf) for leaf in returned}

    def is_statistic(path: Any, x: Any) -> bool:
        # An object has no axes, like a scalar.
        if not getattr(x, "ndim", 0) or "batch_stats" in names(path):
            return True
        return len(names(path)) > 1 and _key(path, x) in both

    rows: set[int] = set()
    if any(is_perturbable(x) and not is_statistic(path, x) for path, x in returned):
        known = {id(x) for x in jax.tree.leaves(args)}
        inputs = [x for path, x in given if not is_statistic(path, x)]
        inputs += [x for x in outside() if id(x) not in known]
        shapes = {jnp.shape(x) for _, x in returned if is_perturbable(x)}
        only_in = [x for x in inputs if jnp.shape(x) not in shapes]
        rows = rows.union(*(_rows(x, axes) for x in only_in))
        rows = rows or rows.union(*(_rows(x, axes) for x in inputs))

    def one(path: Any, x: Any) -> Any:
        if is_perturbable(x) and not is_statistic(path, x) and x.shape[0] in rows:
            return x
        return mean_of_floats(x, axes)

    return jax.tree.unflatten(structure, [one(path, x) for path, x in returned])


_PLAIN = (dict, list, tuple, str, int, float, type(None), jax.Array, np.ndarray)


def _key(path: Any, x: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return names(path)[-2:], getattr(x, "shape", ())


def _rows(x: Any, axes: Axes) -> set[int]:
    """The number of rows per example of ``x``, if it has the axis of the batch."""
    if not getattr(x, "ndim", 0):
        return set()
    if axes.tracked and not set(axes.tracked) & set(varying(x)):
        return set()  # the same on all devices
    if x.dtype == jnp.uint32 and x.shape in ((2,), (4,)):
        return set()  # a raw key
    tokens = x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.integer)
    return {x.shape[0], x.size} if tokens else {x.shape[0]}


def names(path: Any) -> tuple[str, ...]:
    """The names on a path: keys of dictionaries and attributes."""
    found = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return tuple(name for name in found if isinstance(name, str))
