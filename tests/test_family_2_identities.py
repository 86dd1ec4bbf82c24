"""Where more methods of SAM's family must coincide with others or with a formula."""

import functools
import re

import flax.linen as nn
import harness
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_family_identities import assert_apart, emitted, flat, pair
from test_identities import (
    RHO,
    ROUNDING,
    TREES,
    ascended,
    filled,
    flattened,
    offset_of,
    on_a_quadratic,
    seeds,
    trained,
    trained_by,
)

import optax_sam
from optax_sam import ascent, blend, when


def answering(*answers):
    """A ``grad_fn`` that gives one answer after the other, and the points it saw."""
    points, answers = [], iter(answers)
    return lambda p: points.append(p) or next(answers), points


def points_of(member, w, *gradients):
    """Where a member looks that gets these gradients, the first one at ``w``."""
    grad_fn, points = answering(*gradients[1:], gradients[-1])
    member.update(gradients[0], member.init(w), w, grad_fn=grad_fn)
    return points


def flattened_step(member, g, g_s, params=None):
    d, _ = emitted(member, g, g_s, params=params)
    return flat(d).astype(np.float64)


# GNP and G-RST.


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gnp_of_all_or_nothing_is_sam_or_the_base_to_the_bit(dtype, x64):
    g, g_s = pair(dtype=dtype)
    for alpha, wanted in ((1.0, g_s), (0.0, g)):
        member = optax_sam.gnp(RHO, alpha=alpha)
        harness.assert_equal(emitted(member, g, g_s)[0], wanted)
    gnp, sam = (ascended(x(RHO)) for x in (optax_sam.gnp, optax_sam.sam))
    harness.assert_equal(gnp[1], sam[1])


def test_gnp_trains_as_sam_or_as_the_base(x64):
    for alpha, name in ((1.0, "sam"), (0.0, "sgd")):
        member = optax_sam.gnp(RHO, alpha=alpha)
        harness.assert_close(trained(member), trained_by(name), 1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.8, 4.0])
