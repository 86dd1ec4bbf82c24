"""Dispatch: the numbers and decisions of plain ``jit``, in two programs, and few waits.

Under whatever holds, moves, restores or rolls back the state.
"""

import collections
import functools
import itertools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from wrapped import (
    RULES,
    WRAPPERS,
    ascents,
    compare,
    rolled_back,
    to_host_and_back,
    wrap,
)

import optax_sam
import optax_sam.nnx
from optax_sam import when

W = jnp.array([0.3, -0.7])


def loss_fn(w, x):
    return jnp.sum((w - x) ** 2) + jnp.sum(jnp.cos(3 * w))


def kept(old, new):
    return new


def make_step(tx, finish=kept, calls=None):
    """A step; ``finish`` says what becomes of the old and the new (w, state)."""

    def step(w, state, x, ascend=None):
        if calls is not None:
            calls.append(ascend)
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        updates, after = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, ascend=ascend)
        return finish((w, state), (optax.apply_updates(w, updates), after))

    return step


def without_keyword(step):
    """The step without ``ascend``, which dispatch then decides from outside."""
    return lambda w, state, x: step(w, state, x)


FORMS = {"keyword": lambda step: step, "no_keyword": without_keyword}


def inputs(steps, bad=()):
    return [np.float32(np.nan if t in bad else np.sin(t)) for t in range(steps)]


def check(step, state, xs, w=W, dispatched=None, **faults):
    """The decisions and weights of plain jit."""
    dispatched = dispatched or optax_sam.dispatch(step)
    return compare(jax.jit(step), dispatched, (w, state), xs, **faults)


def sam(rule):
    return optax.chain(optax_sam.sam(0.3, when=rule), optax.sgd(0.05))


EVERY_3 = sam(when.every_k(3))


@pytest.fixture
def reads(monkeypatch):
    """How often dispatch waited for the state, by reader."""
    module, count = sys.modules["optax_sam.dispatch"], collections.Counter()

    def counted(name, reader):
        return lambda state: count.update([name]) or reader(state)

    for name in ("ascent_plan", "ascends_next"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return count


# Decisions.


def programs():
    """Each rule, and each wrapper, once; all their pairs are slow."""
    for program in itertools.product(RULES, WRAPPERS, FORMS):
        rule, wrapper, form = program
        quick = form == "keyword" and (wrapper == "alone" or rule == "every_2")
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(*program, marks=marks, id="-".join(program))


@pytest.mark.parametrize(("rule", "wrapper", "form"), [*programs()])
def test_the_decisions_of_jit_by_any_rule_in_any_wrapper(rule, wrapper, form):
    tx = wrap(wrapper, sam(RULES[rule]()))
    bad = () if wrapper == "alone" else (4, 9)
    taken = check(FORMS[form](make_step(tx)), tx.init(W), inputs(24, bad))
    if wrapper == "alone" or rule == "every_2":  # else none may be left to be taken
        assert 0 < taken <= 24
        assert rule == "always" or taken < 24


# A plan ends with the window or after 64 steps, and where nothing is known ahead. The
# windows of 4: one plan within the warm-up of 5, one to the end of the first window.
PLANS = {"variance": 2 + 192 // 4, "bernoulli_scheduled": 200, "lagged_trend": 200}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "trend"])
def test_a_plan_is_what_happens_and_is_waited_for_once(rule, reads):
    tx, calls = sam(RULES[rule]()), []
    step = optax_sam.dispatch(make_step(tx, calls=calls), donate_argnums=(0, 1))
    w, state = W + 0, tx.init(W)
    planned, happened, plans = [], [], 0
    for x in inputs(200):
        if not planned:
            planned, plans = list(optax_sam.ascent_plan(state)), plans + 1
        assert planned[0] == bool(optax_sam.ascends_next(state))
        before = ascents(state)
        w, state = step(w, state, x)
        happened.append(ascents(state) > before)
        assert planned.pop(0) == happened[-1]
    assert (rule == "always") == all(happened)
    assert plans == PLANS.get(rule, 4)
    assert reads == {"ascends_next": 1, "ascent_plan": min(plans, 199)}
    # Each variant is traced once.
    assert sorted(calls) == [True] if rule == "always" else [False, True]


def test_the_programs_are_those_with_the_keyword():
    compiled = []

    def jit(run, **options):
        compiled.append(run)
        return jax.jit(run, **options)

    step, args = make_step(EVERY_3), (W, EVERY_3.init(W), 0.5)
    optax_sam.dispatch(without_keyword(step), jit=jit)
    program = lambda step: str(jax.make_jaxpr(step)(*args))
    expected = [
        program(functools.partial(step, ascend=ascend))
        for ascend in (None, True, False)
    ]
    assert [program(run) for run in compiled] == expected
    assert len(set(expected)) == 3


def branched(update):
    def both(*args):
        keep = lambda w, state, x: (w, state)
        return jax.lax.cond(jnp.sum(args[-1]) > -1e9, update, keep, *args)

    return both


def mapped(update):
    def one(*args):
        stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
        return jax.tree.map(lambda x: x[0], jax.vmap(update)(*stacked))

    return one


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint, branched, mapped])
def test_no_decision_is_kept_in_a_function_within_the_step(inner):
    """A jitted function has a cache of traces, and a branch runs at times."""
    tx = sam(RULES["variance"]())
    alone = without_keyword(make_step(tx))
    inside = inner(alone)
    within = lambda w, state, x: inside(w, state, x)
    # The pair of programs is first to trace the inner function; then others do.
    for dispatched in (optax_sam.dispatch(within), jax.jit(within)):
        assert 0 < check(alone, tx.init(W), inputs(24), dispatched=dispatched) < 24


