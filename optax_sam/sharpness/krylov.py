"""Lanczos with full re-orthogonalization, and a check of where it must stop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam.sharpness.data import scan
from optax_sam.sharpness.operators import Operator


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
      diagonal: ``(K,)``, of the projected operator, which is tridiagonal.
      below: ``(K,)``, beside the diagonal, and the norm of what the last step left; 0
        from where the space was exhausted.
      alive: ``(K,)``, the rows that are in the space.
      basis: ``(K, n)``, orthonormal rows; 0 where it is padding.
    """

    diagonal: jax.Array
    below: jax.Array
    alive: jax.Array
    basis: jax.Array

    def rule(self, m: int | None = None) -> Rule:
        """The quadrature after ``m`` of the ``K`` steps; ``None``: after all."""
        d, b, alive = self.diagonal[:m], self.below[:m], self.alive[:m]
        T = jnp.diag(d) + jnp.diag(b[:-1], 1) + jnp.diag(b[:-1], -1)
        theta, U = eigh(T)
        live = jnp.sum(jnp.where(alive[:, None], U**2, 0), 0) > 0.5
        # A row that lives has no nan, unless the operator itself gave it; then
        # everything is nan, and said to be so.
        sound = jnp.isfinite(d).all() & jnp.isfinite(b).all()
        return Rule(
            nodes=jnp.where(sound, theta, jnp.nan),
            live=live,
            weights=jnp.where(live, U[0] ** 2, 0),
            residuals=jnp.where(sound, jnp.abs(U[-1]) * b[-1], jnp.inf),
            combination=U,
        )


def lanczos(operator: Operator, start: jax.Array, num_matvecs: int) -> Lanczos:
    r"""Lanczos that stops where the Krylov space is exhausted.

    The next direction is rounding noise there, in which a plain one goes on: of the
    identity it finds eigenvalue 123. So a row is kept only while all steps before it
    were healthy,

    .. math:: b_j > 10\, \epsilon \sqrt{n}\, s_j, \qquad
       s_j = \max_{i \le j} (|d_i| + |b_{i-1}|)

    with the diagonal :math:`d`, the residual norms :math:`b` below it, and the
    machine's :math:`\epsilon`. Rows after that are zero.
    """
    K, n = min(num_matvecs, operator.size), operator.size
    length, dtype = jnp.linalg.norm(start), start.dtype
    # A start of zero, as a projection may leave: any other, with no weight.
    start = jnp.where(length > 0, start, 1)
    start = start / jnp.linalg.norm(start)
    extend = _extend_on_host if operator.on_host else _extend

    def step(state: Any, j: jax.Array) -> tuple[Any, Any]:
        Q, q, *rest = state
        return extend(Q, q, operator.times(q), rest, j)

    zero = jnp.zeros((), dtype)
    first = (jnp.zeros((K, n), dtype), start, jnp.asarray(True), zero, zero)
    del start
    (Q, *_), (d, b, alive, norm) = scan(operator.on_host, step, first, jnp.arange(K))
    last = jnp.where(alive[-1], norm[-1], 0)
    return Lanczos(d, b.at[-1].set(last), alive, Q)


def _extend(
    Q: jax.Array, q: jax.Array, r: jax.Array, rest: Any, j: jax.Array
) -> tuple[Any, Any]:
    """The basis with ``q`` as row ``j``, and what its image ``r`` has that is new."""
    alive, largest, b = rest
    Q = Q.at[j].set(q)
    d = jnp.where(alive, q @ r, 0)
    largest = jnp.maximum(largest, jnp.abs(d) + b)
    for _ in range(2):  # twice is enough
        r = r - product(product(Q, r), Q)
    norm = jnp.linalg.norm(r)
    threshold = 10 * jnp.finfo(Q.dtype).eps * Q.shape[1] ** 0.5
    # False where anything is nan; and rows that may hold nan are selected away.
    healthy = alive & (norm > threshold * largest)
    b = jnp.where(healthy, norm, 0)
    q = jnp.where(healthy, r / norm, 0)
    return (Q, q, healthy, largest, b), (d, b, alive, norm)


# A loop on the host would have two copies of the basis otherwise.
_extend_on_host = jax.jit(_extend, donate_argnums=0)


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
