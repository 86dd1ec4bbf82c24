"""AWP: adversarial weight perturbation (Wu, Xia and Wang, arXiv 2004.05884)."""

from __future__ import annotations

import functools
from typing import Any, Unpack

import jax
import optax

from optax_sam.masks import Mask
from optax_sam.method import WithoutMask, method, on_engine
from optax_sam.methods.look_layer_sam import trust_ratio
from optax_sam.roles import resolve_roles
from optax_sam.schedules import check_schedule


def matrices(params: Any, *, roles: Any = None) -> Any:
    """The mask of the kernels and embeddings, as :func:`optax_sam.awp` perturbs them.

    Args:
      params: a pytree of parameters.
      roles: what each leaf is, a pytree of :class:`optax_sam.Role` or a function from
        the parameters to one; ``None`` means :func:`optax_sam.roles`.

    Returns:
      A pytree of bools like the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
      >>> print(optax_sam.ascent.matrices(params))
      {'bias': False, 'kernel': True}
    """
    is_matrix = lambda role: role.kind in ("kernel", "embedding")
    return jax.tree.map(is_matrix, resolve_roles(roles, params))


@method(trust_ratio)
def awp(
    gamma: optax.ScalarOrSchedule = 0.01,
    *,
    roles: Any = None,
    mask: Mask = matrices,
    **options: Unpack[WithoutMask],
) -> optax.GradientTransformationExtraArgs:
    r"""AWP: perturbs each matrix relative to its norm, for adversarial training.

    .. math::
      e_l = \gamma\, \frac{\|w_l\|}{\|g_l\|}\, g_l \text{ on matrices } l,
      \text{ else } 0, \qquad d = \nabla L(w + e)

    ``L`` is the loss of adversarial examples. Make them once per step, at ``w``, and
    close ``grad_fn`` over them. On clean examples the method is SAM with a ball for
    each layer. Stacked layers in one leaf (``nn.scan``) are perturbed one by one. The
    authors start it after some epochs: ``when=optax_sam.when.after(steps)``.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Args:
      gamma: norm of the perturbation relative to the norm of a matrix, at least 0, or
        a schedule. The authors take 0.01 with PGD and 0.005 with TRADES.
      roles: what each leaf is, for the default of ``mask`` and for stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      mask: the perturbed leaves, by default :func:`optax_sam.ascent.matrices`; see
        :func:`optax_sam.sharpness_aware`.

    Raises:
      ValueError: if ``gamma`` is negative; on ``update``, if there is no matrix.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.awp(gamma=0.01), optax.sgd(0.1, momentum=0.9))

    Differs from the authors' code in:
      1. The direction is the gradient itself. There it is the difference that a step of
         a second optimizer makes to a copy of the network, with more rounding error.
      2. A matrix of zeros is perturbed by ``gamma * g_l``; there it is not perturbed.
      3. A decay after it in the chain decays ``w``; there it decays the perturbed
         weights.

    References:
      Wu, Xia and Wang, `Adversarial Weight Perturbation Helps Robust Generalization
      <https://arxiv.org/abs/2004.05884>`_, 2020; code: csdongxian/AWP
    """
    gamma = check_schedule("gamma", gamma, 0.0)
    if mask is matrices:
        mask = functools.partial(matrices, roles=roles)
    return on_engine("awp", options, ascent=trust_ratio(gamma, roles=roles), mask=mask)
