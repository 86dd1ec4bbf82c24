"""Two compiled steps instead of one conditional, chosen on the host."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_sam.engine import recorded_steps
from optax_sam.parts import known_ahead
from optax_sam.readers import ascends_next, ascent_plan, members
from optax_sam.states import without_variables


class _NoSingleStep(Exception):
    """The traced function does not take one step from the state that it gets."""


def dispatch(
    train_step: Callable[..., Any] | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
    **jit_options: Any,
) -> Callable[..., Any]:
    """Compiles a train step with and without perturbation, and calls the right one.

    XLA's CPU backend runs backward convolutions inside a conditional (or a loop) many
    times slower than outside, and a GPU has to read the decision back. Two
    straight-line programs have neither cost. The numbers and the decisions are the same
    as with ``jit(train_step)``.

    ``dispatch`` reads decisions ahead. The loop waits for the device once per window
    (vSAM) or once per 64 steps, and otherwise runs ahead of it. This is safe if each
    call takes one step of the method from its state, and returns the state after it.
    ``dispatch`` checks this in the program while it traces ``train_step``. Other
    programs run more slowly:

    - If something may hold the step back or roll it back, such as
      ``optax.apply_if_finite``, each call first reads the decision from its state.
    - If the step runs inside a branch, a loop or a ``vmap``, as in
      ``optax.MultiSteps``, or if there are several steps, the single program with the
      conditional runs, with ``ascend=None``. It also runs for a rule that needs the
      next gradient to decide, and inside another ``jit``, ``scan`` or ``vmap``.
    - If the state is not the one that the last call returned, such as a restored one,
      the call reads its decision, and then the plan from the state after it.

    Args:
      train_step: the step to compile. One of its arguments is the state of an optimizer
        with one sharpness-aware method; it returns this state or updates it in place.
        It may have a keyword ``ascend`` for ``tx.update(..., ascend=ascend)``. Without
        ``train_step``, ``dispatch`` is a decorator with options:
        ``@optax_sam.dispatch(jit=nnx.jit)``.
      jit: the compiler: ``jax.jit``, ``nnx.jit`` for a step that updates NNX objects in
        place, ``eqx.filter_jit`` for Equinox's models, or ``jax.pmap``.
      **jit_options: options of ``jit``, such as ``donate_argnums``.

    Returns:
      A function with the arguments and results of ``train_step``, without ``ascend``.

    Raises:
      ValueError: on the first call, if the arguments hold no such state, or several, or
        if the step changes NNX objects in place and ``jit`` does not see that.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.sam(0.05, when=optax_sam.when.every_k(5)), optax.sgd(0.1))
      >>> @optax_sam.dispatch(donate_argnums=(0, 1))
      ... def step(w, opt_state, x):
      ...     grad_fn = jax.grad(lambda w: jnp.sum((w - x) ** 2))
      ...     updates, opt_state = tx.update(grad_fn(w), opt_state, w, grad_fn=grad_fn)
      ...     return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.zeros(2)
      >>> opt_state = tx.init(w)
      >>> for _ in range(10):
      ...     w, opt_state = step(w, opt_state, 1.0)
      >>> int(optax_sam.metrics(opt_state)["ascents"])
      2
    """
    if train_step is None:
        return functools.partial(dispatch, jit=jit, **jit_options)
    keyword = _has_keyword(train_step)
    runs_ahead = True  # until a trace shows that something may hold a step back
    single = False  # whether only the program with the conditional will do
    plan: list[bool | None] = []  # decisions read ahead and not used yet ...
    follows: Any = None  # ... which hold for the state with these very arrays

    def traced(ascend: bool | None) -> Callable[..., Any]:
        @functools.wraps(train_step)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs_ahead
            given = (args, kwargs)
            before, objects = _clock(given), _nnx_objects(given)
            extra = {"ascend": ascend} if keyword else {}
            with recorded_steps(before and before[0], ascend) as steps:
                result = train_step(*args, **extra, **kwargs)
            if not _knows_nnx(jit):
                _check_nothing_is_lost(objects, result)
            if ascend is not None:
                if len(steps) > 1 or (steps and not _same(_clock(steps[0][0]), before)):
                    raise _NoSingleStep
                ends = steps and _same(_clock(steps[0][1]), _clock(result, given))
                runs_ahead = runs_ahead and bool(ends)
            return result

        return jit(run, **jit_options)

    variants = {ascend: traced(ascend) for ascend in (None, True, False)}

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal plan, follows, single
        given = (args, kwargs)
        if single or _decides_late(given):
            return variants[None](*args, **kwargs)
        clock = _clock(given)
        if any(isinstance(x, jax.core.Tracer) for x in clock or ()):
            # Inside jit, scan or vmap the state cannot be read.
            return variants[None](*args, **kwargs)
        known = _same(clock, follows)
        if not (known and plan):
            plan = _agreed(given, ahead=known and runs_ahead)
        try:
            result = variants[plan[0]](*args, **kwargs)
        except _NoSingleStep:
            single = True
            return variants[None](*args, **kwargs)
        after = _clock(result, given)
        # The trace of this very call may have shown that steps may be held back.
        held = _same(after, clock) or not runs_ahead
        follows, plan = (None, []) if held else (after, plan[1:])
        return result

    return functools.wraps(train_step)(step)


def _has_keyword(train_step: Callable[..., Any]) -> bool:
    """Whether it can be called with ``ascend=``."""
    parameters = inspect.signature(train_step).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any or "ascend" in parameters


def _decides_late(tree: Any) -> bool:
    """Whether the rule needs the next gradient."""
    found = members(tree)
    return len(found) == 1 and not known_ahead(found[0].when)


def _clock(*trees: Any) -> list[Any] | None:
    """The arrays that decide: the step counter of the one method, and its rule's state.

    It is the method in the first pytree that has one.
    """
    for tree in trees:
        found = members(tree)
        if len(found) == 1:
            clock = found[0].count, found[0].when
            return jax.tree.leaves(without_variables(clock))
    return None


def _same(a: list[Any] | None, b: list[Any] | None) -> bool:
    """Whether two states have the very same arrays."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(map(operator.is_, a, b))


