"""One rule, three forms of a step: a conditional, two programs, a plan read ahead."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from harness import each_part
from registry import BY_NAME, METHODS, each

import optax_sam


def decided(state):
    return bool(optax_sam.ascends_next(state))


def with_conditional(state):
    """The decisions of the next steps, and what the step is told of them."""
    return [(decided(state), None)]


def with_two_programs(state):
    return [2 * (decided(state),)]


def with_plan(state):
    return [2 * (bool(ascend),) for ascend in optax_sam.ascent_plan(state)]


def trained(method, form, steps):
    """Parameters, state, decisions, and how often the device was waited for."""
    problem = problems.mlp()
    tx, step = harness.compiled(method)
    params = problem.params()
    state, decisions, reads = tx.init(params), [], 0
    while len(decisions) < steps:
        reads += 1
        for decision, ascend in form(state)[: steps - len(decisions)]:
            batch = problem.batch(len(decisions))
            decisions.append(decision)
            params, state = step(params, state, batch, ascend=ascend)
    return params, state, decisions, reads


@each(*(m for m in METHODS if m.skips and m.lookahead), slow=lambda m: m.name != "vsam")
def test_forms_agree(method, x64):
    steps = 200
    params, state, decisions, _ = trained(method, with_conditional, steps)
    for form in (with_two_programs, with_plan):
        found = trained(method, form, steps)
        assert found[2] == decisions
        harness.assert_close(found[0], params, 1e-10)
        harness.assert_close(found[1], state, 1e-8)
    assert found[3] <= steps / method.lookahead + 3


FORESEEN = "sam vsam looksam ss_sam ae_sam_lagged renyi_sam_after_warmup"


@pytest.mark.parametrize("name", FORESEEN.split())
def test_plan_is_what_happens(name):
    method = BY_NAME[name]
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


@each_part(lambda m: not m.lookahead)
def test_nothing_is_known_ahead(method):
    """AE-SAM decides from the gradient to come."""
    state = method.build().init(harness.tree())
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan):
        with pytest.raises(ValueError, match="ascend=None"):
            reader(state)


@each_part(lambda m: m.skips)
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


def test_ascend_must_be_static():
    tx, params = optax_sam.sam(), harness.tree()
    update = lambda ascend: tx.update(
        params, tx.init(params), params, grad_fn=lambda p: p, ascend=ascend
    )
    for run in (jax.eval_shape, lambda f, x: f(jnp.array(x)), lambda f, x: f("yes")):
        with pytest.raises(ValueError, match="static_argnames"):
            run(update, True)


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
        with pytest.raises(ValueError, match="Several sharpness-aware transformations"):
            reader(state)
    assert optax_sam.ascends_next(state[0])


def test_readers_without_a_member():
    state = optax.adam(0.1).init(harness.tree())
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan, optax_sam.metrics):
        with pytest.raises(ValueError, match="No state of a sharpness-aware method"):
            reader(state)
