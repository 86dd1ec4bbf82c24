"""ASAM: adaptive SAM (Kwon et al., arXiv 2102.11600, ICML 2021)."""

from __future__ import annotations

from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    *,
    eta: optax.ScalarOrSchedule = 0.01,
    adapt: Mask = None,
    roles: Any = None,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: SAM in an ellipsoid that follows the sizes of the weights.

    .. math::
      T = |w| + \eta \text{ on adapted leaves, else } 1, \qquad
      e = \rho\, \frac{T^2 g}{\|T g\|}, \qquad d = \nabla L(w + e)

    The perturbation does not change when layers are rescaled without changing the
    function. Two flavours are published, and they need different radii: the authors'
    (the defaults: kernels and norm gains are adapted, biases have ``T = 1``; ``rho``
    0.5 on CIFAR-10, 1.0 on CIFAR-100) and that of davda54/sam (``adapt=True,
    eta=0.0``: all leaves, biases too; ``rho`` about 2). The authors' example script
    runs with ``eta=0.0``.

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state.

    Args:
      rho: radius relative to the weights' sizes, at least 0, or a schedule.
      eta: added to the sizes, at least 0, or a schedule.
      adapt: the adapted leaves: a bool for all, a tree of bools like the parameters
        or a prefix of it, or a function from the parameters to one; ``None`` means
        kernels, embeddings and gains of normalization layers, and neither biases nor
        offsets.
      roles: what each leaf is, where ``adapt`` does not say it: a pytree of
        :class:`optax_sam.Role` or a function from the parameters to one; ``None``
        means :func:`optax_sam.roles`, whose table :func:`optax_sam.roles_table`
        prints.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative, or both ``adapt`` and ``roles``
        are given.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.asam(rho=0.5), optax.adam(0.1))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros((3, 1))
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1)
      True

    Differs from the authors' code in:
      1. 1e-12 is added to the norm; there 1e-16, which float32 does not see.
      2. The adapted leaves are found by names and structure, see
         :func:`optax_sam.roles`; there by ``weight`` in the name, which PyTorch gives
         to kernels, embeddings and gains. What no name tells is adapted here if it
         has two or more axes, such as a bare class token.

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021;
      code: SamsungLabs/ASAM
    """
    return sharpness_aware(
        ascent.adaptive(rho, eta, adapt, roles=roles),
        when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="asam",
    )
