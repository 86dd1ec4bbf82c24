r"""The engine: one gradient in, one sharpness-aware gradient out, on three axes.

.. math::
  e = \text{ascent}(g), \qquad g_s = \nabla L(w + e), \qquad
  d = \text{blend}(g, g_s) \text{ if when, else } \text{blend}(g)

A method that reshapes the gradient has three parts. The ascent says where to compute
the perturbed gradient, the when on which steps, and the blend how to combine both
gradients. A step goes through five stages, each a function here: :func:`check`,
:func:`decide`, :func:`climb`, :func:`judge`, :func:`keep`. The only conditional
that skips the perturbed gradient is in ``update``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_sam import checks, masks
from optax_sam.axes import (
    check_returned,
    check_same,
    check_varies,
    mapped_axes,
    mean_of_floats,
    vary,
)
from optax_sam.barrier import gradients
from optax_sam.parts import (
    AscentRule,
    Blend,
    Call,
    Descent,
    OwnGradient,
    Step,
    When,
    always,
    metrics_of,
)
from optax_sam.schedules import check_float_dtype
from optax_sam.states import check_not_masked, check_state, registered
from optax_sam.trees import add, norm, widest


@registered
class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      count: number of steps taken, () int32; drives the schedules.
      num_ascents: number of perturbed gradients so far, () int32.
      num_rejected: how many of them were not finite, and so not used, () int32.
      gradient_norm: norm of the gradient on the last perturbed step, () float.
      ascended_norm: norm of the perturbed gradient on that step, () float.
      survival: ``<a, e> / ||e||^2`` on that step, with the offset ``a`` after rounding,
        () float: the share of the perturbation that survives, on leaves that are
        half-precision in the parameters or in ``grad_fn``; 1 if there are none.
      ascent: state of the ascent.
      when: state of the rule that decides.
      blend: state of the blend, with any cached pytree.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    num_ascents: jax.Array
    num_rejected: jax.Array
    gradient_norm: jax.Array
    ascended_norm: jax.Array
    survival: jax.Array
    ascent: Any
    when: Any
    blend: Any

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars to log, with the scalars of the parts."""
        return {
            "ascents": self.num_ascents,
            "rejected_ascents": self.num_rejected,
            "ascent_rate": self.num_ascents / jnp.maximum(self.count, 1),
            "gradient_norm": self.gradient_norm,
            "ascended_norm": self.ascended_norm,
            "survival": self.survival,
        } | metrics_of(self.ascent, self.when, self.blend)


class Method(NamedTuple):
    """The arguments of :func:`sharpness_aware`."""

    ascent: optax.GradientTransformationExtraArgs
    when: When
    blend: Blend
    descent: Descent
    mask: masks.Mask
    axis_name: Any
    ascent_dtype: DTypeLike | None
    name: str
    state_shapes: Callable[[Any], Any]

    def mean(self, tree: Any) -> Any:
        """The mean over the devices of ``axis_name``."""
        return tree if self.axis_name is None else jax.lax.pmean(tree, self.axis_name)

    def rounded(self, point: Any, params: Any) -> Any:
        """A point in the dtype in which ``grad_fn`` gets it."""
        if self.ascent_dtype is not None:
            return optax.tree.cast(point, self.ascent_dtype)
        # float32 for half-precision parameters; a number in float64 changes nothing.
        return jax.tree.map(lambda x, w: x.astype(widest(w)), point, params)