def test_a_decorator_with_options():
    @optax_sam.dispatch(donate_argnums=(0, 1))
    def step(w, state, x):
        return make_step(EVERY_3)(w, state, x)

    w = W + 0
    step(w, EVERY_3.init(W), 0.5)
    assert step.__name__ == "step"
    assert w.is_deleted()


def test_an_argument_overrules_the_decision_of_dispatch():
    @optax_sam.dispatch
    def step(w, state):
        return EVERY_3.update(w, state, w, grad_fn=jnp.sin, ascend=True)[1]

    state = EVERY_3.init(W)
    for _ in range(7):
        state = step(W, state)
    assert ascents(state) == 7


def test_arguments_without_a_member_are_refused():
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    with pytest.raises(ValueError, match="No state of a sharpness-aware method"):
        optax_sam.dispatch(make_step(tx))(W, tx.init(W), 0.0)


def test_a_rule_that_needs_the_gradient_runs_as_one_program():
    tx, calls = sam(when.norm_above_trend()), []
    step = optax_sam.dispatch(make_step(tx, calls=calls))
    w, state = W, tx.init(W)
    with pytest.raises(ValueError, match="next step's gradient"):
        optax_sam.ascends_next(state)
    for x in inputs(3):
        w, state = step(w, state, x)
    assert calls == [None]


# What a step may be.


def state_rolled_back(old, new):
    return new[0], rolled_back(old, new)[1]


@pytest.mark.parametrize(
    ("rule", "finish", "bad"),
    # Where the weights are not rolled back they must stay usable.
    [("every_3", rolled_back, (2, 3, 11)), ("variance", state_rolled_back, ())],
)
def test_a_step_that_rolls_back(rule, finish, bad):
    tx = sam(RULES[rule]())
    check(make_step(tx, finish), tx.init(W), inputs(24, bad))


