"""What callers must keep to, checked where it can be, in errors that give advice.

Everything here runs while tracing: it looks at structures, shapes, dtypes and
concrete numbers, and adds nothing to the compiled program.
"""

from __future__ import annotations

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
        limits = jnp.finfo(jnp.promote_types(value.dtype, jnp.bfloat16))
        low, high = self.low, self.high
        if self.open_low:
            low += max(float(limits.tiny), float(limits.eps) * abs(low))
        if self.open_high:
            high *= 1 - float(limits.epsneg)
        # Half precision is used in float32. Not jnp.clip: it halves a derivative at a
        # bound, such as rho = 0.
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
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
            what="a number (or a schedule of such)",
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
        shape, dtype = jnp.shape(value), jnp.result_type(value)
    except TypeError:
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
    what: str = "a number",
    finite: bool = True,
) -> Any:
    """The number, if it is one within the range.

    A traced one cannot be refused; outside the range it becomes the nearest one inside.
    A number in half precision is used in float32.
    """
    allowed = _Range(low, high, open_low, open_high | (finite and high == np.inf))
    advice = f"{name} must be {what} in {allowed}"
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


def check_call(
    method: str, updates: Any, params: Any, grad_fn: Callable | None
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
    check_gradients(method, "the incoming gradient", updates, params)


def check_gradients(method: str, what: str, grads: Any, params: Any) -> None:
    """Raises unless ``grads`` is a tree of real floats of the parameters' shapes."""
    found, structure = jax.tree_util.tree_flatten_with_path(grads)
    wanted, expected = jax.tree_util.tree_flatten_with_path(params)
    if structure != expected:  # type: ignore[operator]
        have = {jax.tree_util.keystr(path) or "the root" for path, _ in found}
        want = {jax.tree_util.keystr(path) or "the root" for path, _ in wanted}
        missing, surplus = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"{method}: {what} has another structure than the parameters"
            + (f"; missing: {', '.join(missing[:3])}" if missing else "")
            + (f"; not in the parameters: {', '.join(surplus[:3])}" if surplus else "")
            + ". grad_fn must return the gradients alone, as a tree like the"
            " parameters (with has_aux=True, return only the gradients)."
            + ("" if missing or surplus else f" Got {structure}, want {expected}.")
        )
    for (path, leaf), (_, parameter) in zip(found, wanted, strict=True):
        at_path = f"{method}: {what} at {jax.tree_util.keystr(path) or 'the root'}"
        if jnp.shape(leaf) != jnp.shape(parameter):
            raise ValueError(
                f"{at_path} has shape {jnp.shape(leaf)}, its parameter has"
                f" {jnp.shape(parameter)}. Return the gradients of one scalar, the mean"
                " loss of the batch: jax.grad(loss_fn)(params, batch)."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{at_path} has dtype {jnp.result_type(leaf)}; gradients must be real"
                " floats. Differentiate float parameters only, and keep a complex"
                " parameter as a real and an imaginary leaf."
            )


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


def check_varies(method: str, what: str, tree: Any, axis_name: Any) -> None:
    """Refuses a gradient that JAX has already summed over ``axis_name``."""
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    for name in names:
        # Where axis_index does not vary, nothing is tracked (check_vma=False, pmap).
        if name not in varying(jax.lax.axis_index(name)):
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if name not in varying(leaf):
                raise ValueError(
                    f"{method}: axis_name={name!r} asks for one perturbation per"
                    f" device, but {what} at {jax.tree_util.keystr(path) or 'the root'}"
                    f" is the same on all of them: under shard_map, jax.grad at"
                    " replicated parameters is already summed over the axis. Take"
                    " every gradient, also inside grad_fn, at"
                    f' params = jax.lax.pcast(params, {name!r}, to="varying").'
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
