"""The whole spectrum: its density, and sums over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.sharpness.data import each
from optax_sam.sharpness.krylov import fitting, lanczos, product
from optax_sam.sharpness.operators import Operator, also_of_loss
from optax_sam.sharpness.probes import (
    random_vector,
    standard_error,
    student,
    typed_key,
)


class SpectralSumResult(NamedTuple):
    """A sum over the spectrum.

    Attributes:
      estimate: the sum.
      stderr: its standard error over the probes; the deflated part has none.
      num_deflated: how many eigenvalues were found and summed exactly.
    """

    estimate: jax.Array
    stderr: jax.Array
    num_deflated: jax.Array


class SpectralDensity(NamedTuple):
    """The density of the eigenvalues; its integral is one.

    Attributes:
      grid: ``(G,)`` eigenvalues, loss per squared parameter.
      density: ``(G,)``, the mean over probes.
      stderr: ``(G,)``, the standard error at each point; ``nan`` with one probe.
      nodes: ``(N, M)``, the Ritz values of each probe.
      weights: ``(N, M)``, their weights, which sum to one; 0 where a node is padding.
      sigma: the width of the normal density that each node is smoothed with.
    """

    grid: jax.Array
    density: jax.Array
    stderr: jax.Array
    nodes: jax.Array
    weights: jax.Array
    sigma: jax.Array


class Quadrature(NamedTuple):
    """A spectrum as points with weights, so that a sum over it is a sum over points.

    Attributes:
      deflated: ``(E,)`` eigenvalues that were found, 0 in empty places.
      is_deflated: ``(E,)``, which places are filled.
      nodes: ``(N, P)``, for each probe the points that represent other eigenvalues.
      weights: ``(N, P)``, how many eigenvalues each point represents.
      coarse_nodes: ``(N, Q)``, the same after half of the Lanczos steps.
      coarse_weights: ``(N, Q)``.
    """

    deflated: jax.Array
    is_deflated: jax.Array
    nodes: jax.Array
    weights: jax.Array
    coarse_nodes: jax.Array
    coarse_weights: jax.Array

    def sums(self, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The sum of ``fn`` by probe, ``(2, N)``, after all and half of the steps."""
        # Selected, since fn may be infinite at padding.
        exact = jnp.where(self.is_deflated, fn(self.deflated), 0).sum()
        pairs = (self.nodes, self.weights), (self.coarse_nodes, self.coarse_weights)
        rests = [jnp.where(w > 0, w * fn(x), 0).sum(-1) for x, w in pairs]
        return exact + jnp.stack(rests)

    def sum(self, fn: Callable[[jax.Array], jax.Array]) -> SpectralSumResult:
        """The sum of ``fn`` over the spectrum, as :func:`spectral_sum` estimates it."""
        estimate, stderr = jackknife(lambda sums: sums, self.sums(fn))
        return SpectralSumResult(estimate, stderr, self.is_deflated.sum())


def jackknife(
    f: Callable[..., jax.Array], *sums: jax.Array, left: float = 0.2
) -> list[jax.Array]:
    r"""A function of means over probes, and its standard error.

    The error has two parts. One is the spread of the probes, found by leaving out one
    at a time, and widened by Student's distribution because they are few. The other is
    for the bias of the quadrature: a part of the change in the second half of the
    Lanczos steps.

    Args:
      f: a function of the means, with one argument for each of ``sums``.
      *sums: each ``(2, N)``, as :meth:`Quadrature.sums` gives them.
      left: the part of that change by which further steps would change the result.
    """
    N = sums[0].shape[1]
    fine, coarse = (f(*(x.mean(1)[i] for x in sums)) for i in (0, 1))
    without = [(x[0].sum() - x[0]) / (N - 1) for x in sums]
    spread = f(*without)
    spread = jnp.sqrt(jnp.sum((spread - spread.mean()) ** 2) * (N - 1) / N)
    bias = left * (fine - coarse)
    return [fine, jnp.hypot(student(N) * spread, bias).astype(fine.dtype)]


