"""Eigenvalues of an operator, with eigenvectors and bounds on their errors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.sharpness.krylov import fitting, lanczos, product
from optax_sam.sharpness.objective import chosen_part
from optax_sam.sharpness.operators import Operator, also_of_loss, ravel
from optax_sam.sharpness.probes import random_vector
from optax_sam.sharpness.weights import arrays, fill, is_array


class EigenResult(NamedTuple):
    """Eigenpairs, with bounds on their errors.

    Attributes:
      eigenvalues: ``(k,)``, in the requested order; loss per squared parameter. If
        fewer than ``k`` were found, the rest is ``nan``.
      eigenvectors: a pytree like the parameters with leaves ``(k, ...)``, each of
        length one, zero in leaves that are left out.
      residuals: ``(k,)``, ``|H v - lambda v|``; an eigenvalue is at most this far away,
        to a rounding of the largest one.
      converged: ``(k,)``, whether the residual is below the tolerance.
      num_matvecs: the number of Hessian-vector products.
    """

    eigenvalues: jax.Array
    eigenvectors: Any
    residuals: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array

    def vector(self, i: int) -> Any:
        """Eigenvector ``i``, a pytree like the parameters.

        Args:
          i: its index, in the order of the eigenvalues.
        """
        part = lambda v: v[i] if is_array(v) else v
        return jax.tree.map(part, self.eigenvectors)


@also_of_loss
def eigenvalues(
    operator: Operator,
    key: ArrayLike,
    *,
    k: int = 1,
    num_matvecs: int = 20,
    num_vectors: int | None = None,
    which: Literal["LA", "SA", "LM"] = "LA",
    init: Any = None,
    tol: ArrayLike | None = None,
) -> EigenResult:
    r"""The ``k`` largest or smallest eigenvalues, with eigenvectors.

    .. math:: H v_i = \lambda_i v_i, \qquad \lambda_1 \ge \dots \ge \lambda_n

    The method is Lanczos with full re-orthogonalization. It stops once the Krylov space
    is exhausted. It restarts from the best vectors whenever it holds ``num_vectors``
    vectors. ``lambda_max`` in the literature is the algebraically largest
    eigenvalue, ``"LA"``. Power iteration finds the one with the largest magnitude,
    ``"LM"``, which may be negative.

    It costs ``num_matvecs`` products, and the memory of ``num_vectors`` vectors and
    four more: for ten million parameters 11 vectors by default, with ``k = 1``.

    Args:
      operator: from :func:`hessian`, :func:`ggn` or :func:`fisher`; or, for the
        Hessian, ``loss_fn, params, batches`` with the options of :func:`hessian`.
      key: for the random start: an int or a key.
      k: the number of eigenvalues, at most ``num_matvecs``.
      num_matvecs: steps of Lanczos. 20 are enough for up to five large eigenvalues of a
        trained network. The smallest eigenvalue takes 40 to 80 steps. A network at
        initialization may take as many.
      num_vectors: how many vectors it keeps, at least ``k + 1``. ``None`` keeps one for
        each product, or as many as fit into 200 MB, but at least ``k + 6``. A few are
        enough for the largest eigenvalues. With few vectors the smallest eigenvalue
        takes more products. Derivatives need one vector for each product.
      which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest magnitude.
      init: a pytree like ``params`` to start near, such as the last top eigenvector.
      tol: an eigenvalue has converged once its residual is at most ``tol`` times its
        magnitude; default 1e-3, and 1e-6 in float64.

    Returns:
      An :class:`EigenResult`. Copies of a repeated eigenvalue may be missed.

    Raises:
      ValueError: if ``k`` exceeds the number of parameters or ``num_matvecs``, or for
        what :func:`hessian` raises.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.sum(jnp.mean(batch, 0) * w**2)
      >>> batches = jnp.array([[[1.0, -7.0, 5.0]]])  # H = diag(1, -7, 5)
      >>> top = sharpness.hessian_eigenvalues(loss, jnp.ones(3), batches, 0, k=2)
      >>> print(top.eigenvalues.round(3), top.converged)
      [5. 1.] [ True  True]

    References:
      Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via
      Hessian Eigenvalue Density", ICML 2019, arXiv 1901.10159.
    """
    schedules.check_integer("k", k, 1)
    schedules.check_integer("num_matvecs", num_matvecs, 1)
    if k > operator.size:
        raise ValueError(
            f"k={k} eigenvalues were asked for, but there are only {operator.size}"
            f" parameters to look at. Write k={operator.size} or less."
        )
    if k > num_matvecs:
        raise ValueError(
            f"k={k} eigenvalues need at least as many products; num_matvecs is"
            f" {num_matvecs}. Write num_matvecs={max(20, 4 * k)}: twenty find up to"
            " five well."
        )
    if which not in _ORDERS:
        raise ValueError(f'which must be "LA", "SA" or "LM"; got {which!r}.')
    if num_vectors is None:
        num_vectors = fitting(operator, k + 6)
    schedules.check_integer("num_vectors", num_vectors, k + 1)
    keep, order = k + (num_vectors - k) // 3, _ORDERS[which]
    # The start has no name, so that it is dropped on the way.
    krylov = lanczos(
        operator,
        _start(operator, key, init),
        num_matvecs,
        num_vectors,
        (order, keep),
    )
    theta, residuals, found, rows = krylov.best(order, k)
    residuals = jnp.where(found, residuals, jnp.inf)
    eps = jnp.finfo(theta.dtype).eps
    tol = (1e-3 if eps > 1e-10 else 1e-6) if tol is None else tol
    scale = jnp.maximum(jnp.abs(theta), eps * jnp.abs(krylov.projected).max())
    unravel = lambda v: arrays(operator.unravel_params(v))
    vectors = jax.vmap(unravel)(product(rows, krylov.basis))
    return EigenResult(
        eigenvalues=jnp.where(found, theta, jnp.nan),
        eigenvectors=fill(vectors, operator.to_params(operator.like)),
        residuals=residuals,
        converged=residuals <= tol * scale,
        num_matvecs=jnp.asarray(min(num_matvecs, operator.size)),
    )


_ORDERS = {"LA": jnp.positive, "SA": jnp.negative, "LM": jnp.abs}


def _start(operator: Operator, key: ArrayLike, init: Any) -> jax.Array:
    z = random_vector(key, operator)
    if init is None:
        return z
    params = operator.to_params(operator.like)
    init = ravel(chosen_part("init", init, params, operator.like)).astype(z.dtype)
    # Without a random part, a start that is an eigenvector would show nothing else.
    norm = jnp.linalg.norm(init)
    unit = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    return unit * init + 0.1 / jnp.linalg.norm(z) * z