def sharpness_aware(
    ascent: optax.GradientTransformation,
    when: When = always(),
    blend: Blend = Blend(),
    *,
    descent: Descent = Descent(),
    mask: masks.Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
    name: str = "sharpness_aware",
) -> optax.GradientTransformationExtraArgs:
    r"""A sharpness-aware method from its parts.

    On step :math:`t` with gradient :math:`g` at :math:`w`:

    .. math::
      d = \begin{cases}
        \text{fresh}(g, g_s), \; g_s = \nabla L(w + e), \; e = \text{ascent}(g)
          & \text{if when says so} \\
        \text{stale}(g) & \text{otherwise}
      \end{cases}

    The result goes first in an ``optax.chain``, before clipping, weight decay and
    the optimizer, and needs one extra argument: ``grad_fn(params) -> grads`` on this
    step's batch. The static extra argument ``ascend`` has three values: ``None``
    compiles both kinds of step with a conditional that really skips; ``True`` and
    ``False`` compile one of them, without a conditional, and overrule the rule (see
    :func:`optax_sam.dispatch`).

    A gradient that is not finite, or whose squared norm overflows, is not used, and
    does not enter a state. If it is the perturbed gradient, the step emits ``stale``.
    If it is the gradient at ``w``, it passes through, so that a later guard sees it.

    Args:
      ascent: transformation from gradient to offset, one of ``optax_sam.ascent`` or
        your own.
      when: on which steps to take the perturbed gradient, a rule of
        ``optax_sam.when`` or your own.
      blend: the rule that combines both gradients, one of ``optax_sam.blend`` or your
        own.
      descent: an ``optax_sam.parts.Descent``, for methods that do not use the batch's
        gradient at ``w + e``. It computes the gradient to use in its place.
      mask: the leaves that are perturbed; excluded ones get a zero offset and stay
        out of the norm. A bool, a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all. A pytree or a
        function that excludes all leaves is refused; ``False`` excludes all of them on
        purpose.
      axis_name: name of a mapped axis (``shard_map``, ``pmap``) over which the
        gradient at ``w`` is *not yet* averaged. Each device then makes a separate
        perturbation (m-sharpness), and the result is averaged. The state of an ascent
        from Optax, such as ``scale_by_rms``, is averaged too.
      ascent_dtype: dtype of the perturbed parameters that ``grad_fn`` gets; ``None``
        means float32 for half-precision leaves, and else the dtype of the leaf.
      name: the name of this method in errors.

    Returns:
      A transformation for the first place in an ``optax.chain``. Its ``update`` needs
      ``grad_fn``; its state is a :class:`SharpnessAwareState`.

    Raises:
      ValueError: if ``when``, ``blend`` or ``descent`` is no rule; on ``init`` or
        ``update``, if it is inside ``optax.masked`` or ``optax.partition``; on
        ``update``, if ``params`` or ``grad_fn`` is missing or a gradient differs from
        the parameters in structure, shape or kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> method = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.1), when=optax_sam.when.every_k(2))
      >>> tx = optax.chain(method, optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(w), state, w, grad_fn=jax.grad(loss_fn))
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{loss_fn(w):.3f}")
      6.387
    """
    for part, kind in ((when, When), (blend, Blend)):
        if not isinstance(part, kind):
            word = kind.__name__.lower()
            raise ValueError(
                f"{name}: {word} must be a rule of optax_sam.{word}, such as"
                f" {'when.every_k(5)' if kind is When else 'blend.take_ascended()'};"
                f" got {part!r}."
            )
    if not isinstance(descent, Descent):
        raise ValueError(
            f"{name}: descent must be an optax_sam.parts.Descent, such as"
            f" Descent(lambda w_e, call: call.gradient(w_e)); got {descent!r}."
        )
    if not (hasattr(ascent, "init") and hasattr(ascent, "update")):
        raise ValueError(
            f"{name}: ascent must be a transformation from a gradient to an offset,"
            f" such as ascent.l2(0.05); got {ascent!r}."
        )
    check_float_dtype("ascent_dtype", ascent_dtype)
    ascent = masks.restrict(ascent, mask)

    def init(params: Any) -> SharpnessAwareState:
        check_not_masked(name, params)
        # Leaves that are no real floats, as in Equinox's models, have no gradient.
        params = jax.tree.map(lambda x: x if checks.is_perturbable(x) else None, params)
        # Each leaf has its own buffer, so that the state can be donated.
        return SharpnessAwareState(
            count=jnp.zeros((), jnp.int32),
            num_ascents=jnp.zeros((), jnp.int32),
            num_rejected=jnp.zeros((), jnp.int32),
            gradient_norm=jnp.zeros((), float),
            ascended_norm=jnp.zeros((), float),
            survival=jnp.ones((), float),
            ascent=ascent.init(params),
            when=when.init(params),
            blend=blend.init(params),
        )

    given = when, blend, descent, mask, axis_name, ascent_dtype, name
    method = Method(ascent, *given, _shapes_of(init))

    def update(
        updates: Any,
        state: SharpnessAwareState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        ascend: bool | None = None,
        **extra: Any,
    ) -> tuple[Any, SharpnessAwareState]:
        shards = _shards.get()
        here = method if shards is None else shards.inside(method)
        call = check(here, updates, state, params, grad_fn, extra)
        before = state
        decision, state = decide(here, call, state, ascend)
        if shards is None:
            _check_rules(here, call, before, decision)
        perturb = functools.partial(_perturbed, here, call)
        skip = functools.partial(_skipped, here, call)
        if isinstance(decision, jax.core.Tracer):
            d, state = jax.lax.cond(decision, perturb, skip, state)
        else:  # known while tracing, or nothing is traced: a cond would be compiled
            d, state = (perturb if decision else skip)(state)
        after = state._replace(
            count=optax.safe_increment(state.count),
            when=when.advance(state.when, jnp.asarray(decision)),
        )
        if (recorded := _recorded.get()) is not None:
            recorded.steps.append((before, after))
        return d, after

    return optax.GradientTransformationExtraArgs(init, update)


