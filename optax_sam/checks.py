"""Checks of the arguments of ``update``, with errors that give advice.

All checks run while tracing. They look at structures, shapes, dtypes and concrete
numbers, and add nothing to the compiled program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_CALL = (
    "grad_fn = lambda p: jax.grad(loss_fn)(p, batch); "
    "tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)"
)


# For errors about an argument that the caller may well have passed.
DROPPED = (
    " If you did pass it, something on the way dropped it, as Flax's own"
    " TrainState.apply_gradients does (optax_sam.linen.TrainState passes it on),"
    " optax.MultiSteps inside a chain (put it around the chain) and"
    " optax.contrib.split_real_and_imaginary."
)


class MissingArgument(ValueError):
    """``update`` lacks ``name``, an extra argument that it needs."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


def wrapped(method: str, inner: Any, call: str) -> Any:
    """The optimizer that a method wraps, with extra arguments; raises if it is none."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(
            f"{method} wraps an optimizer: optax_sam.{call}; got {inner!r}."
        )
    return with_extra_args(inner)


def with_extra_args(tx: Any) -> Any:
    """A transformation that passes extra arguments on if it can, or drops them.

    ``optax.MultiSteps`` passes them on, though its type does not say so.
    """
    taken = inspect.signature(tx.update).parameters.values()
    takes_any = any(x.kind is x.VAR_KEYWORD for x in taken)
    return tx if takes_any else optax.with_extra_args_support(tx)


def is_perturbable(leaf: Any) -> bool:
    """Whether a leaf is a real float, which a gradient can perturb."""
    try:
        return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
    except (TypeError, ValueError):
        return False


def with_gradients(grads: Any, params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The parameters that have a gradient, and how to put the others back.

    Equinox's models hold functions and integers beside their parameters. The gradients
    have ``None`` in these places.
    """
    is_none = lambda x: x is None
    given, structure = jax.tree.flatten(grads, is_leaf=is_none)
    leaves, expected = jax.tree.flatten(params, is_leaf=is_none)
    static = [g is None and p is not None for g, p in zip(given, leaves, strict=False)]
    same = structure == expected  # type: ignore[operator]
    if not same or not any(static):
        return params, lambda point: point
    choose = lambda point: [
        mine if absent else other
        for absent, mine, other in zip(static, leaves, point, strict=True)
    ]
    some = [None if absent else x for absent, x in zip(static, leaves, strict=True)]
    whole = lambda point: jax.tree.unflatten(
        structure, choose(jax.tree.leaves(point, is_leaf=is_none))
    )
    return jax.tree.unflatten(structure, some), whole


def check_params(method: str, params: Any) -> None:
    """Raises unless ``update`` got the parameters."""
    if params is None:
        raise ValueError(f"{method} needs the parameters: {_CALL}.")


def check_grad_fn(method: str, grad_fn: Any, num_points: int = 1) -> None:
    """Raises unless ``update`` got a function of the parameters."""
    if grad_fn is None:
        raise MissingArgument(
            f"{method} needs grad_fn, a function of the parameters alone that returns"
            " the gradients on this step's batch (same dropout key; drop any aux):"
            f" {_CALL}.{DROPPED}",
            "grad_fn",
        )
    if not callable(grad_fn):
        raise ValueError(f"grad_fn must be a function; got {grad_fn!r}. Write {_CALL}.")
    if not takes(grad_fn, num_points):
        raise ValueError(
            f"{method}: grad_fn must take the parameters alone, but it takes"
            f" {inspect.signature(grad_fn)}. Bind the batch and the dropout key:"
            f" {_CALL}."
        )


