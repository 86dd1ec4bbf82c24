"""Where the second gradient is taken: rules from a gradient to an offset ``e``.

A rule is an ordinary ``optax.GradientTransformationExtraArgs`` whose updates are the
offset, uphill. The engine hands it ``grad_fn``, for rules that look more than once,
and ``count``, the step that schedules are read at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.arguments import Mask, at, resolve_mask
from optax_sam.contract import check_integer, check_schedule

__all__ = ["adaptive", "l2", "n_step", "norm", "rescale", "restrict"]

# Added to a norm before dividing, outside the square root. The authors' codes have
# none, 1e-16, 1e-12 or 1e-7; at 1e-12 a float32 gradient never notices.
_EPS = 1e-12

# XLA's CPU backend runs backward convolutions in a loop many times slower than in the
# entry computation, so short loops are unrolled.
_UNROLL_LIMIT = 8


def norm(tree: Any) -> jax.Array:
    """The l2 norm over all leaves together, accumulated in float32 or better."""
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def rescale(tree: Any, length: jax.Array, radius: ArrayLike) -> Any:
    """``radius * tree / length``, in float32 or better.

    A length that is zero or not finite is no direction: finite entries then give a
    zero offset; others stay NaN, and the engine uses nothing of such a step.
    """
    radius = jnp.asarray(radius, length.dtype)
    scale = jnp.where(length > 0, radius / (length + _EPS), 0)
    wide = lambda x: scale.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.tree.map(lambda x: wide(x) * x, tree)


def l2(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an l2 ball: :math:`e = \rho\, g / \|g\|`.

    The norm is global, over all leaves together.

    Args:
      rho: radius of the ball, in units of the weights, at least 0, or a schedule.

    Returns:
      A transformation from a gradient to an offset of norm ``rho``; a zero gradient
      gives a zero offset.

    Raises:
      ValueError: if ``rho`` is negative.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.l2(0.5)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> e, _ = rule.update(g, rule.init(g))
      >>> print(e["w"])
      [0.3 0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    check_schedule("rho", rho, 0.0)

    def update(
        g: Any, state: Any, params: Any = None, *, count: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        return rescale(g, norm(g), at(rho, count)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def adaptive(
    rho: optax.ScalarOrSchedule,
    eta: optax.ScalarOrSchedule = 0.01,
    adapt: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The steepest point of an ellipsoid that follows the sizes of the weights.

    .. math::
      T = |w| + \eta \text{ on adapted leaves, else } 1, \qquad
      e = \rho\, T^2 g / \|T g\|, \qquad \|e / T\| = \rho

    Args:
      rho: radius in units of the weights' own size, at least 0, or a schedule.
      eta: added to the sizes, so that zero weights move too; at least 0, or a
        schedule.
      adapt: the adapted leaves: a bool for all, a tree of bools or a prefix of it,
        or a function from the parameters to one. Default: leaves with two or more
        dimensions, and gains of normalization layers (named ``scale`` or
        ``weight``).

    Returns:
      A transformation from a gradient to an offset; it needs ``params``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.adaptive(1.0, eta=0.0, adapt=True)
      >>> w, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 2.0])}
      >>> e, _ = rule.update(g, rule.init(w), w)
      >>> print(e["w"])
      [0.6 1.6]

    References:
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    check_schedule("rho", rho, 0.0)
    check_schedule("eta", eta, 0.0)
    chosen = _weights_and_gains if adapt is None else adapt

    def update(
        g: Any, state: Any, params: Any = None, *, count: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        if params is None:
            raise ValueError("An adaptive ascent needs params: its ellipsoid is |w|.")
        radius, eta_now = at(rho, count), at(eta, count)
        adapted = resolve_mask(chosen, params, name="adapt")

        def scaled(x: jax.Array, w: jax.Array, is_adapted: bool) -> jax.Array:
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return (jnp.abs(w) + eta_now) * x if is_adapted else x

        t_g = jax.tree.map(scaled, g, params, adapted)
        t2_g = jax.tree.map(scaled, t_g, params, adapted)
        return rescale(t2_g, norm(t_g), radius), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _weights_and_gains(params: Any) -> Any:
    """Kernels, embeddings and norm gains, as PyTorch's ``weight`` names them."""

    def is_weight(path: Any, leaf: Any) -> bool:
        names = {getattr(k, "key", getattr(k, "name", None)) for k in path[-2:]}
        return jnp.ndim(leaf) >= 2 or bool(names & {"scale", "weight"})

    return jax.tree_util.tree_map_with_path(is_weight, params)


