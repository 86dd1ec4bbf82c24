"""Traces, diagonals and norms of an operator from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from optax_sam import keys, schedules
from optax_sam.sharpness.operators import Operator


class Estimate(NamedTuple):
    """A number, or a tree of numbers, that was estimated from random draws.

    Attributes:
      estimate: the mean over the draws.
      stderr: its standard error, of the same shape; 0 where the value is exact.
    """

    estimate: Any
    stderr: Any


def typed_key(key: ArrayLike) -> jax.Array:
    """A key from an int, raw key data, or a typed key."""
    keys.check_key(key)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if jnp.ndim(key) == 0:
        return jax.random.key(key)
    return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")


def signs(key: jax.Array, like: Any) -> Any:
    """A tree of independent signs: Rademacher probes."""
    return optax.tree.random_like(key, like, jax.random.rademacher)


def normals(key: jax.Array, like: Any) -> Any:
    """A tree of independent standard normals."""
    return optax.tree.random_like(key, like, jax.random.normal)


def trace_of(
    operator: Operator,
    key: ArrayLike,
    *,
    num_matvecs: int = 100,
    method: Literal["xtrace", "hutchinson"] = "xtrace",
) -> Estimate:
    """The trace of an operator, as :func:`hessian_trace` estimates it."""
    check_method(method, "xtrace", "hutchinson")
    if method == "hutchinson":
        return _hutchinson(operator, key, num_matvecs, optax.tree.vdot)
    if num_matvecs >= operator.size:
        H = _dense(operator)
        return Estimate(jnp.trace(H), jnp.zeros((), H.dtype))
    return _mean_and_stderr(_xtrace(_sketch(operator, key, num_matvecs)))


def diagonal_of(
    operator: Operator,
    key: ArrayLike,
    *,
    num_matvecs: int = 100,
    method: Literal["xdiag", "hutchinson"] = "xdiag",
) -> Estimate:
    """The diagonal of an operator, as :func:`hessian_diagonal` estimates it."""
    check_method(method, "xdiag", "hutchinson")
    if method == "hutchinson":
        times = lambda z, Hz: jax.tree.map(jnp.multiply, z, Hz)
        return _hutchinson(operator, key, num_matvecs, times)
    unravel = ravel_pytree(operator.like)[1]
    if num_matvecs >= operator.size:
        diagonal = jnp.diagonal(_dense(operator))
        return Estimate(unravel(diagonal), unravel(jnp.zeros_like(diagonal)))
    estimates = _xdiag(_sketch(operator, key, num_matvecs))
    return Estimate(*map(unravel, _mean_and_stderr(estimates)))


def frobenius_norm_of(
    operator: Operator, key: ArrayLike, *, num_matvecs: int = 100
) -> Estimate:
    """The norm of an operator, as :func:`hessian_frobenius_norm` estimates it."""
    squared_norm = lambda z, Hz: optax.tree.norm(Hz, squared=True)
    squared = _hutchinson(operator, key, num_matvecs, squared_norm)
    norm = jnp.sqrt(squared.estimate)
    # d sqrt(x) = dx / (2 sqrt(x))
    return Estimate(norm, squared.stderr / jnp.where(norm > 0, 2 * norm, 1))


def check_method(method: str, *known: str) -> None:
    """Raises unless ``method`` is one of those that are known."""
    if method not in known:
        names = " or ".join(f'"{name}"' for name in known)
        raise ValueError(f"method must be {names}; got {method!r}.")


def _hutchinson(
    operator: Operator,
    key: ArrayLike,
    num_matvecs: int,
    integrand: Callable[[Any, Any], Any],
) -> Estimate:
    """Mean and standard error of ``integrand(z, Hz)``, keeping one probe at a time."""
    schedules.check_integer("num_matvecs", num_matvecs, 2)

    def add(moments: Any, key_and_count: Any) -> tuple[Any, None]:
        key, count = key_and_count
        z = signs(key, operator.like)
        mean, spread = moments
        x = integrand(z, operator.matvec(z))
        off = jax.tree.map(jnp.subtract, x, mean)
        mean = jax.tree.map(lambda mu, d: mu + d / count, mean, off)
        # Welford: no difference of large squares.
        square = lambda m2, x, mu, d: m2 + d * (x - mu)
        return (mean, jax.tree.map(square, spread, x, mean, off)), None

    like = jax.eval_shape(lambda v: integrand(v, v), operator.like)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    keys = jax.random.split(typed_key(key), num_matvecs)
    counts = jnp.arange(1.0, num_matvecs + 1, dtype=jnp.float32)
    (mean, spread), _ = jax.lax.scan(add, (zeros, zeros), (keys, counts))
    variance = num_matvecs * (num_matvecs - 1)
    return Estimate(mean, jax.tree.map(lambda m2: jnp.sqrt(m2 / variance), spread))


def _mean_and_stderr(values: jax.Array) -> Estimate:
    stderr = jnp.std(values, axis=0, ddof=1) / jnp.sqrt(len(values))
    return Estimate(jnp.mean(values, axis=0), stderr.astype(values.dtype))


class _Sketch(NamedTuple):
    r"""What products with ``N`` probes and with their images tell of an operator.

    :math:`Y = H \Omega = Q R` and :math:`Z = H Q`, all ``(n, N)``. Column ``i`` of
    ``S`` is the unit vector for which :math:`Q (I - s_i s_i^\top) Q^\top` projects on
    the images of all probes but ``i``.
    """

    Omega: jax.Array
    Q: jax.Array
    R: jax.Array
    Z: jax.Array
    S: jax.Array
    spanned: (
        jax.Array
    )  # whether the images of the probes are the operator's whole range


def _sketch(operator: Operator, key: ArrayLike, num_matvecs: int) -> _Sketch:
    # Own code beside matfree's XTrace and XDiag: those map over all products at once,
    # so that N gradients live in memory, and judge ranks by an absolute threshold.
    schedules.check_integer("num_matvecs", num_matvecs, 4)
    Omega, unravel = _probes(operator, key, num_matvecs // 2)
    matvec = lambda v: ravel_pytree(operator.matvec(unravel(v)))[0]
    Q, R = jnp.linalg.qr(jax.lax.map(matvec, Omega).T)
    Z = jax.lax.map(matvec, Q.T).T
    size = jnp.abs(jnp.diagonal(R))
    spanned = size.min() <= 10 * jnp.finfo(R.dtype).eps * size.max()
    identity = jnp.eye(len(R), dtype=R.dtype)
    regular = jnp.where(spanned, identity, R)
    S = jax.scipy.linalg.solve_triangular(regular, identity, trans="T")
    S = S / jnp.linalg.norm(S, axis=0)
    return _Sketch(Omega.T, Q, R, Z, S, spanned)


def _probes(operator: Operator, key: ArrayLike, number: int) -> tuple[Any, Any]:
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, operator.like))
    shape = (number, operator.size)
    return jax.random.normal(typed_key(key), shape, flat.dtype), unravel


def _xtrace(x: _Sketch) -> jax.Array:
    """XTrace's estimates ``(N,)``, each from its own probe and the others' images."""
    n, N = x.Omega.shape
    H = x.Q.T @ x.Z
    W, T = x.Q.T @ x.Omega, x.Z.T @ x.Omega
    dots = lambda a, b: jnp.sum(a * b, axis=0)
    s_w, s_r = dots(x.S, W), dots(x.S, x.R)
    X = W - x.S * s_w
    low_rank = jnp.trace(H) - dots(x.S, H @ x.S)
    residual = s_w * s_r - dots(T, X) + dots(X, H @ X)
    # The part of a normal probe that is left has a random length; its mean is known.
    length = dots(x.Omega, x.Omega) - dots(X, X)
    estimates = low_rank + residual * (n - N + 1) / length
    return jnp.where(x.spanned, jnp.trace(H), estimates)


def _xdiag(x: _Sketch) -> jax.Array:
    """XDiag's estimates ``(N, n)``, each from its own probe and the others' images."""
    QS = x.Q @ x.S
    low_rank = jnp.sum(x.Q * x.Z, axis=1)[:, None] - QS * (x.Z @ x.S)
    residual = x.Omega * QS * jnp.sum(x.S * x.R, axis=0)
    exact = jnp.sum(x.Q * x.Z, axis=1)[:, None]
    return jnp.where(x.spanned, exact, low_rank + residual).T


def _dense(operator: Operator) -> jax.Array:
    """The matrix itself: no dearer than a sketch where its products are as many."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, operator.like))
    row = lambda v: ravel_pytree(operator.matvec(unravel(v)))[0]
    return jax.lax.map(row, jnp.eye(operator.size, dtype=flat.dtype))
