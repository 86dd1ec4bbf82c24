r"""The engine: one gradient in, one sharpness-aware gradient out, on three axes.

.. math::
  e = \text{ascent}(g), \qquad g_s = \nabla L(w + e), \qquad
  d = \text{blend}(g, g_s) \text{ if when, else } \text{blend}(g)

Every method that reshapes the gradient is a product of an ascent (where is the second
gradient taken?), a when (on this step?) and a blend (how do both become one?). The
conditional that skips the second gradient is here and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_sam import contract
from optax_sam.arguments import Mask, gradients, resolve_nonempty_mask
from optax_sam.ascent import OwnGradient, norm, restrict
from optax_sam.ascent.rule import add
from optax_sam.blend import Blend, take_ascended
from optax_sam.step import Step
from optax_sam.when import When, always


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      count: number of steps taken, () int32; drives the schedules.
      num_ascents: number of second gradients asked for, () int32.
      num_rejected: how many ascents were not finite and not used, () int32.
      gradient_norm: norm of the gradient on the last ascended step, () float.
      ascended_norm: norm of the ascended gradient on that step, () float.
      survival: ``<achieved, e> / ||e||^2`` on that step, () float: the share of the
        offset that rounding left over, on leaves that are kept in half precision or
        handed to ``grad_fn`` in it; 1 if there are none.
      ascent: state of the ascent rule.
      when: state of the rule that decides.
      blend: state of the blend, with any cached tree.
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
        """Scalars to log, with those of the parts."""
        values = {
            "ascents": self.num_ascents,
            "rejected_ascents": self.num_rejected,
            "ascent_rate": self.num_ascents / jnp.maximum(self.count, 1),
            "gradient_norm": self.gradient_norm,
            "ascended_norm": self.ascended_norm,
            "survival": self.survival,
        }
        for part in (self.ascent, self.when, self.blend):
            values |= part.metrics() if hasattr(part, "metrics") else {}
        return values


def sharpness_aware(
    ascent: optax.GradientTransformation,
    when: When = always(),
    blend: Blend = take_ascended(),
    *,
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
    name: str = "sharpness_aware",
) -> optax.GradientTransformationExtraArgs:
    r"""A sharpness-aware method from its three parts.

    On step :math:`t` with gradient :math:`g` at :math:`w`:

    .. math::
      d = \begin{cases}
        \text{fresh}(g, g_s), \; g_s = \nabla L(w + e), \; e = \text{ascent}(g)
          & \text{if when says so} \\
        \text{stale}(g) & \text{otherwise}
      \end{cases}

    The result stands first in an ``optax.chain``, before clipping, weight decay and
    the optimizer, and needs one extra argument: ``grad_fn(params) -> grads`` on this
    step's batch. The static extra argument ``ascend`` has three values: ``None``
    compiles both kinds of step with a conditional that really skips; ``True`` and
    ``False`` compile one of them, without a conditional, and overrule the rule (see
    :func:`optax_sam.dispatch`).

    A gradient that is not finite, or whose squared norm overflows, is not used: an
    ascended one gives way to ``stale``, an incoming one passes through for a later
    guard to see; neither enters a state.

    Args:
      ascent: transformation from gradient to offset, one of ``optax_sam.ascent`` or
        your own.
      when: the rule that decides, one of ``optax_sam.when`` or your own.
      blend: the rule that combines, one of ``optax_sam.blend`` or your own.
      mask: the leaves that are perturbed; excluded ones get a zero offset and stay
        out of the norm. A bool, a tree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all. A tree or a
        function that excludes all leaves is refused; ``False`` says that none is meant.
      axis_name: name of a mapped axis (``shard_map``, ``pmap``) over which the
        incoming gradient is *not yet* averaged: each device then takes its own
        ascent (m-sharpness), and the result is averaged.
      ascent_dtype: dtype of the perturbed parameters handed to ``grad_fn``; ``None``
        means float32 for half-precision leaves, else the leaf's own.
      name: what errors call this method.

    Returns:
      The transformation; its state is a :class:`SharpnessAwareState`.

    Raises:
      ValueError: if ``when`` or ``blend`` is no rule; on ``init`` or ``update``, if
        it stands inside ``optax.masked`` or ``optax.partition``; on ``update``, if
        ``params`` or ``grad_fn`` is missing or a gradient has another structure,
        shape or kind than the parameters.

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
    if not (hasattr(ascent, "init") and hasattr(ascent, "update")):
        raise ValueError(
            f"{name}: ascent must be a transformation from a gradient to an offset,"
            f" such as ascent.l2(0.05); got {ascent!r}."
        )
    contract.check_float_dtype("ascent_dtype", ascent_dtype)
    ascent = restrict(ascent, mask)

    def mean(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def init(params: Any) -> SharpnessAwareState:
        contract.check_not_masked(name, params)
        # Leaves that are no real floats, as in Equinox's models, have no gradient.
        params = jax.tree.map(
            lambda x: x if contract.is_perturbable(x) else None, params
        )
        # Every leaf is a buffer of its own, so that the state can be donated.
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

    @functools.lru_cache(maxsize=2)
    def shapes_for(structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
        return jax.eval_shape(init, jax.tree.unflatten(structure, leaves))

    def made_for(params: Any) -> Any:
        """The shapes of the state that ``init`` makes for these parameters."""
        leaves, structure = jax.tree.flatten(params)
        kinds = (jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
        return shapes_for(structure, tuple(kinds))

    def update(
        updates: Any,
        state: SharpnessAwareState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        ascend: bool | None = None,
        **extra: Any,
    ) -> tuple[Any, SharpnessAwareState]:
        params, whole = contract.with_gradients(updates, params)
        contract.check_call(name, updates, params, grad_fn)
        contract.check_state(name, SharpnessAwareState, state, made_for(params))
        resolve_nonempty_mask(mask, params, name="mask")
        if axis_name is not None:
            contract.check_varies(name, contract.INCOMING, updates, axis_name)
        # Python and NumPy numbers among the leaves become arrays, as in Optax.
        g, params = gradients(updates), jax.tree.map(jnp.asarray, params)
        params = contract.vary(params, axis_name)
        step = Step(state.count, mean, axis_name)

        def rounded(point: Any) -> Any:
            # float32 offsets make float32 points of half-precision parameters.
            return (
                point if ascent_dtype is None else optax.tree.cast(point, ascent_dtype)
            )

        def gradient(point: Any) -> Any:
            grads = grad_fn(whole(rounded(point)))
            contract.check_returned(name, grads, params, axis_name)
            return gradients(grads)

        def emitted(d: Any) -> Any:
            return optax.tree.cast_like(d, g)

        def ascended(state: SharpnessAwareState) -> tuple[Any, SharpnessAwareState]:
            e, ascent_state = ascent.update(
                g,
                state.ascent,
                params,
                grad_fn=gradient,
                step=step,
                count=state.count,
                **extra,
            )
            # A rule that looked elsewhere (R-SAM) stands on its own gradient, also
            # where it falls back: XLA drops the incoming one if nothing uses it.
            e, first = e if isinstance(e, OwnGradient) else (e, g)
            w_e = rounded(add(params, e))
            g_s = gradient(w_e)
            # Judged in the dtype that is emitted: float16 may not hold what grad_fn
            # returned for a float32 point.
            measured = jnp.stack(
                [
                    x.astype(state.gradient_norm.dtype)
                    for x in (
                        norm(optax.tree.cast_like(first, g)),
                        norm(optax.tree.cast_like(g_s, g)),
                        _survival(params, w_e, e),
                    )
                ]
            )
            # One device's failure is everybody's, so that all stay equal: the mean of
            # the norms is finite where each of them is.
            measured = mean(measured)
            accepted = jnp.all(jnp.isfinite(measured[:2]))

            choose = functools.partial(optax.tree.where, accepted)
            d, fresh_blend = blend.fresh(first, g_s, state.blend, step)
            fallback, stale_blend = blend.stale(first, state.blend, step)
            gradient_norm, ascended_norm, survival = choose(
                tuple(measured),
                (state.gradient_norm, state.ascended_norm, state.survival),
            )
            observed = when.observe(state.when, first, g_s, step)
            d = choose(emitted(d), emitted(fallback))
            return mean(d), state._replace(
                num_ascents=optax.safe_increment(state.num_ascents),
                num_rejected=state.num_rejected + (~accepted).astype(jnp.int32),
                gradient_norm=gradient_norm,
                ascended_norm=ascended_norm,
                survival=survival,
                ascent=choose(ascent_state, state.ascent),
                when=choose(observed, state.when),
                blend=choose(fresh_blend, stale_blend),
            )

        def skipped(state: SharpnessAwareState) -> tuple[Any, SharpnessAwareState]:
            d, blend_state = blend.stale(g, state.blend, step)
            return mean(emitted(d)), state._replace(blend=blend_state)

        forced = _decided(_static(ascend), state.count)
        decision, moved = when.now(state.when, g, step)
        decision, state = (
            decision if forced is None else forced,
            state._replace(when=moved),
        )
        if isinstance(decision, jax.core.Tracer):
            d, state = jax.lax.cond(decision, ascended, skipped, state)
        else:  # known while tracing, or nothing is traced: a cond would be compiled
            d, state = (ascended if decision else skipped)(state)
        after = optax.safe_increment(state.count)
        if (recorded := _recorded.get()) is not None:
            recorded.steps.append((state.count, after))
        return d, state._replace(
            count=after, when=when.advance(state.when, jnp.asarray(decision))
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Recorded(NamedTuple):
    """What a caller decided for the step from ``count``, and the steps it sees."""

    start: Any
    ascend: bool | None
    steps: list[tuple[Any, Any]]


_recorded: ContextVar[_Recorded | None] = ContextVar("_recorded", default=None)


@contextlib.contextmanager
def recorded_steps(start: Any, ascend: bool | None) -> Iterator[list[tuple[Any, Any]]]:
    """Records the counts before and after each step that is traced inside.

    A caller that finds these very arrays in the state that goes in, and in the one that
    comes out, knows that nothing around the engine holds a step back, repeats it or
    rolls it back.

    The step whose count is the very array ``start`` is taken as ``ascend`` says. In a
    function that is traced inside, such as a branch or a jitted one, the count is
    another, so that no trace with a decision is kept in the cache of that function.
    """
    steps: list[tuple[Any, Any]] = []
    token = _recorded.set(_Recorded(start, ascend, steps))
    try:
        yield steps
    finally:
        _recorded.reset(token)


def _decided(forced: bool | None, count: Any) -> bool | None:
    """What the argument says, or else the caller for the step from ``count``."""
    recorded = _recorded.get()
    if forced is None and recorded is not None and recorded.start is count:
        return recorded.ascend
    return forced


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
    """The share ``<achieved, e> / ||e||^2`` that rounding left of the offset.

    Over the half-precision leaves: on float32 ones it would cost as many passes over
    the parameters as the rest of a step, to say 1.
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
