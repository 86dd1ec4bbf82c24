"""Dispatch takes the decisions of plain jit under whatever holds or moves the state."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from wrapped import RULES, WRAPPERS, ascents, rolled_back, to_host_and_back, wrap

import optax_sam
import optax_sam.nnx
from optax_sam import when

W = jnp.array([0.3, -0.7])


def loss_fn(w, x):
    return jnp.sum((w - x) ** 2) + jnp.sum(jnp.cos(3 * w))


def make_step(tx, finish=lambda old, new: new):
    """A step; ``finish`` says what becomes of the old and the new (w, state)."""

    def step(w, state, x, ascend=None):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        updates, after = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=ascend)
        return finish((w, state), (optax.apply_updates(w, updates), after))

    return step


def inputs(steps, bad=()):
    return [np.float32(np.nan if t in bad else np.sin(t)) for t in range(steps)]


def check(step, state, xs, w=W):
    """The same decisions and weights under plain jit and dispatched."""
    plain, dispatched = jax.jit(step), optax_sam.dispatch(step)
    a = b = (w, state)
    for t, x in enumerate(xs):
        a, b = plain(*a, x), dispatched(*b, x)
        np.testing.assert_array_equal(ascents(a[1]), ascents(b[1]), err_msg=str(t))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), a[0], b[0])
    return ascents(a[1])


def sam(rule):
    return optax.chain(optax_sam.sam(0.3, when=rule), optax.sgd(0.05))


def built(rule, wrapper):
    return wrap(wrapper, sam(RULES[rule]()))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper):
    tx = built("every_2", wrapper)
    taken = check(make_step(tx), tx.init(W), inputs(24, bad=(4, 9)))
    assert 0 < taken < 24


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("rule", RULES)
def test_rules_in_wrappers(rule, wrapper):
    tx = built(rule, wrapper)
    check(make_step(tx), tx.init(W), inputs(24, bad=(4, 9)))


def state_rolled_back(old, new):
    return new[0], rolled_back(old, new)[1]


@pytest.mark.parametrize("finish", [rolled_back, state_rolled_back])
@pytest.mark.parametrize("rule", ["every_3", "variance"])
def test_a_step_that_rolls_back(rule, finish):
    tx = sam(RULES[rule]())
    xs = inputs(24, bad=(2, 3, 11))
    step = make_step(tx, finish)
    if finish is state_rolled_back:  # the weights must stay usable
        xs = inputs(24)
    check(step, tx.init(W), xs)


def test_lookahead():
    """It drops extra arguments, so the fast optimizer is bound to them in the step."""
    fast = sam(when.every_k(3))

    def bound(**extra):
        update = functools.partial(fast.update, **extra)
        fast_bound = optax.GradientTransformation(fast.init, update)
        return optax.lookahead(fast_bound, sync_period=4, slow_step_size=0.5)

    def step(w, state, x, ascend=None):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        tx = bound(grad_fn=grad_fn, ascend=ascend)
        updates, state = tx.update(grad_fn(w.fast), state, w)
        return optax.apply_updates(w, updates), state

    w = optax.LookaheadParams.init_synced(W)
    assert check(step, bound().init(w), inputs(24), w) == 8


def test_several_steps_in_one_call():
    """A loop of four steps, written out or not: each has a decision."""
    tx = sam(when.every_k(3))
    one = make_step(tx)

    def unrolled(w, state, x, ascend=None):
        for i in range(4):
            w, state = one(w, state, x + i, ascend)
        return w, state

    def scanned(w, state, x, ascend=None):
        body = lambda carry, i: (one(*carry, x + i, ascend), None)
        return jax.lax.scan(body, (w, state), jnp.arange(4.0))[0]

    for step in (unrolled, scanned):
        assert check(step, tx.init(W), inputs(9)) == 12


def test_a_population():
    """Seeds under vmap decide for themselves."""
    tx = optax.chain(optax_sam.sam(0.3, when=when.bernoulli(0.5)), optax.sgd(0.05))
    many = lambda w, state, x, ascend=None: jax.vmap(
        functools.partial(make_step(tx), ascend=ascend), in_axes=(0, 0, None)
    )(w, state, x)
    w = jnp.stack([W, W + 1, W - 1])
    state = jax.vmap(tx.init)(w)
    keys = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
    member = state[0]._replace(when=state[0].when._replace(key=keys))
    taken = check(many, (member, state[1]), inputs(20), w)
    assert len(set(taken.tolist())) > 1
    plan = optax_sam.ascent_plan((member, state[1]))
    assert plan.shape == (3, 64)
    alone = jax.tree.map(lambda x: x[1], member)
    np.testing.assert_array_equal(plan[1], optax_sam.ascent_plan(alone))


def test_a_population_of_vsam():
    tx = optax_sam.vsam(0.1, window=4, num_slices=2, warmup_steps=4)
    states = jax.vmap(lambda k: tx.init(W))(jnp.arange(3))
    assert {x.shape for x in optax_sam.metrics(states).values()} == {(3,)}
    assert optax_sam.ascends_next(states).shape == (3,)
    assert optax_sam.ascent_plan(states).shape[0] == 3


# Other states than the one that the call before returned.


CHANGED = {
    "every_k": (when.every_k(5), when.every_k(3)),
    "every_k_shorter": (when.every_k(2), when.every_k(7, phase=3)),
    "bernoulli": (when.bernoulli(0.9), when.bernoulli(0.1)),
    "bernoulli_scheduled": (
        when.bernoulli(0.9),
        when.bernoulli(optax.linear_schedule(0.9, 0.0, 20)),
    ),
    "bernoulli_constant": (
        when.bernoulli(optax.linear_schedule(0.9, 0.0, 20)),
        when.bernoulli(0.3),
    ),
    "variance": (
        when.variance_controlled(4, 2, warmup_steps=2, force_quota=False),
        when.variance_controlled(4, 2, warmup_steps=9, sensitivity=0.9),
    ),
    "after": (when.after(9, when.every_k(2)), when.after(2, when.every_k(3))),
    "after_long": (when.after(80, when.every_k(2)), when.after(80, when.every_k(5))),
    "after_twice": (
        when.after(9, when.after(3, when.bernoulli(0.9))),
        when.after(9, when.after(3, when.bernoulli(0.2))),
    ),
    "lagged": (
        when.norm_above_trend(0.9, lag=1),
        when.norm_above_trend(0.1, threshold=-1.0, lag=1),
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_state_continues_under_other_settings(case):
    """The new settings hold from the first step on, under jit and dispatch alike."""
    before, after = CHANGED[case]
    w, state = W, sam(before).init(W)
    for x in inputs(4):
        w, state = jax.jit(make_step(sam(before)))(w, state, x)
    assert check(make_step(sam(after)), state, inputs(90), w) > 0


def test_a_changed_period_is_that_of_the_new_rule():
    tx = sam(when.every_k(3))
    state = sam(when.every_k(5)).init(W)
    step = optax_sam.dispatch(make_step(tx))
    w, seen = W, []
    for x in inputs(13):
        seen.append(bool(optax_sam.ascends_next(state)))
        w, state = step(w, state, x)
    assert seen == [t % 3 == 0 for t in range(13)]
    assert optax_sam.ascent_plan(state)[:3].tolist() == [False, False, True]


def test_restored_and_rolled_back_states():
    """From the host, an older one, a new one: in the middle of a plan."""
    tx = sam(when.every_k(3))
    ends = []
    for run in (jax.jit(make_step(tx)), optax_sam.dispatch(make_step(tx))):
        history, carry = [], (W, tx.init(W))
        for t, x in enumerate(inputs(20)):
            if t == 5:
                carry = to_host_and_back(carry)
            if t == 12:
                carry = history[7]
            if t == 13:
                carry = carry[0], tx.init(W)
            carry = run(*carry, x)
            history.append(carry)
        ends.append([ascents(state) for _, state in history])
    assert ends[0] == ends[1]
    assert ends[0][-1] == 3  # of the seven steps after the new state


def test_a_call_that_raises_uses_no_decision():
    tx = sam(when.every_k(3))
    step = optax_sam.dispatch(make_step(tx))
    w, state = W, tx.init(W)
    for t, x in enumerate(inputs(12)):
        if t in (0, 4, 6):
            with pytest.raises(TypeError):
                step(w, state, "no batch")
        assert bool(optax_sam.ascends_next(state)) == (t % 3 == 0)
        before = ascents(state)
        w, state = step(w, state, x)
        assert (ascents(state) > before) == (t % 3 == 0)


# Running ahead, and other compilers.


@pytest.fixture
def reads(monkeypatch):
    """How often dispatch waited for the state."""
    module, count = sys.modules["optax_sam.dispatch"], []
    for name in ("ascent_plan", "ascends_next"):
        reader = getattr(module, name)
        waiting = lambda state, reader=reader: count.append(1) or reader(state)
        monkeypatch.setattr(module, name, waiting)
    return count


def run_plain(tx, jit=jax.jit, **options):
    step = optax_sam.dispatch(make_step(tx), jit=jit, **options)
    w, state = W + 0, tx.init(W)  # a buffer that may be donated
    for x in inputs(130):
        w, state = step(w, state, x)
    return w, state


@pytest.mark.parametrize(
    "behind",
    [
        optax.identity(),
        optax.clip_by_global_norm(1.0),
        optax.apply_if_finite(optax.adam(1e-3), 3),
    ],
    ids=["alone", "clip", "guard"],
)
def test_it_runs_ahead_in_a_chain(reads, behind):
    tx = optax.chain(optax_sam.sam(0.1, when=when.every_k(3)), behind, optax.sgd(0.05))
    _, state = run_plain(tx, donate_argnums=(0, 1))
    assert ascents(state) == 44
    assert len(reads) <= 4  # 64 steps each, and one for a state that is not known yet


def test_it_runs_ahead_under_inject_hyperparams_and_in_wsam(reads):
    injected = optax.inject_hyperparams(
        optax_sam.sam, static_args=optax_sam.static_args(optax_sam.sam)
    )
    tx = optax.chain(injected(0.1, when=when.every_k(3)), optax.sgd(0.05))
    run_plain(tx)
    assert len(reads) <= 4
    run_plain(optax_sam.wsam(optax.sgd(0.05), learning_rate=0.05, when=when.every_k(3)))
    assert len(reads) <= 8


def test_it_reads_each_decision_where_a_step_may_be_rolled_back(reads):
    tx = optax.apply_if_finite(sam(when.every_k(3)), 10)
    run_plain(tx)
    assert len(reads) == 130


def test_filter_jit(reads):
    tx = sam(when.every_k(3))
    _, state = run_plain(tx, jit=eqx.filter_jit, donate="all-except-first")
    assert ascents(state) == 44
    assert len(reads) <= 4


def test_an_equinox_model_with_functions():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = sam(when.every_k(2))

    def step(model, state, x, ascend=None):
        grad_fn = lambda m: eqx.filter_grad(lambda m: jnp.sum(m(x) ** 2))(m)
        updates, state = tx.update(
            grad_fn(model), state, model, grad_fn=grad_fn, ascend=ascend
        )
        return eqx.apply_updates(model, updates), state

    ends = []
    for run in (
        eqx.filter_jit(step),
        optax_sam.dispatch(step, jit=eqx.filter_jit),
    ):
        carry = model, tx.init(eqx.filter(model, eqx.is_inexact_array))
        for t in range(6):
            carry = run(*carry, jnp.array([1.0, t]))
        ends.append(jax.tree.leaves(eqx.filter(carry, eqx.is_array)))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_pmap(reads):
    tx = sam(when.every_k(3))
    replicate = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)

    def step(w, state, x, ascend=None):
        grad_fn = lambda p: jax.lax.pmean(jax.grad(loss_fn)(p, x), "d")
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=ascend)
        return optax.apply_updates(w, updates), state

    devices = jax.devices()[:2]
    run = optax_sam.dispatch(step, jit=jax.pmap, axis_name="d", devices=devices)
    carry = replicate((W, tx.init(W)))
    for x in inputs(130):
        carry = run(*carry, jnp.array([x, 2 * x]))
    assert ascents(carry[1]).tolist() == [44, 44]
    assert len(reads) <= 4


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def nnx_run(compiled, returns=False):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sam(when.every_k(3)), wrt=nnx.Param)
    metric = nnx.metrics.Average()

    def step(model, optimizer, metric, x, ascend=None):
        f = lambda model, x: jnp.mean(model(x) ** 2)
        value, grads, grad_fn = optax_sam.nnx.value_and_grad(f)(model, x)
        optimizer.update(model, grads, grad_fn=grad_fn, ascend=ascend)
        metric.update(values=value)
        return (model, optimizer, metric) if returns else value

    run = compiled(step)
    x = jax.random.normal(jax.random.key(1), (5, 2))
    for _ in range(130):
        result = run(model, optimizer, metric, x)
        if returns:
            model, optimizer, metric = result
    return jax.tree.leaves(nnx.state((model, optimizer, metric)))


def test_nnx_objects_that_are_updated_in_place(reads):
    """Modules, dropout keys, statistics and metrics, none of them returned."""
    expected = nnx_run(nnx.jit)
    found = nnx_run(lambda step: optax_sam.dispatch(step, jit=nnx.jit))
    assert len(reads) <= 4
    for a, b in zip(expected, found, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_lost_nnx_updates_are_refused():
    with pytest.raises(ValueError, match=r"changes the \w+ among.*jit=nnx\.jit"):
        nnx_run(optax_sam.dispatch)


@pytest.mark.parametrize("lost", ["rngs", "metric"])
def test_one_lost_nnx_object_is_refused(lost):
    """The optimizer comes back, the generator or the metric does not."""
    rngs, metric = nnx.Rngs(0), nnx.metrics.Average()
    tx = sam(when.every_k(2))

    def step(w, state, rngs, metric, ascend=None):
        x = rngs.dropout() if lost == "rngs" else jax.random.key(0)
        x = jax.random.normal(x)
        if lost == "metric":
            metric.update(values=x)
        return make_step(tx)(w, state, x, ascend)

    with pytest.raises(ValueError, match=r"changes the (Rngs|Average)"):
        optax_sam.dispatch(step)(W, tx.init(W), rngs, metric)
    optax_sam.dispatch(step, jit=nnx.jit)(W, tx.init(W), rngs, metric)


def test_returned_nnx_objects_need_no_other_compiler():
    expected = nnx_run(nnx.jit, returns=True)
    found = nnx_run(optax_sam.dispatch, returns=True)
    for a, b in zip(expected, found, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# All of it at random.


@settings(max_examples=12)
@given(
    rule=st.sampled_from(sorted(RULES)),
    wrapper=st.sampled_from(sorted(WRAPPERS)),
    finish=st.sampled_from([None, rolled_back]),
    bad=st.sets(st.integers(0, 29), max_size=4),
    restored=st.sets(st.integers(0, 29), max_size=3),
    raising=st.sets(st.integers(0, 29), max_size=3),
)
def test_any_program(rule, wrapper, finish, bad, restored, raising):
    """Chains, wrappers, rules, faults and restores drawn at random."""
    tx = built(rule, wrapper)
    step = make_step(tx, finish or (lambda old, new: new))
    plain, dispatched = jax.jit(step), optax_sam.dispatch(step)
    a = b = (W, tx.init(W))
    history = [a]
    for t, x in enumerate(inputs(30, bad)):
        if t in restored:  # an older state of the plain run, in both
            older = history[t // 2]
            a = b = to_host_and_back(older)
        if t in raising:
            with pytest.raises(TypeError):
                dispatched(*b, "no batch")
        a, b = plain(*a, x), dispatched(*b, x)
        history.append(a)
        assert ascents(a[1]) == ascents(b[1])
    np.testing.assert_allclose(a[0], b[0], rtol=2e-5)
