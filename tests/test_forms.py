"""One rule, three forms of a step: a conditional, two programs, a plan read ahead."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from registry import (
    BY_NAME,
    METHODS,
    each,
    every_foreseen,
    every_method,
    every_skipping,
)

import optax_sam

with_key = pytest.mark.parametrize(
    "rule",
    [
        optax_sam.when.bernoulli,
        functools.partial(
            optax_sam.when.variance_controlled, window=20, warmup_steps=0
        ),
    ],
    ids=["bernoulli", "variance_controlled"],
)


def with_conditional(method, problem, steps):
    tx, step = harness.compiled(method)
    params = problem.params()
    state, decisions = tx.init(params), []
    for t in range(steps):
        decisions.append(bool(optax_sam.ascends_next(state)))
        params, state = step(params, state, problem.batch(t))
    return params, state, decisions


def with_two_programs(method, problem, steps):
    tx, step = harness.compiled(method)
    params = problem.params()
    state, decisions = tx.init(params), []
    for t in range(steps):
        ascend = bool(optax_sam.ascends_next(state))
        decisions.append(ascend)
        params, state = step(params, state, problem.batch(t), ascend=ascend)
    return params, state, decisions


def with_plan(method, problem, steps):
    tx, step = harness.compiled(method)
    params = problem.params()
    state, decisions, reads = tx.init(params), [], 0
    while len(decisions) < steps:
        reads += 1
        for ascend in optax_sam.ascent_plan(state)[: steps - len(decisions)]:
            batch = problem.batch(len(decisions))
            decisions.append(bool(ascend))
            params, state = step(params, state, batch, ascend=bool(ascend))
    assert reads <= steps / method.lookahead + 3  # each waits for the device
    return params, state, decisions


def assert_forms_agree(method, forms, steps, tolerance):
    problem = problems.mlp()
    reference = with_conditional(method, problem, steps)
    for form in forms:
        params, state, decisions = form(method, problem, steps)
        assert decisions == reference[2]
        harness.assert_close(params, reference[0], tolerance)
        if tolerance < 1e-8:
            harness.assert_close(state, reference[1], 100 * tolerance)


@each(
    *(m for m in METHODS if m.skips and m.lookahead),
    slow=lambda m: m.name not in ("sam_5", "vsam", "looksam"),
)
def test_forms_agree_in_float64(method, x64):
    assert_forms_agree(method, (with_two_programs, with_plan), 200, 1e-10)


@pytest.mark.parametrize("name", ["sam_5", "ss_sam", "vsam"])
def test_forms_agree_in_float32(name):
    assert_forms_agree(BY_NAME[name], (with_two_programs, with_plan), 20, 1e-5)


@every_foreseen
def test_plan_is_what_happens(method):
    tx, update = harness.compiled_update(method)
    params = harness.tree()
    state, decisions, plans = tx.init(params), [], []
    for t in range(40):
        plans.append(optax_sam.ascent_plan(state))
        decisions.append(bool(optax_sam.ascends_next(state)))
        g, g_s = harness.tree(20 + t % 7), harness.tree(10 + t % 5)
        _, state, _ = update(g, g_s, state, params, ascend=decisions[-1])
    for t, plan in enumerate(plans):
        assert plan.ndim == 1
        assert plan.dtype == bool
        assert len(plan) >= 1
        known = decisions[t : t + len(plan)]
        np.testing.assert_array_equal(plan[: len(known)], known)
    assert all(decisions) != method.skips


@each(*(m for m in METHODS if not m.lookahead))
def test_nothing_is_known_ahead(method):
    """AE-SAM decides from the gradient to come."""
    state = method.build().init(harness.tree())
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan):
        with pytest.raises(ValueError, match="ascend=None"):
            reader(state)


@every_skipping
def test_a_static_ascend_overrules_and_is_recorded(method):
    tx, update = harness.compiled_update(method)
    params, g, g_s = harness.tree(), harness.tree(1), harness.tree(2)
    for ascend in (True, False):
        state = tx.init(params)
        for t in range(8):
            d, state, points = update(g, g_s, state, params, ascend=ascend)
            assert len(points) == (method.calls if ascend else 0)
            if ascend:
                harness.assert_emits(method, d, g, g_s, 1e-6)
            else:
                harness.assert_equal(d, g)
            assert optax_sam.metrics(state)["ascents"] == (t + 1 if ascend else 0)
    # NumPy's bools are what a plan is made of.
    _, _, points = update(g, g_s, state, params, ascend=np.bool_(True))
    assert len(points) == method.calls


@every_method
def test_ascend_must_be_static(method):
    tx, params = method.build(), harness.tree()
    update = lambda ascend: tx.update(
        params, tx.init(params), params, grad_fn=lambda p: p, ascend=ascend
    )
    with pytest.raises(ValueError, match="static_argnames"):
        jax.eval_shape(update, True)


@pytest.mark.parametrize(("k", "phase"), [(1, 0), (3, 0), (3, 1), (3, 2), (70, 69)])
def test_every_k(k, phase):
    method = optax_sam.sam(when=optax_sam.when.every_k(k, phase=phase))
    plan = optax_sam.ascent_plan(method.init(jnp.ones(2)))
    np.testing.assert_array_equal(plan, (np.arange(len(plan)) + phase) % k == 0)


# Randomness.


def drawn(when, state, steps):
    """The decisions of some steps whose gradients teach the rule nothing."""
    body = lambda s, _: (when.advance(s, s.ascends), s.ascends)
    return jax.jit(lambda s: jax.lax.scan(body, s, length=steps))(state)[1]


@with_key
def test_keys_of_all_kinds_draw_alike(rule):
    typed = jax.random.key(7, impl="threefry2x32")
    kinds = [7, np.int64(7), jnp.uint32(7), typed, jax.random.key_data(typed)]
    kinds += [np.asarray(jax.random.key_data(typed))]
    states = [rule(key=key).init(None) for key in kinds]
    for state in states:
        harness.assert_equal(state, states[0])
        assert state.key.dtype == jnp.uint32
    when = rule(key=7)
    plans = [drawn(when, s, 100) for s in (states[0], rule(key=8).init(None))]
    assert 0 < np.sum(plans[0] != plans[1]) < 100


@with_key
def test_a_key_of_another_generator(rule):
    state = rule(key=jax.random.key(7, impl="rbg")).init(None)
    assert harness.kinds(state) == harness.kinds(rule(key=7).init(None))


@with_key
def test_vmap_over_keys(rule):
    states = jax.vmap(lambda key: rule(key=key).init(None))(jnp.arange(3))
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], states)
        harness.assert_close(one, rule(key=i).init(None), 1e-6)


@with_key
@pytest.mark.parametrize("key", [jnp.zeros(3, jnp.uint32), np.zeros(2), 1.5, None])
def test_no_key(rule, key):
    with pytest.raises(ValueError, match="key must be"):
        rule(key=key).init(None)


def test_bernoulli_frequency():
    """As often as promised, by the binomial's own standard deviation."""
    p, steps = 0.3, 2000
    when = optax_sam.when.bernoulli(p, key=1)
    decisions = drawn(when, when.init(None), steps)
    assert abs(decisions.mean() - p) < 4 * np.sqrt(p * (1 - p) / steps)
    assert abs(decisions[1:] @ (1.0 * decisions[:-1]) / steps - p**2) < 0.05