def test_gnp_on_a_quadratic_is_the_penalized_gradient(alpha, x64):
    """``grad (L + alpha rho ||grad L||)``, by differentiating that."""
    w, g, d, _, _ = on_a_quadratic(optax_sam.gnp(RHO, alpha=alpha))
    hessian = jnp.asarray(problems.hessian())

    def penalized(w):
        return w @ hessian @ w / 2 + alpha * RHO * jnp.linalg.norm(hessian @ w)

    wanted = jax.grad(penalized)(jnp.asarray(w))
    np.testing.assert_allclose(d, wanted, rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(d - g) > 1e-3


def test_g_rst_is_sam_on_average(x64):
    """``E d = g + p gamma (g_s - g)``, and the ascents are binomial."""
    p, gamma, steps, runs = 0.4, 2.5, 60, 400
    g, g_s = jnp.asarray([1.0, 2.0]), jnp.asarray([-1.0, 0.5])

    def run(key):
        member = optax_sam.gnp(RHO, alpha=gamma, when=when.bernoulli(p, key))

        def step(state, _):
            d, state = member.update(g, state, g, grad_fn=lambda p: g_s)
            return state, d

        state, d = jax.lax.scan(step, member.init(g), length=steps)
        return state.num_ascents, d.mean(axis=0)

    keys = jax.random.bits(jax.random.key(1), (runs, 2), jnp.uint32)
    counts, means = map(np.asarray, jax.jit(jax.vmap(run))(keys))
    shares = counts[:, None] / steps
    np.testing.assert_allclose(means, g + shares * gamma * (g_s - g), rtol=1e-12)
    # The standard error of a mean of 24000 draws is 0.0032, that of the variance of
    # 400 counts 7 %.
    assert abs(shares.mean() - p) < 4 * 0.0032
    assert counts.var() == pytest.approx(steps * p * (1 - p), rel=0.28)
    # As p gamma = 1, the gradient of SAM, to the same standard error.
    error = 4 * 0.0032 * gamma * np.abs(g_s - g)
    assert np.all(np.abs(means.mean(axis=0) - g_s) < error)


def test_gnp_of_a_unit_gradient(x64):
    rule = blend.interpolate(0.8, unit_gradient=True)
    member = optax_sam.sharpness_aware(ascent.l2(RHO), blend=rule)
    g, g_s = pair(scale=20.0)
    n = np.linalg.norm(flat(g))
    wanted = 0.2 * flat(g) / n + 0.8 * flat(g_s)
    np.testing.assert_allclose(flattened_step(member, g, g_s), wanted, rtol=1e-12)
    zero = harness.like(g, 0.0)
    d = flattened_step(member, zero, g_s)
    np.testing.assert_allclose(d, 0.8 * flat(g_s), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gnp_extrapolates_in_half_precision(dtype, x64):
    """Rounded once: ``9 g_s - 8 g`` of close gradients would cancel."""
    g = harness.tree(1, dtype=dtype)
    g_s = jax.tree.map(lambda x: (x * 1.02).astype(dtype), g)
    d = flattened_step(optax_sam.gnp(RHO, alpha=9.0), g, g_s)
    a, b = flat(g).astype(np.float64), flat(g_s).astype(np.float64)
    half_a_digit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(d, 9 * b - 8 * a, rtol=1.01 * half_a_digit)


# F-SAM.


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


def shards_of(batch, count):
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


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


# Schedules.

TUNED = {
    "gnp": (optax_sam.gnp, {"alpha": 0.8}),
    "friendly_sam": (optax_sam.friendly_sam, {"sigma": 0.7, "decay": 0.6}),
    "fisher_sam": (optax_sam.fisher_sam, {"eta": 2.0}),
    "sam_on": (optax_sam.sam_on, {"eta": 0.2, "adapt": True, "mask": None}),
    "stable_sam": (optax_sam.stable_sam, {}),
}


@pytest.mark.parametrize("name", TUNED)
def test_schedules_are_read_at_the_step(name, x64):
    """Each by itself, on the third step, against the number that it has there."""
    factory, settings = TUNED[name]
    w, g, g_s = (harness.tree(seed) for seed in range(3))
    settings = {"rho": RHO, **settings}
    member = factory(**settings)
    state = member.init(w)
    for _ in range(2):  # so that there is an average
        _, state = member.update(g_s, state, w, grad_fn=lambda p: g)

    def step(member, state):
        grad_fn, points = answering(g_s)
        d, after = member.update(g, state, w, grad_fn=grad_fn)
        return d, points, after.ascent

    before = step(member, state)
    for argument, value in settings.items():
        if isinstance(value, float):
            schedule = lambda t, x=value: x * (1.3 - 0.3 * (t < 2))
            later = step(factory(**settings | {argument: schedule}), state)
            wanted = step(factory(**settings | {argument: 1.3 * value}), state)
            harness.assert_close(later, wanted, 1e-12)
            changed = zip(*map(jax.tree.leaves, (later, before)), strict=True)
            assert any(np.max(np.abs(x * 1.0 - y)) > 1e-6 for x, y in changed)


# m-sharpness.

ON_SHARDS = {
    "sam": functools.partial(optax_sam.sam, RHO),
    "sam, 2 steps": functools.partial(optax_sam.sam, RHO, num_ascent_steps=2),
    "gnp": functools.partial(optax_sam.gnp, RHO, alpha=2.0),
    "stable_sam": functools.partial(optax_sam.stable_sam, RHO),
    "fisher_sam": functools.partial(optax_sam.fisher_sam, RHO, eta=30.0),
    "amp": functools.partial(optax_sam.amp, 0.1, inner_iter=2),
    "gam": functools.partial(optax_sam.gam, RHO, gamma=0.5),
}
LIKE_OTHERS = {"sam, 2 steps", "fisher_sam", "stable_sam"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name
        for name in ON_SHARDS
    ],
)
def test_m_sharpness_over_a_vmapped_axis(name, x64):
    """The mean over shards of what each would do alone."""
    problem = problems.mlp()
    params, batch = problem.params(), problem.batch(0)

    def emit(member, shard):
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, shard)
        return member.update(
            grad_fn(params), member.init(params), params, grad_fn=grad_fn
        )

    alone = functools.partial(emit, ON_SHARDS[name]())
    together = functools.partial(emit, ON_SHARDS[name](axis_name="shards"))
    shards = shards_of(batch, 4)
    d, states = jax.device_get(jax.jit(jax.vmap(together, axis_name="shards"))(shards))
    single = jax.device_get(jax.jit(jax.vmap(alone))(shards)[0])
    mean = jax.tree.map(lambda x: x.mean(axis=0), single)
    for i in range(4):
        harness.assert_close(row(d, i), mean, 1e-12)
        harness.assert_equal(row(states, i), row(states, 0))
    if name == "sam":
        one, _ = jax.jit(jax.vmap(together, axis_name="shards"))(shards_of(batch, 1))
        whole, _ = jax.jit(alone)(batch)
        harness.assert_close(row(jax.device_get(one), 0), whole, 1e-12)
        assert_apart(mean, whole)
        grad, shards = jax.jit(jax.grad(problem.loss_fn)), jax.device_get(shards)
        by_hand = []
        for i in range(4):
            g = grad(params, row(shards, i))
            e = optax.tree.scale(RHO / np.linalg.norm(flat(g)), g)
            by_hand.append(flat(grad(optax.tree.add(params, e), row(shards, i))))
        np.testing.assert_allclose(flat(mean), np.mean(by_hand, axis=0), rtol=1e-9)


