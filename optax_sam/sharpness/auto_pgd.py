"""The largest loss in a ball, by Auto-PGD. All worst cases here use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam.axes import vary
from optax_sam.sharpness.data import repeat, scan
from optax_sam.sharpness.probes import typed_key
from optax_sam.trees import norm, rescale, scaled, widest

Ball = Literal["l2", "linf"]
ALPHA = 0.75  # the share of a step that is new; the rest repeats the step before


class Ascent(NamedTuple):
    """The best point of one ascent.

    Attributes:
      value: the objective there; -inf if no point had a number.
      earlier: the best value found before the last quarter of the steps.
      u: the point.
    """

    value: jax.Array
    earlier: jax.Array
    u: Any


class Maximum(NamedTuple):
    """The best point of all ascents in a ball around zero.

    Attributes:
      gain: how far the objective rose above its value at zero; at least 0, and NaN
        where it was NaN at zero or at all other points.
      late_gain: the part of the gain that came in the last quarter of the steps.
      u: the point; zero if none was better.
    """

    gain: jax.Array
    late_gain: jax.Array
    u: Any


def maximize(
    value_and_grad: Callable[[Any], tuple[jax.Array, Any]],
    at_zero: jax.Array,
    like: Any,
    rho: ArrayLike,
    key: ArrayLike | None,
    *,
    ball: Ball = "l2",
    project: Callable[[Any], Any] = lambda u: u,
    num_steps: int = 20,
    num_restarts: int = 1,
    axis_name: Any = None,
    on_host: bool = False,
) -> Maximum:
    """The best of ascents from random points, or of one from zero if ``key`` is None.

    Each ascent takes ``num_steps + 1`` values with gradients. The ascents run one after
    the other and only the best point is kept, so memory does not grow with their
    number.

    Args:
      value_and_grad: the objective, a function of a pytree like ``like``.
      at_zero: the objective at zero.
      like: a pytree of arrays, whose shapes and dtypes are used.
      rho: radius of the ball.
      key: an int, typed key or raw key data for the starts; ``None``: zero.
      ball: ``"l2"``, over all leaves together, or ``"linf"``.
      project: with ``"l2"``, an orthogonal projector to the subspace to stay in.
      num_steps: steps of each ascent.
      num_restarts: the number of random starts.
      axis_name: the mapped axis over which the objective differs between devices.
      on_host: whether the objective is a loop of the host.

    Returns:
      The best point, and its gain over zero.
    """
    climb = lambda start: auto_pgd(
        value_and_grad,
        start,
        rho,
        ball=ball,
        project=project,
        num_steps=num_steps,
        axis_name=axis_name,
        on_host=on_host,
    )
    zeros = jax.tree.map(jnp.zeros_like, like)
    if key is None:
        found = climb(zeros)
    else:

        def attempt(best: Ascent, key: jax.Array) -> tuple[Ascent, None]:
            new = climb(random_start(key, like, rho, ball=ball, project=project))
            return _select(new.value > best.value, new, best), None

        nothing = jnp.full_like(at_zero, -jnp.inf)
        first = vary(Ascent(nothing, nothing, zeros), axis_name)
        keys = jax.random.split(typed_key(key), num_restarts)
        found = scan(on_host, attempt, first, keys)[0]
    # Zero is in the ball, so the gain is at least 0; but NaN must not become 0.
    value = jnp.where(found.value == -jnp.inf, jnp.nan, found.value)
    better = ~(value <= at_zero)
    gain = jnp.where(better, value - at_zero, 0)
    before = jnp.where(found.earlier > at_zero, found.earlier - at_zero, 0)
    u = jax.tree.map(lambda x: jnp.where(better, x, 0), found.u)
    return Maximum(gain, gain - jnp.where(better, before, 0), u)


def random_start(
    key: jax.Array,
    like: Any,
    rho: ArrayLike,
    *,
    ball: Ball = "l2",
    project: Callable[[Any], Any] = lambda u: u,
) -> Any:
    """A point uniform on the sphere within the subspace (l2), or in the box (linf)."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    if ball == "linf":
        draw = lambda key, x: jax.random.uniform(key, x.shape, x.dtype, -1, 1)
        unit = jax.tree.unflatten(structure, map(draw, keys, leaves))
        return scaled(unit, jnp.asarray(rho))
    draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
    direction = project(jax.tree.unflatten(structure, map(draw, keys, leaves)))
    return rescale(direction, norm(direction), rho, eps=0.0)


class _Climb(NamedTuple):
    u: Any
    previous: Any
    best: Ascent
    gradient: Any  # at the best point
    eta: jax.Array
    rises: jax.Array  # of the best value, since the last checkpoint


