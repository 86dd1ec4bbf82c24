"""Lanczos with full re-orthogonalization, and a guard that knows where it must stop."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.sharpness.data import scan
from optax_sam.sharpness.operators import Operator


class Lanczos(NamedTuple):
    """The projection of an operator on a Krylov space, with what is noise marked.

    Attributes:
      eigenvalues: the Ritz values ``(K,)``, ascending.
      live: ``(K,)``, whether each of them belongs to the operator. Where the space was
        exhausted before ``K`` steps, the others are padding.
      residuals: ``(K,)``, bounds ``|H v - theta v|`` on their errors.
      weights: ``(K,)``, the squared part of the start vector in each Ritz vector; 0
        where not live. They sum to the start's squared length.
      combination: ``(K, K)``, whose column ``i`` makes Ritz vector ``i`` of the basis.
      basis: a tree with leaves ``(K, ...)``, orthonormal rows; 0 where it is padding.
    """

    eigenvalues: jax.Array
    live: jax.Array
    residuals: jax.Array
    weights: jax.Array
    combination: jax.Array
    basis: Any

    def vectors(self, chosen: jax.Array) -> Any:
        """The Ritz vectors of these indices ``(k,)``, as a tree ``(k, ...)``."""
        columns = self.combination[:, chosen]
        return jax.tree.map(
            lambda q: jnp.tensordot(columns.astype(q.dtype), q, axes=((0,), (0,))),
            self.basis,
        )


def lanczos(operator: Operator, start: Any, num_matvecs: int) -> Lanczos:
    r"""Lanczos that stops where the Krylov space is exhausted.

    The next direction is rounding noise there, in which a plain one goes on: of the
    identity it finds eigenvalue 123. So a row is kept only while all steps before it
    were healthy,

    .. math:: b_j > 10\, \epsilon \sqrt{n}\, s_j, \qquad
       s_j = \max_{i \le j} (|d_i| + |b_{i-1}|)

    with the diagonal :math:`d`, the residual norms :math:`b` below it, and the
    machine's :math:`\epsilon`. Rows after that are zero.
    """
    K = min(num_matvecs, operator.size)
    length = optax.tree.norm(start)
    dtype = length.dtype
    # A start of zero, as a projection may leave: any other, with no weight.
    start = jax.tree.map(lambda x: jnp.where(length > 0, x, 1), start)
    threshold = 10 * jnp.finfo(dtype).eps * operator.size**0.5

    def step(state: Any, j: jax.Array) -> tuple[Any, Any]:
        Q, q, alive, largest, b = state
        Q = jax.tree.map(lambda Q, x: Q.at[j].set(x), Q, q)
        r = operator.matvec(q)
        d = jnp.where(alive, optax.tree.vdot(q, r), 0).astype(dtype)
        largest = jnp.maximum(largest, jnp.abs(d) + b)
        for _ in range(2):  # twice is enough
            r = jax.tree.map(jnp.subtract, r, combine(dots(Q, r), Q))
        norm = optax.tree.norm(r).astype(dtype)
        # False where anything is nan; and rows that may hold nan are selected away.
        healthy = alive & (norm > threshold * largest)
        q = jax.tree.map(lambda x: jnp.where(healthy, x / norm.astype(x.dtype), 0), r)
        b = jnp.where(healthy, norm, 0)
        return (Q, q, healthy, largest, b), (d, b, alive, norm)

    Q = jax.tree.map(lambda x: jnp.zeros((K, *x.shape), x.dtype), start)
    unit = optax.tree.norm(start)
    q = jax.tree.map(lambda x: x / unit.astype(x.dtype), start)
    first = (Q, q, jnp.asarray(True), jnp.zeros((), dtype), jnp.zeros((), dtype))
    (Q, *_), (d, b, alive, norm) = scan(operator.on_host, step, first, jnp.arange(K))
    # A row that lives has no nan, unless the operator itself gave it; then everything
    # is nan, and said to be so.
    sound = jnp.isfinite(d).all() & jnp.isfinite(b).all()
    off = b[:-1]
    theta, U = jnp.linalg.eigh(jnp.diag(d) + jnp.diag(off, 1) + jnp.diag(off, -1))
    live = jnp.sum(jnp.where(alive[:, None], U**2, 0), 0) > 0.5
    last = jnp.where(alive[-1], jnp.abs(U[-1]) * norm[-1], 0)
    return Lanczos(
        eigenvalues=jnp.where(sound, theta, jnp.nan),
        live=live,
        residuals=jnp.where(sound, last, jnp.inf),
        weights=jnp.where(live, U[0] ** 2, 0) * length**2,
        combination=U,
        basis=Q,
    )


def dots(rows: Any, x: Any) -> jax.Array:
    """The inner products ``(K,)`` of a vector with rows, a tree ``(K, ...)``."""

    def of_leaf(rows: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tensordot(rows, x, axes=x.ndim, precision="highest")

    # Accelerators would round products to a few digits.
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaf, rows, x)))


def combine(coefficients: jax.Array, rows: Any) -> Any:
    """The vector that is this combination ``(K,)`` of rows, a tree ``(K, ...)``."""

    def of_leaf(rows: jax.Array) -> jax.Array:
        c = coefficients.astype(rows.dtype)
        return jnp.tensordot(c, rows, axes=1, precision="highest")

    return jax.tree.map(of_leaf, rows)
