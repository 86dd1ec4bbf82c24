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
WITHOUT_COMPILER = 4
RATE = 0.05


@each(*METHODS, *OTHERS, slow=lambda method: False)
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
            early = jax.device_get((params, state))
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
    "quadratic": (problems.quadratic, 0.1, 300),
    "logistic": (problems.logistic, 0.5, 300),
    "mlp": (problems.mlp, 0.1, 300),
}


def trained(problem, tx, extra_args, steps):
    """The mean loss after a run in one scan, and the state."""
    step = harness.make_step(tx, problem.loss_fn, extra_args)
    body = lambda carry, batch: (step(*carry, batch), None)
    run = jax.jit(lambda carry, batches: jax.lax.scan(body, carry, batches)[0])
    params = problem.params()
    params, state = run((params, tx.init(params)), problem.batches(steps))
    losses = [problem.loss_fn(params, problem.batch(t)) for t in range(4)]
    return np.mean(losses), state


def falling(target):
    _, rate, steps = TARGETS[target]
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)


@functools.cache
def without_a_method(target):
    make, _, steps = TARGETS[target]
    tx = optax.chain(optax.with_extra_args_support(optax.identity()), falling(target))
    return trained(make(), tx, grad_fn_only, steps)[0]


@each(*METHODS, *OTHERS, slow=lambda m: m.name not in ("sam", "msam"))
@pytest.mark.parametrize(
    "target",
    ["rosenbrock"]
    + [pytest.param(t, marks=pytest.mark.slow) for t in list(TARGETS)[1:]],
)
def test_converges(method, target):
    """As far as the base optimizer does, up to a hundredth of the way."""
    make, rate, steps = TARGETS[target]
    smaller = {method.radius: 0.02} if method.radius in method.settings else {}
    if "learning_rate" in method.settings:
        smaller["learning_rate"] = optax.cosine_decay_schedule(rate, steps)
    if method.factory is optax_sam.renyi_sam:  # else it grows as the gradient vanishes
        smaller["max_offset_norm"] = 0.02
    tx = method.optimizer(falling(target), **smaller)
    reached, state = trained(make(), tx, method.extra_args, steps)
    start = make().loss_fn(make().params(), make().batch(0))
    plain = without_a_method(target)
    assert reached - plain < 0.01 * (start - plain)
    assert plain < 0.7 * start
    if method.calls:
        assert optax_sam.metrics(state)["rejected_ascents"] == 0
