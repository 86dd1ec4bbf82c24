"""F-SAM: the ascent along what is new in the gradient."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods_lib import (
    RHO,
    ascended,
    assert_apart,
    emitted,
    flat,
    pair,
    trained,
    trained_by,
)
from reference import friendly_sam
from trajectories import Fresh, every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE, SIGMA, DECAY = map(rising, (0.2, 0.5, 0.4))


def friendly(k=1, sigma=SIGMA, decay=DECAY):
    """F-SAM whose hyperparameters change, on every k-th step."""

    def make():
        method = friendly_sam.FriendlySAM()

        def direction(t, w, grad):
            method.rho, method.sigma, method.lam = SIZE(t), sigma(t), decay(t)
            return method.direction(w, grad)

        return every(k, direction)

    return Fresh(make)


CASES = {
    "friendly_sam": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=DECAY),
        friendly(),
    ),
    "sigma = 1": (
        optax_sam.friendly_sam(SIZE, sigma=1.0, decay=DECAY),
        friendly(sigma=lambda t: 1.0),
    ),
    "without memory": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=0.0),
        friendly(decay=lambda t: 0.0),
    ),
    "every 3": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=DECAY, when=when.every_k(3)),
        friendly(3),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


def direction(h):
    method = friendly_sam.FriendlySAM(h["rho"], h["sigma"], h["lmbda"])
    return lambda t, w, grad: method.direction(w, grad)


test_the_reference_meets_the_recorded_runs, test_the_recorded_runs_are_met = (
    recorded_runs(
        3,
        "fsam",
        member=lambda name, h: optax_sam.friendly_sam(
            h["rho"], sigma=h["sigma"], decay=h["lmbda"]
        ),
        direction=direction,
    )
)


def followed(rule, gradients, params=None):
    """Offsets of a rule on a series of gradients, and its states."""
    state = rule.init(gradients[0])
    for t, g in enumerate(gradients):
        e, state = rule.update(g, state, params, count=t)
        yield e, state


def test_friendly_sam_that_takes_nothing_out_is_sam(x64):
    member = optax_sam.friendly_sam(RHO, sigma=0.0)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    assert_apart(trained(optax_sam.friendly_sam(RHO)), trained_by("sam"))


def test_friendly_sam_starts_as_sam(x64):
    member = optax_sam.friendly_sam(RHO, sigma=1.0, decay=0.9)
    harness.assert_close(ascended(member)[1], ascended(optax_sam.sam(RHO))[1], 1e-12)


@pytest.mark.parametrize(
    ("sigma", "decay"), [(1.0, 0.0), (1.0, 0.6), (0.5, 0.9), (2.0, 1.0)]
)
def test_friendly_sam_by_hand(sigma, decay, x64):
    """``a_t = g_t - sigma m_{t-1}``; without memory ``a_t = g_t - g_{t-1}``."""
    gradients = [harness.tree(seed) for seed in range(6)]
    rule = ascent.friendly(RHO, sigma, decay)
    m = previous = None
    for g, (e, state) in zip(gradients, followed(rule, gradients), strict=True):
        g = flat(g)
        a = g if m is None else g - sigma * m
        if decay == 0 and m is not None:
            np.testing.assert_allclose(a, g - previous, rtol=1e-12)
        m = g if m is None else decay * m + (1 - decay) * g
        np.testing.assert_allclose(flat(e), RHO * a / np.linalg.norm(a), rtol=1e-9)
        np.testing.assert_allclose(flat(state.average), m, rtol=1e-12)
        previous = g


def test_both_orders_of_friendly_sam_have_one_direction(x64):
    """With ``sigma = 1`` the paper's, with the average of this step taken out."""
    gradients = [harness.tree(seed) for seed in range(4)]
    for t, (e, state) in enumerate(followed(ascent.friendly(RHO), gradients)):
        if t:
            a = flat(gradients[t]) - flat(state.average)
            wanted = RHO * a / np.linalg.norm(a)
            np.testing.assert_allclose(flat(e), wanted, rtol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95, 0.999])
def test_a_constant_gradient_leaves_no_direction(decay, precision):
    """Whatever its value, compiled or not: rounding does not add up to one."""
    with jax.enable_x64(precision == "float64"):
        rule = ascent.friendly(RHO, 1.0, decay)
        g = jnp.asarray(np.random.default_rng(0).normal(size=(200, 3)), precision)

        def run(g, steps):
            step = lambda state, _: rule.update(g, state, g)[::-1]
            return jax.lax.scan(step, rule.init(g), length=steps)[1]

        e = np.asarray(jax.jit(jax.vmap(run, (0, None)), static_argnums=1)(g, 400))
        np.testing.assert_allclose(np.linalg.norm(e[:, 0], axis=-1), RHO, rtol=1e-5)
        np.testing.assert_array_equal(e[:, 1:], 0)
        lengths = [float(optax.tree.norm(e)) for e, _ in followed(rule, 20 * [g])]
        assert lengths == [pytest.approx(RHO, rel=1e-5)] + 19 * [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_average_stays_clean(bad, x64):
    """Neither gradient of a rejected step enters it; it goes on from where it was."""
    member = optax_sam.friendly_sam(RHO)
    g, g_s = pair()
    broken = harness.with_entry(g, bad)
    fresh = member.init(g)
    for state in (fresh, emitted(member, g, g_s)[1]):
        for first, second in ((broken, g_s), (g, broken)):
            d, after = emitted(member, first, second, state)
            harness.assert_equal(d, first)
            harness.assert_equal(after.ascent, state.ascent)
            wanted, _ = emitted(member, g_s, g, state)
            harness.assert_equal(emitted(member, g_s, g, after)[0], wanted)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_devices_have_one_average_and_noises_of_their_own(x64):
    """The average of the mean gradient; and each ascends against it by itself."""
    rule = ascent.friendly(RHO, 1.0, 0.6)
    mean = lambda tree: jax.lax.pmean(tree, "shards")
    step = optax_sam.when.Step(0, mean, "shards")
    averaging = lambda g, state, w: rule.update(g, state, w, step=step)
    gradients = [
        jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5)))
        for seed in range(3)
    ]
    update = jax.vmap(averaging, (0, None, None), (0, 0), axis_name="shards")
    alone = ascent.friendly(RHO, 1.0, 0.6)
    state = wanted = rule.init(gradients[0][0])
    for t, g in enumerate(gradients):
        m = np.asarray(wanted.average)
        e, states = update(g, state, g[0])
        for i in range(4):
            harness.assert_equal(row(states, i), row(states, 0))
            a = g[i] - m if t else g[i]
            np.testing.assert_allclose(e[i], RHO * a / np.linalg.norm(a), rtol=1e-9)
        _, wanted = alone.update(g.mean(axis=0), wanted)
        harness.assert_close(row(states, 0), wanted, 1e-12)
        state = row(states, 0)
    member = optax_sam.friendly_sam(RHO, axis_name="shards")
    step = lambda g: member.update(g, member.init(g), g, grad_fn=lambda p: p)[1]
    states = jax.vmap(step, axis_name="shards")(gradients[0])
    for i in range(4):
        average = states.ascent.average[i]
        np.testing.assert_allclose(average, gradients[0].mean(axis=0), rtol=1e-12)