# Fisher SAM.


def test_fisher_sam_in_the_euclidean_metric_is_sam(x64):
    member = optax_sam.fisher_sam(RHO, eta=0.0)
    harness.assert_close(ascended(member)[1], ascended(optax_sam.sam(RHO))[1], 1e-12)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    assert_apart(trained(optax_sam.fisher_sam(RHO, eta=50.0)), trained_by("sam"))


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, st.sampled_from([0.0, 1.0, 1e3, 1e6]))
def test_fisher_offsets_have_one_length_in_the_metric(description, seed, eta):
    with harness.x64():
        g = filled(description, seed)
        e, flat_g = offset_of(ascent.fisher(0.3, eta), g), flattened(g)
        f = 1 + eta * flat_g**2
        length = 0.3 if np.any(flat_g) else 0.0
        np.testing.assert_allclose(np.sqrt(e @ (f * e)), length, rtol=ROUNDING)
        # Along F^-1 g, all with one factor.
        np.testing.assert_allclose(
            e * (flat_g @ (flat_g / f)) ** 0.5, length * flat_g / f, rtol=ROUNDING
        )


def test_fisher_offset_where_the_information_is_large(x64):
    """``e -> rho / (g sqrt(dim eta))``: the smaller the gradient, the longer."""
    g = harness.tree(1)
    e = flat(ascent.fisher(RHO, 1e12).update(g, None)[0])
    wanted = RHO / flat(g) / np.sqrt(e.size * 1e12)
    np.testing.assert_allclose(e, wanted, rtol=1e-6)


@pytest.mark.parametrize("eta", [1.0, 1e8])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-12, 1e12, 1e18, 1e25])
def test_fisher_of_huge_and_tiny_gradients_in_float32(scale, eta):
    g, g_s = pair(scale)
    d, state = emitted(optax_sam.fisher_sam(RHO, eta=eta), g, g_s)
    points = points_of(optax_sam.fisher_sam(RHO, eta=eta), g, g)
    assert harness.is_finite((d, points, state))
    rejected = scale > 1e19  # the squared norm overflows
    assert int(state.num_rejected) == rejected
    harness.assert_equal(d, g if rejected else g_s)


# AMP.


def test_amp_inside_its_ball_is_raw_ascent(x64):
    """So that small gradients make small offsets."""
    w = harness.tree()
    for scale in (1e-3, 1e-6):
        g = harness.tree(1, scale)
        for projection in ("leaf", "global"):
            member = optax_sam.amp(0.5, inner_lr=0.7, projection=projection)
            (point,) = points_of(member, w, g)
            wanted = jax.tree.map(lambda w, x: w + 0.7 * x, w, g)
            harness.assert_close(point, wanted, 1e-15)


def test_amp_of_one_long_leaf_is_sam(x64):
    w, g = harness.tree()["layer"]["kernel"], 9 * harness.tree(1)["layer"]["kernel"]
    sam = points_of(optax_sam.sam(0.5), w, g)
    for projection in ("leaf", "global"):
        amp = optax_sam.amp(0.5, projection=projection)
        harness.assert_close(points_of(amp, w, g), sam, 1e-11)