def check(
    method: Method, updates: Any, state: Any, params: Any, grad_fn: Any, extra: Any
) -> Call:
    """Stage 1: checks the arguments of ``update``, and collects them for later."""
    name, axis_name = method.name, method.axis_name
    params, whole = checks.with_gradients(updates, params)
    checks.check_params(name, params)
    method.descent.check(name, grad_fn, extra)
    checks.check_gradients(name, checks.INCOMING, updates, params)
    check_state(name, SharpnessAwareState, state, method.state_shapes(params))
    masks.resolve_nonempty_mask(method.mask, params, name="mask")
    g, mean, shards = updates, method.mean, _shards.get()
    if shards is not None:
        mean = shards.mean
    else:
        check_varies(name, checks.INCOMING, updates, axis_name)
        # Python and NumPy numbers among the leaves become arrays, as in Optax.
        g = gradients(updates)
    params = vary(jax.tree.map(jnp.asarray, params), axis_name)

    def taken(function: Callable[[Any], Any], point: Any) -> Any:
        grads = function(method.rounded(point, params))
        check_returned(name, grads, params, axis_name)
        return gradients(grads)

    device = None if axis_name is None else jax.lax.axis_index(axis_name)
    step = Step(state.count, mean, device)
    return Call(g, params, whole, step, taken, grad_fn, extra)


def decide(
    method: Method, call: Call, state: SharpnessAwareState, ascend: Any
) -> tuple[bool | jax.Array, SharpnessAwareState]:
    """Stage 2: whether this step is perturbed, and the state of the rule after it."""
    forced = _static(ascend)
    recorded = _recorded.get()
    if forced is None and recorded is not None and recorded.start is state.count:
        forced = recorded.ascend
    decision, moved = method.when.now(state.when, call.g, call.step)
    return decision if forced is None else forced, state._replace(when=moved)


class Found(NamedTuple):
    """What :func:`climb` found, or a skipped step, on the batch or on a shard of it.

    Attributes:
      emitted: pytrees that may be emitted, each like the gradient.
      states: the states of the rules. They are the same for all shards, because what a
        rule stores from a gradient goes through ``step.mean``.
      measured: both norms and the survival, (3,).
    """

    emitted: tuple[Any, ...]
    states: Any
    measured: jax.Array | None = None


