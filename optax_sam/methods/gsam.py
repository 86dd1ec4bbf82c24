"""GSAM: surrogate gap guided SAM (Zhuang et al., arXiv 2203.08065, ICLR 2022)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask, at
from optax_sam.blend import surrogate_gap
from optax_sam.contract import check_number, check_schedule
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    alpha: optax.ScalarOrSchedule = 0.4,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: lowers the perturbed loss and its gap to the clean loss together.

    .. math::
      g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big), \qquad
      g_\perp = g - \frac{\langle g, g_s \rangle}{\|g_s\|^2}\, g_s, \qquad
      d = g_s - \alpha\, g_\perp

    ``alpha=0`` is SAM. The paper ties the radius to the learning rate, see
    :func:`optax_sam.rho_from_lr`; its ``alpha`` is 0.01 for ResNets and 0.4 to 1 for
    ViTs. A large ``alpha`` and a large radius together do not train (see the demo's
    page).

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      alpha: weight of the gap, at least 0, or a schedule.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``alpha`` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> lr = optax.cosine_decay_schedule(0.1, decay_steps=50)
      >>> rho = optax_sam.rho_from_lr(lr, rho_min=0.01, rho_max=0.1)
      >>> tx = optax.chain(optax_sam.gsam(rho, alpha=0.4), optax.sgd(lr))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1)
      True

    Differs from the authors' code in:
      1. The projection has no epsilon, and a zero gradient none at all; the PyTorch
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
    return sharpness_aware(
        ascent.l2(rho),
        when,
        surrogate_gap(alpha),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="gsam",
    )


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
      lr_schedule: the true learning rate by step, as the optimizer gets it.
      rho_min: radius at the lowest learning rate, at least 0.
      rho_max: radius at the highest learning rate, at least ``rho_min``.
      lr_min: the lowest learning rate; ``None`` means the lowest one after the peak,
        which the schedule is searched for when it is first used.
      lr_max: the highest learning rate; ``None`` means the schedule's peak.

    Returns:
      A schedule for ``rho=``.

    Raises:
      ValueError: if the radii are negative, or radii or learning rates are in the
        wrong order (a learning rate that is searched for, on the first use).

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
    lr_schedule = check_schedule("lr_schedule", lr_schedule, 0.0)

    @functools.cache  # at the first use: a factory must not touch the devices
    def ends() -> tuple[float, float]:
        # Every step of a short run, and one in a thousand later on.
        counts = np.append(np.arange(2**16), np.geomspace(2**16, 2**31 - 1, 2**14))
        with jax.ensure_compile_time_eval():
            rates = jax.vmap(lambda t: jnp.asarray(at(lr_schedule, t), float))(
                jnp.asarray(counts, jnp.int32)
            )
            peak = int(jnp.argmax(rates))
            return float(jnp.min(rates[peak:])), float(rates[peak])

    def schedule(count: ArrayLike) -> jax.Array:
        low = ends()[0] if lr_min is None else lr_min
        high = ends()[1] if lr_max is None else lr_max
        if high < low:
            raise ValueError(
                f"rho_from_lr needs lr_min <= lr_max; got {low} and {high}"
                f"{'' if None not in (lr_min, lr_max) else ', one of them found'}."
                " Pass the lowest rate as lr_min and the highest as lr_max."
            )
        share = (at(lr_schedule, count) - low) / (high - low) if high > low else 1.0
        return rho_min + (rho_max - rho_min) * jnp.clip(share, 0, 1)

    return schedule
