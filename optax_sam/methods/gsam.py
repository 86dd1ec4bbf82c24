"""GSAM: surrogate gap guided SAM (Zhuang et al., arXiv 2203.08065, ICLR 2022)."""

from __future__ import annotations

import functools
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.ascent.ball import l2
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Blend, Step
from optax_sam.schedules import at, check_number, check_schedule, shown
from optax_sam.trees import along, lift, norm, scaled, widest


def surrogate_gap(
    alpha: optax.ScalarOrSchedule = 0.4,
    minimize: Literal["perturbed", "clean"] = "perturbed",
) -> Blend:
    r"""The blend of :func:`optax_sam.gsam`, which also has a form for the clean loss.

    :func:`optax_sam.gsam` shows the form that minimizes the perturbed loss. The other
    form is

    .. math::
      d = g + \alpha \Big(g_s - \frac{\langle g, g_s \rangle}{\|g\|^2} g\Big)
        \quad\text{to minimize the clean loss}

    The added part is normal to the gradient of the minimized loss. The step along it
    lowers the gap and, to first order, does not change the minimized loss. On steps
    without a perturbed gradient it emits the gradient at ``w``.

    Args:
      alpha: weight of the gap, at least 0, or a schedule; 0 is SAM.
      minimize: ``"perturbed"``, as in the paper, or ``"clean"``, the alternative in
        big_vision, where ``alpha = 0`` is the base optimizer.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``alpha`` is negative or ``minimize`` is neither.

    Examples:
      >>> import optax_sam
      >>> adaptive_gsam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.adaptive(2.0, eta=0.0, adapt=True),
      ...     blend=optax_sam.blend.surrogate_gap(alpha=0.4))
    """
    alpha = check_schedule("alpha", alpha, 0.0)
    if minimize not in ("perturbed", "clean"):
        raise ValueError(f'minimize must be "perturbed" or "clean"; got {minimize!r}.')

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        main, other, sign = (g_s, g, -1) if minimize == "perturbed" else (g, g_s, 1)
        factor = lift(norm(main))
        lifted = scaled(main, factor)
        c = along(scaled(other, factor), lifted)
        # A zero gradient has no direction to be normal to.
        weight = jnp.where(norm(lifted) > 0, sign * at(alpha, step.count), 0)

        def d(x: jax.Array, y: jax.Array) -> jax.Array:
            dtype = widest(x, y)
            x, y = x.astype(dtype), y.astype(dtype)
            return x + weight.astype(dtype) * (y - c.astype(dtype) * x)

        return jax.tree.map(d, main, other), state

    return Blend(fresh=fresh, call=f"blend.surrogate_gap({shown(alpha)})")


