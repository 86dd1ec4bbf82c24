"""Finds which way an optimizer's momentum points, by running the optimizer.

The optimizer runs on a small copy of the parameters with a gradient ``g`` and with
``-g``. A momentum starts at zero and changes its sign with the gradient; a second
moment does not. A momentum that points along ``g`` is one of gradients. A momentum that
points against ``g`` is one of steps. Reversing a momentum also reverses the steps.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import momentum

# The longest axis of the copy, if the state then has the same form as for the
# parameters: masks and partitions may depend on sizes (in optax.adafactor, on 128).
_CAPS = (3, 130, None)
_LARGEST = 2**24  # entries of a copy
# Steps to wait for every leaf of a momentum to move, and for any: MultiSteps delays.
_FEW, _MANY = 64, 1024
_UNBOUND = re.compile(r"unbound axis name: (\w+)")


class _Optimizer(NamedTuple):
    """An optimizer on a copy of the parameters, as programs on leaves.

    Attributes:
      g: leaves of the gradient.
      starts: leaves of the first state.
      updates: ``(g, state) -> (u, state)``, with all leaves. There is one function, and
        one state, for each way to fill in traced values.
      where: the leaves of the state that are the momentum.
      shown: some parameters, one of each rank for each part of the momentum.
    """

    g: list[np.ndarray]
    starts: list[list[Any]]
    updates: list[Callable[[Any, Any], tuple[Any, Any]]]
    where: tuple[int, ...]
    shown: list[int]


class _Seen(NamedTuple):
    """The behaviour of an optimizer.

    Attributes:
      from_zero: whether the momentum starts at zero, or nearly.
      along: for each leaf, 1 along the gradient and -1 against it; 0 if it stayed
        zero, NaN if it does not change its sign with the gradient.
      turns: for each leaf of ``shown``, 1 if the step turns with the momentum, -1 if
        it turns against it, 0 if it does not turn; NaN if there was no step.
      moved: whether each leaf of the weights moved.
    """

    from_zero: bool
    along: np.ndarray
    turns: np.ndarray
    moved: np.ndarray


def sign(
    inner: optax.GradientTransformationExtraArgs,
    params: Any,
    extra: dict[str, Any] | None = None,
) -> int | None:
    """1 if an optimizer has a momentum of gradients, -1 if it has one of steps.

    Args:
      inner: the optimizer; it may close over traced values.
      params: arrays, traced or not, or their shapes.
      extra: the extra arguments of ``update``, if they are known.

    Returns:
      The sign; ``None`` if ``update`` needs an extra argument and ``extra`` is missing.

    Raises:
      ValueError: if the result of :func:`optax_sam.momentum.parts` is no momentum, with
        a remedy.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params
    )
    if not any(x.size for x in jax.tree.leaves(shapes)):
        return 1  # no parameters, so no direction
    # A new thread has none of the caller's traces, meshes, mapped axes and guards. So
    # the numbers here are concrete wherever this is called.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_sign, inner, shapes, extra).result()


def _sign(inner: Any, params: Any, extra: dict[str, Any] | None) -> int | None:
    state = jax.eval_shape(inner.init, params)
    parts = momentum.parts(state, params)
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.debug_infs(False))
        stack.enter_context(jax.transfer_guard("allow"))
        stack.enter_context(_on_cpu())
        for cap in _CAPS:
            w, g = _copies(params, cap)
            if sum(x.size for x in jax.tree.leaves(w)) > _LARGEST:
                break
            for number, arguments in enumerate(_arguments(extra)):
                try:
                    optimizer = _optimizer(inner, w, g, arguments, state, parts)
                    ways = zip(optimizer.starts, optimizer.updates, strict=True)
                    seen = [_watch(optimizer, *way) for way in ways]
                except Exception as e:  # whatever the optimizer of a user raises
                    error = e if number == 0 or error is None else error
                    continue
                return _verdict(seen, parts, state, params)
    if isinstance(error, NameError) and (name := _UNBOUND.search(str(error))):
        return _sign(_on_one_device(inner, name[1]), params, extra)
    if extra is None and isinstance(error, TypeError) and "argument" in str(error):
        return None
    raise ValueError(
        "msam runs the inner optimizer on a small copy of the parameters, to see which"
        f" way its momentum ({momentum.labels(parts)}) points, and that failed:"
        f" {type(error).__name__}: {error}. Make it run on other parameters of this"
        f" structure. {momentum.remedy(state)}"
    ) from error


