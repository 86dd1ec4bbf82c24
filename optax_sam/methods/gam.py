"""GAM: gradient norm aware minimization (Zhang et al., arXiv 2303.03108, CVPR 2023)."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax.numpy as jnp
import optax

from optax_sam.ascent.ball import l2
from optax_sam.masks import resolve_mask
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Call, Descent
from optax_sam.schedules import at, check_schedule
from optax_sam.trees import (
    add,
    along,
    beyond_rounding,
    keep,
    lift,
    norm,
    rescale,
    scaled,
    weighted,
)


@method()
def gam(
    grad_rho: optax.ScalarOrSchedule = 0.02,
    *,
    norm_rho: optax.ScalarOrSchedule = 0.2,
    beta0: optax.ScalarOrSchedule = 0.5,
    beta1: optax.ScalarOrSchedule = 0.6,
    gamma: optax.ScalarOrSchedule = 0.03,
    h_minus: Literal["paper", "code"] = "paper",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""GAM: lowers the largest gradient norm nearby as well as the loss.

    With :math:`\rho` for ``norm_rho``, :math:`\rho'` for ``grad_rho``,
    :math:`\alpha` for ``beta1`` and :math:`\beta` for ``beta0``:

    .. math::
      g_1 &= \nabla L\Big(w + \rho'\, \frac{g_0}{\|g_0\|}\Big), \qquad h = g_1 - g_0 \\
      g_2 &= \nabla L(w_2), \qquad w_2 = w + \rho\, \frac{h}{\|h\|} \\
      g_3 &= \nabla L\Big(w_2 + \rho'\, \frac{g_2}{\|g_2\|}\Big) \\
      h_+ &= \alpha\, g_1 + (1 - \alpha)\, g_3, \qquad
        h_- = \beta\, g_0 + (1 - \beta)\, g_2 \\
      d &= h_+ - \gamma \Big(h_- - \frac{\langle h_-, h_+ \rangle}{\|h_+\|^2}\, h_+\Big)

    The difference :math:`h` points where the gradient norm rises, so the norm is about
    largest at :math:`w_2`. This is the authors' accelerated form, which needs no
    products with the Hessian. ``gamma=0, beta1=1`` is SAM with ``rho = grad_rho``.

    Cost: 4 gradients per perturbed step, which run one after another, and 1 on others;
    a few scalars of state. ``metrics`` has the norms of :math:`g_0` and :math:`d`.

    Args:
      grad_rho: radius of the steps along gradients in units of the weights, at least 0,
        or a schedule of the step. 0.02 to 0.04 in the authors' runs.
      norm_rho: radius of the step along :math:`h`, at least 0, or a schedule.
      beta0: share of :math:`g_0` in :math:`h_-`, in ``[0, 1]``, or a schedule. The
        authors have 0.5 (ResNets) and 0.3 (PyramidNets) on CIFAR-100, 0.1 on CIFAR-10.
      beta1: share of :math:`g_1` in :math:`h_+`, in ``[0, 1]``, or a schedule. The
        authors have 0.6 and 0.5 on CIFAR-100, 0.1 on CIFAR-10.
      gamma: weight of the part of :math:`h_-` that is normal to :math:`h_+`, at least
        0, or a schedule.
      h_minus: ``"paper"``, as above, or ``"code"``, the authors' code, where
        :math:`h_- = g_0 + (1 - \beta)\, g_2`.

    Raises:
      ValueError: if a number is out of its range, or ``h_minus`` is neither.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.gam(0.02, norm_rho=0.2), optax.sgd(0.1))

    Differs from the authors' code in:
      1. The default for :math:`h_-` is the paper's formula; their code uses
         ``h_minus="code"``.
      2. If the difference :math:`h` consists only of rounding errors (in float32 or
         better), nothing moves; there they are scaled up to the length ``norm_rho``.
      3. The projection has no epsilon; there 1e-12 is added to norms.

    References:
      Zhang et al., `Gradient Norm Aware Minimization Seeks First-Order Flatness and
      Improves Generalization <https://arxiv.org/abs/2303.03108>`_, 2023; code:
      xxgege/GAM
    """
    norm_rho = check_schedule("norm_rho", norm_rho, 0.0)
    beta0 = check_schedule("beta0", beta0, 0.0, 1.0)
    beta1 = check_schedule("beta1", beta1, 0.0, 1.0)
    gamma = check_schedule("gamma", gamma, 0.0)
    if h_minus not in ("paper", "code"):
        raise ValueError(f'h_minus must be "paper" or "code"; got {h_minus!r}.')

    def combined(w_1: Any, call: Call) -> Any:
        """The method's gradient, seen from ``w_1``, the perturbed weights of SAM."""
        chosen = resolve_mask(options.get("mask"), call.params)
        read = lambda value: at(value, call.step.count)

        def towards(h: Any, rho: optax.ScalarOrSchedule, reference: Any) -> Any:
            h = keep(h, chosen)
            length = beyond_rounding(norm(h), norm(keep(reference, chosen)))
            return rescale(h, length, read(rho))

        g_0, g_1 = call.g, call.gradient(w_1)
        h = weighted(jnp.ones(()), g_1, -jnp.ones(()), g_0)
        w_2 = add(call.params, towards(h, norm_rho, g_0))
        g_2 = call.gradient(w_2)
        g_3 = call.gradient(add(w_2, towards(g_2, grad_rho, g_2)))

        alpha, beta = read(beta1), read(beta0)
        h_plus = weighted(alpha, g_1, 1 - alpha, g_3)
        share = beta if h_minus == "paper" else jnp.ones_like(beta)
        h_less = weighted(share, g_0, 1 - beta, g_2)
        factor = lift(norm(h_plus))
        lifted = scaled(h_plus, factor)
        c = along(scaled(h_less, factor), lifted)
        # A zero gradient has no direction to be normal to.
        weight = jnp.where(norm(lifted) > 0, read(gamma), 0)
        return weighted(1 + weight * c, h_plus, -weight, h_less)

    return on_engine("gam", options, ascent=l2(grad_rho), descent=Descent(combined))
