"""WSAM, decoupled: the optimizer's own step and, beside it, one along the sharpness."""

import functools

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import problems
import pytest
import trajectories as beside
import wrapping
from reference import wsam

import optax_sam
from optax_sam import when

SGD = optax.sgd(0.1, momentum=0.9)
PROBLEM = problems.mlp()
SIZE, GAMMA, LIMIT = map(beside.rising, (0.2, 0.4, 0.7))


def case(optimizer, lr, limit=None, k=1):
    build = lambda inner: optax_sam.wsam(
        inner,
        learning_rate=lr,
        rho=SIZE,
        gamma=GAMMA,
        max_norm=limit,
        when=when.every_k(k),
    )
    # Without an ascent the sharpness has no weight.
    gamma = lambda t: 0.0 if t % k else GAMMA(t)
    transcription = lambda *given: wsam.decoupled(*given, SIZE, gamma, lr, limit)
    return build, transcription, optimizer


CASES = {
    "wsam": case(wrapping.sgd, wrapping.LR),
    "clipped": case(wrapping.sgd, wrapping.LR, LIMIT),
    "clipped, every 2": case(wrapping.sgd, wrapping.LR, LIMIT, 2),
    "a learning rate of its own": case(wrapping.sgd, beside.rising(0.25)),
    "adamw": case(wrapping.adamw, wrapping.ADAM_LR),
    "adamw, clipped": case(wrapping.adamw, wrapping.ADAM_LR, LIMIT),
}
test_ten_steps_meet_the_reference, test_cases_differ = wrapping.ten_steps(CASES)


@beside.runs(3, "wsam_decoupled")
def test_the_reference_is_as_recorded(name):
    h = beside.hyperparameters(name)
    arguments = {"gamma": h["gamma"], "lr": h["lr"], "max_norm": h.get("max_norm")}
    wrapping.assert_reference_meets_the_recorded_run(name, wsam.decoupled, **arguments)


@beside.runs_of_package(3, "wsam_decoupled")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    numbers = {"learning_rate": h["lr"], "rho": h["rho"], "gamma": h["gamma"]}
    limit = h.get("max_norm")
    beside.assert_met(
        name, optax_sam.wsam(beside.base_optimizer(name), max_norm=limit, **numbers)
    )


# Where it is another method.


@pytest.mark.parametrize("zero", ["gamma", "rho"])
def test_without_weight_or_radius_it_is_the_inner_optimizer(zero, x64):
    params, state = lib.trained_with(
        optax_sam.wsam(SGD, learning_rate=0.1, **{zero: 0.0})
    )
    plain, inner = lib.trained_with(optax.with_extra_args_support(SGD))
    harness.assert_close((params, state.inner), (plain, inner), 1e-12)
    assert harness.ascents(state) == lib.STEPS


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_with_plain_sgd_it_is_sam_or_gnp(gamma, x64):
    """SAM for half the weight, else coupled; with momentum the two forms part."""
    lr = harness.linear(0.3, 0.0, lib.STEPS)
    member = optax_sam.gnp(0.1, alpha=gamma / (1 - gamma))
    member = optax_sam.sam(0.1) if gamma == 0.5 else member
    tx = optax_sam.wsam(optax.sgd(lr), learning_rate=lr, rho=0.1, gamma=gamma)
    coupled, _ = lib.trained_with(optax.chain(member, optax.sgd(lr)))
    harness.assert_close(lib.trained_with(tx)[0], coupled, 1e-12)
    tx = optax_sam.wsam(SGD, learning_rate=0.1, rho=0.1, gamma=gamma)
    lib.assert_apart(lib.trained_with(tx)[0], lib.trained(member), 1e-3)


# The step.


def clipped(x, limit):
    """As PyTorch clips, with its epsilon."""
    return optax.tree.scale(min(1, limit / (float(optax.tree.norm(x)) + 1e-6)), x)


def sharpness_alone(g, g_s, w, before=(), gamma=0.5, lr=1.0, **settings):
    """What it emits where the optimizer rests, leaf by leaf in float64."""
    tx = optax_sam.wsam(optax.sgd(0.0), learning_rate=lr, gamma=gamma, **settings)
    u, _ = lib.emitted(optax.chain(*before, tx), g, g_s, params=w)
    assert harness.kinds(u) == harness.kinds(w)
    return jax.tree.map(lambda x: np.asarray(x, float), u)