@method(l2, surrogate_gap)
def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    alpha: optax.ScalarOrSchedule = 0.4,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: lowers the perturbed loss and its gap to the loss at ``w``.

    .. math::
      g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big), \qquad
      g_\perp = g - \frac{\langle g, g_s \rangle}{\|g_s\|^2}\, g_s, \qquad
      d = g_s - \alpha\, g_\perp

    The paper's radius follows the learning rate: see :func:`optax_sam.rho_from_lr`. Its
    ``alpha`` is 0.01 for ResNets and 0.4 to 1 for ViTs. With a large ``alpha`` and a
    large radius together, training fails.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative.

    Examples:
      >>> import optax, optax_sam
      >>> lr = optax.cosine_decay_schedule(0.1, decay_steps=50)
      >>> rho = optax_sam.rho_from_lr(lr, rho_min=0.01, rho_max=0.1)
      >>> tx = optax.chain(optax_sam.gsam(rho, alpha=0.4), optax.sgd(lr))

    Differs from the authors' code in:
      1. The projection has no epsilon, and is left out for a zero gradient; the PyTorch
         code adds 1e-12 to norms and cosine.
      2. Their "adaptive" flags are other ascents: big_vision's is
         :func:`optax_sam.ascent.weight_scaled`, the PyTorch code's
         ``optax_sam.ascent.adaptive(rho, eta=0.0, adapt=True)``; big_vision's
         ``minimize_fp=False`` is ``surrogate_gap(alpha, minimize="clean")``. Combine
         them in :func:`optax_sam.sharpness_aware`.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022; code: google-research/big_vision,
      juntang-zhuang/GSAM
    """
    return on_engine("gsam", options, ascent=l2(rho), blend=surrogate_gap(alpha))


def rho_from_lr(
    lr_schedule: optax.ScalarOrSchedule,
    rho_min: float,
    rho_max: float,
    *,
    lr_min: float | None = None,
    lr_max: float | None = None,
) -> optax.Schedule:
    r"""A radius that follows the learning rate, as in GSAM and R-SAM.

    .. math::
      \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})\,
      \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}}
      \quad\text{clipped to } [\rho_{\min}, \rho_{\max}]

    A learning rate that does not change gives ``rho_max``.

    Args:
      lr_schedule: the learning rate by step, as the optimizer gets it.
      rho_min: radius at the lowest learning rate, at least 0.
      rho_max: radius at the highest learning rate, at least ``rho_min``.
      lr_min: the lowest learning rate; ``None`` means the lowest one after the peak.
        The schedule is searched for it on the first use.
      lr_max: the highest learning rate; ``None`` means the schedule's peak.

    Returns:
      A schedule for ``rho=``.

    Raises:
      ValueError: if the radii are negative, if radii or learning rates are in the
        wrong order, or if a learning rate is searched for in an array or in a schedule
        that always rises in the end (on the first use).

    Examples:
      >>> import optax, optax_sam
      >>> lr = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100, end_value=0.01)
      >>> rho = optax_sam.rho_from_lr(lr, rho_min=0.02, rho_max=0.2)
      >>> [round(float(rho(t)), 3) for t in (0, 10, 55, 100)]
      [0.02, 0.2, 0.11, 0.02]

    Differs from the authors' code in:
      1. The radius is clipped; theirs falls below ``rho_min``, even below zero, while
         the learning rate warms up.

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022; code: google-research/big_vision
    """
    rho_min = check_number("rho_min", rho_min, 0.0)
    rho_max = check_number("rho_max", rho_max, 0.0)
    if rho_max < rho_min:
        raise ValueError(
            f"rho_max must be at least rho_min = {rho_min}; got {rho_max}."
        )
    if lr_min is not None:
        lr_min = check_number("lr_min", lr_min, 0.0)
    if lr_max is not None:
        lr_max = check_number("lr_max", lr_max, 0.0)
    if isinstance(lr_schedule, jax.Array) and None in (lr_min, lr_max):
        raise ValueError(
            "lr_schedule is an array, as inside optax.inject_hyperparams, so"
            " rho_from_lr cannot search it. Pass the lowest rate as lr_min and the"
            " highest as lr_max."
        )
    unchecked = lr_schedule  # whose NaN does not become a rate of zero
    lr_schedule = check_schedule("lr_schedule", lr_schedule, 0.0)

    @functools.cache  # at the first use: a factory must not touch the devices
    def ends() -> tuple[float, float]:
        # Every step of a short run, and one in a thousand later on.
        counts = np.append(np.arange(2**16), np.geomspace(2**16, 2**31 - 1, 2**14))
        with jax.ensure_compile_time_eval():
            rates = np.asarray(
                jax.vmap(lambda t: jnp.asarray(at(unchecked, t), float))(
                    jnp.asarray(counts, jnp.int32)
                )
            )
        # A schedule may be undefined after its end.
        rates = rates[: int(np.argmin(np.isfinite(rates))) or None]
        peak = int(np.argmax(rates))
        if peak == len(counts) - 1:
            raise ValueError(
                "rho_from_lr searched lr_schedule for its peak, but the rate still"
                f" rises at step {2**31 - 1:,}. Pass the lowest rate as lr_min and the"
                " highest as lr_max."
            )
        return float(np.min(rates[peak:])), float(rates[peak])

    def schedule(count: ArrayLike) -> jax.Array:
        rate = at(lr_schedule, count)  # first, because this checks the schedule
        low = ends()[0] if lr_min is None else lr_min
        high = ends()[1] if lr_max is None else lr_max
        if high < low:
            given = None not in (lr_min, lr_max)
            read = "" if given else ", one of them read from the schedule"
            raise ValueError(
                f"rho_from_lr needs lr_min <= lr_max; got {low} and {high}{read}."
                " Pass the lowest rate as lr_min and the highest as lr_max."
            )
        share = (rate - low) / (high - low) if high > low else 1.0
        return rho_min + (rho_max - rho_min) * jnp.clip(share, 0, 1)

    return schedule
