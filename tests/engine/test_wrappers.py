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
from registry import BY_NAME, METHODS, each

import optax_sam

VSAM = BY_NAME["vsam"]


def quick(*names):
    """By all methods but the variants; those that are named here run quickly."""
    found = [method for method in METHODS if not method.variant]
    return each(*found, slow=lambda method: method.name not in names)


def trained(tx, steps=12):
    """The parameters and state after some steps."""
    problem = problems.mlp()
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    return harness.run(step, params, tx.init(params), problem, steps)


# inject_hyperparams.


def test_no_shape_and_no_function_is_traced_as_a_hyperparameter():
    for method in METHODS:
        assert optax_sam.static_args(method.factory) == method.static
        factory = optax.inject_hyperparams(method.factory, static_args=method.static)
        state = jax.eval_shape(factory(**method.settings).init, harness.tree())
        arguments = inspect.signature(method.factory).parameters.values()
        given = {a.name for a in arguments if a.default is not None}
        assert set(state.hyperparams) == given - set(method.static)


# A method for each way to make an offset of the radius.
@quick("sam", "esam", "friendly_sam", "gam")
def test_an_injected_radius_counts(method):
    """A rho that is put into the state counts, and nothing else changes."""
    factory = optax.inject_hyperparams(method.factory, static_args=method.static)
    tx = factory(**method.settings)
    params, g = harness.tree(), harness.tree(1)
    state = tx.init(params)

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


def test_injected_schedule_is_the_plain_schedule():
    settings = {
        "rho": optax.linear_schedule(0.0, 0.2, 10),
        "when": optax_sam.when.every_k(2),
    }
    static = optax_sam.static_args(optax_sam.sam)
    injected = optax.inject_hyperparams(optax_sam.sam, static_args=static)
    results = [
        trained(optax.chain(build(**settings), optax.sgd(0.1)))[0]
        for build in (optax_sam.sam, injected)
    ]
    harness.assert_close_in_size(*results, 5e-7)


@pytest.mark.parametrize(
    ("factory", "settings", "static"),
    [
        (optax_sam.vsam, {"window": 4}, ()),
        # The first is traced.
        (
            optax_sam.vsam,
            {"warmup_steps": 7, "window": 4, "num_slices": 2},
            ("window", "num_slices", "key"),
        ),
        (optax_sam.sam, {"num_ascent_steps": 2}, ()),
        (optax_sam.esam, {"gamma": 0.5}, ()),
    ],
)
def test_a_traced_shape_is_named(factory, settings, static):
    tx = optax.inject_hyperparams(factory, static_args=static)(**settings)
    message = rf"{[*settings][0]} sets a shape or a loop(.|\n)*static_args"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, harness.tree())


# masked, partition.


def test_masked_around_a_member_is_refused():
    params = harness.tree()
    mask = {"layer": True, "gain": False}
    advice = r"is inside optax\.masked or optax\.partition(.|\n)*mask="
    around = optax.masked(VSAM.build(), mask)
    with pytest.raises(ValueError, match=advice):
        around.init(params)
    split = optax.partition(
        {"sam": VSAM.optimizer(), "sgd": optax.sgd(0.1)},
        {"layer": "sam", "gain": "sgd"},
    )
    with pytest.raises(ValueError, match=advice):
        split.init(params)
    # A state that was made elsewhere does not get through either.
    state = optax.MaskedState(VSAM.build().init(params))
    with pytest.raises(ValueError, match=advice):
        around.update(params, state, params, grad_fn=lambda p: p)


@quick("look_layer_sam", "friendly_sam")
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


# Guards.


def test_apply_if_finite():
    """The guard around it all sees what is not finite, and nothing stays of it."""
    problem, plain = problems.mlp(), VSAM.optimizer()
    tx = optax.apply_if_finite(plain, max_consecutive_errors=5)
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    params, state = harness.run(step, params, tx.init(params), problem, 3)
    x, y = problem.batch(0)
    poisoned = step(params, state, (x.at[0, 0].set(jnp.nan), y))
    harness.assert_equal(poisoned[0], params)
    assert poisoned[1].total_notfinite == 1
    harness.assert_equal(poisoned[1].inner_state, state.inner_state)
    params, state = harness.run(step, *poisoned, problem, 9, first=3)
    harness.assert_close(params, trained(plain)[0], 1e-6)


# Reshaping, order.