def auto_pgd(
    value_and_grad: Callable[[Any], tuple[jax.Array, Any]],
    u0: Any,
    rho: ArrayLike,
    *,
    ball: Ball = "l2",
    project: Callable[[Any], Any] = lambda u: u,
    num_steps: int = 20,
    axis_name: Any = None,
    on_host: bool = False,
) -> Ascent:
    r"""Auto-PGD from ``u0`` in a ball of radius ``rho`` around zero.

    .. math::
      z = P(u_k + \eta\, s(\nabla \varphi(u_k))), \qquad
      u_{k+1} = P(u_k + \alpha (z - u_k) + (1 - \alpha) (u_k - u_{k-1}))

    with :math:`s` the unit gradient (l2) or its signs (linf), :math:`P` the projection
    to the ball, :math:`\alpha = 0.75`, and :math:`u_1 = z`. The step :math:`\eta`
    begins at :math:`2 \rho`. At each checkpoint, if fewer than three in four steps
    were improvements, the step is halved, and the ascent continues from the best point
    so far.

    It takes ``num_steps + 1`` values with gradients. The gradient at the last point is
    not used, but this way the program has one copy of the objective.

    Difference from the authors' code: a step counts as an improvement if it improves
    the best value, not the value before it. So the step is always halved if the best
    value did not rise between two checkpoints; their second condition asks for this.

    Args:
      value_and_grad: the objective, a function of a pytree like ``u0``.
      u0: the start, in the ball and the subspace.
      rho: radius of the ball.
      ball: ``"l2"`` or ``"linf"``.
      project: with ``"l2"``, an orthogonal projector to the subspace to stay in.
      num_steps: ``n``.
      axis_name: the mapped axis over which the objective differs between devices.
      on_host: whether the objective is a loop of the host.

    Returns:
      The best point of the ascent, which may be ``u0``.

    References:
      Croce and Hein, `Reliable Evaluation of Adversarial Robustness with an Ensemble
      of Diverse Parameter-free Attacks <https://arxiv.org/abs/2003.01690>`_, 2020
    """
    demands = jnp.asarray(checkpoint_demands(num_steps))
    late = num_steps - max(num_steps // 4, 1)
    radius = jnp.asarray(rho)

    def onto_ball(u: Any) -> Any:
        if ball == "linf":
            bound = lambda x: radius.astype(x.dtype)
            return jax.tree.map(lambda x: jnp.clip(x, -bound(x), bound(x)), u)
        u = project(u)
        length = norm(u)
        far = length > radius.astype(length.dtype)
        # Inside the ball, a multiplication by one would round.
        return _select(far, rescale(u, length, radius, eps=0.0), u)

    def uphill(g: Any) -> Any:
        if ball == "linf":
            return jax.tree.map(jnp.sign, g)
        g = project(g)
        return rescale(g, norm(g), 1.0, eps=0.0)

    def climb(k: jax.Array, state: _Climb) -> _Climb:
        u, previous, best, best_g, eta, rises = state
        value, g = value_and_grad(u)
        better = value > best.value
        top = jnp.where(better, value, best.value)
        earlier = jnp.where(k == late, top, best.earlier)
        best = Ascent(top, earlier, _select(better, u, best.u))
        best_g = _select(better, g, best_g)

        rises = rises + better.astype(rises.dtype)
        halve = 4 * rises < demands[k]
        rises = jnp.where(demands[k] > 0, 0, rises)
        eta = jnp.where(halve, eta / 2, eta)
        u, previous, g = _select(halve, (best.u, best.u, best_g), (u, previous, g))

        step = lambda x, s: x + eta.astype(x.dtype) * s
        z = onto_ball(jax.tree.map(step, u, uphill(g)))
        blend = lambda z, x, y: x + ALPHA * (z - x) + (1 - ALPHA) * (x - y)
        mixed = onto_ball(jax.tree.map(blend, z, u, previous))
        return _Climb(_select(k == 0, z, mixed), u, best, best_g, eta, rises)

    # A loss has the weights' dtype; on the host nothing depends on it.
    dtype = widest(*jax.tree.leaves(u0))
    if not on_host:
        dtype = jax.eval_shape(value_and_grad, u0)[0].dtype
    nothing = jnp.full((), -jnp.inf, dtype)
    zeros = jax.tree.map(jnp.zeros_like, u0)
    start = _Climb(
        u=u0,
        previous=u0,
        best=Ascent(nothing, nothing, u0),
        gradient=zeros,
        eta=2 * radius,
        rises=jnp.zeros((), jnp.int32),
    )
    # One more turn than steps, because each turn begins with the value of a point.
    end = repeat(on_host, num_steps + 1, climb, vary(start, axis_name))
    return end.best


def checkpoint_demands(num_steps: int) -> np.ndarray:
    """Four times the improvements required after ``k`` steps; 0 if none are.

    The start always counts as an improvement; the first entry resets the count then.
    """
    # In whole hundredths: in floating point 0.7 * 20 lies above 14.
    marks, step = [22], 19
    while marks[-1] + step < 100:
        marks.append(marks[-1] + step)
        step = max(step - 3, 6)
    positions = sorted({-(-mark * num_steps // 100) for mark in marks})
    demands = np.zeros(num_steps + 1, np.int32)
    demands[0] = 1
    demands[positions] = 3 * np.diff([0, *positions])
    return demands


def _select(choice: jax.Array, x: Any, y: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(choice, x, y), x, y)
