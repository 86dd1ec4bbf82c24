"""What every registered method keeps to, on its own and in the simplest chain."""

import functools
import inspect
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from registry import (
    METHODS,
    OTHERS,
    each,
    every_foreseen,
    every_method,
    every_named,
    every_one,
    every_skipping,
    grad_fn_only,
    relative_norm,
)

import optax_sam

# Where the rest of a method does not matter, but compiling it takes long.
one_per_ascent = each(*METHODS, slow=lambda method: method.skips)

STEPS = 20


class Record(NamedTuple):
    """What one run of 20 steps of the program with the conditional showed."""

    params: Any
    state: Any
    decisions: list
    executions: list
    step_traces: int
    grad_fn_traces: int
    first_kinds: Any
    deleted: list


@functools.cache
def recorded(method):
    problem = problems.mlp()
    tx = method.optimizer()
    executed = harness.Counter()
    traces = {"step": 0, "grad_fn": 0}

    def traced(grad_fn):
        def call(params):
            traces["grad_fn"] += 1
            return grad_fn(params)

        return call

    step = harness.make_step(
        tx, problem.loss_fn, method.extra_args, lambda f: traced(executed(f))
    )

    def counted_step(*args):
        traces["step"] += 1
        return step(*args)

    compiled = jax.jit(counted_step, donate_argnums=(0, 1))
    params = problem.params()
    state = tx.init(params)
    first_kinds = harness.kinds(state)
    decisions, executions, deleted = [], [], []
    for t in range(STEPS):
        before, ascents = executed.read(), harness.ascents(state)
        # Scalars that the program overwrites unread are dropped, not donated.
        given = [x for x in jax.tree.leaves((params, state)) if x.ndim]
        params, state = compiled(params, state, problem.batch(t))
        executions.append(executed.read() - before)
        decisions.append(harness.ascents(state) > ascents)
        deleted.append(all(x.is_deleted() for x in given))
    return Record(
        params,
        state,
        decisions,
        executions,
        traces["step"],
        traces["grad_fn"],
        first_kinds,
        deleted,
    )


# The contract.


@every_one
def test_hands_all_extra_arguments_on(method):
    seen = {}

    def probe(updates, state, params=None, **extra):
        del params
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


@every_named
def test_says_what_is_missing(method):
    tx = method.build()
    g = harness.tree()
    state = tx.init(g)
    name = method.factory.__name__
    name = name if hasattr(optax_sam, name) else "sharpness_aware"
    with pytest.raises(ValueError, match=rf"{name} needs .*params"):
        tx.update(g, state, grad_fn=lambda p: g)
    with pytest.raises(ValueError, match=rf"{name} needs {method.needs}.*tx\.update"):
        tx.update(g, state, g)
    if method.needs == "grad_fn":
        with pytest.raises(ValueError, match="grad_fn must be a function"):
            tx.update(g, state, g, grad_fn=g)


@every_named
def test_arguments_are_keywords_with_defaults(method):
    arguments = list(inspect.signature(method.factory).parameters.values())
    assert all(a.default is not inspect.Parameter.empty for a in arguments)
    assert all(a.kind is inspect.Parameter.KEYWORD_ONLY for a in arguments[1:])


# State: structure, dtypes, buffers.


@every_one
def test_state_is_arrays_and_init_can_be_abstract(method):
    tx, params = method.build(), harness.tree()
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    harness.assert_equal(
        jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, params)),
        jax.tree.map(lambda x: (x.shape, x.dtype), state),
    )


@every_one
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "mix"])
def test_dtypes_stay(method, dtype, x64):
    params = harness.tree(dtype="float32" if dtype == "mix" else dtype)
    if dtype == "mix":
        params = {**params, "gain": params["gain"].astype("bfloat16")}
    tx = method.build()
    state = jax.eval_shape(tx.init, params)
    handed = []

    def update(g, state, ascend):
        def grad_fn(p):
            handed.append(p)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), p, params)

        return tx.update(g, state, params, grad_fn=grad_fn, ascend=ascend)

    for ascend in (None, True, False):
        after = jax.eval_shape(functools.partial(update, ascend=ascend), params, state)
        assert harness.kinds(after[0]) == harness.kinds(params)
        assert harness.kinds(after[1]) == harness.kinds(state)
    # Half precision is perturbed in single precision.
    for at in handed:
        assert jax.tree.map(lambda x: x.dtype, at) == jax.tree.map(
            lambda x: jnp.promote_types(x.dtype, jnp.float32), params
        )