def _on_one_device(inner: Any, axis_name: str) -> Any:
    """An optimizer that averages over a mapped axis, on an axis of length 1."""

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        mapped = jax.vmap(function, in_axes=None, axis_name=axis_name, axis_size=1)
        return lambda *args: jax.tree.map(lambda x: x[0], mapped(*args))

    def update(g: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        return alone(lambda *args: inner.update(*args, **extra))(g, state, params)

    return optax.GradientTransformationExtraArgs(alone(inner.init), update)


def _on_cpu() -> Any:
    """A device for which small programs compile quickly, if there is one."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _copies(params: Any, cap: int | None) -> tuple[Any, Any]:
    """Weights around 1 and gradients of both signs, with shorter axes."""
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct, factors: list[float]) -> np.ndarray:
        shape = [n if cap is None else min(n, cap) for n in x.shape]
        drawn = rng.uniform(0.5, 1.0, shape) * rng.choice(factors, shape)
        return np.asarray(drawn, x.dtype)

    w = jax.tree.map(lambda x: draw(x, [1.0, 2.0]), params)
    return w, jax.tree.map(lambda x: draw(x, [-1.0, 1.0]), params)


def _arguments(extra: dict[str, Any] | None) -> Iterator[Callable[[Any], dict]]:
    """Sets of extra arguments with which an optimizer may run; small sets first."""
    is_number = lambda x: isinstance(x, (float, int, np.ndarray, jax.Array))
    ones = jax.tree.map(
        lambda x: np.ones(jnp.shape(x), jnp.result_type(x)) if is_number(x) else x,
        extra or {},
    )

    def known(g: Any) -> dict[str, Any]:
        linear = lambda p, *_, **__: optax.tree.vdot(g, p)
        grad_fn = lambda p: jax.tree.map(lambda x, like: x.astype(like.dtype), g, p)
        value = np.float32(1.0)
        functions = dict.fromkeys(("value_fn", "obj_fn"), linear)
        return {"value": value, "grad": g, "grad_fn": grad_fn} | functions

    def some(*names: str) -> Callable[[Any], dict]:
        return lambda g: {k: x for k, x in known(g).items() if k in names}

    yield some()
    yield some("value")
    yield some("value", "grad", "value_fn")
    yield some("obj_fn")
    yield some("grad_fn")
    if extra is not None:
        yield lambda g: ones | some(*ones)(g)


def _optimizer(
    inner: Any,
    w: Any,
    g: Any,
    arguments: Callable[[Any], dict],
    real: Any,
    parts: list[Any],
) -> _Optimizer:
    """Traces an optimizer, whose numbers may belong to another trace."""
    init, state = jax.make_jaxpr(inner.init, return_shape=True)(w)
    where = momentum.locate(state, w)
    wanted = {i: j for part in parts for i, j in part.where.items()}
    same = jax.tree.structure(state) == jax.tree.structure(real)  # type: ignore[operator]
    if not same or where != tuple(wanted[i] for i in range(len(wanted))):
        raise ValueError(
            "its state must have the same form for parameters of other shapes"
        )
    update = jax.make_jaxpr(lambda g, s, w: inner.update(g, s, w, **arguments(g)))(
        g, state, w
    )
    weights, gradient = jax.tree.leaves(w), jax.tree.leaves(g)
    ranks = {(k, weights[i].ndim): i for k, p in enumerate(parts) for i in p.where}
    shown = sorted(ranks.values())

    def filled(jaxpr: Any, number: float) -> Callable[..., list[Any]]:
        fill = lambda x: jnp.full(x.shape, number, x.dtype) if is_traced(x) else x
        constants = [fill(x) for x in jaxpr.consts]

        def call(*leaves: Any) -> list[Any]:
            # A state may change a dtype on the first step.
            cast = [
                x if x.dtype == v.aval.dtype else x.astype(v.aval.dtype)
                for x, v in zip(leaves, jaxpr.jaxpr.invars, strict=True)
            ]
            return jax.core.eval_jaxpr(jaxpr.jaxpr, constants, *cast)

        return call

    def program(number: float) -> Callable[[Any, Any], tuple[Any, Any]]:
        call = filled(update, number)

        def step(g: Any, state: Any) -> tuple[Any, Any]:
            out = call(*g, *state, *weights)
            return out[: len(weights)], out[len(weights) :]

        return jax.jit(step)

    is_traced = lambda x: isinstance(x, jax.core.Tracer)
    traced = any(map(is_traced, [*init.consts, *update.consts]))
    numbers = (0.1, -0.1) if traced else (0.1,)
    return _Optimizer(
        gradient,
        [filled(init, x)(*weights) for x in numbers],
        [program(x) for x in numbers],
        where,
        shown,
    )


def _watch(optimizer: _Optimizer, start: Any, update: Any) -> _Seen:
    """Runs an optimizer with a gradient and its negative until its momentum moves."""
    g, where, shown = optimizer.g, optimizer.where, optimizer.shown
    read = lambda state: [np.asarray(state[i], np.float64) for i in where]
    first = list(map(np.linalg.norm, read(start)))
    from_zero = True
    filled = np.array([x.size > 0 for x in g])
    along, turns = np.zeros(len(g)), np.full(len(shown), np.nan)
    stepped = np.zeros(len(g), bool)
    plus = minus = start
    for t in range(_MANY):
        before = plus
        u, plus = update(g, before)
        stepped |= [bool(np.any(x)) for x in u]
        _, minus = update([-x for x in g], minus)
        odd = [(a - b) / 2 for a, b in zip(read(plus), read(minus), strict=True)]
        even = [(a + b) / 2 for a, b in zip(read(plus), read(minus), strict=True)]
        now = np.array(list(map(_direction, odd, even, g)))
        along = np.where(along == 0, now, along)
        from_zero &= all(
            a <= 0.01 * np.linalg.norm(b) for a, b in zip(first, odd, strict=True) if a
        )
        # Not on the first step, on which some optimizers set their momentum.
        unseen = np.isnan(turns) | (turns == 0)
        if unseen.any() and any(np.any(x) for x in u):
            new = _turns(optimizer, update, before, u, odd, along)
            turns = np.where(unseen & ~np.isnan(new), new, turns)
            unseen = np.isnan(turns) | (turns == 0)
        moved = (along != 0) | ~filled
        if (moved.all() and not unseen.any()) or (t >= _FEW and moved.any()):
            break
    return _Seen(from_zero, along, turns, stepped)


def _direction(odd: np.ndarray, even: np.ndarray, g: np.ndarray) -> float:
    """The direction of a leaf that changed by ``odd`` with the gradient's sign."""
    g = np.asarray(g, np.float64)
    size, both = np.linalg.norm(odd), np.linalg.norm(even)
    if size == both == 0:
        return 0.0
    cosine = np.sum(odd * g) / (size * np.linalg.norm(g) + 1e-300)
    return np.sign(cosine) if size > 0.01 * both and abs(cosine) > 0.1 else np.nan


def _turns(
    optimizer: _Optimizer, update: Any, before: Any, u: Any, odd: Any, along: Any
) -> np.ndarray:
    """How the leaves of a step turn with the momentum, made large enough to decide."""

    def step(factor: float) -> list[np.ndarray]:
        state = list(before)
        for i, x in zip(optimizer.where, odd, strict=True):
            state[i] = jnp.asarray(factor * x, state[i].dtype)
        return [np.asarray(x, np.float64) for x in update(optimizer.g, state)[0]]

    turns, ups, downs = [], step(1e3), step(-1e3)
    for i in optimizer.shown:
        x, up, down = u[i], ups[i], downs[i]
        change, scale = up - down, np.abs(up) + np.abs(down)
        unknown = not np.isfinite(change).all() or not np.any(scale)  # an overflow
        if unknown or not np.any(x) or along[i] == 0:
            turns.append(np.nan)  # no step, or none from this leaf's momentum yet
        elif np.linalg.norm(change) <= 1e-6 * np.linalg.norm(scale):
            turns.append(0.0)
        else:
            turns.append(np.sign(np.sum(change * odd[i])))
    return np.array(turns)


def _verdict(ways: list[_Seen], parts: list[Any], state: Any, params: Any) -> int:
    """The sign, which must be the same for all ways to fill in traced values."""
    traced = len(ways) > 1
    signs = {_sign_of(seen, parts, state, params, traced) for seen in ways}
    if len(signs) > 1:
        raise ValueError(
            f"msam cannot tell which way the momentum ({momentum.labels(parts)})"
            " points: the inner optimizer keeps an average of steps, and its sign"
            " depends on a traced learning rate. Put the learning rate after"
            " the momentum: optax.chain(optax.scale_by_rms(), optax.trace(0.9),"
            " optax.scale_by_learning_rate(learning_rate))."
        )
    return signs.pop()


def _sign_of(
    seen: _Seen, parts: list[Any], state: Any, params: Any, traced: bool
) -> int:
    names = momentum.labels(parts)
    uphill = bool(np.any(seen.turns[:, None] == seen.along)) and not traced
    own = not all(part.named for part in parts)
    none = ""
    if not seen.from_zero:
        none = "does not start at zero"
    elif np.isnan(seen.along).any():
        none = "does not change its sign with the gradient"
    elif np.any(seen.turns == 0) and not traced:
        none = "does not move the weights"
    elif uphill and own:
        none = "leads uphill"
    if none:
        raise ValueError(
            "msam needs a momentum to perturb along, but the inner optimizer keeps"
            f" none: {names} {none}. {momentum.remedy(state)}"
        )
    if not seen.along.any():
        raise ValueError(
            f"msam cannot tell which way the momentum ({names}) points: it stays zero"
            f" for {_MANY} steps, as after a learning rate of zero. Put the learning"
            " rate after the momentum: optax.chain(optax.trace(0.9),"
            " optax.scale_by_learning_rate(schedule))."
        )
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    of = {
        int(x): jax.tree_util.keystr(path)
        for x, path in zip(seen.along, paths, strict=True)
        if x
    }
    if len(of) > 1:
        raise ValueError(
            "msam needs one momentum of all parameters, but the inner optimizer keeps"
            f" a momentum of gradients for {of[1]} and a momentum of steps, with the"
            f" other sign and other units, for {of[-1]}. Put the learning rate after"
            " the momentum in"
            " each part, as optax.sgd and optax.adam do (optax.rmsprop and optax.lars"
            " do not)."
        )
    # Empty leaves have no momentum that moves.
    still = (seen.along != 0) & ~seen.moved
    if seen.moved.any() and still.any():
        frozen = [jax.tree_util.keystr(paths[i]) for i in np.flatnonzero(still)]
        raise ValueError(
            f"msam would perturb {momentum.and_more(frozen)}, which the inner optimizer"
            f" never moves although it keeps a momentum there. {momentum.FREEZE}"
        )
    if uphill:
        raise ValueError(
            "msam needs an inner optimizer that steps down the gradient, but this one"
            f" (its momentum is {names}) moves the weights up the gradient. It lacks"
            f" its learning rate, which must be inside msam, as in {momentum.PLAIN}. If"
            " it maximizes on purpose, minimize the negative."
        )
    return next(iter(of))
