"""mRWP: mixed with a gradient at random weights (Li et al., arXiv 2211.11489)."""

from __future__ import annotations

from typing import Any, Unpack

import optax
from jax.typing import ArrayLike

from optax_sam.ascent.noise import filter_noise
from optax_sam.method import Options, method, on_engine
from optax_sam.methods.gnp import interpolate


@method(filter_noise)
def mrwp(
    gamma: optax.ScalarOrSchedule = 0.01,
    *,
    alpha: optax.ScalarOrSchedule = 0.5,
    key: ArrayLike = 0,
    roles: Any = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""mRWP: the gradient at ``w`` mixed with one at randomly perturbed weights.

    .. math::
      e_u &= \gamma\, \|W_u\|\, z_u, \quad z \sim \mathcal N(0, I)
        && \text{for each output unit } u \\
      d &= (1 - \alpha)\, \nabla L(w) + \alpha\, \nabla L(w + e)

    Leaves that are no kernels and no embeddings are one unit, in each layer of stacked
    ones. Neither gradient waits for the other one. The authors take them on two
    batches: close ``grad_fn`` over the second one. ``alpha=1`` is RWP, which
    :func:`optax_sam.ascent.filter_noise` has for 1 gradient, and LPF-SGD.

    Cost: 2 gradients per perturbed step, which can run at once, and a normal number
    per weight; 1 on others; a few scalars and a key of state.

    Args:
      alpha: share of the gradient at the perturbed weights, at least 0, or a schedule;
        0 is the base optimizer.

    Returns:
      A transformation for the first place in an ``optax.chain``, whose ``update`` needs
      ``grad_fn``. The extra argument ``noise``, a pytree of standard normals like the
      parameters, replaces its draw.

    Raises:
      ValueError: if ``gamma`` or ``alpha`` is negative, or ``key`` is no key.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.mrwp(gamma=0.01), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Both gradients are on one batch unless ``grad_fn`` has another; there two
         processes take one each.
      2. Statistics of BatchNorm are those of the pass at ``w``; there of both passes.

    References:
      Li et al., `Efficient Generalization Improvement Guided by Random Weight
      Perturbation <https://arxiv.org/abs/2211.11489>`_, 2022; code: nblt/RWP
    """
    rule = filter_noise(gamma, key, roles=roles)
    return on_engine("mrwp", options, ascent=rule, blend=interpolate(alpha))