def climb(method: Method, call: Call, state: SharpnessAwareState) -> Found:
    """Stage 3: the offset, the perturbed weights (rounded here), the gradient there.

    Also the blend of both gradients, and what is emitted after a rejection.
    """
    g, step = call.g, call.step
    # The caller's arguments of these names are for other transformations of the chain.
    own = {"grad_fn": call.grad_fn and call.gradient, "step": step, "count": step.count}
    given = g, state.ascent, call.params
    e, ascent = method.ascent.update(*given, **call.extra | own)
    if not isinstance(method.ascent, AscentRule):
        # An Optax transformation, such as scale_by_rms, does not know the axis.
        ascent = mean_of_floats(ascent, mapped_axes(method.axis_name))
    # A rule with another gradient than the one at w (R-SAM) uses it for the fallback
    # too. XLA then drops the gradient at w, because nothing uses it.
    e, first = e if isinstance(e, OwnGradient) else (e, g)
    w_e = method.rounded(add(call.params, e), call.params)
    g_s = method.descent.gradient(w_e, call)
    d, blend = method.blend.fresh(first, g_s, state.blend, step)
    fallback, stale_blend = method.blend.stale(first, state.blend, step)
    when = method.when.observe(state.when, first, g_s, step)
    # Judged in the dtype that is emitted: float16 may not hold what grad_fn returned
    # for a float32 point.
    emitted = lambda tree: optax.tree.cast_like(tree, g)
    measures = norm(emitted(first)), norm(emitted(g_s)), _survival(call.params, w_e, e)
    measured = jnp.stack([x.astype(state.gradient_norm.dtype) for x in measures])
    states = (ascent, when, blend), stale_blend
    return Found((emitted(d), emitted(fallback)), states, measured)


def judge(method: Method, found: Found) -> tuple[jax.Array, jax.Array]:
    """Stage 4: both norms and the survival, (3,), and whether to use the gradients."""
    # If one device fails, all do, so that they stay equal: the mean of the norms is
    # finite if all norms are.
    measured = method.mean(found.measured)
    return measured, jnp.all(jnp.isfinite(measured[:2]))


def keep(
    method: Method, state: SharpnessAwareState, found: Found
) -> tuple[Any, SharpnessAwareState]:
    """Stage 5: what is emitted and what enters the state; a rejection changes both."""
    measured, accepted = judge(method, found)
    choose = functools.partial(optax.tree.where, accepted)
    gradient_norm, ascended_norm, survival = choose(
        tuple(measured), (state.gradient_norm, state.ascended_norm, state.survival)
    )
    perturbed, stale_blend = found.states
    ascent, when, blend = choose(perturbed, (state.ascent, state.when, stale_blend))
    return method.mean(choose(*found.emitted)), state._replace(
        num_ascents=optax.safe_increment(state.num_ascents),
        num_rejected=state.num_rejected + (~accepted).astype(jnp.int32),
        gradient_norm=gradient_norm,
        ascended_norm=ascended_norm,
        survival=survival,
        ascent=ascent,
        when=when,
        blend=blend,
    )


def _check_rules(
    method: Method, call: Call, state: SharpnessAwareState, decision: Any
) -> None:
    """Refuses rules that decide or store something else on each device."""

    def found(g: Any) -> Any:
        own = call._replace(g=g, grad_fn=lambda p: g)
        decision, moved = decide(method, own, state, None)
        alike = method._replace(descent=Descent(lambda w_e, call: g))
        (ascent, when, blend), stale = climb(alike, own, moved).states
        perturbed = moved._replace(ascent=ascent, when=when, blend=blend)
        return decision, moved, perturbed, moved._replace(blend=stale)

    check_same(method.name, state, decision, found, call.g, method.axis_name)


def _perturbed(
    method: Method, call: Call, state: SharpnessAwareState
) -> tuple[Any, SharpnessAwareState]:
    found = _over_shards(lambda call: climb(method, call, state), method, call)
    return keep(method, state, found)


