"""What callers must keep to, checked where it can be, in errors that give advice.

Everything here runs while tracing: it looks at structures, shapes, dtypes and
concrete numbers, and adds nothing to the compiled program.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

_CALL = (
    "grad_fn = lambda p: jax.grad(loss_fn)(p, batch); "
    "tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)"
)

# For errors about an argument that the caller may well have passed.
DROPPED = (
    " If you did pass it, something on the way dropped it, as Flax's own"
    " TrainState.apply_gradients does (optax_sam.linen.TrainState hands it on) and"
    " optax.contrib.split_real_and_imaginary."
)


class MissingArgument(ValueError):
    """``update`` lacks an extra argument, ``name``, that it cannot do without."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


class _Range(NamedTuple):
    """The numbers that an argument may have."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    def __str__(self) -> str:
        left, right = "(["[not self.open_low], ")]"[not self.open_high]
        return f"{left}{self.low}, {self.high}{right}"

    def holds(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return above and below  # a number that is none lies in no range

    def nearest(self, value: jax.Array) -> jax.Array:
        """The value, or the last one inside that its dtype has."""
        if not jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(jnp.float32)
        limits = jnp.finfo(value.dtype)
        low, high = self.low, self.high
        if self.open_low:
            low += max(float(limits.tiny), float(limits.eps) * abs(low))
        if self.open_high:
            high *= 1 - float(limits.epsneg)
        # Half precision is used in float32. Not jnp.clip: it halves a derivative at a
        # bound, such as rho = 0.
        value = value.astype(jnp.float32) if limits.bits < 32 else value
        value = jnp.where(value < low, low, value) if np.isfinite(low) else value
        return jnp.where(value > high, high, value) if np.isfinite(high) else value


def check_schedule(
    name: str,
    value: optax.ScalarOrSchedule,
    low: float,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    finite: bool = True,
) -> Any:
    """A number that was checked, or a schedule that is checked where it is read.

    A schedule's first value is held against the range, as a number is, when the
    schedule is first read. Later values cannot be refused in a compiled step: those
    outside the range are replaced by the nearest one inside, so that the overshoot of
    a schedule makes no NaN.
    """
    if isinstance(value, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be a number or a schedule of such, but is a transformation."
            " An optimizer goes behind the method, not into it: write"
            " optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))."
        )
    if not callable(value):
        return check_number(
            name,
            value,
            low,
            high,
            open_low=open_low,
            open_high=open_high,
            or_what=", or a schedule of such",
            finite=finite,
        )
    allowed = _Range(low, high, open_low, open_high | (finite and high == np.inf))
    unread = True

    def checked(count: Any) -> jax.Array:
        nonlocal unread
        if unread:
            _check_first(name, value, allowed)
            unread = False
        return allowed.nearest(jnp.asarray(_scalar(name, value(count), "its schedule")))

    return checked


def _check_first(name: str, schedule: Callable[[Any], Any], allowed: _Range) -> None:
    """Refuses a schedule that starts outside the range."""
    with jax.ensure_compile_time_eval():
        first = schedule(jnp.zeros((), jnp.int32))
    first = _scalar(name, first, "its schedule")
    # One that depends on what is traced, as inside optax.inject_hyperparams, cannot be
    # read yet.
    if not isinstance(first, jax.core.Tracer) and not allowed.holds(float(first)):
        raise ValueError(
            f"{name} must be in {allowed}, but its schedule gives {float(first)} at"
            " step 0."
        )


def _scalar(name: str, value: Any, source: str) -> Any:
    """Raises unless ``value`` is one real number, known or traced."""
    try:
        dtype, shape = jnp.result_type(value), jnp.shape(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number; {source} gave {value!r}.") from None
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if shape != () or not real:
        raise ValueError(
            f"{name} must be one real number, but {source} gave an array of shape"
            f" {shape} and dtype {dtype}."
        )
    return value


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    or_what: str = "",
    finite: bool = True,
) -> Any:
    """The number, if it is one within the range.

    A traced one cannot be refused; outside the range it becomes the nearest one inside.
    A number in half precision is used in float32.
    """
    allowed = _Range(low, high, open_low, open_high | (finite and high == np.inf))
    advice = f"{name} must be a number in {allowed}{or_what}"
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise ValueError(f"{advice}; got {value!r}.")
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = _scalar(name, value, "the argument")
        if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
            _warn_of_half_precision(name, value)
            # A bound that is excluded may be what rounding made of a number inside.
            return allowed.nearest(jnp.asarray(value))
        if isinstance(value, jax.core.Tracer):
            return allowed.nearest(jnp.asarray(value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{advice}; got {value!r}.") from None
    if not allowed.holds(number):
        raise ValueError(f"{advice}; got {number}.")
    return value


def _warn_of_half_precision(name: str, value: Any) -> None:
    known = "" if isinstance(value, jax.core.Tracer) else f" ({float(value)})"
    warnings.warn(
        f"{name} arrived in {value.dtype}{known}, which rounds it: 0.999 becomes 1."
        " optax.inject_hyperparams takes the dtype of the parameters for its numbers."
        " Write optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32, ...).",
        stacklevel=4,
    )


def check_static(name: str, value: Any, what: str) -> None:
    """Raises if ``value``, which the program's form depends on, is an array."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} sets a shape or a loop, so it must be {what}, but it is a JAX"
            f" array or a traced value: {value}. Inside optax.inject_hyperparams, name"
            " it as static: optax.inject_hyperparams(factory,"
            " static_args=optax_sam.static_args(factory))."
        )


