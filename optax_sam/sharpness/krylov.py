"""Lanczos with full re-orthogonalization, and a check of where it must stop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.sharpness.data import scan
from optax_sam.sharpness.operators import Operator
from optax_sam.trees import widest

Order = Callable[[jax.Array], jax.Array]  # largest first


class Rule(NamedTuple):
    """Gauss quadrature of a spectrum, as a start vector sees it.

    Attributes:
      nodes: the Ritz values ``(m,)``, ascending.
      live: ``(m,)``, whether each of them belongs to the operator. Where the space was
        exhausted before ``m`` steps, the others are padding.
      weights: ``(m,)``, the squared part of a start of length one in each Ritz vector;
        0 where not live.
      residuals: ``(m,)``, bounds ``|H v - theta v|`` on their errors.
      combination: ``(m, m)``, whose column ``i`` makes Ritz vector ``i`` of the basis.
    """

    nodes: jax.Array
    live: jax.Array
    weights: jax.Array
    residuals: jax.Array
    combination: jax.Array


class Lanczos(NamedTuple):
    """The projection of an operator on a Krylov space, with its noise marked.

    Attributes:
      projected: ``(K, K)``, the projected operator; tridiagonal without restarts.
      left: ``(K,)``, the norm of what each step left; 0 from where the space was
        exhausted.
      alive: ``(K,)``, which rows are in the space.
      basis: ``(K, n)``, orthonormal rows; 0 where it is padding. Without restarts it
        may be shorter. It then holds the last rows only, in a ring.
    """

    projected: jax.Array
    left: jax.Array
    alive: jax.Array
    basis: jax.Array

    def rule(self, m: int | None = None) -> Rule:
        """The quadrature after ``m`` of the steps; ``None``: after all."""
        T, left, alive = self.projected[:m, :m], self.left[:m], self.alive[:m]
        theta, U = eigh(T)
        live = jnp.sum(jnp.where(alive[:, None], U**2, 0), 0) > 0.5
        # A live row has a nan only if the operator itself gave it. Then all nodes are
        # nan and all residuals infinite.
        sound = jnp.isfinite(T).all() & jnp.isfinite(left).all()
        return Rule(
            nodes=jnp.where(sound, theta, jnp.nan),
            live=live,
            weights=jnp.where(live, U[0] ** 2, 0),
            residuals=jnp.where(sound, jnp.abs(U[-1]) * left[-1], jnp.inf),
            combination=U,
        )

    def best(self, order: Order, k: int) -> tuple[jax.Array, ...]:
        """The first ``k`` live Ritz pairs in this order.

        Returns:
          The values, their residuals, whether each was found, and the rows that combine
          the basis to Ritz vectors.
        """
        x = self.rule()
        _, best = jax.lax.top_k(jnp.where(x.live, order(x.nodes), -jnp.inf), k)
        return x.nodes[best], x.residuals[best], x.live[best], x.combination[:, best].T


def lanczos(
    operator: Operator,
    start: jax.Array,
    num_matvecs: int,
    num_vectors: int | None = None,
    restart: tuple[Order, int] | None = None,
) -> Lanczos:
    r"""Lanczos that stops where the Krylov space is exhausted.

    Once the space is exhausted, the next direction is rounding noise. Plain Lanczos
    goes on in this noise: for the identity it returns 123 as an eigenvalue. So this one
    keeps a row only while all steps before it were healthy,

    .. math:: b_j > 10\, \epsilon \sqrt{n}\, s_j, \qquad
       s_j = \max_{i \le j} (|d_i| + |b_{i-1}|)

    with the diagonal :math:`d`, the residual norms :math:`b` below it, and the
    machine's :math:`\epsilon`. Rows after that are zero.

    With fewer vectors than products, new vectors replace the oldest ones. Lanczos then
    finds converged eigenvalues again. The copies of an eigenvalue share its weight, so
    the quadrature stays the same (Greenbaum, 1989).

    If the caller needs eigenvectors, it gives ``restart=(order, keep)``. Whenever the
    basis is full, the first ``keep`` Ritz vectors in this order stay, and the others
    are dropped. The residual of each Ritz vector is a multiple of the next direction,
    before and after a restart. So its norm is known in the same way (Wu and Simon,
    2000).
    """
    K, n = min(num_matvecs, operator.size), operator.size
    m = min(num_vectors or K, K)
    length, dtype = jnp.linalg.norm(start), start.dtype
    # A projection may leave a start of zero. Any other start does then, with no weight.
    start = jnp.where(length > 0, start, 1)
    start = start / jnp.linalg.norm(start)
    places = np.arange(K)
    rows, size = places % m, K
    restart = restart if m < K else None
    if restart is not None:
        keep, size = restart[1], m
        # Some rows stay empty until the first restart, so that all are full at the end.
        places = places + (m - K) % (m - keep)
        places = np.where(places < m, places, keep + (places - m) % (m - keep))
        rows = places
    Q = jnp.zeros((m, n), dtype).at[rows[0]].set(start)
    del start
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    alive = jnp.arange(size) == places[0]
    first = (Lanczos(zeros(size, size), zeros(size), alive, Q), zeros(), zeros())
    del Q
    extend = _extend_on_host if operator.on_host else _extend

    def step(state: Any, at: Any) -> tuple[Any, None]:
        row, place = at
        r = operator.times(state[0].basis[row[0]])
        return extend(state, r, row, place, restart), None

    # The last step has no next one: what is out of range is dropped.
    at = [np.stack([x, np.append(x[1:], K)], 1) for x in (rows, places)]
    (found, *_), _ = scan(operator.on_host, step, first, at)
    return found


def _extend(
    state: Any, r: jax.Array, row: jax.Array, place: jax.Array, restart: Any
) -> Any:
    """The basis with what is new in the image ``r`` of a row as the next row."""
    (T, left, alive, Q), largest, b = state
    (row, next_row), (j, following) = row, place
    d = jnp.where(alive[j], Q[row] @ r, 0)
    largest = jnp.maximum(largest, jnp.abs(d) + b)
    for _ in range(2):  # twice is enough
        r = r - product(product(Q, r), Q)
    norm = jnp.linalg.norm(r)
    threshold = 10 * jnp.finfo(Q.dtype).eps * Q.shape[1] ** 0.5
    # False where anything is nan; and rows that may hold nan are selected away.
    healthy = alive[j] & (norm > threshold * largest)
    b = jnp.where(healthy, norm, 0)
    T, left = T.at[j, j].set(d), left.at[j].set(jnp.where(alive[j], norm, 0))
    krylov, beside = Lanczos(T, left, alive, Q), jnp.eye(len(T), dtype=T.dtype)[j]
    if restart is not None:
        krylov, beside = jax.lax.cond(
            following <= j,  # the basis is full
            lambda x: _compress(x, *restart),
            lambda x: (x, beside),
            krylov,
        )
    T, left, alive, Q = krylov
    Q = Q.at[next_row].set(jnp.where(healthy, r / norm, 0), mode="drop")
    T = T.at[following].set(b * beside, mode="drop")
    T = T.at[:, following].set(b * beside, mode="drop")
    alive = alive.at[following].set(healthy, mode="drop")
    return Lanczos(T, left, alive, Q), largest, b


# A loop on the host would have two copies of the basis otherwise.
_extend_on_host = jax.jit(_extend, donate_argnums=0, static_argnames="restart")


def _compress(x: Lanczos, order: Order, keep: int) -> tuple[Lanczos, jax.Array]:
    """The best Ritz vectors as the first rows, and their last components."""
    theta, _, found, rows = x.best(order, keep)
    rows = jnp.where(found[:, None], rows, 0)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    # Not selected: nan must stay.
    T = zeros(x.projected).at[:keep, :keep].set(jnp.diag(theta * found))
    Q = x.basis.at[:keep].set(product(rows, x.basis)).at[keep:].set(0)
    alive = zeros(x.alive).at[:keep].set(found)
    return Lanczos(T, zeros(x.left), alive, Q), zeros(x.left).at[:keep].set(rows[:, -1])


def _one_by_one(factorize: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Under vmap, a loop over the matrices; with the derivatives of the function.

    XLA's runtime for CPUs can wait for ever where two factorizations of batches of
    matrices run at the same time.
    """
    run = jax.custom_jvp(jax.custom_batching.sequential_vmap(factorize))
    run.defjvp(lambda at, along: jax.jvp(factorize, at, along))
    return run


eigh = _one_by_one(lambda x: jnp.linalg.eigh(x))
qr = _one_by_one(lambda x: jnp.linalg.qr(x))
# Accelerators would round products to a few digits.
product = functools.partial(jnp.matmul, precision="highest")


_MOST_BYTES = 200_000_000


def fitting(operator: Operator, least: int) -> int:
    """How many vectors Lanczos keeps by default: as 200 MB hold, but some at least."""
    dtype = widest(*jax.tree.leaves(operator.like))
    return max(least, _MOST_BYTES // (operator.size * jnp.dtype(dtype).itemsize))
