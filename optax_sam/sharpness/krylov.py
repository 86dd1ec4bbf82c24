"""Lanczos, done by matfree, with a guard around it. Nothing else imports matfree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.sharpness.operators import Operator

try:
    from matfree import decomp
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "optax_sam.sharpness needs matfree for its linear algebra:"
        " pip install 'optax_sam[sharpness]'."
    ) from error


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
    r"""Lanczos with full re-orthogonalization that knows where it must stop.

    Once the Krylov space is exhausted, the next direction is rounding noise, and
    matfree goes on with it in silence: of the identity it finds eigenvalue 123. So its
    Arnoldi iteration is run, whose sub-diagonal has the true residual norms
    :math:`b_j`, and a row is kept only while all steps before it were healthy,

    .. math:: b_j > 10\, \epsilon \sqrt{n}\, s_j, \qquad
       s_j = \max_{i \le j} (|d_i| + |b_{i-1}|)

    with the diagonal :math:`d` and the machine's :math:`\epsilon`.
    """
    K = min(num_matvecs, operator.size)
    norm = optax.tree.norm(start)
    # A start of zero, as a projection may leave: any other, with no weight.
    start = jax.tree.map(lambda x: jnp.where(norm > 0, x, 1), start)
    Q, J, r, _ = decomp.hessenberg(K, reortho="full", custom_vjp=False)(
        operator.matvec, start
    )
    dtype = J.dtype
    d = jnp.diagonal(J)
    b = jnp.diagonal(J, -1)
    s = jax.lax.cummax(jnp.abs(d) + jnp.abs(jnp.concatenate([jnp.zeros(1, dtype), b])))
    threshold = 10 * jnp.finfo(dtype).eps * jnp.sqrt(float(operator.size))
    healthy = b > (threshold * s)[:-1]  # False where anything is nan
    alive = jnp.concatenate(
        [jnp.ones(1, bool), jnp.cumprod(healthy, dtype=jnp.int32).astype(bool)]
    )
    # By selection, not by a product: dead rows may hold nan. A row that lives has none,
    # unless the operator itself gave it; then everything is nan, and said to be so.
    d = jnp.where(alive, d, 0)
    sound = jnp.isfinite(d).all() & jnp.isfinite(jnp.where(alive[:-1], b, 0)).all()
    b = jnp.where(alive[1:], b, 0)
    theta, U = jnp.linalg.eigh(jnp.diag(d) + jnp.diag(b, 1) + jnp.diag(b, -1))
    live = jnp.sum(jnp.where(alive[:, None], U**2, 0), 0) > 0.5
    last = jnp.where(alive[-1], jnp.abs(U[-1]) * optax.tree.norm(r), 0)
    theta, last = jnp.where(sound, theta, jnp.nan), jnp.where(sound, last, jnp.inf)
    basis = jax.tree.map(
        lambda q: jnp.where(jnp.expand_dims(alive, range(1, q.ndim)), q, 0), Q
    )
    return Lanczos(
        eigenvalues=theta,
        live=live,
        residuals=last,
        weights=jnp.where(live, U[0] ** 2, 0) * norm.astype(dtype) ** 2,
        combination=U,
        basis=basis,
    )
