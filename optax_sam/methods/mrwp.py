"""mRWP: mixes in a gradient at random weights (Li et al., arXiv 2211.11489)."""

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
    r"""mRWP: mixes the gradient at ``w`` with one at randomly perturbed weights.

    .. math::
      e_u &= \gamma\, \|W_u\|\, z_u, \quad z \sim \mathcal N(0, I)
        && \text{for each output unit } u \\
      d &= (1 - \alpha)\, \nabla L(w) + \alpha\, \nabla L(w + e)

    A leaf that is neither a kernel nor an embedding is one unit. If it holds stacked
    layers, each layer is one unit. Neither gradient depends on the other, so they can
    run in parallel. The authors compute them on two batches: close ``grad_fn`` over the
    second one. ``alpha=1`` is RWP. :func:`optax_sam.ascent.filter_noise` computes RWP
    and LPF-SGD for 1 gradient.

    Cost: 2 gradients and a normal number per weight on a perturbed step, 1 gradient on
    others; a few scalars and a key of state. The two gradients can run in parallel,
    with the memory of two.

    Args:
      alpha: share of the gradient at the perturbed weights, at least 0, or a schedule;
        0 is the base optimizer.

    Returns:
      A transformation for the first place in an ``optax.chain``. Its ``update`` needs
      ``grad_fn``. The extra argument ``noise``, a pytree of standard normals like the
      parameters, replaces its draw.

    Raises:
      ValueError: if ``gamma`` or ``alpha`` is negative, or ``key`` is no key.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.mrwp(gamma=0.01), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Both gradients use one batch unless ``grad_fn`` has another; there each of two
         processes computes one of them.
      2. BatchNorm's statistics come from the pass at ``w``; there from both passes.

    References:
      Li et al., `Efficient Generalization Improvement Guided by Random Weight
      Perturbation <https://arxiv.org/abs/2211.11489>`_, 2022; code: nblt/RWP
    """
    rule = filter_noise(gamma, key, roles=roles)
    return on_engine("mrwp", options, ascent=rule, blend=interpolate(alpha))
