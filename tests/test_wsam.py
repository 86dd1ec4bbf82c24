"""WSAM, decoupled: the optimizer's own step and, beside it, one along the sharpness."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods_lib import RHO

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
STEPS = 12


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def run(tx, steps=STEPS, first=0, start=None, problem=problems.mlp):
    """Parameters and state after some steps, with one program for all of them."""
    step = jax.jit(harness.make_step(tx, problem().loss_fn))
    params = problem().params()
    start = (params, tx.init(params)) if start is None else start
    return harness.run(step, *start, problem(), steps, first=first)


def assert_apart(a, b, gap=1e-3):
    assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > gap


def by_hand(inner, steps, *, lr, rho, gamma, max_norm=None, clip=None):
    """The paper's step written out, with numbers or functions of the step."""
    problem = problems.mlp()
    grad = jax.jit(jax.grad(problem.loss_fn))
    inner = optax.with_extra_args_support(inner)
    inner_update = jax.jit(inner.update)
    w = problem.params()
    state = inner.init(w)
    for t in range(steps):
        at = lambda x, t=t: x(t) if callable(x) else x
        batch = problem.batch(t)
        g = grad(w, batch)
        if clip is not None:
            g = optax.tree.scale(min(1, clip / np.linalg.norm(flat(g))), g)
        unit = optax.tree.scale(1 / np.linalg.norm(flat(g)), g)
        g_s = grad(jax.tree.map(lambda x, e: x + at(rho) * e, w, unit), batch)  # noqa: B023
        if max_norm is not None:
            limit = lambda x: min(1, at(max_norm) / (np.linalg.norm(flat(x)) + 1e-6))  # noqa: B023
            g, g_s = (optax.tree.scale(limit(x), x) for x in (g, g_s))
        u, state = inner_update(g, state, w)
        weight = at(lr) * at(gamma) / (1 - at(gamma))
        move = lambda w, u, x, x_s: w + u - weight * (x_s - x)  # noqa: B023
        w = jax.tree.map(move, w, u, g, g_s)
    return w, state


# Where it is another method.


INNER = {
    "sgd": SGD,
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "schedule": optax.sgd(harness.linear(0.2, 0.0, STEPS), nesterov=True),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
def test_without_weight_it_is_the_inner_optimizer(inner, x64):
    params, state = run(optax_sam.wsam(inner, learning_rate=0.1, gamma=0.0))
    plain, plain_state = run(optax.with_extra_args_support(inner))
    harness.assert_close(params, plain, 1e-12)
    harness.assert_close(state.inner, plain_state, 1e-12)
    assert harness.ascents(state) == STEPS


def test_without_radius_it_is_the_inner_optimizer(x64):
    params, _ = run(optax_sam.wsam(SGD, learning_rate=0.1, rho=0.0))
    harness.assert_close(params, run(optax.with_extra_args_support(SGD))[0], 1e-12)


def test_half_the_weight_around_plain_sgd_is_sam(x64):
    for lr in (0.1, harness.linear(0.3, 0.0, STEPS)):
        tx = optax_sam.wsam(optax.sgd(lr), learning_rate=lr, rho=RHO, gamma=0.5)
        sam, _ = run(optax.chain(optax_sam.sam(RHO), optax.sgd(lr)))
        harness.assert_close(run(tx)[0], sam, 1e-12)


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_coupled_and_decoupled_with_plain_sgd(gamma, x64):
    """GNP, with ``alpha = gamma / (1 - gamma)``; with momentum they part."""
    alpha = gamma / (1 - gamma)
    plain = optax.sgd(0.1)
    coupled, _ = run(optax.chain(optax_sam.gnp(RHO, alpha=alpha), plain))
    build = functools.partial(optax_sam.wsam, learning_rate=0.1, rho=RHO, gamma=gamma)
    harness.assert_close(run(build(plain))[0], coupled, 1e-12)
    if gamma == 0.9:
        coupled, _ = run(optax.chain(optax_sam.gnp(RHO, alpha=alpha), SGD))
        assert_apart(run(build(SGD))[0], coupled)


# The step.


def uneven(*values):
    """A schedule that no other step shares."""
    return lambda t: jnp.asarray(values)[t % len(values)]


@pytest.mark.parametrize(
    "max_norm",
    [None, 0.4, uneven(0.1, 0.5, 2.0)],
    ids=["unclipped", "clipped", "scheduled"],
)
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_the_sharpness_bypasses_the_optimizer(inner, max_norm, x64):
    """``u_inner(g) - lr a (g_s - g)``: no momentum, no preconditioning, no decay.

    Every number is a schedule that changes on each step, so that one read a step too
    early or too late shows.
    """
    settings = {
        "lr": uneven(0.1, 0.4, 0.0, 0.2, 0.7),
        "rho": uneven(0.1, 0.0, 0.5),
        "gamma": uneven(0.9, 0.5, 0.0, 0.8),
        "max_norm": max_norm,
    }
    wanted, wanted_state = by_hand(INNER[inner], STEPS, **settings)
    lr = settings.pop("lr")
    tx = optax_sam.wsam(INNER[inner], learning_rate=lr, **settings)
    params, state = run(tx)
    harness.assert_close(params, wanted, 1e-9)
    harness.assert_close_in_size(state.inner, wanted_state, 1e-10)


def test_each_gradient_is_clipped_for_itself(x64):
    """The same factor for both, or one on their difference, would not do."""
    g, g_s, w = harness.tree(1, 0.01), harness.tree(2, 30.0), harness.tree()
    tx = optax_sam.wsam(optax.sgd(0.0), learning_rate=1.0, gamma=0.5, max_norm=2.0)
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)
    length = np.linalg.norm(flat(g_s))
    assert length > 2 > np.linalg.norm(flat(g))
    wanted = flat(g) - 2 / (length + 1e-6) * flat(g_s)
    np.testing.assert_allclose(flat(u), wanted, rtol=1e-12)


