"""Members inside, around and beside what Optax offers to combine optimizers."""

import functools
import inspect

import harness
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from registry import BY_NAME, METHODS, OTHERS, each, every_method

import optax_sam

some_methods = pytest.mark.parametrize(
    "method", [BY_NAME["sam_5"], BY_NAME["vsam"]], ids=lambda m: m.name
)


def trained(tx, steps=12, problem=problems.mlp, wrap=lambda f: f):
    """The parameters and state after some steps."""
    step = jax.jit(harness.make_step(tx, problem().loss_fn, wrap=wrap))
    params = problem().params()
    return harness.run(step, params, tx.init(params), problem(), steps)


@functools.cache
def plainly_trained(method):
    return trained(method.optimizer())


# inject_hyperparams.


@every_method
def test_inject_hyperparams(method):
    """A rho that is put into the state counts, and nothing else changes."""
    assert optax_sam.static_args(method.factory) == method.static
    factory = optax.inject_hyperparams(method.factory, static_args=method.static)
    tx = factory(**method.settings)
    params, g = harness.tree(), harness.tree(1)
    state = tx.init(params)
    arguments = inspect.signature(method.factory).parameters.values()
    given = {a.name for a in arguments if a.default is not None}
    assert set(state.hyperparams) == given - set(method.static)

    @jax.jit
    def update(state):
        points = []
        grad_fn = lambda p: points.append(p) or g
        d, state = tx.update(g, state, params, grad_fn=grad_fn, ascend=True)
        return d, state, points[-1]

    for rho in (method.settings[method.radius], 0.5, 0.0, 0.25):
        state.hyperparams[method.radius] = jnp.asarray(rho)
        _, state, point = update(state)
        offset = jax.tree.map(jnp.subtract, point, params)
        length = method.norm(offset, params, g)
        np.testing.assert_allclose(length, rho, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(state.hyperparams[method.radius], rho)
    assert optax_sam.metrics(state)["ascents"] == 4


@some_methods
def test_injected_method_is_the_plain_one(method):
    factory = optax.inject_hyperparams(method.factory, static_args=method.static)
    tx = optax.chain(factory(**method.settings), optax.sgd(0.1, momentum=0.9))
    params, state = trained(tx)
    harness.assert_close(params, plainly_trained(method)[0], 1e-6)
    plain = optax_sam.metrics(plainly_trained(method)[1])
    assert optax_sam.metrics(state)["ascents"] == plain["ascents"]
    assert optax_sam.ascends_next(state) == optax_sam.ascends_next(
        plainly_trained(method)[1]
    )


def test_injected_schedule_is_the_plain_schedule():
    schedule = optax.linear_schedule(0.0, 0.2, 10)
    build = functools.partial(optax_sam.sam, when=optax_sam.when.every_k(2))
    static = optax_sam.static_args(optax_sam.sam)
    injected = optax.inject_hyperparams(optax_sam.sam, static_args=static)
    members = (
        build(rho=schedule),
        injected(rho=schedule, when=optax_sam.when.every_k(2)),
    )
    results = [trained(optax.chain(m, optax.sgd(0.1)))[0] for m in members]
    harness.assert_close_in_size(*results, 5e-7)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (lambda: optax.inject_hyperparams(optax_sam.vsam)(window=4), "window"),
        (
            lambda: optax.inject_hyperparams(
                optax_sam.vsam, static_args=("window", "num_slices", "key")
            )(window=4, num_slices=2, warmup_steps=7),
            "warmup_steps",
        ),
        (
            lambda: optax.inject_hyperparams(optax_sam.sam)(num_ascent_steps=2),
            "num_ascent_steps",
        ),
        (lambda: optax.inject_hyperparams(optax_sam.esam)(gamma=0.5), "gamma"),
    ],
    ids=["window", "warmup_steps", "num_ascent_steps", "gamma"],
)
def test_a_traced_shape_is_named(factory, name):
    message = rf"{name} sets a shape or a loop(.|\n)*static_args"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(factory().init, harness.tree())


# masked, partition.