def test_bernoulli_probability_schedule():
    """Step t is drawn with p(t), and only its decision is known ahead."""
    p = lambda count: jnp.where(count < 5, 1.0, 0.0)
    tx = optax_sam.sam(when=optax_sam.when.bernoulli(p))
    params = jnp.ones(2)
    state, decisions = tx.init(params), []
    update = jax.jit(lambda s: tx.update(params, s, params, grad_fn=lambda p: p)[1])
    for _ in range(10):
        plan = optax_sam.ascent_plan(state)
        assert len(plan) == 1
        decisions.append(bool(plan[0]))
        state = update(state)
    assert decisions == 5 * [True] + 5 * [False]
    assert optax_sam.metrics(state)["ascents"] == 5


@pytest.mark.parametrize("max_rate", [0.4, 1.0])
def test_vsam_full_windows_hold_their_quota(max_rate):
    """Each full window has floor(s) ascents, and s moves with the variation."""
    window = 10
    tx = optax_sam.vsam(
        window=window, num_slices=5, warmup_steps=19, max_rate=max_rate, sensitivity=1.0
    )
    params, rng = harness.tree(), np.random.default_rng(0)
    g = harness.tree(1)

    @jax.jit
    def update(state, g_s):
        return tx.update(g, state, params, grad_fn=lambda p: g_s)[1]

    state = tx.init(params)
    decisions, rates = [], []
    for size in 1 + 0.1 * np.abs(rng.normal(size=19 + 9 + 12 * window)):
        decisions.append(bool(optax_sam.ascends_next(state)))
        state = update(state, jax.tree.map(lambda x, s=size: s * x, g))
        rates.append(float(optax_sam.metrics(state)["samples_per_window"]))
    # After the warm-up the clock stands at 1 in a window whose quota is spent.
    assert decisions[:28] == 19 * [True] + 9 * [False]
    for start in range(28, len(decisions), window):
        taken = sum(decisions[start : start + window])
        assert taken == int(rates[start]) <= window * max_rate
    assert max(rates) > 2 if max_rate == 1.0 else max(rates) == 4


# Readers.


def test_readers_with_several_members():
    """Metrics keep apart what belongs to which; there is no one decision."""
    tx = optax.chain(optax_sam.sam(0.1), optax_sam.asam(0.2), optax.sgd(0.1))
    state = tx.init(harness.tree())
    metrics = optax_sam.metrics(state)
    assert {key.rpartition("/")[2] for key in metrics} == {
        "ascents",
        "rejected_ascents",
        "ascent_rate",
        "gradient_norm",
        "ascended_norm",
        "survival",
    }
    assert len(metrics) == 12
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan):
        with pytest.raises(ValueError, match="Several sharpness-aware members"):
            reader(state)
    assert optax_sam.ascends_next(state[0])


def test_readers_without_a_member():
    state = optax.adam(0.1).init(harness.tree())
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan, optax_sam.metrics):
        with pytest.raises(ValueError, match="No state of a sharpness-aware method"):
            reader(state)