def check_integer(name: str, value: int, low: int) -> None:
    """Raises unless ``value`` is a Python integer, not below ``low``."""
    check_static(name, value, "a Python integer")
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer >= {low}; got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be an integer >= {low}; got {value}.")


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises unless ``dtype`` is ``None`` or names real floats."""
    if dtype is None:
        return
    try:
        real = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        real = False
    if not real:
        raise ValueError(
            f"{name} must be None or a dtype of real floats, such as jnp.float32 or"
            f' "bfloat16"; got {dtype!r}.'
        )


def check_key(key: ArrayLike) -> None:
    """Raises unless ``key`` is an int, a typed key or raw key data.

    It computes nothing, so that a factory may be called before ``jax.distributed`` is
    initialized.
    """
    array = key if isinstance(key, (jax.Array, np.ndarray)) else np.asarray(key)
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    raw = array.dtype == np.uint32 and array.shape == (2,)
    if not (raw or (array.shape == () and (integer or typed))):
        raise ValueError(
            "key must be an int, a key from jax.random.key, or raw key data (two"
            f" uint32 words); got {key!r}."
        )


def check_optimizer(method: str, inner: Any, call: str) -> None:
    """Raises unless ``inner`` is something that a method can wrap."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(
            f"{method} wraps an optimizer: optax_sam.{call}; got {inner!r}."
        )


def has_placeholders(*trees: Any) -> bool:
    """Whether some leaves are hidden by optax.masked or optax.partition."""
    is_placeholder = lambda x: isinstance(x, optax.MaskedNode)
    return any(map(is_placeholder, jax.tree.leaves(trees, is_leaf=is_placeholder)))


def check_not_masked(method: str, *trees: Any, advice: str | None = None) -> None:
    """Refuses placeholders: a member inside optax.masked or optax.partition."""
    if has_placeholders(*trees):
        advice = advice or (
            "grad_fn would get placeholders instead of parameters. Put it outside, and"
            " say with mask= which leaves it perturbs:"
            f" optax.chain(optax_sam.{method}(..., mask=mask),"
            " optax.partition(transforms, labels))."
        )
        raise ValueError(
            f"{method} stands inside optax.masked or optax.partition, where {advice}"
        )