@every_method
def test_masked_around_a_member_is_refused(method):
    params = harness.tree()
    mask = {"layer": True, "gain": False}
    advice = r"stands inside optax\.masked or optax\.partition(.|\n)*mask="
    around = optax.masked(method.build(), mask)
    with pytest.raises(ValueError, match=advice):
        around.init(params)
    split = optax.partition(
        {"sam": method.optimizer(), "sgd": optax.sgd(0.1)},
        {"layer": "sam", "gain": "sgd"},
    )
    with pytest.raises(ValueError, match=advice):
        split.init(params)
    # A state that was made elsewhere does not get through either.
    state = optax.MaskedState(method.build().init(params))
    with pytest.raises(ValueError, match=advice):
        around.update(params, state, params, grad_fn=lambda p: p)


@some_methods
def test_masked_around_everything_is_no_mask(method):
    everything = jax.tree.map(lambda _: True, problems.mlp().start)
    params, _ = trained(optax.masked(method.optimizer(), everything))
    harness.assert_close(params, plainly_trained(method)[0], 1e-6)


@every_method
def test_partition_after_a_member(method):
    """Frozen layers stay; the perturbation still sees them unless it has a mask."""
    labels = {"layer0": "train", "layer1": "frozen"}
    transforms = {"train": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    tx = optax.chain(
        method.build(mask={"layer0": True, "layer1": False}),
        optax.partition(transforms, labels),
    )
    params, state = trained(tx, steps=4)
    start = problems.mlp().params()
    harness.assert_equal(params["layer1"], start["layer1"])
    assert not np.allclose(params["layer0"]["kernel"], start["layer0"]["kernel"])
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


# Guards and accumulation.


@some_methods
def test_apply_if_finite(method):
    """The guard around the chain sees what is not finite, and nothing stays of it."""
    problem = problems.mlp()
    tx = optax.apply_if_finite(method.optimizer(), max_consecutive_errors=5)
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    state = tx.init(params)
    params, state = harness.run(step, params, state, problem, 3)
    x, y = problem.batch(0)
    poisoned = step(params, state, (x.at[0, 0].set(jnp.nan), y))
    harness.assert_equal(poisoned[0], params)
    assert poisoned[1].total_notfinite == 1
    harness.assert_equal(poisoned[1].inner_state, state.inner_state)
    params, state = harness.run(step, *poisoned, problem, 9, first=3)
    harness.assert_close(params, plainly_trained(method)[0], 1e-6)


@pytest.mark.parametrize(("name", "expected"), [("sam", (8, 2)), ("sam_5", (4, 1))])
def test_multi_steps_pays_on_each_micro_step(name, expected):
    """A member inside cannot know where it is; accumulate within grad_fn instead."""
    executed = harness.Counter()
    tx = optax.MultiSteps(BY_NAME[name].optimizer(), every_k_schedule=4)
    _, state = trained(tx, steps=8, wrap=executed)
    ascents = optax_sam.metrics(state)["ascents"]
    # Two updates in eight micro-steps, and one decision for the four of each.
    assert (executed.read(), int(ascents)) == expected
    assert harness.member_state(state).count == state.gradient_step == 2
    assert bool(optax_sam.ascends_next(state)) == (name == "sam")


def test_chain_around_multi_steps_is_sam_per_micro_batch():
    """The other nesting runs too, and is another method: each ascent is its own."""
    executed = harness.Counter()
    member = BY_NAME["sam"].build()
    tx = optax.chain(member, optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4))
    params, state = trained(tx, steps=8, wrap=executed)
    assert executed.read() == optax_sam.metrics(state)["ascents"] == 8
    inside = optax.MultiSteps(optax.chain(member, optax.sgd(0.1)), every_k_schedule=4)
    gap = jax.tree.map(jnp.subtract, params, trained(inside, steps=8)[0])
    assert optax.tree.norm(gap) > 1e-4


# Reshaping, averaging, order.


@some_methods
def test_flatten_after_a_member(method):
    base = optax.flatten(optax.sgd(0.1, momentum=0.9))
    params, _ = trained(method.optimizer(base))
    harness.assert_close(params, plainly_trained(method)[0], 1e-6)