def test_clipped_in_half_precision():
    """Numbers whose squares float16 does not hold; types stay."""
    w = harness.tree(dtype="float16")
    g, g_s = harness.like(w, 1e3), harness.like(w, -1e3)
    tx = optax_sam.wsam(optax.sgd(0.0), learning_rate=1.0, gamma=0.5, max_norm=3.0)
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)
    assert harness.kinds(u) == harness.kinds(w)
    # Both are (+-1, ..., +-1) of length 3, rounded to eleven bits.
    np.testing.assert_allclose(flat(u), 2.0, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sharpness_is_rounded_once(dtype, x64):
    """Not its difference, the step along it, and their product as well."""
    w = harness.tree(dtype=dtype)
    g, g_s = harness.tree(1, dtype=dtype), harness.tree(2, 1e-2, dtype=dtype)
    tx = optax_sam.wsam(optax.sgd(0.0), learning_rate=0.43, gamma=0.7)
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)
    wanted = -0.43 * 0.7 / 0.3 * (flat(g_s).astype(float) - flat(g).astype(float))
    half_a_digit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(flat(u).astype(float), wanted, rtol=1.01 * half_a_digit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_stay(dtype):
    tx = optax_sam.wsam(INNER["adamw"], learning_rate=optax.constant_schedule(0.1))
    w = harness.tree(dtype=dtype)
    state = tx.init(w)
    update = lambda g, s: tx.update(g, s, w, grad_fn=lambda p: p)
    u, after = jax.eval_shape(update, w, state)
    assert harness.kinds(u) == harness.kinds(w)
    assert harness.kinds(after) == harness.kinds(state)


# What is not finite.


def test_a_rejected_ascent_leaves_the_inner_step(x64):
    g, w = harness.tree(1), harness.tree()
    plain, plain_state = SGD.update(g, SGD.init(w), w)
    for bad in (np.nan, np.inf, 1e200):  # the square of the last one overflows
        for max_norm in (None, 100.0):
            tx = optax_sam.wsam(SGD, learning_rate=1.0, max_norm=max_norm)
            g_s = harness.with_entry(harness.tree(2), bad)
            u, state = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)  # noqa: B023
            harness.assert_equal(u, plain)
            harness.assert_equal(state.inner, plain_state)
            assert optax_sam.metrics(state)["rejected_ascents"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_incoming_gradient_that_is_not_finite_passes_through(bad):
    """To a guard around it; the state of the ascents stays clean."""
    w, broken = harness.tree(), harness.with_entry(harness.tree(1), bad)
    for max_norm in (None, 1.0):
        tx = optax_sam.wsam(SGD, learning_rate=0.1, max_norm=max_norm)
        u, state = tx.update(broken, tx.init(w), w, grad_fn=lambda p: p)
        assert not np.isfinite(u["layer"]["kernel"][1, 1])
        if max_norm is None:  # elsewhere it is the plain step
            np.testing.assert_array_equal(u["gain"], -0.1 * broken["gain"])
        assert harness.is_finite(state.ascent)
        assert int(state.ascent.num_rejected) == 1


def test_apply_if_finite_around():
    """A batch of NaN leaves everything; training goes on as if it had not been."""
    problem, tx = problems.mlp(), optax_sam.wsam(INNER["adamw"], learning_rate=0.01)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    step = jax.jit(harness.make_step(guarded, problem.loss_fn))
    before = run(guarded, 4)
    x, y = problem.batch(0)
    params, state = step(*before, (x.at[0, 0].set(jnp.nan), y))
    harness.assert_equal(params, before[0])
    harness.assert_equal(state.inner_state, before[1].inner_state)
    assert state.total_notfinite == 1
    params, state = harness.run(step, params, state, problem, 8, first=4)
    plain, plain_state = run(tx)
    harness.assert_close(params, plain, 1e-5)
    assert optax_sam.metrics(state)["ascents"] == harness.ascents(plain_state) == 12


# In company.


def test_behind_a_clip_in_a_chain(x64):
    """Which the second gradient does not see."""
    wsam = optax_sam.wsam(SGD, learning_rate=0.1, rho=RHO, gamma=0.7)
    params, _ = run(optax.chain(optax.clip_by_global_norm(0.2), wsam))
    wanted, _ = by_hand(SGD, STEPS, lr=0.1, rho=RHO, gamma=0.7, clip=0.2)
    harness.assert_close(params, wanted, 1e-10)


def test_extra_args_reach_the_inner_optimizer():
    plateau = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=1, accumulation_size=1
    )
    tx = optax_sam.wsam(optax.chain(SGD, plateau), learning_rate=0.1)
    w = harness.tree()
    update = jax.jit(
        lambda s: tx.update(w, s, w, grad_fn=lambda p: p, value=1.0, unknown=2)[1]
    )
    state = tx.init(w)
    for _ in range(4):
        state = update(state)
    assert state.inner[1].scale < 1