def test_flatten_around_a_member_needs_a_flat_grad_fn():
    """``grad_fn`` is handed the vector: it has to speak vectors itself."""
    tx, params, g = optax.flatten(VSAM.build()), harness.tree(), harness.tree(1)
    ravel = jax.flatten_util.ravel_pytree
    flat = lambda v: ravel(g)[0] if v.ndim == 1 else None
    d, _ = tx.update(g, tx.init(params), params, grad_fn=flat)
    harness.assert_equal(d, g)
    with pytest.raises(ValueError, match="grad_fn returned has a different structure"):
        tx.update(g, tx.init(params), params, grad_fn=lambda v: params)


@quick("sam", "gsam")
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


# lookahead.


def test_lookahead_as_on_the_page_is_sam_with_slow_weights(x64):
    names = harness.defined("troubleshooting.md", "lookahead_step")
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
    assert harness.ascents(state) == 12
    assert step._cache_size() == 2  # on the page, and here


def test_what_the_page_says_of_lookahead():
    fast = optax.chain(
        optax_sam.sam(0.1, when=optax_sam.when.every_k(2)), optax.sgd(0.1)
    )
    pair = optax.LookaheadParams.init_synced(jnp.ones(2))
    around = optax.lookahead(fast, 5, 0.5)
    for tx, error, message in (
        (around, TypeError, "unexpected keyword argument 'grad_fn'"),
        (
            optax.with_extra_args_support(around),
            ValueError,
            "something on the way dropped it",
        ),
        (
            optax.chain(optax_sam.sam(0.1), around),
            ValueError,
            r"missing: \.fast, \.slow",
        ),
    ):
        with pytest.raises(error, match=message):
            tx.update(pair.fast, tx.init(pair), pair, grad_fn=lambda p: p)
    # Bound, but reset: the count starts again, flags become integers.
    update = functools.partial(fast.update, grad_fn=lambda p: p)
    bound = optax.GradientTransformation(fast.init, update)
    reset = optax.lookahead(bound, 2, 0.5, reset_state=True)
    state = reset.init(pair)
    flags = lambda state: sum(x.dtype == bool for x in jax.tree.leaves(state))
    assert flags(state) == 1
    for _ in range(2):
        _, state = reset.update(pair.fast, state, pair)
    assert (flags(state), harness.member_state(state).count) == (0, 0)


@pytest.mark.parametrize("place", ["sampa", "msam"])
def test_multi_steps_inside_a_method_hands_arguments_on(place):
    """To Optax it is no transformation with extra arguments, but it takes them."""
    seen = []

    def update(updates, state, params=None, *, value=None, **extra):
        seen.append(value)
        return updates, state

    record = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    inner = optax.MultiSteps(optax.chain(record, optax.sgd(0.1, momentum=0.9)), 1)
    w, extra = jnp.ones(2), {"value": 1.5, "grad_fn": jnp.sin}
    tx = getattr(optax_sam, place)(inner)
    extra |= {"previous_grad_fn": jnp.sin} if place == "sampa" else {}
    tx.update(w, tx.init(w), w, **extra)
    assert 1.5 in seen


@pytest.mark.parametrize("name", ["step", "count", "g"])
def test_an_extra_argument_of_any_name_is_for_others(name):
    """Each ascent, with and without a mask, also in shards."""
    problem = problems.mlp()
    for method in METHODS:
        if method.variant or method.place == "around":
            continue
        tx = method.optimizer(optax.sgd(0.1))
        step = harness.make_step(tx, problem.loss_fn, method.extra_args)
        inside = functools.partial(tx.update, **{name: 3})
        named = harness.make_step(
            optax.GradientTransformationExtraArgs(tx.init, inside),
            *(problem.loss_fn, method.extra_args),
        )
        params = problem.params()
        state, batch = tx.init(params), problem.batch(0)
        harness.assert_equal(named(params, state, batch), step(params, state, batch))
    w = jnp.ones(2)
    masked = optax_sam.sam(0.1, mask=lambda p: True)
    shards = optax_sam.micro_sharpness(optax_sam.sam(0.1, axis_name="shards"), 2)
    masked.update(w, masked.init(w), w, grad_fn=jnp.sin, **{name: 3})
    shards.update(None, shards.init(w), w, grad_fn=lambda p, i: jnp.sin(p), **{name: 3})


def test_multi_steps_inside_a_chain_drops_arguments():
    """To Optax it is no transformation with extra arguments, as it is alone."""
    each = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1))
    w, inside = jnp.ones(2), optax.chain(optax.MultiSteps(each, 2), optax.scale(1.0))
    with pytest.raises(ValueError, match=r"MultiSteps inside a chain \(put it around"):
        inside.update(w, inside.init(w), w, grad_fn=jnp.sin)
