"""The noise that the weights tolerate, as in PAC-Bayes bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.masks import Mask
from optax_sam.sharpness.data import each, repeat
from optax_sam.sharpness.objective import Objective, chosen_part, objective
from optax_sam.sharpness.probes import normals, standard_error, typed_key
from optax_sam.sharpness.weights import weights_of
from optax_sam.trees import inner, wide

_EPS = 1e-3  # from the papers: the noise at a weight of 0


class PacBayesFlatness(NamedTuple):
    r"""The largest noise that the weights tolerate.

    Attributes:
      value: :math:`1 / \sigma^2`; large means sharp.
      sigma: the largest tried standard deviation at which the drop is within the
        target. If the drop is beyond the target at all of them, the smallest one.
      drop: the mean drop of the metric at ``sigma``.
      stderr: the standard error of ``drop``, over the draws. The draws also chose
        ``sigma``, so it is a little too small: the true drop lies within two standard
        errors for 88 to 97 of 100 keys.
      converged: whether the drop is within a tenth of the target. It is false if the
        weights tolerate even ``sigma_max``, or if the metric falls in too large steps.
    """

    value: jax.Array
    sigma: jax.Array
    drop: jax.Array
    stderr: jax.Array
    converged: jax.Array


def pac_bayes_flatness(
    metric_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Any,
    key: ArrayLike,
    *,
    target: ArrayLike = 0.1,
    magnitude_aware: bool = False,
    sigma_max: ArrayLike = 2.0,
    num_samples: int = 10,
    num_steps: int = 15,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> PacBayesFlatness:
    r"""One over the variance of the noise that lowers the accuracy by a given amount.

    .. math::
      \frac{1}{\sigma^2}, \qquad \sigma = \max \big\{ \sigma \le \sigma_{\max} :
      \mathbb{E}_u [a(w) - a(w + u)] \le \text{target} \big\}, \qquad
      u \sim N(0, \sigma^2 I)

    or, if it is magnitude-aware, :math:`u_i \sim N(0, \sigma^2 w_i^2 + 10^{-6})`.
    For a rise of the loss instead of a drop of the accuracy, give
    ``metric_fn=lambda params, batch: -loss_fn(params, batch)``. Near a minimum,
    :math:`\sigma` is then :math:`\sqrt{2\, \text{target} / \operatorname{tr} H}`.

    Bisection from ``sigma_max`` finds :math:`\sigma`, with the same draws at all steps.
    So the result is reproducible, and its absolute resolution is
    ``sigma_max / 2^(num_steps - 1)``. It costs ``num_steps * num_samples + 1`` passes
    over the data for the metric. Memory does not grow with either number.

    First fold BatchNorm into the layer before it. The scale of the weights in that
    layer does not change the function, but this measure depends on it.

    Args:
      metric_fn: ``metric_fn(params, batch)``, the mean accuracy of one batch, or any
        other number that is larger where the model is better.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples; or a
        list, a loader or a generator of them, as for :func:`hessian`.
      key: an int, typed key or raw key data, for the noise.
      target: the drop to tolerate, above 0, in units of the metric.
      magnitude_aware: whether the noise, and so ``sigma``, is relative to the weights.
      sigma_max: the largest standard deviation to try, above 0, in units of the weights
        (or relative to them).
      num_samples: draws of the noise.
      num_steps: values of ``sigma`` to try, at least 1.
      mask: the leaves that get noise: a pytree of bools like the parameters or a prefix
        of it, or a function from the parameters to one; ``None`` means all.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread.

    Returns:
      The flatness with the drop that was reached, as a :class:`PacBayesFlatness`.

    Raises:
      ValueError: if ``metric_fn`` returns no scalar, ``target`` or ``sigma_max`` is not
        above 0, the key is not valid, or as :func:`hvp` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> accuracy = lambda w, x: jnp.mean(x @ w > 0)
      >>> w, x = jnp.ones(1000), jnp.eye(1000)  # each margin is 1
      >>> result = sharpness.pac_bayes_flatness(accuracy, w, x[None], 0)
      >>> print(f"{result.sigma:.1f}")  # 1 / 1.28, where 10 % are beyond
      0.8

    Differs from the authors' code in: ``sigma`` is the standard deviation (there it is
    the root of it, because a variance is passed as a deviation), all steps use the same
    draws, and no step is skipped.

    References:
      Jiang et al., `Fantastic Generalization Measures and Where to Find Them
      <https://arxiv.org/abs/1912.02178>`_, 2020; Dziugaite et al., `In Search of Robust
      Measures of Generalization <https://arxiv.org/abs/2010.11924>`_, 2020; code:
      nitarshan/robust-generalization-measures
    """
    o = objective(
        _scalar(metric_fn),
        params,
        batches,
        mask=mask,
        weights=weights,
        axis_name=axis_name,
    )
    schedules.check_number("target", target, 0, open_low=True)
    schedules.check_number("sigma_max", sigma_max, 0, open_low=True)
    schedules.check_integer("num_samples", num_samples, 1)
    schedules.check_integer("num_steps", num_steps, 1)
    metric = lambda w: o.mean(Objective.loss_here, w)
    before = metric(o.w)
    keys = jax.random.split(typed_key(key), num_samples)

    def noisy(w: jax.Array, z: jax.Array, sigma: jax.Array) -> jax.Array:
        sigma = sigma.astype(w.dtype)
        size = jnp.hypot(sigma * w, _EPS) if magnitude_aware else sigma
        return w + size * z

    def attempt(sigma: jax.Array) -> PacBayesFlatness:
        def drop(key: jax.Array) -> jax.Array:
            z = normals(key, o.w)
            return before - metric(
                jax.tree.map(lambda w, z: noisy(w, z, sigma), o.w, z)
            )

        drops = each(o.on_host, drop, keys)
        mean = drops.mean()
        stderr = standard_error(drops)
        close = jnp.abs(mean - target) <= jnp.asarray(target, mean.dtype) / 10
        return PacBayesFlatness(1 / sigma**2, sigma, mean, stderr, close)

    def bisect(k: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high, best, some = state
        new = attempt(jnp.where(k == 0, high, (low + high) / 2))
        borne = new.drop <= target
        take = borne | ~some  # the smallest while no noise is tolerated
        best = jax.tree.map(lambda x, y: jnp.where(take, x, y), new, best)
        low, high = jnp.where(borne, new.sigma, low), jnp.where(borne, high, new.sigma)
        return low, high, best, some | borne

    zero = jnp.zeros_like(before)
    nothing = PacBayesFlatness(zero, zero, zero, zero, jnp.asarray(False))
    state = (zero, jnp.asarray(sigma_max, zero.dtype), nothing, jnp.asarray(False))
    best = repeat(o.on_host, num_steps, bisect, state)[2]
    # Comparisons with nan are false, so the search would end at the smallest noise.
    value, sigma = (jnp.where(jnp.isnan(best.drop), jnp.nan, x) for x in best[:2])
    return best._replace(value=value, sigma=sigma)


def pac_bayes_bound(
    params: Any,
    sigma: ArrayLike,
    num_examples: int,
    *,
    initial: Any = None,
    reference: Literal["init", "orig"] = "init",
    magnitude_aware: bool = False,
    mask: Mask = None,
) -> jax.Array:
    r"""The PAC-Bayes bound for a noise that the weights tolerate.

    .. math::
      B = \frac{\|r\|^2}{4 \sigma^2} + \log \frac{m}{\sigma} + 10, \qquad
      r = w - w_0 \text{ or } w

    or, if it is magnitude-aware, with :math:`\epsilon = 10^{-3}` and
    :math:`\omega` the number of parameters,

    .. math::
      B = \frac{1}{4} \sum_i \log \frac
      {\epsilon^2 + (\sigma^2 + 1) \|r\|^2 / \omega}
      {\epsilon^2 + \sigma^2 (w_i - w_{0,i})^2} + \log \frac{m}{\sigma} + 10

    The papers report :math:`\sqrt{B / m}`.

    Args:
      params: the weights ``w``.
      sigma: the noise that they tolerate, from :func:`pac_bayes_flatness`, above 0.
      num_examples: ``m``, the number of training examples.
      initial: the weights :math:`w_0` before training, a pytree like ``params``; needed
        unless ``reference`` is ``"orig"`` and the bound is not magnitude-aware.
      reference: ``"init"``: :math:`r = w - w_0`; ``"orig"``: :math:`r = w`.
      magnitude_aware: which of the two bounds; the same as for ``sigma``.
      mask: the leaves that count; the same as for ``sigma``. ``None`` means all.

    Returns:
      The scalar ``B``.

    Raises:
      ValueError: if ``sigma`` is not above 0, a leaf that counts is no weight, or
        ``initial`` is missing or of another structure or shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> w, w_0 = jnp.array([3.0, 4.0]), jnp.zeros(2)
      >>> B = sharpness.pac_bayes_bound(w, 0.5, 1000, initial=w_0)
      >>> print(f"{B:.2f}")  # 25 + log 2000 + 10
      42.60

    References:
      Jiang et al., `Fantastic Generalization Measures and Where to Find Them
      <https://arxiv.org/abs/1912.02178>`_, 2020
    """
    schedules.check_number("sigma", sigma, 0, open_low=True)
    schedules.check_integer("num_examples", num_examples, 1)
    if reference not in ("init", "orig"):
        raise ValueError(f'reference must be "init" or "orig"; got {reference!r}.')
    if initial is None and (magnitude_aware or reference == "init"):
        raise ValueError(
            "initial is missing, the weights before training. Only"
            ' reference="orig" with magnitude_aware=False works without it. Keep a copy'
            " before training, and pass it as initial=."
        )
    if isinstance(initial, (int, float)):
        raise ValueError(
            f"initial must be a pytree like params; got the number {initial!r}. If"
            " training began at zero, write initial=jax.tree.map(jnp.zeros_like,"
            " params)."
        )
    w = moved = weights_of(params, mask)
    if initial is not None:
        start = chosen_part("initial", initial, params, w)
        moved = jax.tree.map(jnp.subtract, w, start)
    r = w if reference == "orig" else moved
    square = inner(r, r)
    rest = jnp.log(num_examples / sigma) + 10
    if not magnitude_aware:
        return square / (4 * sigma**2) + rest
    omega = sum(x.size for x in jax.tree.leaves(w))
    top = _EPS**2 + (sigma**2 + 1) * square / omega
    terms = jax.tree.map(
        lambda x: jnp.log(top / (_EPS**2 + sigma**2 * jnp.square(x))).sum(), moved
    )
    return sum(jax.tree.leaves(terms)) / 4 + rest


def _scalar(metric_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], jax.Array]:
    if not callable(metric_fn):
        raise ValueError(
            "The first argument must be metric_fn, a function (params, batch) -> scalar"
            f" that is larger where the model is better; got {metric_fn!r}."
        )

    def metric(params: Any, batch: Any) -> jax.Array:
        value = metric_fn(params, batch)
        numbers = (jax.Array, np.ndarray, np.generic, int, float)
        if not isinstance(value, numbers) or jnp.shape(value):
            what = f"shape {value.shape}" if hasattr(value, "shape") else repr(value)
            raise ValueError(
                "metric_fn must return a scalar, such as the accuracy of the batch,"
                f" jnp.mean(logits.argmax(-1) == labels); it returned {what}."
            )
        return wide(jnp.asarray(value))

    return metric
