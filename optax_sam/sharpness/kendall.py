"""Rank correlation of a measure with the quantity it should predict."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optax_sam import schedules

Variant = Literal["a", "b"]


class KendallInterval(NamedTuple):
    """A rank correlation, and its interval over models from the same grid.

    Attributes:
      tau: the correlation of all models.
      low: lower end of the interval.
      high: upper end of the interval.
      stderr: the standard deviation over the resamples.
    """

    tau: float
    low: float
    high: float
    stderr: float


class GranulatedKendall(NamedTuple):
    r"""Rank correlations within a grid of hyperparameters.

    Attributes:
      Psi: :math:`\Psi`, the mean over the axes.
      psi: :math:`\psi_i`, the correlation among models that differ along axis ``i``
        alone, ``(q,)``.
    """

    Psi: float
    psi: NDArray[np.float64]


def kendall_tau(s: ArrayLike, t: ArrayLike, *, variant: Variant = "a") -> float:
    r"""Kendall's rank correlation of two quantities over ``M`` models.

    .. math::
      \tau_a = \frac{2}{M (M - 1)} \sum_{i < j}
      \mathrm{sign}(s_i - s_j)\, \mathrm{sign}(t_i - t_j), \qquad
      \tau_b = \frac{C - D}{\sqrt{(N - T_s) (N - T_t)}}

    Of the :math:`N = M(M-1)/2` pairs, :math:`C` are concordant and :math:`D`
    discordant; :math:`T_s` pairs are tied in ``s`` and :math:`T_t` in ``t``. The two
    variants differ if there are ties, which are common among small test errors. So
    report the variant with the number, and say whether the gap compares errors or
    losses. The function runs on the host and takes :math:`M^2` memory.

    Args:
      s: the measure of each model, ``(M,)``, finite.
      t: the quantity to predict, such as test minus training error, ``(M,)``, finite.
      variant: ``"a"``, as in studies of geodesic sharpness, or ``"b"``, as in studies
        of Rényi sharpness and by default in SciPy.

    Returns:
      The correlation in ``[-1, 1]``. It is 0 if ``s`` or ``t`` is the same for all
      models, for ``"b"`` too (SciPy: NaN).

    Raises:
      ValueError: if ``s`` and ``t`` have different shapes, are not finite or have fewer
        than 2 models, or if ``variant`` is unknown.

    Examples:
      >>> from optax_sam import sharpness
      >>> s, t = [1, 2, 2, 3], [1, 2, 3, 3]
      >>> print(f"{sharpness.kendall_tau(s, t):.3f}")
      0.667
      >>> print(f"{sharpness.kendall_tau(s, t, variant='b'):.3f}")
      0.800

    References:
      Kendall, "The treatment of ties in ranking problems", 1945
    """
    _check_variant(variant)
    s, t = _pair(s, t)
    return float(_tau(s, t, np.ones((1, len(s))), variant)[0])


def kendall_interval(
    s: ArrayLike,
    t: ArrayLike,
    *,
    variant: Variant = "a",
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> KendallInterval:
    """Kendall's correlation with a bootstrap interval over the models.

    The bootstrap draws models with replacement. The interval lies between percentiles
    of the correlations. A model that is drawn twice makes no pair with itself: such
    pairs are tied in both, and would pull every resample towards zero. The interval
    says what other models from the same grid might give. It says nothing about other
    architectures or data.

    Args:
      s: as in :func:`kendall_tau`.
      t: as in :func:`kendall_tau`.
      variant: as in :func:`kendall_tau`.
      confidence: the share of the resamples within the interval, in ``(0, 1)``.
      num_resamples: the number of resamples.
      seed: the seed of the draws.

    Returns:
      The correlation, the interval's ends, and the standard error.

    Raises:
      ValueError: as :func:`kendall_tau` does, or if an option is out of its range.

    Examples:
      >>> from optax_sam import sharpness
      >>> s = range(20)
      >>> tau, low, high, stderr = sharpness.kendall_interval(s, [x % 15 for x in s])
      >>> print(f"{tau:.2f} in [{low:.2f}, {high:.2f}]")
      0.34 in [0.02, 0.74]

    References:
      Efron, "Bootstrap methods: another look at the jackknife", 1979
    """
    _check_variant(variant)
    schedules.check_integer("num_resamples", num_resamples, 1)
    schedules.check_number(
        "confidence", confidence, 0.0, 1.0, open_low=True, open_high=True
    )
    s, t = _pair(s, t)
    rng, M = np.random.default_rng(seed), len(s)
    counts = rng.multinomial(M, np.full(M, 1 / M), num_resamples).astype(float)
    found = _tau(s, t, counts, variant)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    tau = kendall_tau(s, t, variant=variant)
    return KendallInterval(tau, float(low), float(high), float(found.std()))


def granulated_kendall(
    s: ArrayLike, t: ArrayLike, grid_shape: tuple[int, ...]
) -> GranulatedKendall:
    r"""Kendall's correlation among models that differ in one hyperparameter.

    A measure that follows one hyperparameter alone, such as the depth, may order all
    models well and still say nothing about the other hyperparameters. So
    :math:`\tau_a` is computed along each axis of the grid, for each setting of the
    other axes. :math:`\psi_i` is the mean over these settings, and :math:`\Psi` the
    mean over the axes.

    Args:
      s: the measure of each model of the grid, of shape ``grid_shape`` or flattened
        from it (the last axis is the fastest), finite.
      t: the quantity to predict, of the same shape, finite.
      grid_shape: the number of values of each hyperparameter, each at least 2.

    Returns:
      ``(Psi, psi)``.

    Raises:
      ValueError: if the models do not fill the grid, are not finite, or an axis has
        one value.

    Examples:
      >>> from optax_sam import sharpness
      >>> sharpness.granulated_kendall([1, 3, 2, 4], [1, 2, 4, 3], (2, 2))
      GranulatedKendall(Psi=0.5, psi=array([1., 0.]))

    References:
      Jiang et al., `Fantastic Generalization Measures and Where to Find Them
      <https://arxiv.org/abs/1912.02178>`_, 2020
    """
    if not grid_shape or min(grid_shape) < 2:
        raise ValueError(
            "grid_shape must have the numbers of values, at least 2, of each"
            f" hyperparameter; got {tuple(grid_shape)}. Leave out those that are fixed."
        )
    s, t = _pair(s, t)
    if s.size != np.prod(grid_shape):
        raise ValueError(
            f"{s.size} models do not fill a grid of shape {tuple(grid_shape)}. Every"
            " combination is needed once, the last hyperparameter varying fastest."
        )

    def along(axis: int) -> float:
        lines = [
            np.moveaxis(x.reshape(grid_shape), axis, -1).reshape(-1, grid_shape[axis])
            for x in (s, t)
        ]
        taus = [kendall_tau(*line) for line in zip(*lines, strict=True)]
        return float(np.mean(taus))

    psi = np.array([along(axis) for axis in range(len(grid_shape))])
    return GranulatedKendall(float(psi.mean()), psi)


def _tau(
    s: NDArray, t: NDArray, counts: NDArray, variant: Variant
) -> NDArray[np.float64]:
    """The correlations ``(R,)`` of samples with these multiplicities ``(R, M)``."""
    S, T = (np.sign(x[:, None] - x).astype(float) for x in (s, t))
    others = 1 - np.eye(len(s))
    over_pairs = lambda x: np.einsum("ri,ri->r", counts @ x, counts)
    if variant == "a":
        size = over_pairs(others)
    else:
        size = np.sqrt(over_pairs(S**2) * over_pairs(T**2))
    zeros = np.zeros(len(counts))
    return np.divide(over_pairs(S * T), size, out=zeros, where=size > 0)


def _pair(s: ArrayLike, t: ArrayLike) -> tuple[NDArray, NDArray]:
    s, t = np.asarray(s, float), np.asarray(t, float)
    if s.shape != t.shape or s.size < 2:
        raise ValueError(
            "s and t must have a value for each of at least 2 models; got shapes"
            f" {s.shape} and {t.shape}."
        )
    for name, x in ("s", s), ("t", t):
        if not np.isfinite(x).all():
            where = np.argwhere(~np.isfinite(x))[0].tolist()
            raise ValueError(
                f"{name} is {x[tuple(where)]} at {where}. A model that diverged has no"
                " rank: leave it out of both, and report that."
            )
    return s.ravel(), t.ravel()


def _check_variant(variant: Variant) -> None:
    if variant not in ("a", "b"):
        raise ValueError(f'variant must be "a" or "b"; got {variant!r}.')