@some_methods
def test_flatten_around_a_member_needs_a_flat_grad_fn(method):
    """``grad_fn`` is handed the vector: it has to speak vectors itself."""
    problem = problems.mlp()
    tx = optax.flatten(method.optimizer())
    params = problem.params()
    unravel = jax.flatten_util.ravel_pytree(params)[1]

    @jax.jit
    def step(params, state, batch):
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, batch)
        flat = lambda v: jax.flatten_util.ravel_pytree(grad_fn(unravel(v)))[0]
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=flat)
        return optax.apply_updates(params, updates), state

    params, _ = harness.run(step, params, tx.init(params), problem, 12)
    harness.assert_close_in_size(params, plainly_trained(method)[0], 5e-6)
    update = lambda g: tx.update(g, tx.init(params), params, grad_fn=lambda v: params)
    with pytest.raises(ValueError, match="what grad_fn returned has another structure"):
        jax.eval_shape(update, params)


@some_methods
def test_schedule_free_around_the_chain(method):
    """Both gradients belong to the interpolated weights that are being trained."""
    problem = problems.logistic()
    member = method.build()
    tx = optax.contrib.schedule_free(
        optax.chain(member, optax.sgd(0.5)), learning_rate=0.5, b1=0.9
    )
    params, state = trained(tx, steps=60, problem=problems.logistic)
    average = optax.contrib.schedule_free_eval_params(state, params)
    loss = lambda p: float(problem.loss_fn(p, problem.batch(0)))
    assert loss(average) < 0.6 * loss(problem.params())
    # By hand: the same member, then the published recurrence.
    sgd = harness.make_step(optax.chain(member, optax.sgd(0.5)), problem.loss_fn)
    state, z, x = member.init(problem.params()), problem.params(), problem.params()
    state = (state, optax.sgd(0.5).init(x))
    sgd = jax.jit(sgd)
    for t in range(60):
        y = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, z, x)
        moved, state = sgd(y, state, problem.batch(t))
        z = jax.tree.map(lambda a, b, c: a + b - c, z, moved, y)
        x = jax.tree.map(lambda a, b, c=1 / (t + 1): (1 - c) * a + c * b, x, z)
    harness.assert_close(average, x, 1e-4)


@every_method
def test_clipping_belongs_after_a_member(method):
    """Clipped before, the ascent is the same and the emitted gradient is whole."""
    g, g_s = harness.tree(1, scale=10.0), harness.tree(2, scale=10.0)
    params, member = harness.tree(), method.build()
    clip = optax.clip_by_global_norm(1.0)

    def emitted(tx):
        update = lambda: tx.update(
            g, tx.init(params), params, grad_fn=lambda p: g_s, ascend=True
        )
        return jax.jit(update)()[0]

    after = emitted(optax.chain(member, clip))
    np.testing.assert_allclose(optax.tree.norm(after), 1.0, rtol=1e-5)
    before = emitted(optax.chain(clip, member))
    clipped, _ = clip.update(g, clip.init(params))
    harness.assert_emits(method, before, clipped, g_s, 1e-5)


# The bases that people use.


def plateau(base):
    """Lowers the rate where the loss, handed on as ``value``, does not fall."""
    return optax.chain(base, optax.contrib.reduce_on_plateau(0.5, patience=1))


@each(*METHODS, *OTHERS, slow=lambda m: m.name not in ("sam", "vsam", "esam", "msam"))
@pytest.mark.parametrize(
    "base",
    [
        lambda: optax.sgd(0.05, momentum=0.9),
        lambda: optax.adamw(0.01),
        lambda: plateau(optax.sgd(0.05, momentum=0.9)),
    ],
    ids=["sgd", "adamw", "reduce_on_plateau"],
)
def test_bases(method, base):
    """The whole is trained, and what the base gets as ``value`` counts."""
    problem, tx = problems.logistic(), method.optimizer(base())

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        extra = method.extra_args(problem.loss_fn, batch)
        updates, state = tx.update(grads, state, params, value=value, **extra)
        return optax.apply_updates(params, updates), state

    params, state = problem.params(), tx.init(problem.params())
    for t in range(12):
        params, state = step(params, state, problem.batch(t))
    losses = [problem.loss_fn(params, problem.batch(t)) for t in range(4)]
    assert np.mean(losses) < np.log(2)  # where it started
    best = optax.tree.get(state, "best_value")
    assert best is None or jnp.isfinite(best)


