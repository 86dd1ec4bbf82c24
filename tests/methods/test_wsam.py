"""WSAM, decoupled: the optimizer's own step and, beside it, one along the sharpness."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import problems
import pytest

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.01, weight_decay=0.1)
STEPS = 12
PROBLEM = problems.mlp()


def run(tx, steps=STEPS, first=0, start=None):
    """Parameters and state after some steps, with one program for all of them."""
    step = jax.jit(harness.make_step(tx, PROBLEM.loss_fn))
    params = PROBLEM.params()
    start = (params, tx.init(params)) if start is None else start
    return harness.run(step, *start, PROBLEM, steps, first=first)


def assert_apart(a, b, gap=1e-3):
    assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > gap


def clipped(x, limit):
    """As PyTorch clips, with its epsilon."""
    return optax.tree.scale(min(1, limit / (float(optax.tree.norm(x)) + 1e-6)), x)


def ascended(grad, w, g, rho):
    """The gradient further along another."""
    return grad(optax.tree.add(w, optax.tree.scale(rho / optax.tree.norm(g), g)))


def by_hand(inner, steps, *, lr, rho, gamma, max_norm=None, clip=None):
    """The paper's step written out, with numbers or functions of the step."""
    grad = jax.jit(jax.grad(PROBLEM.loss_fn))
    inner_update = jax.jit(optax.with_extra_args_support(inner).update)
    w = PROBLEM.params()
    state = inner.init(w)
    for t in range(steps):
        at = lambda x, t=t: x(t) if callable(x) else x
        grad_at = lambda w, t=t: grad(w, PROBLEM.batch(t))
        g = grad_at(w)
        if clip is not None:
            g = optax.tree.scale(min(1, clip / float(optax.tree.norm(g))), g)
        g_s = ascended(grad_at, w, g, at(rho))
        if max_norm is not None:
            g, g_s = (clipped(x, at(max_norm)) for x in (g, g_s))
        u, state = inner_update(g, state, w)
        weight = at(lr) * at(gamma) / (1 - at(gamma))
        move = lambda w, u, x, x_s: w + u - weight * (x_s - x)  # noqa: B023
        w = jax.tree.map(move, w, u, g, g_s)
    return w, state


def uneven(*values):
    """A schedule that no other step shares."""
    return lambda t: jnp.asarray(values)[t % len(values)]


# Where it is another method.


@pytest.mark.parametrize(
    ("inner", "zero"),
    [
        (SGD, {"gamma": 0.0}),
        (ADAMW, {"gamma": 0.0}),
        (optax.sgd(harness.linear(0.2, 0.0, STEPS), nesterov=True), {"gamma": 0.0}),
        (SGD, {"rho": 0.0}),
    ],
    ids=["sgd", "adamw", "schedule", "no radius"],
)
def test_without_weight_or_radius_it_is_the_inner_optimizer(inner, zero, x64):
    params, state = run(optax_sam.wsam(inner, learning_rate=0.1, **zero))
    plain, plain_state = run(optax.with_extra_args_support(inner))
    harness.assert_close(params, plain, 1e-12)
    harness.assert_close(state.inner, plain_state, 1e-12)
    assert harness.ascents(state) == STEPS


@pytest.mark.parametrize("gamma", [0.5, pytest.param(0.3, marks=pytest.mark.slow), 0.9])
def test_with_plain_sgd_it_is_sam_or_gnp(gamma, x64):
    """SAM for half the weight, else coupled; with momentum the two forms part."""
    lr = harness.linear(0.3, 0.0, STEPS)
    member = optax_sam.gnp(0.1, alpha=gamma / (1 - gamma))
    member = optax_sam.sam(0.1) if gamma == 0.5 else member
    tx = optax_sam.wsam(optax.sgd(lr), learning_rate=lr, rho=0.1, gamma=gamma)
    coupled, _ = run(optax.chain(member, optax.sgd(lr)))
    harness.assert_close(run(tx)[0], coupled, 1e-12)
    if gamma == 0.9:
        tx = optax_sam.wsam(SGD, learning_rate=0.1, rho=0.1, gamma=gamma)
        assert_apart(run(tx)[0], run(optax.chain(member, SGD))[0])


# The step.


@pytest.mark.parametrize(
    ("inner", "max_norm"),
    [
        (ADAMW, None),
        (SGD, uneven(0.1, 0.5, 2.0)),
        pytest.param(SGD, None, marks=pytest.mark.slow),
        pytest.param(SGD, 0.4, marks=pytest.mark.slow),
        pytest.param(ADAMW, uneven(0.1, 0.5, 2.0), marks=pytest.mark.slow),
        pytest.param(optax.contrib.muon(0.02), None, marks=pytest.mark.slow),
        pytest.param(optax.contrib.prodigy(), None, marks=pytest.mark.slow),
    ],
    ids=["adamw", "uneven", "sgd", "clipped", "adamw uneven", "muon", "prodigy"],
)
def test_the_sharpness_bypasses_the_optimizer(inner, max_norm, x64):
    """``u_inner(g) - lr a (g_s - g)``: no momentum, no preconditioning, no decay.

    Every number is a schedule that changes on each step, so that one read a step too
    early or too late shows.
    """
    settings = {
        "rho": uneven(0.1, 0.0, 0.5),
        "gamma": uneven(0.9, 0.5, 0.0, 0.8),
        "max_norm": max_norm,
    }
    lr = uneven(0.1, 0.4, 0.0, 0.2, 0.7)
    wanted, wanted_state = by_hand(inner, STEPS, lr=lr, **settings)
    params, state = run(optax_sam.wsam(inner, learning_rate=lr, **settings))
    harness.assert_close(params, wanted, 1e-9)
    harness.assert_close_in_size(state.inner, wanted_state, 1e-10)