@also_of_loss
def spectral_sum(
    fn: Callable[[jax.Array], jax.Array],
    operator: Operator,
    key: ArrayLike,
    *,
    num_eigs: int = 30,
    num_top_matvecs: int = 60,
    num_lanczos: int = 100,
    num_probes: int = 6,
) -> SpectralSumResult:
    r"""The sum of a function over all eigenvalues, outliers exactly.

    .. math:: \operatorname{tr} f(H) \approx \sum_{i \text{ found}} f(\lambda_i)
       + \frac{1}{N} \sum_{p=1}^{N} \sum_j \omega_j^{(p)} f(\theta_j^{(p)})

    Outliers cause nearly all of the noise. Lanczos finds them and takes them out
    (deflation). Lanczos quadrature from random vectors sums over the rest. The error is
    small for smooth functions and powers above one (0.4 % for ``abs(x)**1.5`` on a
    small network). It is larger for a function with a kink at zero, where most
    eigenvalues lie: 7 % for ``abs(x)**0.5``, of either sign, and more probes do not
    help. If no eigenvalue is near zero, the function may be infinite there, such as
    ``jnp.log``.

    Cost: ``num_top_matvecs + num_probes * num_lanczos`` products;
    memory: ``num_eigs`` vectors, one for each of the Lanczos steps, and a few.

    Args:
      fn: the function, of arrays, entry by entry, such as ``jnp.square``. For
        ``f(x) = x`` use :func:`hessian_trace`.
      operator: as in :func:`trace`.
      key: for the probes: an int or a key.
      num_eigs: the largest number of eigenvalues to take out.
      num_top_matvecs: Lanczos steps to find them.
      num_lanczos: Lanczos steps for each probe.
      num_probes: random vectors, at least 2.

    Returns:
      A :class:`SpectralSumResult`.

    Raises:
      ValueError: if a number is out of range, or for what :func:`hessian` raises.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.sum(jnp.mean(batch, 0) * w**2)
      >>> batches = jnp.array([[[3.0, -4.0]]])
      >>> result = sharpness.spectral_sum(jnp.square, loss, jnp.ones(2), batches, 0)
      >>> print(result.estimate.round(3), result.num_deflated)
      25.0 2

    References:
      Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos
      Quadrature", SIAM J. Matrix Anal. Appl., 2017.
    """
    quadrature = deflated_quadrature(
        operator,
        key,
        num_eigs=num_eigs,
        num_top_matvecs=num_top_matvecs,
        num_lanczos=num_lanczos,
        num_probes=num_probes,
    )
    return quadrature.sum(fn)


def spectral_sum_of(
    fn: Callable[[jax.Array], jax.Array], quadrature: Quadrature
) -> SpectralSumResult:
    """``quadrature.sum(fn)``, under an older name."""
    return quadrature.sum(fn)