def test_amp_without_radius_or_step_is_the_base_optimizer(x64):
    w, g = harness.tree(), harness.tree(1)
    for member in (
        optax_sam.amp(0.0, inner_iter=3),
        optax_sam.amp(0.5, inner_lr=0.0, inner_iter=3),
        optax_sam.amp(0.0, inner_iter=3, projection="global"),
    ):
        for point in points_of(member, w, g, harness.tree(2), harness.tree(3)):
            harness.assert_equal(point, w)
    member = optax_sam.amp(0.0, inner_iter=2)
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 9, 11])
@pytest.mark.parametrize("projection", ["leaf", "global"])
def test_amp_by_hand(projection, num_steps, x64):
    """More than eight steps are a loop, compiled differently; on a quadratic."""
    epsilon, factor = 0.35, 0.04
    member = optax_sam.amp(
        epsilon, inner_lr=factor, inner_iter=num_steps, projection=projection
    )
    params = problems.quadratic().params()
    grad_fn = lambda p: jax.grad(problems.quadratic().loss_fn)(p, np.zeros(5))
    step = lambda: member.update(
        grad_fn(params), member.init(params), params, grad_fn=grad_fn
    )[0]
    h, w = problems.hessian(), flat(params)
    delta = np.zeros(5)
    shortened = {"leaf": 0, "global": 0}
    for _ in range(num_steps):
        delta = delta + factor * h @ (w + delta)
        parts = [delta[:3], delta[3:]] if projection == "leaf" else [delta]
        shortened[projection] += sum(np.linalg.norm(x) > epsilon for x in parts)
        shorten = lambda x: x * min(1, epsilon / np.linalg.norm(x))
        delta = np.concatenate([shorten(x) for x in parts])
    # After one step nothing is too long yet.
    assert num_steps == 2 or (shortened[projection] > 0) == (num_steps > 2)
    np.testing.assert_allclose(flat(jax.jit(step)()), h @ (w + delta), rtol=1e-9)


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, st.sampled_from([0.0, 1e-3, 0.5]))
def test_amp_offsets_lie_in_their_balls(description, seed, epsilon):
    """In one for each leaf, so together within ``epsilon sqrt(n)``; and by hand."""
    with harness.x64():
        g, other = filled(description, seed), filled(description, seed + 1)
        leaves = jax.tree.leaves(g)
        for projection in ("leaf", "global"):
            rule = ascent.raw_steps(epsilon, 0.3, 2, projection=projection)
            grad_fn, _ = answering(other)
            e, _ = rule.update(g, None, g, grad_fn=grad_fn)
            total = np.linalg.norm(flattened(e))
            count = len(leaves) if projection == "leaf" else 1
            assert total <= epsilon * np.sqrt(count) * (1 + ROUNDING)
            for x in jax.tree.leaves(e):
                assert np.linalg.norm(flattened(x)) <= epsilon * (1 + ROUNDING)
            grad_fn, _ = answering(other)
            rule = ascent.raw_steps(1e9, 0.3, 2, projection=projection)
            e = offset_of(rule, g, g, grad_fn=grad_fn)
            wanted = 0.3 * (flattened(g) + flattened(other))
            size = np.linalg.norm(wanted)
            np.testing.assert_allclose(e, wanted, atol=ROUNDING * size)


def test_loops_of_steps_in_half_precision_keep_their_types():
    """A loop's carry cannot change its type, and the points are float32."""
    w = harness.tree(dtype="bfloat16")
    for rule in (
        ascent.raw_steps(optax.constant_schedule(0.1), 0.5, 9),
        ascent.n_step(optax.constant_schedule(0.1), 9, step_size=0.05),
    ):
        member = optax_sam.sharpness_aware(rule)
        grad_fn, points = lambda p: harness.tree(2, dtype="bfloat16"), []
        seen = lambda p: points.append(p) or grad_fn(p)  # noqa: B023
        d, _ = member.update(w, member.init(w), w, grad_fn=seen)
        assert harness.kinds(d) == harness.kinds(w)
        assert len(points) == 2  # one in the loop's body, traced
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(points))


def test_schedules_of_several_steps_are_read_at_the_step(x64):
    """Of the step of training, not of the ascent."""
    rho, length = (lambda t: 0.1 * (t + 1)), (lambda t: 0.03 * (t + 1))
    g = harness.tree(1)
    unit = flat(g) / np.linalg.norm(flat(g))
    for t in (0, 4):
        grad_fn, _ = answering(g, g)
        rule = ascent.n_step(rho, 3, step_size=length)
        e, _ = rule.update(g, None, g, grad_fn=grad_fn, count=t)
        np.testing.assert_allclose(flat(e), 0.09 * (t + 1) * unit, rtol=1e-9)
        grad_fn, _ = answering(g, g)
        rule = ascent.raw_steps(1e9, length, 3)
        e, _ = rule.update(g, None, g, grad_fn=grad_fn, count=t)
        np.testing.assert_allclose(flat(e), 0.09 * (t + 1) * flat(g), rtol=1e-9)
        rule = ascent.raw_steps(rho, 1e9, projection="global")
        e, _ = rule.update(g, None, count=t)
        np.testing.assert_allclose(flat(e), 0.1 * (t + 1) * unit, rtol=1e-9)


# GAM.


def gam_by_hand(w, g_0, gradients, rho, rho_h, beta, alpha, gamma, h_minus="paper"):
    """Points and result; ``w`` and all gradients flat."""
    unit = lambda x: x / np.linalg.norm(x)
    g_1, g_2, g_3 = gradients
    w_2 = w + rho_h * unit(g_1 - g_0)
    points = [w + rho * unit(g_0), w_2, w_2 + rho * unit(g_2)]
    h_plus = alpha * g_1 + (1 - alpha) * g_3
    h_less = (beta if h_minus == "paper" else 1) * g_0 + (1 - beta) * g_2
    normal = h_less - (h_less @ h_plus) / (h_plus @ h_plus) * h_plus
    return points, h_plus - gamma * normal, h_plus


