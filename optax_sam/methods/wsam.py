"""WSAM: weighted SAM, decoupled (Yue et al., arXiv 2305.15817, KDD 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_sam import checks, schedules, states
from optax_sam.ascent.ball import l2
from optax_sam.barrier import gradients
from optax_sam.engine import SharpnessAwareState
from optax_sam.method import Options, method, on_engine
from optax_sam.schedules import at
from optax_sam.trees import norm, scaled, wide


@states.registered
class WSAMState(NamedTuple):
    """State of :func:`wsam`.

    Attributes:
      ascent: state of the perturbation, with the number of steps taken.
      inner: state of the inner optimizer.
    """

    ascent: SharpnessAwareState
    inner: Any


@method(l2)
def wsam(
    inner: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: optax.ScalarOrSchedule = 0.9,
    max_norm: optax.ScalarOrSchedule | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: adds a weighted sharpness term to the optimizer's step on the loss.

    .. math::
      g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big), \qquad
      w \leftarrow w + \text{inner}(g, w)
        - \eta\, \frac{\gamma}{1 - \gamma}\, (g_s - g)

    The gradient of the sharpness :math:`L(w + e) - L(w)` bypasses the inner optimizer's
    momentum and preconditioning. It therefore needs the learning rate :math:`\eta`
    separately. ``gamma=0`` is the inner optimizer. With plain SGD ``gamma=0.5`` is SAM.

    The coupled form passes both gradients to the optimizer. It is
    :func:`optax_sam.gnp` with ``alpha = gamma / (1 - gamma)``. With plain SGD both
    forms are the same.

    It wraps a whole optimizer, and nothing that rescales its updates may come after
    it in a chain. If the inner optimizer does not move a leaf, the sharpness term still
    moves it. To freeze leaves, put ``optax.masked(optax.set_to_zero(), frozen)`` after
    it.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Args:
      inner: the optimizer, with its learning rate.
      learning_rate: the step :math:`\eta` along the sharpness, at least 0, or a
        schedule: the inner optimizer's own.
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      gamma: weight of the sharpness, in ``[0, 1)``, or a schedule; 0.8 to 0.95 suits
        CNNs.
      max_norm: the norm to which each of the two gradients is clipped before they are
        combined, positive, or a schedule; ``None`` means no limit.

    Returns:
      An optimizer; its ``update`` needs ``params`` and ``grad_fn`` and forwards all
      other extra arguments to ``inner``. Its state is a :class:`WSAMState`.

    Raises:
      ValueError: if a number is out of its range or ``inner`` is no optimizer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> lr = optax.cosine_decay_schedule(0.1, 100)
      >>> tx = optax_sam.wsam(optax.sgd(lr, momentum=0.9), learning_rate=lr)
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss_fn(w) < 0.1)
      True

    Differs from the authors' code in:
      1. If a perturbed gradient is rejected, the inner optimizer's step stays.
      2. Their ``adaptive=True`` is the ellipsoid of ASAM, and their ``decouple=False``
         is :func:`optax_sam.gnp`.

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023; code:
      intelligent-machine-learning/atorch
    """
    learning_rate = schedules.check_schedule("learning_rate", learning_rate, 0.0)
    gamma = schedules.check_schedule("gamma", gamma, 0.0, 1.0, open_high=True)
    if max_norm is not None:
        max_norm = schedules.check_schedule("max_norm", max_norm, 0.0, open_low=True)
    inner = checks.wrapped("wsam", inner, "wsam(optax.sgd(lr), learning_rate=lr)")
    axis_name = options.get("axis_name")
    engine = on_engine("wsam", options, ascent=l2(rho))

    def init(params: Any) -> WSAMState:
        states.check_not_masked("wsam", params, advice=_OUTSIDE)
        inner_state = inner.init(params)
        if states.nodes(inner_state, optax.MultiStepsState):
            raise ValueError(
                "wsam adds its sharpness term on every step, but the optax.MultiSteps"
                " inside it moves the weights on every k-th alone. Accumulate the"
                " gradients inside grad_fn, or put optax.MultiSteps around wsam."
            )
        return WSAMState(engine.init(params), inner_state)

    def update(
        updates: Any, state: WSAMState, params: Any = None, **extra: Any
    ) -> tuple[Any, WSAMState]:
        states.check_not_masked("wsam", updates, params, advice=_OUTSIDE)
        states.check_state("wsam", WSAMState, state)
        g = gradients(updates)
        # On unperturbed and rejected steps this is g, and the term is zero.
        g_s, ascended = engine.update(g, state.ascent, params, **extra)
        if axis_name is not None:
            g = jax.lax.pmean(g, axis_name)
        count = state.ascent.count
        if max_norm is not None:
            # The authors clip as PyTorch does, with this epsilon.
            limit = at(max_norm, count)
            clip = lambda x: scaled(x, jnp.minimum(1, limit / (norm(x) + 1e-6)))
            g, g_s = (optax.tree.cast_like(clip(x), x) for x in (g, g_s))
        u, inner_state = inner.update(g, state.inner, params, **extra)
        weight = at(gamma, count) / (1 - at(gamma, count))
        step = jnp.asarray(at(learning_rate, count) * weight)

        def move(u: jax.Array, x: jax.Array, x_s: jax.Array) -> jax.Array:
            # A guard inside has decided about a gradient that is not finite.
            rise = wide(x_s) - wide(x)
            sharpness = jnp.where(jnp.isfinite(rise), rise, 0)
            return (wide(u) - step.astype(sharpness.dtype) * sharpness).astype(u.dtype)

        return jax.tree.map(move, u, g, g_s), WSAMState(ascended, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


_OUTSIDE = (
    "its grad_fn would get placeholders instead of parameters. Put it outside, and say"
    " with mask= which leaves it perturbs: optax_sam.wsam(optax.partition(transforms,"
    " labels), learning_rate=lr, mask=mask)."
)