@every_named
def test_gradients_of_another_float_dtype_are_cast(method, x64):
    tx, params = method.build(), harness.tree(dtype="float32")
    state = tx.init(params)
    for first, second in (("bfloat16", "float64"), ("float64", "float16")):
        g = harness.tree(1, dtype=first)
        update = lambda ascend, g=g, second=second: tx.update(
            g,
            state,
            params,
            grad_fn=lambda p: jax.tree.map(lambda x: x.astype(second), p),
            ascend=ascend,
        )
        for ascend in (None, True, False):
            emitted, after = jax.eval_shape(functools.partial(update, ascend))
            assert harness.kinds(emitted) == harness.kinds(g)
            assert harness.kinds(after) == harness.kinds(state)


@every_one
def test_state_keeps_its_kinds_in_a_run(method):
    assert harness.kinds(recorded(method).state) == recorded(method).first_kinds


@every_one
def test_state_is_stable_in_cond_and_scan(method):
    tx, params = method.build(), harness.tree()

    def body(state, g):
        taken = lambda s: tx.update(g, s, params, grad_fn=lambda p: p)[1]
        return jax.lax.cond(g["gain"] > 0, taken, lambda s: s, state), None

    gradients = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    # Both constructions compare the types of what goes in and out.
    jax.eval_shape(lambda state: jax.lax.scan(body, state, gradients), tx.init(params))


@every_one
def test_parameters_and_state_can_be_donated(method):
    assert all(recorded(method).deleted)


@every_one
def test_state_from_a_compiled_init_can_be_donated(method):
    tx, params = method.build(), harness.tree()
    state = jax.jit(tx.init)(params)
    consume = jax.jit(lambda *trees: trees, donate_argnums=(0, 1))
    harness.assert_equal(consume(params, state)[1], tx.init(harness.tree()))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


@every_one
def test_tree_maps_reach_parameter_like_state_alone(method):
    tx, params = method.optimizer(), harness.tree()
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda x: x + 1, state)
    changed = [
        x.shape
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(marked), strict=True)
        if np.any(np.asarray(x) != np.asarray(y))
    ]
    shapes = [x.shape for x in jax.tree.leaves(params)]
    # The base optimizer's momentum is one such tree too.
    assert sorted(changed) == sorted(shapes * (method.trees + 1))


# Compilation and cost.


@every_one
def test_compiles_once_and_traces_grad_fn_once(method):
    record = recorded(method)
    assert record.step_traces == 1
    assert record.grad_fn_traces == method.calls


@every_method
def test_runs_grad_fn_as_often_as_promised(method):
    record = recorded(method)
    assert record.executions == [method.calls * d for d in record.decisions]
    assert (not all(record.decisions)) == method.skips
    metrics = optax_sam.metrics(record.state)
    assert metrics["ascents"] == sum(record.decisions)
    assert metrics["rejected_ascents"] == 0
    np.testing.assert_allclose(metrics["ascent_rate"], np.mean(record.decisions))
    assert all(jnp.shape(x) == () for x in metrics.values())


@every_method
def test_metrics_are_those_of_the_last_ascended_step(method):
    tx, update = harness.compiled_update(method)
    params, g, g_s = harness.tree(), harness.tree(1), harness.tree(2)
    _, state, _ = update(g, g_s, tx.init(params), params, ascend=True)
    first = g if method.uses_incoming else g_s
    second = method.second(g, g_s)
    for _ in range(2):
        metrics = optax_sam.metrics(state)
        for name, tree in (("gradient_norm", first), ("ascended_norm", second)):
            np.testing.assert_allclose(metrics[name], optax.tree.norm(tree), rtol=1e-5)
        assert metrics["survival"] == 1
        _, state, _ = update(g_s, g, state, params, ascend=False)
    assert optax_sam.metrics(state)["ascent_rate"] == pytest.approx(1 / 3)


@every_skipping
def test_scan_skips_and_agrees_with_a_loop(method):
    problem = problems.mlp()
    tx = method.optimizer()
    executed = harness.Counter()
    step = harness.make_step(tx, problem.loss_fn, method.extra_args, executed)

    def epoch(params, state, batches):
        body = lambda carry, batch: (step(*carry, batch), None)
        return jax.lax.scan(body, (params, state), batches)[0]

    params = problem.params()
    params, state = jax.jit(epoch, donate_argnums=(0, 1))(
        params, tx.init(params), problem.batches(STEPS)
    )
    record = recorded(method)
    assert executed.read() == sum(record.executions)
    harness.assert_close(params, record.params, 1e-5)
    harness.assert_close(state, record.state, 1e-4)