@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_by_hand(h_minus, x64):
    """Four gradients, three points; and ``<d, h_plus> = ||h_plus||^2``."""
    w, *gradients = (harness.tree(seed) for seed in range(5))
    numbers = 0.1, 0.4, 0.3, 0.8, 0.7
    rho, rho_h, beta, alpha, gamma = numbers
    member = optax_sam.gam(
        *(rho,),
        norm_rho=rho_h,
        beta0=lambda t: beta / (t + 1),
        beta1=lambda t: alpha / (t + 1),
        gamma=lambda t: gamma / (t + 1),
        h_minus=h_minus,
    )
    for t in range(2):  # schedules at the step, not at the number of gradients
        state = member.init(w)._replace(count=jnp.asarray(t))
        grad_fn, points = answering(*gradients[1:])
        d, _ = member.update(gradients[0], state, w, grad_fn=grad_fn)
        wanted = [beta / (t + 1), alpha / (t + 1), gamma / (t + 1)]
        g_0, *others = map(flat, gradients)
        by_hand = gam_by_hand(flat(w), g_0, others, rho, rho_h, *wanted, h_minus)
        for found, point in zip(points, by_hand[0], strict=True):
            np.testing.assert_allclose(flat(found), point, rtol=1e-10)
        np.testing.assert_allclose(flat(d), by_hand[1], rtol=1e-10)
        h_plus = by_hand[2]
        np.testing.assert_allclose(flat(d) @ h_plus, h_plus @ h_plus, rtol=1e-10)


def test_gam_without_the_norm_is_sam(x64):
    member = optax_sam.gam(RHO, gamma=0.0, beta1=1.0)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    # The other share is that of a gradient elsewhere.
    assert_apart(trained(optax_sam.gam(RHO, gamma=0.0)), trained_by("sam"))


def test_gam_without_the_step_along_the_difference_is_gsam(x64):
    gsam = trained(optax_sam.gsam(RHO, alpha=0.4))
    for beta1, beta0 in ((0.0, 0.5), (0.6, 1.0)):
        member = optax_sam.gam(RHO, norm_rho=0.0, gamma=0.4, beta0=beta0, beta1=beta1)
        harness.assert_close(trained(member), gsam, 1e-11)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_does_not_follow_rounding(h_minus, precision):
    """With no radius the difference is rounding, however large the other radius.

    In ``grad_fn`` the gradient has rounding of its own, as another program gives.
    """
    with jax.enable_x64(precision == "float64"):
        w, g = harness.tree(), harness.tree(1)
        member = optax_sam.gam(0.0, norm_rho=100.0, gamma=0.5, h_minus=h_minus)
        eps, points = float(jnp.finfo(precision).eps), []

        def grad_fn(p):
            points.append(p)
            noise = 1 + 4 * eps * np.sign(harness.tree(len(points))["gain"])
            return jax.tree.map(lambda x: (x * noise).astype(x.dtype), g)

        d, _ = member.update(g, member.init(w), w, grad_fn=grad_fn)
        assert len(points) == 3
        for point in points:
            harness.assert_equal(point, w)
        harness.assert_close(d, g, 100 * eps)