def takes(function: Callable, num_arguments: int) -> bool:
    """Whether a function can take this number of arguments, as far as is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # a builtin has no signature
    try:
        signature.bind(*range(num_arguments))
    except TypeError:
        return False
    return True


def check_gradients(method: str, what: str, grads: Any, params: Any) -> None:
    """Raises unless ``grads`` is a pytree of real floats of the parameters' shapes.

    The parameters must be real floats too.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(grads)
    wanted, expected = jax.tree_util.tree_flatten_with_path(params)
    if structure != expected:  # type: ignore[operator]
        have = {place(path) for path, _ in found}
        want = {place(path) for path, _ in wanted}
        missing, surplus = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{method}: {what} has a different structure from the parameters"
            + (f"; missing: {', '.join(missing[:3])}" if missing else "")
            + (f"; not in the parameters: {', '.join(surplus[:3])}" if surplus else "")
            + ". Pass the gradients alone, as a pytree like the parameters."
            f" {_advice(grads, wanted, expected, what == INCOMING)}"
            + ("" if missing or surplus else f" Got {structure}, want {expected}.")
        )
    for (path, leaf), (_, parameter) in zip(found, wanted, strict=True):
        if not is_perturbable(parameter):
            raise ValueError(
                f"{method}: the parameter at {place(path)} {_kind(parameter)}, but"
                f" parameters must be real floats. {_instead(parameter)}"
            )
        at_path = f"{method}: {what} at {place(path)}"
        if jnp.shape(leaf) != jnp.shape(parameter):
            raise ValueError(
                f"{at_path} has shape {jnp.shape(leaf)}, its parameter has"
                f" {jnp.shape(parameter)}. Return the gradients of one scalar, the mean"
                " loss of the batch: jax.grad(loss_fn)(params, batch)."
            )
        if not is_perturbable(leaf):
            raise ValueError(
                f"{at_path} {_kind(leaf)}; gradients must be real"
                " floats. Differentiate float parameters only, and keep a complex"
                " parameter as a real and an imaginary leaf."
            )


INCOMING = "the gradient at w"
_FILTER = (
    "Keep everything else out of the parameters: with Equinox, pass"
    " eqx.filter(model, eqx.is_inexact_array) to init and update; with Flax, the"
    ' collection "params" (Linen) or nnx.Param (NNX) alone.'
)


def _instead(parameter: Any) -> str:
    if isinstance(parameter, jax.Array | np.ndarray) and jnp.iscomplexobj(parameter):
        return "Keep a complex parameter as a real and an imaginary leaf."
    return _FILTER


def place(path: Any) -> str:
    """A path as errors name it."""
    return jax.tree_util.keystr(path) or "the root"


def _kind(leaf: Any) -> str:
    """Describes a leaf that should have been a real float."""
    try:
        return f"has dtype {jnp.result_type(leaf)}"
    except (TypeError, ValueError):
        dtype = getattr(leaf, "dtype", None)
        return f"is {leaf!r:.60}" if dtype is None else f"has dtype {dtype}"


def _advice(grads: Any, wanted: Any, expected: Any, incoming: bool) -> str:
    """Advice if gradients have a different structure from the parameters."""
    static = [place(path) for path, leaf in wanted if not is_perturbable(leaf)]
    if static:
        return f"The parameters have no gradient at {static[0]}. {_FILTER}"
    pair = isinstance(grads, tuple) and len(grads) == 2
    if pair and jax.tree.structure(grads[1]) == expected:  # type: ignore[operator]
        return (
            "This is a pair (value, gradients), as jax.value_and_grad returns: write"
            " value, grads = jax.value_and_grad(loss_fn)(params, batch), and"
            " grad_fn = lambda p: jax.grad(loss_fn)(p, batch)."
        )
    if incoming:
        return "Of a pair (gradients, aux), pass the first."
    return "With has_aux=True, grad_fn must return only the gradients."


def check_loss(value: Any, has_aux: bool) -> Any:
    """Refuses a loss with ``aux`` if ``has_aux`` is false, and the reverse."""
    pair = isinstance(value, tuple) and len(value) == 2
    if has_aux and not pair:
        raise ValueError(
            "With has_aux=True the loss must return a pair, (loss, aux), where aux is"
            " a pytree of anything, such as (metrics, model_state); got"
            f" {type(value).__name__}"
            + (f" of length {len(value)}." if isinstance(value, tuple) else ".")
        )
    if not has_aux and isinstance(value, (tuple, list, dict)):
        raise ValueError(
            "The loss must be a scalar, but loss_fn returned a"
            f" {type(value).__name__}. To keep metrics or the model's new state beside"
            " it, return (loss, aux) and write value_and_grad(loss_fn, has_aux=True)."
        )
    return value