def check_state(method: str, kind: type, state: Any, expected: Any = None) -> None:
    """Refuses the state of another optimizer, method, rule or window.

    Args:
      method: what errors call the method.
      kind: the type of its state.
      state: the state that ``update`` got.
      expected: what ``init`` would make for these parameters, as shapes, to compare
        all parts of the state with; ``None`` compares the type alone.
    """
    if not isinstance(state, kind):
        raise ValueError(
            f"{method} got a state of another optimizer or of another place in the"
            f" chain: {_named(state)} where it needs {kind.__name__}. A state belongs"
            " to the transformation that made it: opt_state = tx.init(params), with"
            " the same tx. A checkpoint is restored into such a state, as"
            " target=tx.init(params); restored without one it is dicts and lists."
        )
    difference = None if expected is None else _difference(state, expected)
    if difference is not None:
        path, have, want = difference
        part = path.split(".")[1].split("[")[0]
        raise ValueError(
            f"{method} got a state that was made with other settings or for other"
            f" parameters: at state{path} it has {have}, and the method as it is now"
            f" makes {want}. Build the method with the settings that the state was made"
            f" with, or start this part again and keep the others: state ="
            f" state._replace({part}=method.init(params).{part}), where method is this"
            " transformation and state its own state in the optimizer's."
        )


def _named(state: Any) -> str:
    if isinstance(state, tuple) and not hasattr(state, "_fields"):
        return f"a tuple of {', '.join(type(x).__name__ for x in state) or 'nothing'}"
    return type(state).__name__


def _difference(have: Any, want: Any, path: str = "") -> tuple[str, str, str] | None:
    """Where two states first differ in type or shape: the path, and what is there."""
    if hasattr(want, "_fields"):
        if type(have) is not type(want):
            return path, type(have).__name__, type(want).__name__
        parts = [
            (f".{name}", getattr(have, name), getattr(want, name))
            for name in want._fields
        ]
    elif isinstance(want, tuple):
        if not isinstance(have, tuple) or len(have) != len(want):
            return path, _named(have), _named(want)
        parts = [
            (f"[{i}]", *pair) for i, pair in enumerate(zip(have, want, strict=True))
        ]
    else:
        # By leaves: NNX keeps a cached pytree in another structure than parameters.
        shapes = lambda tree: list(map(jnp.shape, jax.tree.leaves(tree)))
        if shapes(have) == shapes(want):
            return None
        show = lambda tree: ", ".join(map(str, shapes(tree)[:4])) or "nothing"
        return path, f"arrays of shapes {show(have)}", f"arrays of shapes {show(want)}"
    for name, *pair in parts:
        if (found := _difference(pair[0], pair[1], path + name)) is not None:
            return found
    return None


def is_perturbable(leaf: Any) -> bool:
    """Whether a leaf is a real float, which a gradient can perturb."""
    try:
        return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
    except (TypeError, ValueError):
        return False


def with_gradients(grads: Any, params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The parameters that have a gradient, and how to put the others back.

    Equinox's models hold functions and integers beside their parameters, where the
    gradients have ``None``.
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


def check_call(
    method: str,
    updates: Any,
    params: Any,
    grad_fn: Callable | None,
    num_points: int = 1,
) -> None:
    """Raises unless ``update`` got what every method on the engine needs."""
    if params is None:
        raise ValueError(f"{method} needs the parameters: {_CALL}.")
    check_not_masked(method, updates, params)
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
    check_gradients(method, "the incoming gradient", updates, params)


def takes(function: Callable, num_arguments: int) -> bool:
    """Whether a function can be called with so many arguments, as far as is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # a builtin says nothing
    try:
        signature.bind(*range(num_arguments))
    except TypeError:
        return False
    return True


def check_gradients(method: str, what: str, grads: Any, params: Any) -> None:
    """Raises unless ``grads`` is a tree of real floats of the parameters' shapes.

    The parameters must be real floats too.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(grads)
    wanted, expected = jax.tree_util.tree_flatten_with_path(params)
    if structure != expected:  # type: ignore[operator]
        have = {_place(path) for path, _ in found}
        want = {_place(path) for path, _ in wanted}
        missing, surplus = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{method}: {what} has another structure than the parameters"
            + (f"; missing: {', '.join(missing[:3])}" if missing else "")
            + (f"; not in the parameters: {', '.join(surplus[:3])}" if surplus else "")
            + ". Pass the gradients alone, as a pytree like the parameters."
            f" {_advice(grads, wanted, expected, what == INCOMING)}"
            + ("" if missing or surplus else f" Got {structure}, want {expected}.")
        )
    for (path, leaf), (_, parameter) in zip(found, wanted, strict=True):
        if not is_perturbable(parameter):
            raise ValueError(
                f"{method}: the parameter at {_place(path)} {_kind(parameter)}, but"
                f" parameters must be real floats. {_instead(parameter)}"
            )
        at_path = f"{method}: {what} at {_place(path)}"
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