def test_each_gradient_is_clipped_for_itself(x64):
    """The same factor for both, or one on their difference, would not do."""
    g, g_s, w = harness.tree(1, 0.01), harness.tree(2, 30.0), harness.tree()
    assert optax.tree.norm(g_s) > 2 > optax.tree.norm(g)
    wanted = optax.tree.sub(g, clipped(g_s, 2.0))
    harness.assert_close(sharpness_alone(g, g_s, w, max_norm=2.0), wanted, 1e-12)
    # In half precision too, which does not hold the squares of these.
    w = harness.tree(dtype="float16")
    g, g_s = harness.like(w, 1e3), harness.like(w, -1e3)
    found = sharpness_alone(g, g_s, w, max_norm=3.0)
    # Both are (+-1, ..., +-1) of length 3, rounded to eleven bits.
    harness.assert_close(found, harness.like(harness.tree(), 2.0), 1e-3)


def test_the_second_gradient_does_not_see_a_clip_before_it(x64):
    g, g_s = lib.pair()
    found = sharpness_alone(g, g_s, g, [optax.clip_by_global_norm(0.2)])
    first = optax.tree.scale(0.2 / optax.tree.norm(g), g)
    harness.assert_close(found, optax.tree.sub(first, g_s), 1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sharpness_is_rounded_once(dtype, x64):
    """Not its difference, the step along it, and their product as well."""
    w = harness.tree(dtype=dtype)
    g, g_s = harness.tree(1, dtype=dtype), harness.tree(2, 1e-2, dtype=dtype)
    u = sharpness_alone(g, g_s, w, gamma=0.7, lr=optax.constant_schedule(0.43))
    exact = lambda x, x_s: -0.43 * 0.7 / 0.3 * (x_s.astype(float) - x.astype(float))
    half_a_digit = float(jnp.finfo(dtype).eps) / 2
    harness.assert_close(u, jax.tree.map(exact, g, g_s), 1.01 * half_a_digit)


# What is not finite.


@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_a_rejected_ascent_leaves_the_inner_step(max_norm, x64):
    g, w = harness.tree(1), harness.tree()
    plain, plain_state = SGD.update(g, SGD.init(w), w)
    tx = optax_sam.wsam(SGD, learning_rate=1.0, max_norm=max_norm)
    for bad in (np.nan, np.inf, 1e200):  # the square of the last one overflows
        g_s = harness.with_entry(harness.tree(2), bad)
        u, state = lib.emitted(tx, g, g_s, params=w)
        harness.assert_equal((u, state.inner), (plain, plain_state))
        assert optax_sam.metrics(state)["rejected_ascents"] == 1


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_an_incoming_gradient_that_is_not_finite_passes_through(max_norm):
    """To a guard around it; the state of the ascents stays clean."""
    w, broken = harness.tree(), harness.with_entry(harness.tree(1), np.nan)
    tx = optax_sam.wsam(SGD, learning_rate=0.1, max_norm=max_norm)
    u, state = lib.emitted(tx, broken, lambda p: p, params=w)
    assert not np.isfinite(u["layer"]["kernel"][1, 1])
    if max_norm is None:  # elsewhere it is the plain step
        np.testing.assert_array_equal(u["gain"], -0.1 * broken["gain"])
    assert harness.is_finite(state.ascent)
    assert int(state.ascent.num_rejected) == 1


def test_a_guard_inside_decides_about_a_gradient_that_is_not_finite():
    w, rise = jnp.array([1.0, 2.0]), lambda p: 2 * p
    for inner in (
        optax.apply_if_finite(optax.sgd(0.1), 5),
        optax.chain(optax.zero_nans(), optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.sgd(0.1),
    ):
        inner = optax.with_extra_args_support(inner)
        tx = optax_sam.wsam(inner, learning_rate=0.1)
        for bad in (np.nan, np.inf):
            g = jnp.array([bad, 1.0])
            found, _ = tx.update(g, tx.init(w), w, grad_fn=rise)
            wanted, _ = inner.update(g, inner.init(w), w)
            np.testing.assert_array_equal(found, wanted)


# In company.


def test_a_number_put_into_the_state_counts_from_the_next_step_on(x64):
    static = optax_sam.static_args(optax_sam.wsam)
    assert {"inner", "when", "mask", "axis_name", "ascent_dtype"} <= set(static)
    assert not {"learning_rate", "rho", "gamma"} & set(static)
    factory = optax.inject_hyperparams(optax_sam.wsam, static_args=static)
    injected = factory(SGD, learning_rate=0.1, rho=0.1, gamma=0.5)
    w, g, g_s = harness.tree(), *lib.pair()
    state = injected.init(w)
    for lr, gamma in ((0.1, 0.5), (0.3, 0.9), (0.0, 0.9), (0.2, 0.1)):
        numbers = {"learning_rate": jnp.asarray(lr), "gamma": jnp.asarray(gamma)}
        state.hyperparams.update(numbers)
        inner, _ = SGD.update(g, state.inner_state.inner, w)
        u, state = lib.emitted(injected, g, g_s, state, w)
        along = optax.tree.scale(lr * gamma / (1 - gamma), optax.tree.sub(g_s, g))
        harness.assert_close(u, optax.tree.sub(inner, along), 1e-10)
    assert optax_sam.metrics(state)["ascents"] == 4


def test_m_sharpness_over_a_vmapped_axis(x64):
    """One ascent for each shard; both gradients are averaged, and then subtracted."""
    adam = optax.adam(0.1)
    settings = {"rho": 0.5, "gamma": 0.8, "max_norm": 0.3}
    tx = optax_sam.wsam(adam, learning_rate=0.1, axis_name="shards", **settings)
    w, batch = PROBLEM.params(), PROBLEM.batch(0)
    shards = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)

    def of_shard(shard):
        grad_fn = lambda p: jax.grad(PROBLEM.loss_fn)(p, shard)
        g = grad_fn(w)
        emitted = tx.update(g, tx.init(w), w, grad_fn=grad_fn)
        e = optax.tree.scale(0.5 / optax.tree.norm(g), g)
        return emitted, g, grad_fn(optax.tree.add(w, e))

    rows, *both = jax.jit(jax.vmap(of_shard, axis_name="shards"))(shards)
    mean = lambda tree: jax.tree.map(lambda x: x.mean(0), tree)
    g, g_s = (clipped(mean(x), 0.3) for x in both)
    u, _ = adam.update(g, adam.init(w), w)
    wanted = jax.tree.map(lambda u, x, y: u - 0.1 * 4 * (y - x), u, g, g_s)
    first = jax.tree.map(lambda x: x[0], rows)
    harness.assert_close(first[0], wanted, 1e-9)
    for i in range(1, 4):
        harness.assert_equal(jax.tree.map(lambda x, i=i: x[i], rows), first)


def test_what_a_mask_or_the_optimizer_leaves_alone_still_steps_along_the_sharpness(x64):
    w, g, g_s = harness.tree(), harness.tree(1), harness.tree(2)
    points, zero = [], jnp.zeros_like(w["gain"])
    labels = {"layer": "train", "gain": "freeze"}
    frozen = optax.partition({"train": SGD, "freeze": optax.set_to_zero()}, labels)
    mask = {"layer": True, "gain": False}
    along = g_s["gain"] - g["gain"]
    for inner, settings, wanted in (
        (SGD, {"mask": mask}, -0.1 * g["gain"] - along),
        (frozen, {}, -along),
    ):
        tx = optax_sam.wsam(inner, learning_rate=1.0, gamma=0.5, **settings)
        u, _ = lib.emitted(tx, g, lambda p: points.append(p) or g_s, params=w)
        np.testing.assert_allclose(u["gain"], wanted, rtol=1e-12)
    harness.assert_equal(points[0]["gain"], w["gain"])
    # Zero gradients freeze it.
    u, _ = lib.emitted(tx, {**g, "gain": zero}, {**g_s, "gain": zero}, params=w)
    harness.assert_equal(u["gain"], zero)


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate must be a number"),
        ({"max_norm": 0.0}, "max_norm must be a number in"),
        ({"inner": 0.1}, "wsam wraps an optimizer.*learning_rate=lr"),
    ],
    ids=str,
)
def test_refused_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        optax_sam.wsam(**{"inner": SGD, "learning_rate": 0.1, **changes})


def test_accumulation_inside_is_refused():
    """The weights move on every k-th step, and the sharpness term on every one."""
    tx = optax_sam.wsam(optax.MultiSteps(SGD, 2), learning_rate=0.1)
    with pytest.raises(ValueError, match="optax.MultiSteps around wsam"):
        tx.init(harness.tree())


def test_refused_calls():
    tx, w = optax_sam.wsam(SGD, learning_rate=0.1), harness.tree()
    update = functools.partial(tx.update, w, tx.init(w))
    with pytest.raises(ValueError, match="wsam needs the parameters"):
        update()
    with pytest.raises(ValueError, match="wsam: what grad_fn returned.*missing"):
        update(w, grad_fn=lambda p: {"gain": p["gain"]})
    # The advice puts nothing behind it in a chain.
    around = optax.masked(tx, {"layer": True, "gain": False})
    advice = r"Put it outside(.|\n)*optax_sam\.wsam\(optax\.partition\("
    with pytest.raises(ValueError, match=advice):
        around.init(w)
    with pytest.raises(ValueError, match=advice):
        around.update(w, optax.MaskedState(tx.init(w)), w, grad_fn=lambda p: p)