# The same as what Optax itself offers.


@pytest.mark.parametrize("steps", [1, 3])
def test_contrib_sam(steps, x64):
    """Opaque contrib SAM ascends ``sync_period - 1`` times, without projection."""
    rho, problem = 0.3, problems.mlp()
    theirs = optax.contrib.sam(
        optax.adam(0.05),
        optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
        sync_period=steps + 1,
        opaque_mode=True,
    )
    rule = optax_sam.ascent.n_step(rho, steps, project=False)
    ours = optax.chain(
        optax_sam.sam(rho) if steps == 1 else optax_sam.sharpness_aware(rule),
        optax.adam(0.05),
    )

    @jax.jit
    def their_step(params, state, batch):
        grad_fn = lambda p, i: jax.grad(problem.loss_fn)(p, batch)
        grads = grad_fn(params, 0)
        updates, state = theirs.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = problem.params()
    their_params, _ = harness.run(their_step, params, theirs.init(params), problem, 8)
    harness.assert_close(trained(ours, steps=8)[0], their_params, 1e-10)


def lookahead_of_the_page():
    names = {"jax": jax, "jnp": jnp, "optax": optax, "optax_sam": optax_sam}
    (block,) = [x for x in harness.code("troubleshooting.md") if "lookahead_step" in x]
    exec(block, names)
    return names


def test_lookahead_as_on_the_page_is_sam_with_slow_weights(x64):
    names = lookahead_of_the_page()
    batches = np.random.default_rng(0).normal(size=(12, 4, 3))
    pair = optax.LookaheadParams.init_synced(jnp.zeros(3))
    state = names["lookahead"](names["fast"]).init(pair)
    step = names["lookahead_step"]
    fast = slow = trace = np.zeros(3)
    for t, x in enumerate(batches, 1):
        pair, state = step(pair, state, x)
        gradient = lambda w, x=x: 2 * x.T @ (x @ w - 1) / len(x)
        g = gradient(fast)
        trace = 0.9 * trace + gradient(fast + 0.05 * g / np.linalg.norm(g))
        fast = fast - 0.1 * trace
        if t % 5 == 0:
            fast = slow = slow + 0.5 * (fast - slow)
        np.testing.assert_allclose(pair.fast, fast, rtol=1e-10)
        np.testing.assert_allclose(pair.slow, slow, rtol=1e-10)
    assert optax_sam.metrics(state)["ascents"] == 12
    assert step._cache_size() == 2  # on the page, and here


def test_what_the_page_says_of_lookahead():
    fast = optax.chain(
        optax_sam.sam(0.1, when=optax_sam.when.every_k(2)), optax.sgd(0.1)
    )
    pair = optax.LookaheadParams.init_synced(jnp.ones(2))
    grad_fn = lambda p: p
    around = optax.lookahead(fast, 5, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grad_fn'"):
        around.update(pair.fast, around.init(pair), pair, grad_fn=grad_fn)
    supported = optax.with_extra_args_support(around)
    with pytest.raises(ValueError, match="something on the way dropped it"):
        supported.update(pair.fast, around.init(pair), pair, grad_fn=grad_fn)
    before = optax.chain(optax_sam.sam(0.1), around)
    with pytest.raises(ValueError, match=r"missing: \.fast, \.slow"):
        before.update(pair.fast, before.init(pair), pair, grad_fn=grad_fn)
    # Bound, but reset: the count starts again, flags become integers.
    update = functools.partial(fast.update, grad_fn=grad_fn)
    bound = optax.GradientTransformation(fast.init, update)
    reset = optax.lookahead(bound, 2, 0.5, reset_state=True)
    state = reset.init(pair)
    flags = lambda state: sum(x.dtype == bool for x in jax.tree.leaves(state))
    assert flags(state) == 1
    for _ in range(2):
        _, state = reset.update(pair.fast, state, pair)
    assert (flags(state), harness.member_state(state).count) == (0, 0)
