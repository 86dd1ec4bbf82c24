"""vSAM: SAM sampled by the variation of its gradient (Deng et al., 2403.08821)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.blend import reuse_difference, take_ascended
from optax_sam.contract import check_number
from optax_sam.engine import sharpness_aware
from optax_sam.when import variance_controlled


def vsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    window: int = 50,
    num_slices: int = 5,
    sensitivity: ArrayLike = 0.13,
    max_rate: ArrayLike = 0.8,
    warmup_steps: int | None = None,
    initial_rate: ArrayLike | None = None,
    reuse_decay: ArrayLike = 0.8,
    max_reuse: int | None = 6,
    norm_mask: Mask = None,
    force_quota: bool = True,
    key: ArrayLike = 0,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""vSAM: takes SAM's gradient as often as it changes, and reuses it in between.

    The SAM gradient is the plain one plus a difference,
    :math:`\mathrm{PSF} = \nabla L(w + \rho\, g / \|g\|) - g`. A sampled step computes
    it; the steps after it damp and reuse it:

    .. math::
      d = g + \mathrm{PSF} \;\text{ on sampled steps}, \qquad
      d = g + \beta^j\, \mathrm{PSF} \;\text{ on the } j\text{-th step after}

    How many steps of a window are sampled follows the variation of
    :math:`\|\mathrm{PSF}\|`, see :func:`optax_sam.when.variance_controlled`.
    The number grows over training, since the mean relative change of a noisy norm is
    positive; so the length of the run in windows sets the cost. A run of few windows
    wants smaller ones, or ``initial_rate`` between 0.2 and 0.35 (the published shares),
    since the authors' start of one sample per window hardly grows in it.
    ``reuse_decay=0.0`` is vSAM-A: the same sampler without the reuse, and without the
    stored tree.

    Cost: 1 gradient per step plus 1 per sampled step, 1.3 to 1.43 on average in the
    published runs; one tree like the parameters, three windows of scalars and a
    dozen scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      window: ``K``, steps per window and samples per ring, divisible by
        ``num_slices``.
      num_slices: ``m``, slices of the sorted ring, of at least two values each.
      sensitivity: ``a``, at least 0; 0.05 to 0.2 in the paper.
      max_rate: largest share of sampled steps, in ``(0, 1]``.
      warmup_steps: steps at the start that are all sampled; ``None`` means two
        windows. The paper's script takes three epochs.
      initial_rate: the share of sampled steps after the warm-up, in
        ``(0, max_rate]``; ``None`` is the authors' one per window.
      reuse_decay: ``beta``, damping per step, in ``[0, 1]``; 0.6 to 0.9 in the paper,
        0.7 in its code.
      max_reuse: the largest ``j`` that still reuses; ``None`` means no limit.
      norm_mask: the leaves whose norms are watched; ``None`` means all. The paper's
        shortcut is the last layers; its script watches the last 10 leaves.
      force_quota: whether the end of a window catches up on its quota.
      key: an int, a key from ``jax.random.key``, or raw key data, for the draws.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if an argument is out of its range, ``window`` is not divisible by
        ``num_slices``, or an argument that sets a shape is traced.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> vsam = optax_sam.vsam(rho=0.05, window=10, warmup_steps=20)
      >>> tx = optax.chain(vsam, optax.sgd(0.02, momentum=0.9))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> grad_fn = jax.grad(loss_fn)
      >>> @jax.jit
      ... def train_step(w, state):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...     w, state = train_step(w, state)
      >>> bool(loss_fn(w) < 0.1)
      True
      >>> bool(optax_sam.metrics(state)["ascent_rate"] < 0.6)
      True

    Differs from the authors' code in:
      1. The reuse ends after ``max_reuse`` steps, counted in integers; there a
         comparison of floats allows 6 or 7, depending on ``beta``.
      2. The watched leaves are a mask; there the last 10 tensors as registered.
      3. A change whose predecessor is zero counts as zero; there it is NaN.

    References:
      Deng et al., `Effective Gradient Sample Size via Variation Estimation for
      Accelerating Sharpness aware Minimization <https://arxiv.org/abs/2403.08821>`_,
      2024; code: ajiaaa/vSAM
    """
    reuse_decay = check_number("reuse_decay", reuse_decay, 0.0, 1.0)
    # Only a Python zero: the state's structure cannot depend on a traced value.
    without_reuse = isinstance(reuse_decay, (int, float)) and reuse_decay == 0
    return sharpness_aware(
        ascent.l2(rho),
        variance_controlled(
            window=window,
            num_slices=num_slices,
            sensitivity=sensitivity,
            max_rate=max_rate,
            warmup_steps=warmup_steps,
            initial_rate=initial_rate,
            norm_mask=norm_mask,
            force_quota=force_quota,
            key=key,
        ),
        take_ascended() if without_reuse else reuse_difference(reuse_decay, max_reuse),
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="vsam",
    )