def sharpness_alone(g, g_s, w, gamma=0.5, lr=1.0, **settings):
    """What it emits where the optimizer rests, leaf by leaf in float64."""
    tx = optax_sam.wsam(optax.sgd(0.0), learning_rate=lr, gamma=gamma, **settings)
    u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: g_s)
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


# In company.


def test_the_second_gradient_does_not_see_a_clip_before_it(x64):
    wsam = optax_sam.wsam(SGD, learning_rate=0.1, rho=0.1, gamma=0.7)
    params, _ = run(optax.chain(optax.clip_by_global_norm(0.2), wsam))
    wanted, _ = by_hand(SGD, STEPS, lr=0.1, rho=0.1, gamma=0.7, clip=0.2)
    harness.assert_close(params, wanted, 1e-10)


def test_a_number_put_into_the_state_counts_from_the_next_step_on(x64):
    static = optax_sam.static_args(optax_sam.wsam)
    assert {"inner", "when", "mask", "axis_name", "ascent_dtype"} <= set(static)
    assert not {"learning_rate", "rho", "gamma"} & set(static)
    factory = optax.inject_hyperparams(optax_sam.wsam, static_args=static)
    injected = factory(SGD, learning_rate=0.1, rho=0.1, gamma=0.5)
    step = jax.jit(harness.make_step(injected, PROBLEM.loss_fn))
    params = PROBLEM.params()
    state = injected.init(params)
    lrs, gammas = (0.1, 0.3, 0.0, 0.2), (0.5, 0.9, 0.9, 0.1)
    for t in range(4):
        state.hyperparams["learning_rate"] = jnp.asarray(lrs[t])
        state.hyperparams["gamma"] = jnp.asarray(gammas[t])
        params, state = step(params, state, PROBLEM.batch(t))
    numbers = {"lr": uneven(*lrs), "rho": 0.1, "gamma": uneven(*gammas)}
    harness.assert_close(params, by_hand(SGD, 4, **numbers)[0], 1e-10)
    assert optax_sam.metrics(state)["ascents"] == 4


def test_on_other_steps_it_is_the_inner_optimizer_also_dispatched(x64):
    rule = optax_sam.when.every_k(3)
    tx = optax_sam.wsam(SGD, learning_rate=0.1, rho=0.1, when=rule)
    step = harness.make_step(tx, PROBLEM.loss_fn)
    w = PROBLEM.params()
    carry, compiled = (w, tx.init(w)), jax.jit(step)
    for t in range(7):
        g = jax.grad(PROBLEM.loss_fn)(carry[0], PROBLEM.batch(t))
        u, _ = SGD.update(g, carry[1].inner, carry[0])
        plain = optax.apply_updates(carry[0], u)
        carry = compiled(*carry, PROBLEM.batch(t))
        (harness.assert_close if t % 3 else (lambda a, b, _: assert_apart(a, b)))(
            carry[0], plain, 1e-12
        )
    assert harness.ascents(carry[1]) == 3
    dispatched = optax_sam.dispatch(step, donate_argnums=(0, 1))
    w = PROBLEM.params()
    found = harness.run(dispatched, w, tx.init(w), PROBLEM, 7)
    harness.assert_close(found, carry, 1e-10)


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
        row = tx.update(g, tx.init(w), w, grad_fn=grad_fn)
        return row, g, ascended(grad_fn, w, g, 0.5)

    rows, *both = jax.jit(jax.vmap(of_shard, axis_name="shards"))(shards)
    mean = lambda tree: jax.tree.map(lambda x: x.mean(0), tree)
    g, g_s = (clipped(mean(x), 0.3) for x in both)
    u, _ = adam.update(g, adam.init(w), w)
    wanted = jax.tree.map(lambda u, x, y: u - 0.1 * 4 * (y - x), u, g, g_s)
    for i in range(4):
        harness.assert_close(jax.tree.map(lambda x, i=i: x[i], rows[0]), wanted, 1e-9)
        one = jax.tree.map(lambda x, i=i: x[i], rows[1])
        harness.assert_equal(one, jax.tree.map(lambda x: x[0], rows[1]))


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
        u, _ = tx.update(g, tx.init(w), w, grad_fn=lambda p: points.append(p) or g_s)
        np.testing.assert_allclose(u["gain"], wanted, rtol=1e-12)
    harness.assert_equal(points[0]["gain"], w["gain"])
    # Zero gradients freeze it.
    at_zero = lambda p: {**g_s, "gain": zero}
    u, _ = tx.update({**g, "gain": zero}, tx.init(w), w, grad_fn=at_zero)
    harness.assert_equal(u["gain"], zero)


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
    update = functools.partial(tx.update, w, tx.init(w))
    for message, args, extra in (
        ("wsam needs the parameters", (), {}),
        ("wsam needs grad_fn", (w,), {}),
        (
            "wsam: what grad_fn returned.*missing",
            *((w,), {"grad_fn": lambda p: {"gain": p["gain"]}}),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            update(*args, **extra)
    # The advice puts nothing behind it in a chain.
    around = optax.masked(tx, {"layer": True, "gain": False})
    advice = r"Put it outside(.|\n)*optax_sam\.wsam\(optax\.partition\("
    with pytest.raises(ValueError, match=advice):
        around.init(w)
    with pytest.raises(ValueError, match=advice):
        around.update(w, optax.MaskedState(tx.init(w)), w, grad_fn=lambda p: p)
