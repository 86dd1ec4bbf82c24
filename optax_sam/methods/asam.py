"""ASAM: adaptive SAM (Kwon et al., arXiv 2102.11600, ICML 2021)."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.masks import Mask, resolve_mask
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Step, offset_rule
from optax_sam.roles import is_weight, resolve_roles
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import norm, rescale, wide


def adaptive(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.01,
    adapt: Mask = None,
    *,
    roles: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.asam`: an ellipsoid that follows the weights.

    Args:
      rho: radius relative to the weights' sizes, at least 0, or a schedule of the step.
      eta: added to the sizes, so that zero weights move too; at least 0, or a
        schedule.
      adapt: the adapted leaves: a bool for all, a pytree of bools like the parameters
        or a prefix of it, or a function from the parameters to one; ``None`` means
        kernels, embeddings and gains of normalization layers, but not biases and
        offsets.
      roles: what each leaf is, if ``adapt`` is not given: a pytree of
        :class:`optax_sam.Role` or a function from the parameters to one; ``None``
        means :func:`optax_sam.roles`. :func:`optax_sam.roles_table` prints them.

    Returns:
      A transformation from a gradient to an offset with ``norm(e / T) = rho``; it
      needs ``params``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative, or both ``adapt`` and ``roles``
        are given.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.adaptive(1.0, eta=0.0, adapt=True)
      >>> w, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 2.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["w"])
      [0.6 1.6]
    """
    rho = check_schedule("rho", rho, 0.0)
    eta = check_schedule("eta", eta, 0.0)
    if adapt is not None and roles is not None:
        raise ValueError(
            "adapt already says which leaves are adapted, so roles has no effect:"
            " write roles= alone, or"
            " adapt=lambda params: jax.tree.map(choose, roles(params))."
        )

    def offset(g: Any, params: Any, step: Step) -> Any:
        eta_now = at(eta, step.count)
        if adapt is None:
            adapted = jax.tree.map(is_weight, resolve_roles(roles, params))
        else:
            adapted = resolve_mask(adapt, params, name="adapt")

        def times_t(x: jax.Array, w: jax.Array, is_adapted: bool) -> jax.Array:
            return (jnp.abs(wide(w)) + eta_now) * wide(x) if is_adapted else wide(x)

        t_g = jax.tree.map(times_t, g, params, adapted)
        t2_g = jax.tree.map(times_t, t_g, params, adapted)
        return rescale(t2_g, norm(t_g), at(rho, step.count))

    return offset_rule(offset, needs=("params",))


@method(adaptive)
def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    *,
    eta: optax.ScalarOrSchedule = 0.01,
    adapt: Mask = None,
    roles: Any = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: perturbs in an ellipsoid that follows the sizes of the weights.

    .. math::
      T = |w| + \eta \text{ on adapted leaves, else } 1, \qquad
      e = \rho\, \frac{T^2 g}{\|T g\|}, \qquad d = \nabla L(w + e)

    The perturbation does not change when layers are rescaled without changing the
    function. Two flavours are published, and they need different radii:

    - **The authors' flavour** is the default. It adapts kernels and norm gains; biases
      have ``T = 1``. ``rho`` is 0.5 on CIFAR-10 and 1.0 on CIFAR-100. The authors'
      example script runs with ``eta=0.0``.
    - **davda54/sam** adapts all leaves, biases too: ``adapt=True, eta=0.0``. ``rho`` is
      about 2.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.asam(rho=0.5), optax.sgd(0.1))

    Differs from the authors' code in:
      1. 1e-12 is added to the norm; there it is 1e-16, which float32 rounds away.
      2. The adapted leaves are found by names and structure, see
         :func:`optax_sam.roles`; there by ``weight`` in the name, which PyTorch gives
         to kernels, embeddings and gains. If no name identifies a leaf, it is adapted
         here if it has two or more axes, such as a bare class token.

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021;
      code: SamsungLabs/ASAM
    """
    return on_engine("asam", options, ascent=adaptive(rho, eta, adapt, roles=roles))