def test_a_step_that_may_roll_back_from_some_step_on():
    """Decisions that were read ahead before do not hold then."""
    tx = sam(when.every_k(3))

    def step(w, state, x):
        mask = x.get("mask", 1.0)
        x = x["x"]
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        updates, new = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        after = optax.apply_updates(w, updates), new
        if isinstance(mask, float):
            return after
        return optax.tree.where(mask > 0, after, (w, state))

    xs = [{"x": np.float32(np.sin(t))} for t in range(14)]
    for t in (4, 5, 6):
        xs[t]["mask"] = np.float32(t == 4)
    check(step, tx.init(W), xs)


def test_lookahead():
    """It drops extra arguments, so the fast optimizer is bound to them in the step."""

    def bound(**extra):
        update = functools.partial(EVERY_3.update, **extra)
        fast = optax.GradientTransformation(EVERY_3.init, update)
        return optax.lookahead(fast, sync_period=4, slow_step_size=0.5)

    def step(w, state, x, ascend=None):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        tx = bound(grad_fn=grad_fn, ascend=ascend)
        updates, state = tx.update(grad_fn(w.fast), state, w)
        return optax.apply_updates(w, updates), state

    w = optax.LookaheadParams.init_synced(W)
    assert check(step, bound().init(w), inputs(24), w) == 8


def test_several_steps_in_one_call():
    """A loop of four steps, written out or not: each has a decision."""
    one = make_step(EVERY_3)

    def unrolled(w, state, x, ascend=None):
        for i in range(4):
            w, state = one(w, state, x + i, ascend)
        return w, state

    def scanned(w, state, x, ascend=None):
        body = lambda carry, i: (one(*carry, x + i, ascend), None)
        return jax.lax.scan(body, (w, state), jnp.arange(4.0))[0]

    for step in (unrolled, scanned):
        assert check(step, EVERY_3.init(W), inputs(9)) == 12


def test_a_population():
    """Seeds under vmap decide for themselves."""
    tx = sam(when.bernoulli(0.5))
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


# Other states than the one that the call before returned.


def falling():
    return when.bernoulli(optax.linear_schedule(0.9, 0.0, 20))


CHANGED = {
    "every_k": (when.every_k(5), when.every_k(3)),
    "bernoulli_scheduled": (when.bernoulli(0.9), falling()),
    "bernoulli_constant": (falling(), when.bernoulli(0.3)),
    "variance": (
        when.variance_controlled(4, 2, warmup_steps=2, force_quota=False),
        when.variance_controlled(4, 2, warmup_steps=9, sensitivity=0.9),
    ),
    "after": (when.after(80, when.every_k(2)), when.after(2, when.every_k(3))),
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
    before, after = map(sam, CHANGED[case])
    carry, step = (W, before.init(W)), jax.jit(make_step(before))
    for x in inputs(4):
        carry = step(*carry, x)
    taken = check(make_step(after), carry[1], inputs(90), carry[0])
    # Of every_k(5) one in four steps, and of every_k(3) from the third one on.
    assert taken == 1 + 30 if case == "every_k" else taken > 0


@pytest.mark.parametrize("place", ["jit", "scan", "vmap"])
def test_a_dispatched_step_inside_another_program(place):
    """It cannot read the state there, and runs the program with the conditional."""
    step = optax_sam.dispatch(make_step(EVERY_3))
    carry, xs = (W, EVERY_3.init(W)), jnp.stack(list(inputs(7)))
    if place == "jit":
        run = jax.jit(
            lambda carry: functools.reduce(lambda c, x: step(*c, x), xs, carry)
        )
        w, state = run(carry)
    elif place == "scan":
        (w, state), _ = jax.lax.scan(lambda c, x: (step(*c, x), None), carry, xs)
    else:
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), carry)
        for x in xs:
            many = jax.vmap(lambda w, s, x=x: step(w, s, x))(*many)
        w, state = jax.tree.map(lambda leaf: leaf[1], many)
    plain = jax.jit(make_step(EVERY_3))
    for x in xs:
        carry = plain(*carry, x)
    np.testing.assert_allclose(w, carry[0], rtol=1e-6)
    assert ascents(state) == ascents(carry[1]) == 3