def n_step(
    rho: optax.ScalarOrSchedule,
    num_steps: int,
    *,
    step_size: optax.ScalarOrSchedule | None = None,
    project: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Several ascent steps, each normalized, kept inside the ball of radius rho.

    .. math::
      \delta_0 = 0, \qquad
      \delta_{i+1} = \Pi_\rho\big(\delta_i + s\, g_i / \|g_i\|\big), \qquad
      g_i = \nabla L(w + \delta_i), \qquad e = \delta_n

    The first gradient is the incoming one, so ``n`` steps cost ``n`` gradients and
    the descent gradient one more.

    Args:
      rho: radius of the ball, at least 0, or a schedule.
      num_steps: number ``n`` of ascent steps, at least 1; up to 8 are unrolled,
        more run in a loop (slow for convolutions on CPU).
      step_size: length ``s`` of one step; ``None`` means ``rho``.
      project: whether to return into the ball after each step. Without it the offset
        can reach ``n * s``, as in ``optax.contrib.sam`` with
        ``sync_period = n + 1``.

    Returns:
      A transformation from a gradient to an offset; it needs ``params`` and
      ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``step_size`` is negative, or ``num_steps`` is traced
        or below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.n_step(0.1, num_steps=3)
      >>> grad_fn = jax.grad(lambda w: (w**2).sum())
      >>> w = jnp.array([3.0, 4.0])
      >>> e, _ = rule.update(grad_fn(w), rule.init(w), w, grad_fn=grad_fn)
      >>> print(jnp.linalg.norm(e))
      0.1

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2021; projected as in Andriushchenko and
      Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, 2022
    """
    check_schedule("rho", rho, 0.0)
    check_integer("num_steps", num_steps, 1)
    if step_size is not None:
        check_schedule("step_size", step_size, 0.0)

    def update(
        g: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Callable[[Any], Any] | None = None,
        count: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del extra
        if params is None or grad_fn is None:
            raise ValueError("An ascent of several steps needs params and grad_fn.")
        radius = at(rho, count)
        length = radius if step_size is None else at(step_size, count)

        def climb(delta: Any, g: Any) -> Any:
            delta = optax.tree.add(delta, rescale(g, norm(g), length))
            if not project:
                return delta
            size = norm(delta)
            return jax.tree.map(
                lambda x, inner: jnp.where(size > radius, x, inner),
                rescale(delta, size, radius),
                delta,
            )

        # No distance from zero to go back: the first step needs no projection,
        # unless it is longer than the radius.
        delta = rescale(g, norm(g), jnp.minimum(length, radius) if project else length)
        step = lambda _, delta: climb(delta, grad_fn(optax.tree.add(params, delta)))
        if num_steps > _UNROLL_LIMIT:
            return jax.lax.fori_loop(1, num_steps, step, delta), state
        for i in range(1, num_steps):
            delta = step(i, delta)
        return delta, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def restrict(
    rule: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """The rule on some leaves only: the others stay in place and out of the norm.

    ``optax.masked`` will not do here: it lets the raw gradient through as offset.

    Args:
      rule: an ascent rule.
      mask: the leaves that move: a tree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all.

    Returns:
      The restricted ascent rule.

    Raises:
      ValueError: (on update) if the mask holds anything but Python bools or has
        another structure than the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.restrict(
      ...     optax_sam.ascent.l2(0.5), {"kernel": True, "bias": False})
      >>> g = {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([7.0])}
      >>> e, _ = rule.update(g, rule.init(g), g)
      >>> print(e["kernel"], e["bias"])
      [0.3 0.4] [0.]
    """
    inner = optax.with_extra_args_support(rule)
    if mask is None:
        return inner

    def keep(tree: Any, chosen: Any) -> Any:
        return jax.tree.map(
            lambda x, kept: x if kept else jnp.zeros_like(x), tree, chosen
        )

    def update(g: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        chosen = resolve_mask(mask, g if params is None else params)
        if grad_fn := extra.get("grad_fn"):
            extra["grad_fn"] = lambda p: keep(grad_fn(p), chosen)
        e, state = inner.update(keep(g, chosen), state, params, **extra)
        return keep(e, chosen), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