def test_inject_hyperparams(x64):
    """A number put into the state counts from the next step on."""
    static = optax_sam.static_args(optax_sam.wsam)
    assert {"inner", "when", "mask", "axis_name", "ascent_dtype"} <= set(static)
    assert not {"learning_rate", "rho", "gamma"} & set(static)
    factory = optax.inject_hyperparams(optax_sam.wsam, static_args=static)
    injected = factory(SGD, learning_rate=0.1, rho=RHO, gamma=0.5)
    step = jax.jit(harness.make_step(injected, problems.mlp().loss_fn))
    params = problems.mlp().params()
    state = injected.init(params)
    lrs, gammas = (0.1, 0.3, 0.0, 0.2), (0.5, 0.9, 0.9, 0.1)
    for t in range(4):
        state.hyperparams["learning_rate"] = jnp.asarray(lrs[t])
        state.hyperparams["gamma"] = jnp.asarray(gammas[t])
        params, state = step(params, state, problems.mlp().batch(t))
    numbers = {"lr": uneven(*lrs), "rho": RHO, "gamma": uneven(*gammas)}
    harness.assert_close(params, by_hand(SGD, 4, **numbers)[0], 1e-10)
    assert optax_sam.metrics(state)["ascents"] == 4


EVERY_3 = functools.partial(
    optax_sam.wsam, SGD, learning_rate=0.1, rho=RHO, when=optax_sam.when.every_k(3)
)


def test_on_every_third_step(x64):
    """On the others the step is the inner optimizer's."""
    tx, w = EVERY_3(), harness.tree()
    update = jax.jit(lambda g, s: tx.update(g, s, w, grad_fn=lambda p: p))
    state = tx.init(w)
    for t in range(7):
        g = harness.tree(t + 1)
        plain, _ = SGD.update(g, state.inner, w)
        u, state = update(g, state)
        if t % 3:
            harness.assert_close(u, plain, 1e-12)
        else:
            assert_apart(u, plain)
    assert optax_sam.metrics(state)["ascents"] == 3


def test_dispatch_and_donation(x64):
    wanted, wanted_state = run(EVERY_3())
    tx, problem = EVERY_3(), problems.mlp()
    step = harness.make_step(tx, problem.loss_fn)
    params = problem.params()
    dispatched = optax_sam.dispatch(step, donate_argnums=(0, 1))
    found = harness.run(dispatched, params, tx.init(params), problem, STEPS)
    harness.assert_close(found, (wanted, wanted_state), 1e-10)
    assert harness.ascents(found[1]) == 4


