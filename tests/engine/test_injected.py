"""A gradient that is not finite is not used, and leaves nothing behind."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import each_part
from registry import BY_NAME, METHODS, OTHERS, each

import optax_sam

# In the registry warm-ups take 7 steps and windows 4; a few more show what the last
# fault did.
STEPS, AFTER = 20, 4
SPOILED = {"first": [1, 0], "second": [0, 1], "both": [1, 1]}
CASES = [
    (step, which, bad)
    for step in range(STEPS)
    for which in SPOILED
    for bad in harness.BAD
]
INJECTED = [method for method in METHODS + OTHERS if not method.variant]
# What is kept, and what decides, differs among these; the others are like one of them.
QUICK = ("vsam", "ae_sam", "friendly_sam", "sampa", "msam")


@functools.cache
def gradients():
    """A first and a second one for each step."""
    trees = [harness.tree(seed) for seed in range(2 * (STEPS + AFTER))]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    return stack(trees[::2]), stack(trees[1::2])


def entries():
    """What replaces an entry of both gradients, by case and step; 0 for nothing."""
    found = np.zeros((1 + len(CASES), STEPS + AFTER, 2), np.float32)
    for case, (step, which, bad) in enumerate(CASES, start=1):
        found[case, step, np.flatnonzero(SPOILED[which])] = bad
    return found


@functools.cache
def all_runs(method):
    """What is emitted, and the states, of a run without a fault and one per case.

    The base optimizer keeps nothing, or has a guard; the method has none.
    """
    base = optax.sgd(0.1)
    if method.name == "msam":  # it needs a momentum
        base = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), STEPS)
    tx, params = method.optimizer(base), harness.tree()

    def spoiled(g, entry):
        there = g["layer"]["kernel"][1, 1]
        return harness.with_entry(g, jnp.where(entry == 0, there, entry))

    def step(state, given):
        first, second = map(spoiled, *given)
        emitted, state = tx.update(first, state, params, grad_fn=lambda p: second)
        return state, (emitted, state)

    @jax.jit
    def run(gradients, entries):
        of_case = lambda x: jax.lax.scan(step, tx.init(params), (gradients, x))[1]
        return jax.lax.map(of_case, entries)

    emitted, states = jax.device_get(run(gradients(), entries()))
    # Time in front: leaves are then (steps, cases, ...).
    return jax.tree.map(lambda x: np.moveaxis(x, 1, 0), (emitted, states))


def where_finite(stacked):
    """For which steps and cases all numbers are finite."""
    leaves = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(stacked)]
    floats = [x for x in leaves if np.issubdtype(x.dtype, np.floating)]
    return np.all([np.isfinite(x).all(axis=-1) for x in floats], axis=0)


@each(*INJECTED, slow=lambda method: method.name not in QUICK)
def test_a_fault_leaves_nothing_behind(method):
    emitted, states = all_runs(method)
    assert where_finite(states).all()
    cases = np.arange(1, 1 + len(CASES))
    at_fault = np.zeros((STEPS + AFTER, 1 + len(CASES)), bool)
    at_fault[[step for step, *_ in CASES], cases] = True
    assert (where_finite(emitted) | at_fault).all()
    if harness.members(states):
        assert_decided_and_counted(method, emitted, states)


def assert_decided_and_counted(method, emitted, states):
    (member,) = harness.members(states)
    decisions = np.diff(member.num_ascents, axis=0, prepend=0)
    looks = hasattr(member.when, "rate") or not method.lookahead
    assert looks or (decisions == decisions[:, :1]).all()
    rejected = np.diff(member.num_rejected, axis=0, prepend=0)
    finite = where_finite(emitted)
    for case, (step, which, _) in enumerate(CASES, start=1):
        ascended = bool(decisions[step, case])
        # A first gradient counts on any step, but R-SAM takes its own where it ascends.
        used = method.uses_incoming or not ascended
        counts = ascended and (which != "first" or used)
        expected = np.zeros(STEPS + AFTER)
        expected[step] = counts
        np.testing.assert_array_equal(rejected[:, case], expected)
        assert finite[step, case] or which != "second" or not method.uses_incoming
        if which == "second" and not ascended:  # never asked for
            for leaf in jax.tree.leaves((emitted, states)):
                np.testing.assert_array_equal(leaf[:, case], leaf[:, 0])


def test_all_kinds_of_steps_are_hit():
    _, states = all_runs(BY_NAME["vsam"])
    (member,) = harness.members(states)
    when = jax.tree.map(lambda x: x[:STEPS, 0], member.when)
    ascended = np.diff(member.num_ascents[:STEPS, 0], prepend=0).astype(bool)
    warm = np.append(True, when.warmup_left[:-1] > 0)
    turns = (when.position == 0) & ~warm
    for kind in (warm, ~warm & ascended, ~warm & ~ascended, turns & ascended, turns):
        assert kind.any()


# What is done instead, and what is counted.


@each_part()
def test_a_bad_gradient_is_not_used(method):
    """After two ordinary steps, so that there is something to lose."""
    tx, update = harness.compiled_update(method)
    params, g = harness.tree(), harness.tree(1)
    before = tx.init(params)
    for seed in (2, 3):
        _, before, _ = update(g, harness.tree(seed), before, params, ascend=True)
    were = optax_sam.metrics(before)
    plan = lambda state: optax_sam.ascent_plan(state) if method.lookahead else ()
    _, ordinary, _ = update(g, g, before, params, ascend=True)

    def assert_remembers_nothing(state):
        assert harness.is_finite(state)
        first, second = harness.tree(5), harness.tree(6)
        d, state, _ = update(first, second, state, params, ascend=True)
        harness.assert_emits(method, d, first, second, 1e-5)
        d, state, _ = update(first, second, state, params, ascend=False)
        assert harness.is_finite((d, state))

    for bad in harness.BAD:
        g_bad = harness.with_entry(g, bad)
        for ascend, g_s in ((True, g_bad), (True, g), (False, g)):
            d, state, _ = update(g_bad, g_s, before, params, ascend=ascend)
            unused = ascend and not method.uses_incoming
            if unused and g_s is g:
                harness.assert_equal(d, g)
            else:
                # A guard after the member must see it.
                assert not abs(d["layer"]["kernel"][1, 1]) < 1e29
            assert_remembers_nothing(state)
            rejected = optax_sam.metrics(state)["rejected_ascents"]
            assert rejected == (ascend and not (unused and g_s is g))

        d, state, _ = update(g, g_bad, before, params, ascend=True)
        first = g if method.uses_incoming else g_bad
        d_stale, skipped, _ = update(first, g, before, params, ascend=False)
        harness.assert_equal(d, d_stale)
        assert harness.is_finite(d) or not method.uses_incoming
        harness.assert_equal(state.blend, skipped.blend)
        harness.assert_equal(state.ascent, skipped.ascent)
        metrics = optax_sam.metrics(state)
        assert metrics["rejected_ascents"] == 1
        assert metrics["ascents"] == were["ascents"] + 1
        for name in ("gradient_norm", "ascended_norm", "survival"):
            assert metrics[name] == were[name]
        np.testing.assert_array_equal(plan(state), plan(ordinary))
        assert_remembers_nothing(state)


@each_part()
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
                if method.name not in ("random_sam", "mrwp"):  # these add noise
                    harness.assert_equal(points[-1], params)
        d, state, _ = update(zero, zero, state, params, ascend=False)
        assert harness.is_finite((d, state))
        d, state, _ = update(g, g, state, params, ascend=True)
        assert harness.is_finite((d, state))
        assert optax_sam.metrics(state)["rejected_ascents"] == 0
