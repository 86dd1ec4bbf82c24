"""AMP: adversarial model perturbation (Zheng et al., arXiv 2010.04925, CVPR 2021)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam.ascent.steps import repeated
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Step, ascent_rule
from optax_sam.roles import by_layer, resolve_roles
from optax_sam.schedules import at, check_integer, check_schedule
from optax_sam.trees import EPS, add, norm, scaled


def raw_steps(
    epsilon: optax.ScalarOrSchedule = 0.5,
    step_size: optax.ScalarOrSchedule = 1.0,
    num_steps: int = 1,
    *,
    projection: Literal["leaf", "global"] = "leaf",
    roles: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The ascent of :func:`optax_sam.amp`: steps as long as the gradient.

    Args:
      epsilon: radius of the balls in units of the weights, at least 0, or a schedule
        of the step.
      step_size: the factor ``zeta`` of a gradient, at least 0, or a schedule.
      num_steps: number ``n`` of steps, at least 1; up to 8 are unrolled.
      projection: ``"leaf"``, or ``"global"`` for one ball of all leaves together.
      roles: what each leaf is, for stacked layers: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.

    Returns:
      A transformation from a gradient to an offset; for several steps it needs
      ``params`` and ``grad_fn``.

    Raises:
      ValueError: if ``epsilon`` or ``step_size`` is negative, ``num_steps`` is traced
        or below 1, or ``projection`` is neither.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.raw_steps(epsilon=0.5)
      >>> g = {"a": jnp.array([0.3, 0.0]), "b": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e["a"], e["b"])
      [0.3 0. ] [0.3 0.4]
    """
    epsilon = check_schedule("epsilon", epsilon, 0.0)
    step_size = check_schedule("step_size", step_size, 0.0)
    check_integer("num_steps", num_steps, 1)
    if projection not in ("leaf", "global"):
        raise ValueError(f'projection must be "leaf" or "global"; got {projection!r}.')

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        radius, factor = at(epsilon, step.count), at(step_size, step.count)

        def shortened(delta: Any) -> Any:
            n = norm(delta)
            return scaled(delta, jnp.where(n > radius, radius / (n + EPS), 1))

        if projection == "leaf":
            layers = resolve_roles(roles, g if params is None else params)

        def project(delta: Any) -> Any:
            if projection == "global":
                return shortened(delta)
            of_layers = lambda x, role: by_layer(shortened, role)(x)
            return jax.tree.map(of_layers, delta, layers)

        def again(_: Any, delta: Any) -> Any:
            g = extra["grad_fn"](add(params, delta))
            return project(add(delta, scaled(g, factor)))

        return repeated(again, num_steps, project(scaled(g, factor))), state

    needs = ("params", "grad_fn") if num_steps > 1 else ()
    return ascent_rule(update, needs=needs)


@method(raw_steps)
def amp(
    epsilon: optax.ScalarOrSchedule = 0.5,
    *,
    inner_lr: optax.ScalarOrSchedule = 1.0,
    inner_iter: int = 1,
    projection: Literal["leaf", "global"] = "leaf",
    roles: Any = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""AMP: raw gradient steps inside a ball for each leaf, published before SAM.

    .. math::
      \delta_0 = 0, \qquad
      \delta_{i+1} = \Pi_\epsilon\big(\delta_i + \zeta\, \nabla L(w + \delta_i)\big),
      \qquad d = \nabla L(w + \delta_n)

    where :math:`\Pi_\epsilon` shortens each leaf to the norm :math:`\epsilon` if it is
    longer. In a leaf of stacked layers (``nn.scan``) it shortens each layer. The step
    is not normalized, so small gradients perturb little. With ``n`` leaves at their
    bound the whole perturbation has the norm :math:`\epsilon \sqrt n`.

    Cost: ``inner_iter + 1`` gradients per perturbed step, 1 on others; a few scalars of
    state.

    Args:
      inner_lr: the factor ``zeta`` of a gradient, at least 0, or a schedule.
      inner_iter: number ``n`` of ascent steps, at least 1; up to 8 are unrolled.

    Raises:
      ValueError: if ``epsilon`` or ``inner_lr`` is negative, ``inner_iter`` is traced
        or below 1, or ``projection`` is neither.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.amp(epsilon=0.1), optax.sgd(0.1))

    Differs from the authors' code in:
      1. Their script clips each gradient to the norm 50, also in the ascent.
      2. The caller updates BatchNorm's statistics; there every pass updates them.

    References:
      Zheng, Zhang and Mao, `Regularizing Neural Networks via Adversarial Model
      Perturbation <https://arxiv.org/abs/2010.04925>`_, 2021; code:
      hiyouga/AMP-Regularizer
    """
    rule = raw_steps(epsilon, inner_lr, inner_iter, projection=projection, roles=roles)
    return on_engine("amp", options, ascent=rule)