def over_seeds(method):
    """A compiled step of two trainings, and what it starts from."""
    problem = problems.mlp()
    tx = method.optimizer()
    step = harness.make_step(tx, problem.loss_fn, method.extra_args)
    many = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), problem.params())
    return jax.jit(jax.vmap(step, in_axes=(0, 0, None))), many, jax.vmap(tx.init)


@every_one
def test_vmap_traces(method):
    together, many, init = over_seeds(method)
    state = jax.eval_shape(init, many)
    after = jax.eval_shape(together, many, state, problems.mlp().batch(0))
    assert harness.kinds(after) == harness.kinds((many, state))


# One for each kind of state, and all that stand outside the engine: compiled in
# float64, this is the dearest test of all.
@each(
    *(m for m in METHODS if m.name in ("sam", "vsam", "esam", "ae_sam", "random_sam")),
    *OTHERS,
    slow=lambda m: m.name not in ("sam", "vsam"),
)
def test_vmap_over_seeds(method, x64):
    together, many, init = over_seeds(method)
    starts = [jax.tree.map(lambda x, s=seed: x[s], many) for seed in range(2)]
    state = init(many)
    for t in range(10):
        many, state = together(many, state, problems.mlp().batch(t))
    tx, step = harness.compiled(method)
    for seed, start in enumerate(starts):
        alone = harness.run(step, start, tx.init(start), problems.mlp(), 10)
        one = jax.tree.map(lambda x, s=seed: x[s], (many, state))
        harness.assert_close(one, alone, 1e-10)


# Perturbation.


def point_and_offset(method, count=0, **changes):
    """The last point handed over on an ascended step, and how far it is."""
    params, g = harness.tree(), harness.tree(1)
    tx, update = harness.compiled_update(method)
    state = tx.init(params)
    *_, points = update(g, g, state, params, ascend=True)
    offset = jax.tree.map(jnp.subtract, points[-1], params)
    return params, offset, points


@every_method
def test_perturbation_has_length_rho(method, x64):
    params, offset, points = point_and_offset(method)
    assert len(points) == method.calls
    rho = method.settings[method.radius]
    length = method.norm(offset, params, harness.tree(1))
    np.testing.assert_allclose(length, rho, rtol=1e-9)
    # Uphill: an offset that loses against the gradient would be as long.
    assert optax.tree.vdot(offset, harness.tree(1)) > 0


@every_named
def test_rho_schedule_follows_the_step_counter(method):
    rho = lambda count: 0.02 * (count + 1.0)
    tx = method.build(**method.of_radius(rho))
    params, g = harness.tree(), harness.tree(1)

    state, ascents = tx.init(params), 0
    for t in range(12):
        points = []
        grad_fn = lambda p, points=points: points.append(p) or g
        before = optax_sam.metrics(state)["ascents"]
        _, state = tx.update(g, state, params, grad_fn=grad_fn)
        assert bool(points) == optax_sam.metrics(state)["ascents"] - before
        for point in points[-1:]:
            ascents += 1
            offset = jax.tree.map(jnp.subtract, point, params)
            length = method.norm(offset, params, g)
            np.testing.assert_allclose(length, rho(t), rtol=1e-5)
    assert ascents == optax_sam.metrics(state)["ascents"] > 0


@every_named
def test_learning_rate_schedule_counts_steps(method):
    seen = []

    def remember(updates, state, params=None):
        del params
        return updates, state + 1

    counter = optax.GradientTransformation(lambda p: jnp.zeros((), int), remember)
    tx = method.optimizer(counter)
    params = harness.tree()
    state = tx.init(params)
    update = jax.jit(
        lambda s: tx.update(params, s, params, grad_fn=lambda p: params)[1]
    )
    for _ in range(9):
        state = update(state)
        seen.append(int(state[1]))
    assert seen == list(range(1, 10))
    assert harness.member_state(state).count == 9


