"""Hyperparameters: numbers within a range, and schedules of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


def at(value: optax.ScalarOrSchedule, count: ArrayLike | None) -> jax.Array:
    """The value of a hyperparameter at step ``count``."""
    if not callable(value):
        return jnp.asarray(value)
    if count is None:
        raise ValueError(
            "A schedule needs the step: pass count=..., the number of steps taken so"
            " far (optax_sam.sharpness_aware does so)."
        )
    return jnp.asarray(value(count))


def shown(value: Any) -> str:
    """A hyperparameter as the ``repr`` of a rule shows it."""
    return "a schedule" if callable(value) else str(value)


class _Range(NamedTuple):
    """The range of valid numbers for an argument."""

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
        return above and below  # NaN lies in no range

    def nearest(self, value: jax.Array) -> jax.Array:
        """The value, or the nearest one inside the range in its dtype."""
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
        # NaN, as of a root after the end of a schedule, becomes the lower bound.
        value = jnp.where(value >= low, value, low) if np.isfinite(low) else value
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
    """A number that was checked, or a schedule that is checked when it is read.

    The first value of a schedule is checked against the range when the schedule is
    first read. A compiled step cannot refuse later values. It replaces values outside
    the range by the nearest one inside, and NaN by the lower bound, so what a schedule
    gives after its end makes no NaN.
    """
    if isinstance(value, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be a number or a schedule, but it is a transformation."
            " An optimizer goes after the method, not into it: write"
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
    # A schedule that depends on traced values, as inside optax.inject_hyperparams,
    # cannot be read yet.
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
    """The number, checked against the range.

    A traced number cannot be refused. If it is outside the range, it becomes the
    nearest number inside. A number in half precision is used in float32.
    """
    allowed = _Range(low, high, open_low, open_high | (finite and high == np.inf))
    advice = f"{name} must be a number in {allowed}{or_what}"
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise ValueError(f"{advice}; got {value!r}.")
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = _scalar(name, value, "the argument")
        if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
            _warn_of_half_precision(name, value)
            # Rounding may turn a number inside the range into an excluded bound.
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
    # It points at the first line outside the package.
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals["__name__"].startswith("optax_sam."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{name} arrived in {value.dtype}{known}, which rounds it: 0.999 becomes 1."
        " optax.inject_hyperparams takes the dtype of the parameters for its numbers."
        " Write optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32, ...).",
        stacklevel=level,
    )


def check_static(name: str, value: Any, what: str) -> None:
    """Raises if ``value`` is an array, because it decides the form of the program."""
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
