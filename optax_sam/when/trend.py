"""The rule of AE-SAM: where the gradient's norm is above its trend."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.parts import Step, When
from optax_sam.schedules import at, check_number, check_schedule
from optax_sam.trees import norm


class NormTrendState(NamedTuple):
    """State of :func:`norm_above_trend`, with the letters of its equations.

    Attributes:
      mean: ``mu``, the running mean of the squared norm, () float.
      variance: its running variance, () float.
      started: whether a norm has been recorded, () bool.
    """

    mean: jax.Array
    variance: jax.Array
    started: jax.Array

    def recorded(self, x: jax.Array, decay: ArrayLike) -> NormTrendState:
        """With one more squared norm; one that is not finite is not recorded."""
        decay = jnp.where(self.started, decay, 0).astype(x.dtype)
        mean = decay * self.mean + (1 - decay) * x
        variance = decay * self.variance + (1 - decay) * (x - mean) ** 2
        finite = jnp.isfinite(mean) & jnp.isfinite(variance)
        new = NormTrendState(mean, variance, jnp.array(True))
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, self)

    def exceeded(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Whether a squared norm lies ``c`` standard deviations above the mean."""
        # An infinite c decides alone, also where the deviation is zero.
        sigma = jnp.where(jnp.isfinite(c), jnp.sqrt(self.variance), 1)
        return jnp.isfinite(x) & (x >= self.mean + c * sigma)

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars to log."""
        return {
            "squared_norm_mean": self.mean,
            "squared_norm_deviation": jnp.sqrt(self.variance),
        }


class LaggedNormTrendState(NamedTuple):
    """State of :func:`norm_above_trend` with ``lag=1``.

    Attributes:
      ascends: whether the next step is perturbed, () bool.
      trend: the statistics.
    """

    ascends: jax.Array
    trend: NormTrendState

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars to log."""
        return self.trend.metrics()


def norm_above_trend(
    decay: ArrayLike = 0.9, threshold: optax.ScalarOrSchedule = 0.0, lag: int = 0
) -> When:
    r"""The rule of AE-SAM: perturbs where the gradient's norm lies above its trend.

    With :math:`x_t = \|g_t\|^2` and :math:`\mu_0 = x_0, \sigma_0 = 0`:

    .. math::
      \mu_t = \delta \mu_{t-1} + (1 - \delta) x_t, \qquad
      \sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (x_t - \mu_t)^2, \qquad
      \text{perturb where } x_t \ge \mu_t + c_t \sigma_t

    It decides from the gradient of the same step, so no decision is known ahead, and
    :func:`optax_sam.dispatch` runs one program with the conditional. With ``lag=1``,
    :math:`x_t` decides about step ``t + 1``, which can be dispatched.

    Args:
      decay: ``delta``, in ``[0, 1)``.
      threshold: ``c_t`` in standard deviations, or a schedule of the step. The paper
        lets it fall linearly from 1 to -1 (AE-SAM) or from 2 to 0 (AE-LookSAM).
        Infinity never perturbs, and minus infinity always does.
      lag: with 0, the norm of this step decides. With 1, the norm of the step before
        decides, and the first step is perturbed.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> import optax, optax_sam
      >>> fall = optax.linear_schedule(1.0, -1.0, transition_steps=1000)
      >>> rule = optax_sam.when.norm_above_trend(threshold=fall)
      >>> adaptive_gsam = optax_sam.gsam(0.05, when=rule)

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023
    """
    decay = check_number("decay", decay, 0.0, 1.0, open_high=True)
    threshold = check_schedule("threshold", threshold, -jnp.inf, finite=False)
    if lag not in (0, 1):
        raise ValueError(
            f"lag must be 0 (the step's own norm) or 1 (the last); got {lag!r}."
        )

    def start(params: Any) -> NormTrendState:
        return NormTrendState(
            jnp.zeros((), float), jnp.zeros((), float), jnp.array(False)
        )

    def measured(state: NormTrendState, g: Any, step: Step) -> jax.Array:
        return step.mean(jnp.square(norm(g)).astype(state.mean.dtype))

    def now(state: Any, g: Any, step: Step) -> tuple[jax.Array, Any]:
        x = measured(state, g, step)
        state = state.recorded(x, decay)
        return state.exceeded(x, at(threshold, step.count)), state

    def now_lagged(state: Any, g: Any, step: Step) -> tuple[jax.Array, Any]:
        following = step._replace(count=optax.safe_increment(step.count))
        return state.ascends, LaggedNormTrendState(*now(state.trend, g, following))

    call = f"when.norm_above_trend(decay={decay}, lag={lag})"
    if not lag:
        return When(start, now, call=call)
    init = lambda params: LaggedNormTrendState(jnp.array(True), start(params))
    return When(init, now_lagged, call=call)