@one_per_ascent
def test_survival_of_the_perturbation(method):
    """A bf16 weight of size one does not move by 1e-4, unless it is perturbed wider."""
    g = {"kernel": jax.random.normal(jax.random.key(0), (100, 100))}
    for dtype, ascent_dtype, low, high in (
        ("float32", None, 0.99, 1.01),
        ("bfloat16", None, 0.95, 1.05),
        ("bfloat16", "bfloat16", 0.0, 0.05),
        ("bfloat16", "float32", 0.95, 1.05),
    ):
        # ASAM's ellipsoid is as wide as a weight; Look-LayerSAM's ball, as the layer.
        rho = 0.0002 if method.norm is relative_norm else 0.02
        tx = method.build(ascent_dtype=ascent_dtype, **method.of_radius(rho))
        params = {"kernel": jnp.ones((100, 100), dtype)}
        grads = {"kernel": g["kernel"].astype(dtype)}

        @jax.jit
        def update(state, params=params, grads=grads, tx=tx):
            points = []
            grad_fn = lambda p: points.append(p) or grads
            _, state = tx.update(grads, state, params, grad_fn=grad_fn, ascend=True)
            return state, points[-1]

        state, point = update(tx.init(params))
        assert point["kernel"].dtype == (ascent_dtype or "float32")
        survival = float(optax_sam.metrics(state)["survival"])
        assert low <= survival <= high, (dtype, ascent_dtype, survival)
        # What arrived, against what was meant: the metric must not flatter itself.
        achieved = np.asarray(point["kernel"], np.float64) - 1
        moved = method.norm({"kernel": jnp.asarray(achieved)}, params, grads) / rho
        assert (moved > 0.9) == (survival > 0.9)


# Numbers that are not ordinary.


@every_method
def test_zero_gradients(method):
    tx, update = harness.compiled_update(method)
    params, g = harness.tree(), harness.tree(1)
    zero = harness.like(g, 0.0)
    for pair in ((zero, zero), (zero, g), (g, zero)):
        state = tx.init(params)
        # Long enough for controllers with windows to draw their conclusions.
        for _ in range(20):
            d, state, points = update(*pair, state, params, ascend=True)
            assert harness.is_finite((d, state))
            if pair[0] is zero and pair[1] is zero:
                harness.assert_equal(d, zero)
                if method.uses_incoming:  # R-SAM climbs its noise
                    harness.assert_equal(points[-1], params)
        d, state, _ = update(zero, zero, state, params, ascend=False)
        assert harness.is_finite((d, state))
        d, state, _ = update(g, g, state, params, ascend=True)
        assert harness.is_finite((d, state))
        assert optax_sam.metrics(state)["rejected_ascents"] == 0


def warmed_up(method):
    """A state that has something to lose: two ordinary ascended steps were taken."""
    tx, update = harness.compiled_update(method)
    params, g = harness.tree(), harness.tree(1)
    state = tx.init(params)
    for seed in (2, 3):
        _, state, _ = update(g, harness.tree(seed), state, params, ascend=True)
    return update, params, g, state


def assert_remembers_nothing_of(method, state, params):
    """The next ordinary steps are what they would have been."""
    update = harness.compiled_update(method)[1]
    g, g_s = harness.tree(5), harness.tree(6)
    d, state, _ = update(g, g_s, state, params, ascend=True)
    harness.assert_emits(method, d, g, g_s, 1e-5)
    d, state, _ = update(g, g_s, state, params, ascend=False)
    assert harness.is_finite((d, state))


@every_named
@pytest.mark.parametrize("bad", harness.BAD)
def test_first_gradient_not_finite(method, bad):
    update, params, g, before = warmed_up(method)
    g_bad = harness.with_entry(g, bad)
    for ascend in (True, False):
        for g_s in (g_bad, g):
            d, state, _ = update(g_bad, g_s, before, params, ascend=ascend)
            unused = ascend and not method.uses_incoming
            if unused and g_s is g:
                harness.assert_equal(d, g)
            else:
                # A guard after the member must see it.
                assert not abs(d["layer"]["kernel"][1, 1]) < 1e29
            assert harness.is_finite(state)
            assert_remembers_nothing_of(method, state, params)
            rejected = optax_sam.metrics(state)["rejected_ascents"]
            assert rejected == (ascend and not (unused and g_s is g))


@every_named
@pytest.mark.parametrize("bad", harness.BAD)
def test_second_gradient_not_finite(method, bad):
    update, params, g, before = warmed_up(method)
    g_bad = harness.with_entry(g, bad)
    d, state, _ = update(g, g_bad, before, params, ascend=True)
    first = g if method.uses_incoming else g_bad
    d_stale, skipped, _ = update(first, g, before, params, ascend=False)
    harness.assert_equal(d, d_stale)
    assert harness.is_finite(state)
    assert harness.is_finite(d) or not method.uses_incoming
    harness.assert_equal(state.blend, skipped.blend)
    harness.assert_equal(state.ascent, skipped.ascent)
    metrics, were = optax_sam.metrics(state), optax_sam.metrics(before)
    assert metrics["rejected_ascents"] == 1
    assert metrics["ascents"] == were["ascents"] + 1
    for name in ("gradient_norm", "ascended_norm", "survival"):
        assert metrics[name] == were[name]
    assert_remembers_nothing_of(method, state, params)