def _agreed(tree: Any, ahead: bool) -> list[bool | None]:
    """The next decisions, ``None`` where stacked states (of replicas) differ."""
    found = ascent_plan(tree) if ahead else np.asarray(ascends_next(tree))[..., None]
    found = found.reshape(-1, found.shape[-1])
    same = np.all(found == found[0], axis=0)
    return [
        bool(x) if agreed else None for x, agreed in zip(found[0], same, strict=True)
    ]


def _knows_nnx(jit: Any) -> bool:
    """Whether a compiler returns changes that were made in place."""
    while isinstance(jit, functools.partial):
        jit = jit.func
    return (getattr(jit, "__module__", None) or "").startswith("flax.")


def _nnx_objects(tree: Any) -> list[tuple[str, Any, list[Any]]]:
    """The NNX modules, optimizers and generators in a pytree, with their leaves."""
    is_nnx = lambda x: any(
        c.__module__.startswith("flax.nnx") and c.__name__ in ("Pytree", "Object")
        for c in type(x).__mro__
    )
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_nnx)[0]
    return [
        (jax.tree_util.keystr(path), x, jax.tree.leaves(x))
        for path, x in found
        if is_nnx(x)
    ]


def _check_nothing_is_lost(
    objects: list[tuple[str, Any, list[Any]]], result: Any
) -> None:
    """Refuses changes in place that a compiler does not see."""
    returned = set(map(id, jax.tree.leaves(result)))
    for path, x, before in objects:
        changed = set(map(id, jax.tree.leaves(x))) - set(map(id, before))
        if not changed <= returned:
            name = type(x).__name__
            raise ValueError(
                f"train_step changes the {name} among its arguments ({path}) in place"
                " and does not return it, and jax.jit loses such changes. Write"
                " optax_sam.dispatch(train_step, jit=nnx.jit)."
            )