INCOMING = "the incoming gradient"
_FILTER = (
    "Keep everything else out of the parameters: with Equinox, pass"
    " eqx.filter(model, eqx.is_inexact_array) to init and update; with Flax, the"
    ' collection "params" (Linen) or nnx.Param (NNX) alone.'
)


def _instead(parameter: Any) -> str:
    if isinstance(parameter, jax.Array | np.ndarray) and jnp.iscomplexobj(parameter):
        return "Keep a complex parameter as a real and an imaginary leaf."
    return _FILTER


def _place(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _kind(leaf: Any) -> str:
    """What a leaf is that should have been a real float."""
    try:
        return f"has dtype {jnp.result_type(leaf)}"
    except (TypeError, ValueError):
        dtype = getattr(leaf, "dtype", None)
        return f"is {leaf!r:.60}" if dtype is None else f"has dtype {dtype}"


def _advice(grads: Any, wanted: Any, expected: Any, incoming: bool) -> str:
    """What to write where gradients have another structure than the parameters."""
    static = [_place(path) for path, leaf in wanted if not is_perturbable(leaf)]
    if static:
        return f"The parameters hold what has no gradient, at {static[0]}. {_FILTER}"
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


def check_returned(method: str, grads: Any, params: Any, axis_name: Any) -> None:
    """Raises unless what ``grad_fn`` returned are gradients that can be used."""
    check_gradients(method, "what grad_fn returned", grads, params)
    if axis_name is not None:
        check_varies(method, "what grad_fn returned", grads, axis_name)


def varying(x: Any) -> Any:
    """The mapped axes over which JAX knows that ``x`` varies."""
    kind = jax.typeof(x)  # renamed twice since JAX 0.8
    for name in ("manual_axis_type", "mat"):
        if hasattr(kind, name):
            return getattr(kind, name).varying
    return kind.vma


def vary(tree: Any, axis_name: Any) -> Any:
    """The tree as one that varies over the mapped axes, where JAX keeps track.

    Perturbed weights are then local to a device, whatever perturbs them.
    """
    for name in _tracked(axis_name):
        cast = lambda x: jax.lax.pcast(x, name, to="varying")  # noqa: B023
        tree = jax.tree.map(lambda x: x if name in varying(x) else cast(x), tree)  # noqa: B023
    return tree


def _tracked(axis_name: Any) -> list[Any]:
    """The mapped axes over which JAX tracks what varies.

    Where ``axis_index`` does not vary, it does not (check_vma=False, pmap).
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
                    f" device, but {what} at {_place(path)} is the same on all of them."
                    " Under shard_map, jax.grad at replicated parameters is already"
                    " summed over the axis. Take the gradient at parameters that vary:"
                    f' local = jax.lax.pcast(params, {name!r}, to="varying");'
                    " tx.update(grad_fn(local), opt_state, params, grad_fn=grad_fn)."
                    " The perturbed weights that grad_fn gets vary already. grad_fn"
                    " must not average over the devices; the method does."
                )


def check_loss(value: Any, has_aux: bool) -> Any:
    """Refuses a loss with ``aux`` where none was announced, and the reverse."""
    pair = isinstance(value, tuple) and len(value) == 2
    if has_aux and not pair:
        raise ValueError(
            "With has_aux=True the loss must return a pair, (loss, aux), where aux is"
            " a tree of anything, such as (metrics, model_state); got"
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