def test_any_other_state_is_noticed():
    """Two runs by turns; from the host, an older one, a new one: within a plan."""
    ends = []
    for compiled in (jax.jit, optax_sam.dispatch):
        run, history = compiled(make_step(EVERY_3)), []
        carry = other = (W, EVERY_3.init(W))
        for t, x in enumerate(inputs(20)):
            if t == 5:
                carry = to_host_and_back(carry)
            if t == 12:
                carry = history[7]
            if t == 13:
                carry = carry[0], EVERY_3.init(W)
            carry = run(*carry, x)
            history.append(carry)
            if t % 4:
                other = run(*other, x)
        ends.append([ascents(state) for _, state in [*history, other]])
    assert ends[0] == ends[1]
    # Of the seven steps after the new state, and of the other run's fifteen.
    assert ends[0][-2:] == [3, 5]


@pytest.mark.parametrize("place", ["between", "before", "after"])
def test_a_rule_that_is_started_again(place):
    """By hand or in the step. The step counter goes on, and nothing else tells."""

    def again(state, now):
        member, rest = state
        new = jax.tree.map(
            lambda new, old: jnp.where(now, new, old),
            *(EVERY_3.init(W)[0].when, member.when),
        )
        return member._replace(when=new), rest

    def step(w, state, x, ascend=None):
        state = again(state, x > 0.5) if place == "before" else state
        w, state = make_step(EVERY_3)(w, state, x, ascend)
        return w, again(state, x > 0.5) if place == "after" else state

    runs = [compiled(step) for compiled in (jax.jit, optax_sam.dispatch)]
    if place == "between":
        by_hand = lambda run: lambda w, state, x: run(w, again(state, x > 0.5), x)
        runs = map(by_hand, runs)
    taken = compare(*runs, (W, EVERY_3.init(W)), inputs(24))
    assert taken > 8  # every third step alone


def test_a_probability_from_a_wrapper():
    """A number for the rule, another one on each step: nothing is known ahead."""
    member = optax.inject_hyperparams(
        lambda p: optax_sam.sam(0.3, when=when.bernoulli(p))
    )(p=lambda count: jnp.where(count < 5, 0.0, 1.0))
    tx = optax.chain(member, optax.sgd(0.05))
    assert check(make_step(tx), tx.init(W), inputs(24)) == 18


def test_a_call_that_raises_uses_no_decision():
    step, state = make_step(EVERY_3), EVERY_3.init(W)
    assert check(step, state, inputs(12), raising=(0, 4, 6)) == 4


# Running ahead, and other compilers.


def injected():
    static = optax_sam.static_args(optax_sam.sam)
    member = optax.inject_hyperparams(optax_sam.sam, static_args=static)
    return optax.chain(member(0.1, when=when.every_k(3)), optax.sgd(0.05))


AHEAD = {
    "guard": lambda: optax.chain(
        optax_sam.sam(0.1, when=when.every_k(3)),
        optax.apply_if_finite(optax.adam(1e-3), 3),
    ),
    "injected": injected,
    "wsam": lambda: optax_sam.wsam(
        optax.sgd(0.05), learning_rate=0.05, when=when.every_k(3)
    ),
    # Where a step may be rolled back each decision is read.
    "rolled back": lambda: optax.apply_if_finite(EVERY_3, 10),
    "filter_jit": lambda: EVERY_3,
}