def test_gam_of_zero_gradients(x64):
    """A zero gradient has no direction to be normal to: it is emitted."""
    g, _ = pair()
    zero = harness.like(g, 0.0)
    member = optax_sam.gam(RHO, gamma=0.5)
    grad_fn, _ = answering(zero, g, zero)
    d, state = member.update(g, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal(d, zero)
    grad_fn, points = answering(zero, zero, zero)
    d, state = member.update(zero, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal((d, points), (zero, 3 * [g]))
    assert int(state.num_rejected) == 0


def test_the_mask_of_gam_holds_at_all_its_points(x64):
    w, *gradients = (harness.tree(seed) for seed in range(5))
    for mask in (
        {"layer": {"kernel": True, "bias": False}, "gain": False},
        lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    ):
        member = optax_sam.gam(RHO, norm_rho=0.3, gamma=0.5, mask=mask)
        points = points_of(member, w, *gradients)
        kernel = lambda tree: flat(tree["layer"]["kernel"])
        wanted = gam_by_hand(
            *(kernel(w), kernel(gradients[0]), list(map(kernel, gradients[1:]))),
            *(RHO, 0.3, 0.5, 0.6, 0.5),
        )[0]
        for found, point in zip(points, wanted, strict=True):
            np.testing.assert_allclose(kernel(found), point, rtol=1e-10)
            harness.assert_equal(found["layer"]["bias"], w["layer"]["bias"])
            harness.assert_equal(found["gain"], w["gain"])


@pytest.mark.parametrize(
    ("kept", "asked", "handed"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", None, "float32"),
    ],
)
def test_the_points_of_gam_have_the_dtype_that_was_asked_for(kept, asked, handed):
    w, *gradients = (harness.tree(seed, dtype=kept) for seed in range(5))
    member = optax_sam.gam(RHO, ascent_dtype=asked)
    grad_fn, points = answering(*gradients[1:])
    state = member.init(w)
    d, after = member.update(gradients[0], state, w, grad_fn=grad_fn)
    assert harness.kinds(d) == harness.kinds(w)
    assert harness.kinds(after) == harness.kinds(state)
    assert len(points) == 3
    for x in jax.tree.leaves(points):
        assert x.dtype == jnp.dtype(handed)


def test_gam_refuses_gradients_that_are_summed_already():
    """At every one of its points, as ``jax.grad`` returns them under shard_map."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    member = optax_sam.gam(RHO, axis_name="d")

    def step(params, x, summed_from):
        local = jax.lax.pcast(params, "d", to="varying")
        g = jax.grad(lambda p: jnp.sum(p * x[0]))
        calls = iter(range(9))

        def grad_fn(p):
            grads = g(p)
            return jax.lax.psum(grads, "d") if next(calls) >= summed_from else grads

        first = local if summed_from else params
        return member.update(g(first), member.init(params), local, grad_fn=grad_fn)[0]

    def run(summed_from):
        step_ = functools.partial(step, summed_from=summed_from)
        mapped = jax.shard_map(step_, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        return jax.eval_shape(mapped, jnp.ones(3), jnp.ones((8, 3)))

    assert run(9).shape == (3,)
    for summed_from in range(3):
        with pytest.raises(ValueError, match=re.escape("gam: axis_name='d' asks for")):
            run(summed_from)


def test_gam_says_what_its_gradients_lack():
    w, g = harness.tree(), harness.tree(1)
    less = {"gain": g["gain"]}
    member = optax_sam.gam(RHO)
    for answers in ((less,), (g, less), (g, g, less), ((1.0, g),)):
        grad_fn, _ = answering(*answers)
        with pytest.raises(ValueError, match="gam: what grad_fn returned.*structure"):
            member.update(g, member.init(w), w, grad_fn=grad_fn)
    update = functools.partial(member.update, g, member.init(w))
    with pytest.raises(ValueError, match="gam needs the parameters"):
        update(grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="gam needs grad_fn"):
        update(w)
    with pytest.raises(ValueError, match="grad_fn must be a function; got 3"):
        update(w, grad_fn=3)


# StableSAM.


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_stable_sam_has_the_length_of_one_and_the_direction_of_the_other(
    dtype, scale, x64
):
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    g, g_s = harness.tree(1, scale, dtype), harness.tree(2, 7 / scale, dtype)
    d = flattened_step(optax_sam.stable_sam(RHO), g, g_s)
    a, b = (flat(x).astype(np.float64) for x in (g, g_s))
    wanted = np.linalg.norm(a) / np.linalg.norm(b) * b
    np.testing.assert_allclose(d, wanted, rtol=tolerance)
    assert np.linalg.norm(d) == pytest.approx(np.linalg.norm(a), rel=tolerance)


def test_stable_sam_without_radius_is_the_base_optimizer(x64):
    member = optax_sam.stable_sam(0.0)
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)
    assert_apart(trained(optax_sam.stable_sam(RHO)), trained_by("sam"))


def test_stable_sam_of_a_zero_gradient(x64):
    g, g_s = pair()
    zero = harness.like(g, 0.0)
    for first, second in ((g, zero), (zero, g_s), (zero, zero)):
        d, state = emitted(optax_sam.stable_sam(RHO), first, second)
        harness.assert_equal(d, zero)
        assert int(state.num_rejected) == 0


def test_any_blend_can_be_renormalized(x64):
    g, g_s = pair()
    n = np.linalg.norm(flat(g))
    gsam = flattened_step(optax_sam.gsam(RHO, alpha=0.4), g, g_s)
    build = functools.partial(optax_sam.sharpness_aware, ascent.l2(RHO))
    member = build(blend=blend.renormalize(blend.surrogate_gap(0.4)))
    d = flattened_step(member, g, g_s)
    np.testing.assert_allclose(d, n * gsam / np.linalg.norm(gsam), rtol=1e-12)
    assert abs(n / np.linalg.norm(gsam) - 1) > 0.05


def test_a_renormalized_memory(x64):
    """The difference that is kept and reused is of the gradients as they came."""
    g, g_s = pair()
    rule = blend.renormalize(blend.reuse_difference(0.5, max_reuse=1))
    member = optax_sam.sharpness_aware(ascent.l2(RHO), blend=rule)
    d, state = emitted(member, g, g_s)
    wanted = np.linalg.norm(flat(g)) / np.linalg.norm(flat(g_s)) * flat(g_s)
    np.testing.assert_allclose(flat(d), wanted, rtol=1e-12)
    later = harness.tree(5)
    for weight in (0.5, 0.0):
        d, state = emitted(member, later, g_s, state, ascend=False)
        wanted = flat(later) + weight * (flat(g_s) - flat(g))
        np.testing.assert_allclose(flat(d), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="renormalize needs a rule of optax_sam.blend"):
        blend.renormalize(0.4)


# SAM-ON.


def test_sam_on_all_layers_is_sam_or_asam(x64):
    params = harness.tree()
    for settings, member in (
        ({}, optax_sam.sam(RHO)),
        ({"adapt": True, "eta": 0.2}, optax_sam.asam(RHO, eta=0.2, adapt=True)),
    ):
        for mask in (True, None):
            on = optax_sam.sam_on(RHO, mask=mask, **settings)
            wanted = ascended(member, params)[1]
            harness.assert_close(ascended(on, params)[1], wanted, 1e-12)


def with_norms():
    """A network with a layer of each kind that is told by its name or its scale."""
    rng = np.random.default_rng(0)
    layer = lambda **leaves: {
        k: jnp.asarray(rng.normal(size=n)) for k, n in leaves.items()
    }
    return {
        "Dense_0": layer(kernel=(3, 4), bias=4),
        "LayerNorm_0": layer(scale=4, bias=4),
        "ln_f": layer(scale=4, bias=4),
        "bn1": layer(weight=4, bias=4),
        "head": layer(kernel=(4, 2), bias=2),
    }


CHOSEN = {"LayerNorm_0", "ln_f", "bn1"}


@pytest.mark.parametrize("adapt", [False, True])
def test_sam_on_moves_the_norms_alone(adapt, x64):
    """By ``rho``, on the sizes of their weights where these are adapted."""
    w, g = with_norms(), with_norms()
    g = jax.tree.map(lambda x: jnp.cos(9 * x), g)
    (point,) = points_of(optax_sam.sam_on(2.0, adapt=adapt, eta=0.1), w, g)
    e = jax.tree.map(jnp.subtract, point, w)
    for name in w.keys() - CHOSEN:
        harness.assert_equal(point[name], w[name])
    pick = lambda tree: flat({name: tree[name] for name in CHOSEN})
    t = np.abs(pick(w)) + 0.1 if adapt else 1.0
    wanted = 2.0 * t**2 * pick(g) / np.linalg.norm(t * pick(g))
    np.testing.assert_allclose(pick(e), wanted, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(pick(e) / t), 2.0, rtol=1e-10)


def test_all_but_the_norms(x64):
    """The complement, as the documentation writes it."""
    no_norm = lambda params: jax.tree.map(
        lambda chosen: not chosen, ascent.normalization_layers(params)
    )
    w = with_norms()
    (point,) = points_of(optax_sam.sam(RHO, mask=no_norm), w, w)
    for name in w:
        if name in CHOSEN:
            harness.assert_equal(point[name], w[name])
        else:
            assert_apart(point[name], w[name])


def chosen_in(params):
    """The paths that the default mask chooses, and all, without NNX's last key."""
    mask = ascent.normalization_layers(params)
    found, every = set(), set()
    for path, kept in jax.tree_util.tree_flatten_with_path(mask)[0]:
        keys = [str(getattr(k, "key", getattr(k, "name", None))) for k in path]
        name = "/".join(k for k in keys if k not in ("value", "raw_value"))
        every.add(name)
        found |= {name} if kept else set()
    return found, every


class Linen(nn.Module):
    """Each normalization of Flax by its own name, and one by another."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,))(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.LayerNorm()(x)
        x = nn.RMSNorm(name="before_head")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.LayerNorm(use_scale=False, name="norm_without_scale")(x)
        x = nn.Sequential([nn.Dense(4), nn.LayerNorm(name="ln_f")])(x)
        return nn.Dense(2)(x)


def test_norms_of_linen():
    variables = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((2, 8, 4)))
    params = variables["params"]
    found, every = chosen_in(params)
    assert found == {
        "BatchNorm_0/scale",
        "BatchNorm_0/bias",
        "GroupNorm_0/scale",
        "GroupNorm_0/bias",
        "LayerNorm_0/scale",
        "LayerNorm_0/bias",
        "before_head/scale",
        "norm_without_scale/bias",
        "ln_f/scale",
        "ln_f/bias",
    }
    assert {"Conv_0/kernel", "Dense_0/bias", "Dense_1/bias"} <= every - found
    # With the collection around, as ``init`` returns it.
    assert chosen_in({"params": params})[0] == {f"params/{name}" for name in found}


class NNX(nnx.Module):
    """The same with attributes that say nothing, in a list too."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.a = nnx.BatchNorm(4, rngs=rngs)
        self.b = nnx.LayerNorm(4, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(4, use_scale=False, rngs=rngs)])
        self.block = nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        )
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.b(self.a(self.first(x)))
        return self.head(self.block(self.norms[0](x)))