def _skipped(
    method: Method, call: Call, state: SharpnessAwareState
) -> tuple[Any, SharpnessAwareState]:
    def find(call: Call) -> Found:
        d, blend = method.blend.stale(call.g, state.blend, call.step)
        return Found((optax.tree.cast_like(d, call.g),), blend)

    (d,), blend, _ = _over_shards(find, method, call)
    return method.mean(d), state._replace(blend=blend)


_shards: ContextVar[Any] = ContextVar("_shards", default=None)


@contextlib.contextmanager
def in_shards(shards: Any) -> Iterator[None]:
    """Each step that is traced inside uses these shards of its batch.

    The gradient at ``w`` of such a step has only shapes and dtypes. The shards have
    three methods: ``inside(method)`` is the :class:`Method` without the axis of the
    shards; ``mean(tree)`` replaces ``step.mean``, which sees no gradient of another
    shard; ``average(find, method, call)`` is the mean of the results of ``find(call)``.
    """
    token = _shards.set(shards)
    try:
        yield
    finally:
        _shards.reset(token)


def _over_shards(find: Callable[[Call], Found], method: Method, call: Call) -> Found:
    shards = _shards.get()
    return find(call) if shards is None else shards.average(find, method, call)


def _shapes_of(init: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function from parameters to the shapes of the state that ``init`` makes."""

    @functools.lru_cache(maxsize=2)
    def shapes(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        return jax.eval_shape(init, jax.tree.unflatten(structure, leaves))

    def of(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        kinds = (jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
        return shapes(structure, tuple(kinds))

    return of


class _Recorded(NamedTuple):
    """A caller's decision for the step from ``start``, and the recorded steps."""

    start: Any
    ascend: bool | None
    steps: list[tuple[Any, Any]]


_recorded: ContextVar[_Recorded | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def recorded_steps(start: Any, ascend: bool | None) -> Iterator[list[tuple[Any, Any]]]:
    """Records the states before and after each step that is traced inside.

    If a caller finds the same array objects in the state before and in the state
    after, nothing around the engine holds a step back, repeats it or rolls it back.

    The step whose count is the array object ``start`` follows ``ascend``. A function
    that is traced inside, such as a branch or a jitted function, has another count. So
    the cache of that function keeps no trace with a decision.
    """
    steps: list[tuple[Any, Any]] = []
    token = _recorded.set(_Recorded(start, ascend, steps))
    try:
        yield steps
    finally:
        _recorded.reset(token)


def _static(ascend: Any) -> bool | None:
    if ascend is None or isinstance(ascend, (bool, np.bool_)):
        return None if ascend is None else bool(ascend)
    raise ValueError(
        "ascend chooses the code that is compiled, so it must be None, True or False,"
        f" known while tracing; got {ascend!r}. Mark it static:"
        ' jax.jit(train_step, static_argnames="ascend"), or use'
        " optax_sam.dispatch(train_step)."
    )


def _survival(w: Any, w_e: Any, e: Any) -> jax.Array:
    """The share ``<achieved, e> / ||e||^2`` of the offset that survives rounding.

    It uses the half-precision leaves only. On float32 leaves it would cost as many
    passes over the parameters as the rest of a step, and the result would be 1.
    """
    halves = [
        leaves
        for leaves in zip(*map(jax.tree.leaves, (w, w_e, e)), strict=True)
        if min(jnp.finfo(leaf.dtype).bits for leaf in leaves[:2]) < 32
    ]
    if not halves:
        return jnp.ones(())

    def along(w: jax.Array, w_e: jax.Array, e: jax.Array) -> jax.Array:
        precision = jnp.finfo(w_e.dtype)
        # XLA may keep more digits than the dtype has; what grad_fn gets may not.
        reached = jax.lax.reduce_precision(
            w_e.astype(e.dtype), precision.nexp, precision.nmant
        )
        return jnp.sum((reached - w.astype(e.dtype)) * e)

    achieved = sum(along(*leaves) for leaves in halves)
    intended = norm([e for _, _, e in halves]) ** 2
    return jnp.where(intended > 0, achieved / intended, 1)
