"""What every entry of the registry keeps to; what its parts do is tested by part."""

import functools
import inspect

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from registry import METHODS, OTHERS, each, every_one, grad_fn_only

import optax_sam

# Long enough for each rule to leave a step out.
STEPS = 20
WITHOUT_COMPILER = 3
RATE = 0.05


@every_one
def test_it_trains_as_promised(method):
    """In one program, donated, that asks as often as it decides; and without jit."""
    problem, executed, traced = problems.quadratic(), harness.Counter(), []
    tx = method.optimizer(optax.sgd(lambda count: RATE, momentum=0.9))
    make = functools.partial(harness.make_step, tx, problem.loss_fn, method.extra_args)
    trace = lambda grad_fn: lambda params: traced.append(1) or grad_fn(params)
    compiled = jax.jit(make(lambda f: trace(executed(f))), donate_argnums=(0, 1))
    params = problem.params()
    state = tx.init(params)
    kinds = harness.kinds((params, state))
    decisions, executions = [], []
    for t in range(STEPS):
        before, ascents = executed.read(), harness.ascents(state)
        # Scalars that the program overwrites unread are dropped, not donated.
        given = [x for x in jax.tree.leaves((params, state)) if x.ndim]
        params, state = compiled(params, state, problem.batch(t))
        executions.append(executed.read() - before)
        decisions.append(harness.ascents(state) > ascents)
        assert all(x.is_deleted() for x in given)
        if t + 1 == WITHOUT_COMPILER:
            early = jax.tree.map(np.array, (params, state))  # no views
    assert compiled._cache_size() == 1
    assert len(traced) == method.calls
    assert harness.kinds((params, state)) == kinds
    assert harness.is_finite((params, state))
    start, batch = problem.params(), problem.batch(0)
    assert problem.loss_fn(params, batch) < problem.loss_fn(start, batch)
    assert [x.count for x in scheduled(state)] == [STEPS]

    eager = harness.run(make(), start, tx.init(start), problem, WITHOUT_COMPILER)
    harness.assert_close_in_size(eager, early, 1e-5)

    if method in METHODS:
        assert harness.member_state(state).count == STEPS
        assert executions == [method.calls * d for d in decisions]
        assert (not all(decisions)) == method.skips
        metrics = optax_sam.metrics(state)
        assert metrics["ascents"] == sum(decisions)
        assert metrics["rejected_ascents"] == 0
        np.testing.assert_allclose(metrics["ascent_rate"], np.mean(decisions))
        assert all(jnp.shape(x) == () for x in metrics.values())


def scheduled(state):
    """The states of learning rates."""
    wanted = lambda x: isinstance(x, optax.ScaleByScheduleState)
    return list(filter(wanted, jax.tree.leaves(state, is_leaf=wanted)))


@every_one
def test_hands_all_extra_arguments_on(method):
    seen = {}

    def probe(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    probe = optax.GradientTransformationExtraArgs(optax.init_empty_state, probe)
    tx = method.optimizer(optax.chain(probe, optax.sgd(0.1, momentum=0.9)))
    params = harness.tree()
    update = lambda g, state: tx.update(
        g, state, params, grad_fn=lambda p: g, value=1.0, unheard_of="x"
    )
    jax.eval_shape(update, params, tx.init(params))
    assert {"value", "unheard_of", "grad_fn"} <= set(seen)


def test_arguments_are_keywords_with_defaults():
    for method in METHODS:
        arguments = list(inspect.signature(method.factory).parameters.values())
        assert all(a.default is not a.empty for a in arguments), method.name
        assert all(a.kind is a.KEYWORD_ONLY for a in arguments[1:]), method.name


@every_one
def test_a_new_state(method):
    """Arrays of kinds known before, each a buffer of its own; marked where it is like
    the parameters."""
    tx, params = method.optimizer(), harness.tree()
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert harness.kinds(jax.eval_shape(tx.init, params)) == harness.kinds(state)

    marked = optax.tree.map_params(tx, lambda x: x + 1, state)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(marked), strict=True)
    changed = [x.shape for x, y in pairs if np.any(np.asarray(x) != np.asarray(y))]
    shapes = [x.shape for x in jax.tree.leaves(params)]
    # The base optimizer's momentum is one such tree too.
    assert sorted(changed) == sorted(shapes * (method.trees + 1))

    compiled = jax.jit(tx.init)(params)
    consume = jax.jit(lambda *trees: trees, donate_argnums=(0, 1))
    harness.assert_equal(consume(params, compiled)[1], state)
    assert all(x.is_deleted() for x in jax.tree.leaves(compiled))


# Convergence, with a learning rate that falls to zero.

TARGETS = {
    "rosenbrock": (problems.rosenbrock, 0.02, 400),
    "mlp": (problems.mlp, 0.1, 300),
}


@functools.cache
def trained(target, method=None):
    """The mean loss after a run in one scan, that before it, and the state."""
    make, rate, steps = TARGETS[target]
    problem, rate = make(), optax.cosine_decay_schedule(rate, steps)
    base, extra_args = optax.sgd(rate, momentum=0.9), grad_fn_only
    tx = optax.chain(optax.with_extra_args_support(optax.identity()), base)
    if method is not None:
        smaller = {method.radius: 0.02, "learning_rate": rate}
        smaller = {name: x for name, x in smaller.items() if name in method.settings}
        if method.factory is optax_sam.renyi_sam:
            smaller["max_offset_norm"] = 0.02  # else it grows as the gradient vanishes
        if "max_rho" in method.settings:
            smaller["max_rho"] = 0.02  # likewise
        tx, extra_args = method.optimizer(base, **smaller), method.extra_args
    step = harness.make_step(tx, problem.loss_fn, extra_args)
    body = lambda carry, batch: (step(*carry, batch), None)
    run = jax.jit(lambda carry, batches: jax.lax.scan(body, carry, batches)[0])
    start = problem.params()
    params, state = run((start, tx.init(start)), problem.batches(steps))
    losses = [problem.loss_fn(params, problem.batch(t)) for t in range(4)]
    return np.mean(losses), problem.loss_fn(start, problem.batch(0)), state


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(TARGETS)[1:]]


@each(*METHODS, *OTHERS, slow=lambda m: m.name not in ("sam", "msam"))
@pytest.mark.parametrize("target", ["rosenbrock", *SLOW])
def test_converges(method, target):
    """As far as the base optimizer does, up to a hundredth of the way."""
    (reached, start, state), (plain, *_) = trained(target, method), trained(target)
    assert reached - plain < 0.01 * (start - plain)
    assert plain < 0.7 * start
    if method.calls:
        assert optax_sam.metrics(state)["rejected_ascents"] == 0