@pytest.mark.parametrize("case", AHEAD)
def test_it_runs_ahead_where_no_step_is_rolled_back(case, reads):
    tx, options = AHEAD[case](), {"donate_argnums": (0, 1)}
    if case == "filter_jit":
        options = {"jit": eqx.filter_jit, "donate": "all-except-first"}
    form = "no_keyword" if case == "guard" else "keyword"
    step = optax_sam.dispatch(FORMS[form](make_step(tx)), **options)
    w, state = W + 0, tx.init(W)
    for x in inputs(130):
        w, state = step(w, state, x)
    assert ascents(state) == 44
    # 64 steps each, and one for a state that is not known yet.
    assert reads.total() == (130 if case == "rolled back" else 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_pmap(reads):
    replicate = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)

    def step(w, state, x, ascend=None):
        grad_fn = lambda p: jax.lax.pmean(jax.grad(loss_fn)(p, x), "d")
        updates, state = EVERY_3.update(
            grad_fn(w), state, w, grad_fn=grad_fn, ascend=ascend
        )
        return optax.apply_updates(w, updates), state

    devices = jax.devices()[:2]
    run = optax_sam.dispatch(step, jit=jax.pmap, axis_name="d", devices=devices)
    carry = replicate((W, EVERY_3.init(W)))
    for x in inputs(130):
        carry = run(*carry, jnp.array([x, 2 * x]))
    assert ascents(carry[1]).tolist() == [44, 44]
    assert reads.total() == 4


@pytest.mark.slow
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
    for run in (eqx.filter_jit(step), optax_sam.dispatch(step, jit=eqx.filter_jit)):
        carry = model, tx.init(eqx.filter(model, eqx.is_inexact_array))
        for t in range(6):
            carry = run(*carry, jnp.array([1.0, t]))
        ends.append(jax.tree.leaves(eqx.filter(carry, eqx.is_array)))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def nnx_run(compiled, returns=False):
    """What modules, dropout keys, statistics and metrics hold after the steps."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, EVERY_3, wrt=nnx.Param)
    metric = nnx.metrics.Average()

    def step(model, optimizer, metric, x, ascend=None):
        f = lambda model, x: jnp.mean(model(x) ** 2)
        value, grads, grad_fn = optax_sam.nnx.value_and_grad(f)(model, x)
        optimizer.update(model, grads, grad_fn=grad_fn, ascend=ascend)
        metric.update(values=value)
        return (model, optimizer, metric) if returns else value

    run = compiled(step)
    x = jax.random.normal(jax.random.key(1), (5, 2))
    for _ in range(70):
        result = run(model, optimizer, metric, x)
        if returns:
            model, optimizer, metric = result
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = jax.tree.leaves(nnx.state((model, optimizer, metric)))
    return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


nnx_run_of_jit = functools.cache(lambda: nnx_run(nnx.jit))


@pytest.mark.parametrize(
    "jit",
    [nnx.jit, pytest.param(jax.jit, marks=pytest.mark.slow)],
    ids=["in place", "returned"],
)
def test_nnx_objects_that_are_changed(jit, reads):
    """In place by ``nnx.jit``; returned, any compiler will do."""
    found = nnx_run(functools.partial(optax_sam.dispatch, jit=jit), jit is jax.jit)
    assert reads.total() == 3
    for pair in zip(nnx_run_of_jit(), found, strict=True):
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6)


def test_lost_nnx_updates_are_refused():
    with pytest.raises(ValueError, match=r"changes the \w+ among.*jit=nnx\.jit"):
        nnx_run(optax_sam.dispatch)


@pytest.mark.parametrize("lost", ["rngs", "metric"])
def test_one_lost_nnx_object_is_refused(lost):
    """The optimizer comes back, the generator or the metric does not."""
    rngs, metric = nnx.Rngs(0), nnx.metrics.Average()

    def step(w, state, rngs, metric, ascend=None):
        x = rngs.dropout() if lost == "rngs" else jax.random.key(0)
        x = jax.random.normal(x)
        if lost == "metric":
            metric.update(values=x)
        return make_step(EVERY_3)(w, state, x, ascend)

    args = W, EVERY_3.init(W), rngs, metric
    with pytest.raises(ValueError, match=r"changes the (Rngs|Average)"):
        optax_sam.dispatch(step)(*args)
    optax_sam.dispatch(step, jit=nnx.jit)(*args)