def test_m_sharpness_over_a_vmapped_axis(x64):
    """One ascent for each shard; both gradients are averaged, and then subtracted."""
    problem = problems.mlp()
    adam = optax.adam(0.1)
    tx = optax_sam.wsam(
        adam, learning_rate=0.1, rho=0.5, gamma=0.8, axis_name="shards", max_norm=0.3
    )
    w, batch = problem.params(), problem.batch(0)
    shards = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)

    def update(shard):
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, shard)
        return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)

    rows, states = jax.jit(jax.vmap(update, axis_name="shards"))(shards)
    grad, first, second = jax.jit(jax.grad(problem.loss_fn)), [], []
    for i in range(4):
        shard = jax.tree.map(lambda x, i=i: x[i], shards)
        g = grad(w, shard)
        first.append(g)
        e = optax.tree.scale(0.5 / np.linalg.norm(flat(g)), g)
        second.append(grad(optax.tree.add(w, e), shard))
    mean = lambda trees: jax.tree.map(lambda *xs: sum(xs) / 4, *trees)
    clip = lambda x: optax.tree.scale(min(1, 0.3 / (np.linalg.norm(flat(x)) + 1e-6)), x)
    g, g_s = clip(mean(first)), clip(mean(second))
    u, _ = adam.update(g, adam.init(w), w)
    wanted = jax.tree.map(lambda u, x, y: u - 0.1 * 4 * (y - x), u, g, g_s)
    for i in range(4):
        harness.assert_close(jax.tree.map(lambda x, i=i: x[i], rows), wanted, 1e-9)
        one = jax.tree.map(lambda x, i=i: x[i], states)
        harness.assert_equal(one, jax.tree.map(lambda x: x[0], states))


def test_a_mask_leaves_the_descent_alone(x64):
    """What is not perturbed still has a sharpness to step along."""
    w, g, g_s = harness.tree(), harness.tree(1), harness.tree(2)
    points = []
    tx = optax_sam.wsam(
        SGD, learning_rate=1.0, gamma=0.5, mask={"layer": True, "gain": False}
    )
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: points.append(p) or g_s)
    harness.assert_equal(points[0]["gain"], w["gain"])
    wanted = -0.1 * g["gain"] - (g_s["gain"] - g["gain"])
    np.testing.assert_allclose(u["gain"], wanted, rtol=1e-12)


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -0.1}, "learning_rate must be a number"),
        ({"gamma": 1.0}, r"gamma must be a number in \[0\.0, 1\.0\)"),
        ({"gamma": -0.1}, r"gamma must be a number in \[0\.0, 1\.0\)"),
        ({"rho": -1.0}, "rho must be a number"),
        ({"max_norm": 0.0}, "max_norm must be a number in"),
        ({"inner": 0.1}, "wsam wraps an optimizer.*learning_rate=lr"),
    ],
    ids=str,
)
def test_refused_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        optax_sam.wsam(**{"inner": SGD, "learning_rate": 0.1, **changes})


def test_refused_calls():
    tx, w = optax_sam.wsam(SGD, learning_rate=0.1), harness.tree()
    with pytest.raises(ValueError, match="wsam needs the parameters"):
        tx.update(w, tx.init(w))
    with pytest.raises(ValueError, match="wsam needs grad_fn"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="wsam: what grad_fn returned.*missing"):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: {"gain": p["gain"]})


def test_masked_around_it_is_refused():
    """The advice puts nothing behind it in a chain."""
    w, tx = harness.tree(), optax_sam.wsam(SGD, learning_rate=0.1)
    around = optax.masked(tx, {"layer": True, "gain": False})
    advice = r"Put it outside(.|\n)*optax_sam\.wsam\(optax\.partition\("
    with pytest.raises(ValueError, match=advice):
        around.init(w)
    with pytest.raises(ValueError, match=advice):
        around.update(w, optax.MaskedState(tx.init(w)), w, grad_fn=lambda p: p)


def test_frozen_leaves(x64):
    """By zero gradients; the inner optimizer does not hold the sharpness."""
    labels = {"layer": "train", "gain": "freeze"}
    inner = optax.partition({"train": SGD, "freeze": optax.set_to_zero()}, labels)
    tx, w = optax_sam.wsam(inner, learning_rate=0.1), harness.tree()
    g, g_s = harness.tree(1), harness.tree(2)
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)
    np.testing.assert_allclose(u["gain"], -0.9 * (g_s["gain"] - g["gain"]), rtol=1e-12)
    zero = jnp.zeros_like(w["gain"])
    u, _ = tx.update(
        *({**g, "gain": zero}, tx.init(w), w), grad_fn=lambda p: {**g_s, "gain": zero}
    )
    harness.assert_equal(u["gain"], zero)