NNX_NORMS = {
    "a/scale",
    "a/bias",
    "b/scale",
    "b/bias",
    "norms/0/bias",
    "block/layers/1/scale",
}


def test_norms_of_nnx():
    """In a list a layer's neighbours are not chosen with it."""
    model = NNX()
    _, params, _ = nnx.split(model, nnx.Param, ...)
    for tree in (nnx.state(model, nnx.Param), params, nnx.to_pure_dict(params)):
        found, every = chosen_in(tree)
        assert found == NNX_NORMS
        assert {"first/kernel", "block/layers/0/kernel", "head/bias"} <= every - found
    listed = [{"kernel": 1.0, "bias": 1.0}, {"scale": 1.0, "bias": 1.0}]
    nobody = {"kernel": False, "bias": False}
    mask = ascent.normalization_layers(listed)
    assert mask == [nobody, {"scale": True, "bias": True}]


def test_sam_on_in_an_nnx_optimizer():
    model = NNX()
    tx = optax.chain(optax_sam.sam_on(0.5), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    outer = nnx.graphdef((model, optimizer))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    @jax.jit
    def update(variables):
        model, optimizer = nnx.merge(outer, variables)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss_fn = lambda p: jnp.mean(nnx.merge(graphdef, p, rest, copy=True)(x) ** 2)
        points = []
        grad_fn = lambda p: points.append(p) or jax.grad(loss_fn)(p)
        optimizer.update(model, jax.grad(loss_fn)(params), grad_fn=grad_fn)
        return nnx.state((model, optimizer)), points[0]

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    variables, point = update(nnx.state((model, optimizer)))
    nnx.update((model, optimizer), variables)
    moved = jax.tree.map(np.subtract, nnx.to_pure_dict(point), before)
    squares = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(moved)[0]:
        keys = [str(getattr(k, "key", None)) for k in path]
        squares["/".join(k for k in keys if k != "None")] = float(jnp.sum(leaf**2))
    assert {name for name, x in squares.items() if x} == NNX_NORMS
    assert np.sqrt(sum(squares.values())) == pytest.approx(0.5, rel=1e-4)
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 1


@pytest.mark.parametrize(
    "params",
    [
        {"Dense_0": {"kernel": 1.0, "bias": 2.0}},
        {"scaled": {"kernel": 1.0}, "norm": 2.0},  # a leaf, no layer
        [1.0, (2.0, 3.0)],
        1.0,
        {},
    ],
    ids=str,
)
def test_no_norm_at_all_is_an_error(params):
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(ValueError, match="No normalization layer.*mask= a tree of bo"):
        ascent.normalization_layers(params)
    member = optax_sam.sam_on(RHO)
    with pytest.raises(ValueError, match="No normalization layer was found"):
        member.update(params, member.init(params), params, grad_fn=lambda p: p)


def test_the_first_gradient_of_sam_on_may_be_zero_elsewhere(x64):
    """XLA then drops its weight gradients, a third of it; the result stays."""
    sizes, examples = (320, 320, 320, 320), 128
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {
        f"layer{i}": {"kernel": draw(n, m) / 18, "norm": {"scale": draw(m)}}
        for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    x = draw(examples, sizes[0])
    tx = optax_sam.sam_on(0.5)

    def loss_fn(params):
        h = x
        for layer in params.values():
            h = jnp.tanh(h @ layer["kernel"])
            h = h / jnp.sqrt(1 + jnp.mean(h**2)) * layer["norm"]["scale"]
        return jnp.mean(h**2)

    def step(params, state, partial):
        grad_fn = jax.grad(loss_fn)
        g = grad_fn(params)
        if partial:
            chosen = ascent.normalization_layers(params)
            g = jax.tree.map(lambda x, on: x if on else jnp.zeros_like(x), g, chosen)
        return tx.update(g, state, params, grad_fn=grad_fn)[0]

    whole, part = (
        jax.jit(functools.partial(step, partial=partial))
        .lower(params, tx.init(params))
        .compile()
        for partial in (False, True)
    )
    flops = lambda program: program.cost_analysis()["flops"]
    args = params, tx.init(params)
    harness.assert_close_in_size(part(*args), whole(*args), 1e-12)
    products = sum(
        2 * examples * n * m for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    )
    assert flops(whole) - flops(part) == pytest.approx(products, rel=0.02)
    gradient = jax.jit(jax.grad(loss_fn)).lower(params).compile()
    # A third, and more where there is no gradient of the data to take.
    assert 1 / 3 < products / flops(gradient) < 0.4