@also_of_loss
def deflated_quadrature(
    operator: Operator,
    key: ArrayLike,
    *,
    num_eigs: int = 30,
    num_top_matvecs: int = 60,
    num_lanczos: int = 100,
    num_probes: int = 6,
) -> Quadrature:
    r"""The spectrum of an operator: the outliers, and the rest by quadrature.

    Let ``V`` be the ``E`` eigenvectors that were found, and :math:`P = I - V V^\top`.
    Lanczos runs on :math:`P H P + \lambda_E V V^\top` from :math:`P z`, which has no
    part in the directions of ``V`` but what rounding leaves. There the second term puts
    the found eigenvalue that is smallest in size, so that functions which are infinite
    at zero stay finite. Weights are scaled to the ``n - E`` other directions, so that
    the result for ``c I`` is exact. With normal probes this causes no bias.
    """
    schedules.check_integer("num_eigs", num_eigs, 1)
    schedules.check_integer("num_top_matvecs", num_top_matvecs, 1)
    schedules.check_integer("num_lanczos", num_lanczos, 1)
    schedules.check_integer("num_probes", num_probes, 2)
    start_key, probe_key = jax.random.split(typed_key(key))
    top = lanczos(operator, random_vector(start_key, operator), num_top_matvecs)
    theta, live, _, residuals, U = top.rule()
    size = jnp.abs(theta)
    found = live & (residuals < 1e-3 * size)
    order = jnp.argsort(jnp.where(found, -size, jnp.inf))[:num_eigs]
    found, deflated = found[order], theta[order]
    V = jnp.where(found[:, None], product(U[:, order].T, top.basis), 0)
    project = lambda v: v - product(product(V, v), V)
    # The smallest that was found; V is zero if there is none.
    edge = deflated[found.sum() - 1]

    def through(v: jax.Array) -> jax.Array:
        away = product(product(V, v), V)
        return project(operator.times(v - away)) + edge * away

    like = jax.ShapeDtypeStruct(V.shape[1:], V.dtype)
    rest = Operator(through, like, operator.size, lambda v: v, operator.on_host)

    def probe(key: jax.Array) -> tuple[Any, ...]:
        z = project(random_vector(key, operator))
        krylov = lanczos(rest, z, num_lanczos)
        left = jnp.where(jnp.linalg.norm(z) > 0, operator.size - found.sum(), 0)
        left = left.astype(z.dtype)

        def rules(m: int) -> tuple[jax.Array, jax.Array]:
            # With and without a node near zero, where most eigenvalues lie and powers
            # have a kink, so that their errors have opposite signs.
            pair = [krylov.rule(x) for x in (m, max(m - 1, 1))]
            weights = jnp.concatenate([x.weights for x in pair]) * left / 2
            return jnp.concatenate([x.nodes for x in pair]), weights

        K = len(krylov.left)
        return *rules(K), *rules(max(K // 2, 1))

    keys = jax.random.split(probe_key, num_probes)
    rest_of_it = each(operator.on_host, probe, keys)
    return Quadrature(jnp.where(found, deflated, 0), found, *rest_of_it)


@also_of_loss
def spectral_density(
    operator: Operator,
    key: ArrayLike,
    *,
    num_lanczos: int = 80,
    num_probes: int = 10,
    sigma: ArrayLike | None = None,
    num_grid: int = 1000,
) -> SpectralDensity:
    r"""The density of the eigenvalues, smoothed.

    .. math:: p(t) = \frac{1}{N} \sum_{p=1}^{N} \sum_j \omega_j^{(p)}\,
       \mathcal{N}(t;\ \theta_j^{(p)}, \sigma^2)

    It uses Lanczos quadrature from ``N`` random vectors. The nodes are Ritz values, and
    the weights are the squared *first* components of their eigenvectors. More Lanczos
    steps resolve more. More probes only show how certain the density is.
    ``num_lanczos=50, num_probes=1`` is enough for a quick look.

    Cost: ``num_lanczos * num_probes`` products; memory: ``num_lanczos`` vectors and
    four more, for large models fewer: if the vectors take more than 200 MB, each step
    is orthogonalized against as many of the last ones as fit, and at least four. Ritz
    values then have copies, which share their weight, and the density is the same.

    Args:
      operator: as in :func:`trace`.
      key: for the probes: an int or a key.
      num_lanczos: steps ``M`` for each probe.
      num_probes: ``N``.
      sigma: width of the smoothing; default 0.003 of the range.
      num_grid: points ``G`` of the grid, which spans the range and 5 sigma beyond.

    Returns:
      A :class:`SpectralDensity`, for ``optax_sam.plots.spectral_density``.

    Raises:
      ValueError: if a number is out of range, or for what :func:`hessian` raises.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.sum(jnp.mean(batch, 0) * w**2)
      >>> batches = jnp.array([[[3.0, -4.0]]])
      >>> result = sharpness.spectral_density(loss, jnp.ones(2), batches, 0)
      >>> print(result.nodes[0].round(3))
      [-4.  3.]

    References:
      Ghorbani, Krishnan, Xiao, 2019, arXiv 1901.10159.
    """
    schedules.check_integer("num_lanczos", num_lanczos, 1)
    schedules.check_integer("num_probes", num_probes, 1)
    schedules.check_integer("num_grid", num_grid, 2)
    if sigma is not None:
        schedules.check_number("sigma", sigma, 0, open_low=True)

    def probe(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        few = fitting(operator, 4)
        krylov = lanczos(operator, random_vector(key, operator), num_lanczos, few)
        nodes, live, weights, *_ = krylov.rule()
        return nodes, live, weights / weights.sum()

    keys = jax.random.split(typed_key(key), num_probes)
    nodes, live, weights = each(operator.on_host, probe, keys)
    low = jnp.where(live, nodes, jnp.inf).min()
    high = jnp.where(live, nodes, -jnp.inf).max()
    if sigma is None:
        # The spectrum of c I has no width, and its eigenvalue has a rounding error.
        largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
        least = jnp.where(largest > 0, 100 * jnp.finfo(nodes.dtype).eps * largest, 1e-3)
        sigma = jnp.maximum(0.003 * (high - low), least)
    sigma = jnp.asarray(sigma, nodes.dtype)
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_grid, dtype=nodes.dtype)

    def density_of(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        theta, omega = one
        bumps = jax.scipy.stats.norm.pdf(grid[:, None], theta[None], sigma)
        return bumps @ omega

    densities = jax.lax.map(density_of, (nodes, weights))
    return SpectralDensity(
        grid=grid,
        density=densities.mean(0),
        stderr=standard_error(densities),
        nodes=nodes,
        weights=weights / num_probes,
        sigma=sigma,
    )