@pytest.mark.parametrize("bad", [np.nan, 1e30])
@pytest.mark.parametrize("which", ["first", "second"])
def test_parts_need_no_guard_of_their_own(which, bad):
    """A researcher's parts that store what they are given, without a thought."""
    ascent = optax.chain(optax.ema(0.5), optax_sam.ascent.l2(0.1))
    when = optax_sam.when.always()._replace(
        init=lambda params: params, observe=lambda state, g, g_s, step: g_s
    )
    blend = optax_sam.blend.Blend(
        init=lambda params: params,
        fresh=lambda g, g_s, state, step: (g_s, g_s),
        stale=lambda g, state, step: (g, state),
    )
    tx = optax_sam.sharpness_aware(ascent, when, blend)
    good, params = harness.tree(1), harness.tree()
    before = tx.update(good, tx.init(params), params, grad_fn=lambda p: good)[1]
    spoiled = harness.with_entry(good, bad)
    pair = (spoiled, good) if which == "first" else (good, spoiled)
    _, state = tx.update(pair[0], before, params, grad_fn=lambda p: pair[1])
    harness.assert_equal(
        (state.ascent, state.when, state.blend),
        (before.ascent, before.when, before.blend),
    )


@every_foreseen
def test_a_rejected_ascent_does_not_move_the_plan(method):
    update, params, g, before = warmed_up(method)
    plans = []
    for g_s in (g, harness.with_entry(g, np.nan)):
        _, state, _ = update(g, g_s, before, params, ascend=True)
        plans.append(optax_sam.ascent_plan(state))
    np.testing.assert_array_equal(*plans)


@every_named
def test_whole_gradient_overflows(method):
    """1e30 everywhere is finite in float32, its squared norm is not."""
    tx, update = harness.compiled_update(method)
    params = harness.tree()
    big = harness.tree(1, scale=1e30)
    pairs = [(big, big), (harness.tree(1), big)]
    pairs += [(big, harness.tree(1))] if method.uses_incoming else []
    for pair in pairs:
        d, state, points = update(*pair, tx.init(params), params, ascend=True)
        harness.assert_equal(d, pair[0 if method.uses_incoming else 1])
        assert harness.is_finite((state, points))
        assert optax_sam.metrics(state)["rejected_ascents"] == 1


@every_named
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18])
def test_extreme_but_ordinary_scales(method, scale):
    tx, update = harness.compiled_update(method)
    params, g = harness.tree(), harness.tree(1, scale=scale)
    state = tx.init(params)
    for ascend in (True, False):
        d, state, points = update(g, g, state, params, ascend=ascend)
        assert harness.is_finite((d, state, points))
        harness.assert_close(d, g, 1e-6)
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


@every_named
def test_half_precision_gradients_near_overflow(method):
    """A float16 gradient whose norm no float16 holds is an ordinary gradient."""
    tx = method.build()
    params = harness.tree(dtype="float16")
    g = harness.tree(1, scale=1e4, dtype="float16")
    state = tx.init(params)
    d, state = tx.update(g, state, params, grad_fn=lambda p: g, ascend=True)
    harness.assert_equal(d, g)
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


@every_named
def test_ascended_gradient_beyond_the_emitted_dtype(method):
    """Finite in the float32 of the perturbed point, infinite in float16: rejected."""
    tx = method.build()
    params = harness.tree(dtype="float16")
    g, g_s = harness.tree(1, dtype="float16"), harness.tree(2, scale=1e6)

    update = functools.partial(tx.update, g, params=params, grad_fn=lambda p: g_s)
    d, state = update(tx.init(params), ascend=True)
    later, state = update(state, ascend=False)
    harness.assert_equal(later, g)
    if method.uses_incoming:
        harness.assert_equal(d, g)
    assert optax_sam.metrics(state)["rejected_ascents"] == 1


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


@every_one
@pytest.mark.parametrize(
    "target",
    ["rosenbrock"]
    + [pytest.param(t, marks=pytest.mark.slow) for t in list(TARGETS)[1:]],
)
def test_converges(method, target):
    """As far as the base optimizer does, up to a hundredth of the way."""
    make, _, steps = TARGETS[target]
    smaller = {method.radius: 0.02} if method.radius in method.settings else {}
    if "learning_rate" in method.settings:
        _, rate, steps = TARGETS[target]
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
