"""GCSAM: perturbs along the centralized gradient (Hassan et al., arXiv 2501.11584)."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Step, offset_rule
from optax_sam.roles import Role, resolve_roles
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import norm, rescale, wide


def centralized(
    rho: optax.ScalarOrSchedule, *, roles: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.gcsam`: no output unit moves as a whole.

    Args:
      rho: length of the perturbation before its means are subtracted, in units of
        the weights, at least 0, or a schedule of the step.
      roles: what each leaf is, for its output units: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset whose norm is at most ``rho``; it
      needs ``params``.

    Raises:
      ValueError: if ``rho`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.centralized(5.0)
      >>> g = {"kernel": jnp.array([[4.0], [2.0]]), "bias": jnp.array([5.0**0.5])}
      >>> e, _ = rule.update(g, rule.init(g), g)
      >>> print(e["kernel"].ravel())
      [ 1. -1.]
    """
    rho = check_schedule("rho", rho, 0.0)

    def center(x: jax.Array, role: Role) -> jax.Array:
        axes = role.within_unit(x.ndim)
        x = wide(x)
        return x - jnp.mean(x, axes, keepdims=True) if role.output else x

    def offset(g: Any, params: Any, step: Step) -> Any:
        moved = jax.tree.map(center, g, resolve_roles(roles, params))
        return rescale(moved, norm(g), at(rho, step.count))

    return offset_rule(offset, needs=("params",))


@method(centralized)
def gcsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    roles: Any = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GCSAM: the perturbation has mean zero in each output unit.

    .. math::
      e_u = \frac{\rho}{\|g\|}\, \big(g_u - \operatorname{mean}(g_u)\big)
        \text{ for each output unit } u, \qquad d = \nabla L(w + e)

    Leaves without units, such as biases, are perturbed as in SAM. Units are counted
    along the axes that :func:`optax_sam.roles` finds. ``optax.centralize`` differs: it
    counts them along the first axis, as in PyTorch's kernels.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.gcsam(rho=0.05), optax.adam(1e-3))

    Differs from the authors' code in:
      1. A unit of an embedding is one of its features; there it is one of its rows.
      2. Their paper differs from both: it divides by the norm of the centralized
         gradient, and also centralizes the perturbed gradient.

    References:
      Hassan et al., `GCSAM: Gradient Centralized Sharpness Aware Minimization
      <https://arxiv.org/abs/2501.11584>`_, 2025; code: Mohamed-Hassan22/GCSAM
    """
    return on_engine("gcsam", options, ascent=centralized(rho, roles=roles))
