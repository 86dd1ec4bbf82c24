"""Where the methods of SAM's family must coincide with others or with a formula."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import ae_sam as ae_sam_reference
from registry import esam_by_grad_fn
from test_identities import RHO, ascended, on_a_quadratic, trained, trained_by

import optax_sam
from optax_sam import ascent, blend, when

EVERY = 10**6  # an ascent on the first step alone


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def emitted(member, g, g_s, state=None, params=None, ascend=True):
    """What a member emits for a pair of gradients, and its state; not compiled."""
    params = g if params is None else params
    state = member.init(params) if state is None else state
    return member.update(g, state, params, grad_fn=lambda p: g_s, ascend=ascend)


def pair(scale=1.0, dtype=None):
    return harness.tree(1, scale, dtype), harness.tree(2, scale, dtype)


@functools.cache
def sam_every_3():
    return trained(optax_sam.sam(RHO, when=when.every_k(3)))


@functools.cache
def layerwise(k):
    rule = ascent.trust_ratio(RHO)
    return trained(optax_sam.sharpness_aware(rule, when.every_k(k)))


def assert_apart(a, b, gap=1e-4):
    assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > gap


# LookSAM and Look-LayerSAM.


def test_looksam_without_reuse_is_sam_k(x64):
    member = optax_sam.looksam(RHO, k=3, alpha=0.0)
    harness.assert_close(trained(member), sam_every_3(), 1e-12)
    assert_apart(trained(optax_sam.looksam(RHO, k=3, alpha=0.1)), sam_every_3())
    member = optax_sam.look_layer_sam(RHO, k=3, alpha=0.0)
    harness.assert_close(trained(member), layerwise(3), 1e-12)


def test_looksam_on_every_step_is_sam(x64):
    member = optax_sam.looksam(RHO, k=1)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    member = optax_sam.look_layer_sam(RHO, k=1)
    harness.assert_close(trained(member), layerwise(1), 1e-12)
    assert_apart(layerwise(1), trained_by("sam"))


LOOKING = {
    "looksam": lambda **kw: optax_sam.looksam(0.0, k=3, **kw),
    "look_layer_sam": lambda **kw: optax_sam.look_layer_sam(0.0, k=3, **kw),
    "ae_looksam": lambda **kw: optax_sam.ae_looksam(0.0, decay=0.5, **kw),
}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", LOOKING)
def test_without_radius_rounding_is_not_reused(name, precision):
    """The normal part is then rounding, which must not grow to a gradient."""
    with jax.enable_x64(precision == "float64"):
        base = optax.with_extra_args_support(optax.identity())
        wanted = trained_by("sgd") if precision == "float64" else trained(base)
        tolerance = 1e-12 if precision == "float64" else 1e-5
        harness.assert_close(trained(LOOKING[name]()), wanted, tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_parallel_gradients_have_no_normal_part(dtype, scale, x64):
    member = optax_sam.looksam(RHO)
    for seed in range(3):
        g = harness.tree(seed, scale, dtype)
        for c in (3.0, 1 / 3, -0.7, 1e-4):
            g_s = jax.tree.map(lambda x: (c * x).astype(x.dtype), g)  # noqa: B023
            d, state = emitted(member, g, g_s)
            harness.assert_equal(d, g_s)
            harness.assert_equal(state.blend.normal, harness.like(g, 0.0))
            later = harness.tree(9, scale, dtype)
            d, _ = emitted(member, later, g_s, state, ascend=False)
            harness.assert_equal(d, later)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_normal_part_is_reused(dtype, x64):
    """The guard is against rounding alone."""
    g, other = pair(dtype=dtype)
    g_s = jax.tree.map(lambda a, b: a + 1e-3 * b, g, other)
    _, state = emitted(optax_sam.looksam(RHO), g, g_s)
    normal, a, b = (flat(x).astype(np.float64) for x in (state.blend.normal, g, other))
    wanted = b - (a @ b) / (a @ a) * a
    tolerance = 1e-2 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(
        normal, wanted / np.linalg.norm(wanted), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_normal_part_is_normal_and_the_reuse_has_its_length(scale, x64):
    member = optax_sam.looksam(RHO, alpha=0.4)
    g, g_s = pair(scale)
    d, state = emitted(member, g, g_s)
    harness.assert_equal(d, g_s)
    v = flat(state.blend.normal)
    # The epsilon beside the squared norm leaves 1e-12 / ||g||^2 of it.
    assert abs(v @ flat(g)) < (1e-12 + 1e-12 / scale**2) * 10 * scale
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-12)
    assert v @ flat(g_s) > 0
    for seed in range(3, 9):  # it stays, undamped, until the next ascent
        g = harness.tree(seed, scale)
        d, state = emitted(member, g, g_s, state, ascend=False)
        n, d = np.linalg.norm(flat(g)), flat(d)
        np.testing.assert_allclose(d, flat(g) + 0.4 * n * v, rtol=1e-12)
        cosine = flat(g) @ v / n
        square = n**2 * (1 + 0.4**2 + 2 * 0.4 * cosine)
        np.testing.assert_allclose(d @ d, square, rtol=1e-12)
        assert np.linalg.norm(d) <= 1.4 * n


def test_the_normal_part_of_devices_is_the_mean_of_theirs(x64):
    """One for all, made of the normal part of each device's own pair."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    member = optax_sam.looksam(RHO, axis_name="d")
    firsts, seconds = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(8, 5))) for seed in (0, 1)
    )

    def look(g, g_s):
        w = jnp.ones(5)
        local = jax.lax.pcast(w, "d", to="varying")
        second = lambda p: g_s[0] + 0 * p
        _, state = member.update(g[0], member.init(w), local, grad_fn=second)
        return state.blend.normal

    run = jax.jit(
        jax.shard_map(look, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P())
    )
    a, b = np.asarray(firsts), np.asarray(seconds)
    parts = (
        b
        - np.sum(a * b, axis=1, keepdims=True)
        / np.sum(a * a, axis=1, keepdims=True)
        * a
    )
    wanted = parts.mean(axis=0)
    wanted /= np.linalg.norm(wanted)
    np.testing.assert_allclose(run(firsts, seconds), wanted, rtol=1e-9)


def test_before_the_first_ascent_nothing_is_reused(x64):
    g, g_s = pair()
    d, state = emitted(optax_sam.looksam(RHO), g, g_s, ascend=False)
    harness.assert_equal(d, g)
    harness.assert_equal(state.blend.normal, harness.like(g, 0.0))


def test_a_gradient_that_is_not_finite_passes_where_the_normal_part_is_reused():
    member = optax_sam.looksam(RHO)
    g, g_s = pair()
    _, state = emitted(member, g, g_s)
    for bad in (np.nan, np.inf):
        broken = harness.with_entry(g, bad)
        d, after = emitted(member, broken, g_s, state, ascend=False)
        harness.assert_equal(d, broken)
        harness.assert_equal(after.blend, state.blend)


def test_quadratic_looksam(x64):
    """``g_v = rho (H u - (u'Hu) u)``, and none along an eigenvector."""
    h = problems.hessian()
    _, g, g_s, _, state = on_a_quadratic(optax_sam.looksam(RHO))
    u = g / np.linalg.norm(g)
    np.testing.assert_allclose(g_s - g, RHO * h @ u, rtol=1e-9, atol=1e-12)
    g_v = RHO * (h @ u - (u @ h @ u) * u)
    normal = np.concatenate([state.blend.normal["a"], state.blend.normal["b"]])
    np.testing.assert_allclose(normal, g_v / np.linalg.norm(g_v), atol=1e-9)

    grad_fn = lambda w: jnp.asarray(h) @ w
    w = jnp.asarray(np.linalg.eigh(h)[1][:, 3])
    member = optax_sam.looksam(RHO)
    _, state = member.update(grad_fn(w), member.init(w), w, grad_fn=grad_fn)
    np.testing.assert_array_equal(state.blend.normal, 0)


def test_the_trust_ratio_by_hand(x64):
    w, g = harness.tree(0), harness.tree(1)
    w["gain"], g["layer"]["bias"] = 0 * w["gain"], 0 * g["layer"]["bias"]
    rule = ascent.trust_ratio(0.1)
    e, _ = rule.update(g, rule.init(w), w)
    kernel = w["layer"]["kernel"], g["layer"]["kernel"], e["layer"]["kernel"]
    w_k, g_k, e_k = map(np.asarray, kernel)
    wanted = 0.1 * np.linalg.norm(w_k) * g_k / np.linalg.norm(g_k)
    np.testing.assert_allclose(e_k, wanted, rtol=1e-12)
    np.testing.assert_allclose(e["gain"], 0.1 * g["gain"], rtol=1e-12)
    np.testing.assert_array_equal(e["layer"]["bias"], 0)


# GSAM.


def test_gsam_without_a_gap_is_sam(x64):
    harness.assert_close(
        trained(optax_sam.gsam(RHO, alpha=0.0)), trained_by("sam"), 1e-12
    )
    assert_apart(trained(optax_sam.gsam(RHO, alpha=0.1)), trained_by("sam"))
    clean = lambda alpha: optax_sam.sharpness_aware(
        ascent.l2(RHO), blend=blend.surrogate_gap(alpha, minimize="clean")
    )
    harness.assert_close(trained(clean(0.0)), trained_by("sgd"), 1e-12)
    assert_apart(trained(clean(0.5)), trained_by("sgd"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_gsam_leaves_the_main_gradient_alone(dtype, scale, x64):
    """What is subtracted is normal to it, and its own part stays what it was."""
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    g, g_s = pair(scale, dtype)
    clean = optax_sam.sharpness_aware(
        ascent.l2(RHO), blend=blend.surrogate_gap(0.4, minimize="clean")
    )
    for member, main, other, sign in (
        (optax_sam.gsam(RHO), g_s, g, -1),
        (clean, g, g_s, 1),
    ):
        d, _ = emitted(member, g, g_s)
        a, b, d = (flat(x).astype(np.float64) for x in (main, other, d))
        normal = sign * (d - a) / 0.4
        sizes = np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(normal) > 0.1 * np.linalg.norm(b)
        assert abs(normal @ a) < 10 * tolerance * sizes
        np.testing.assert_allclose(d @ a, a @ a, rtol=10 * tolerance)
        wanted = b - (a @ b) / (a @ a) * a
        close = 10 * tolerance * np.linalg.norm(b)
        np.testing.assert_allclose(normal, wanted, rtol=0, atol=close)


def test_gsam_of_parallel_gradients_is_sam(x64):
    g, _ = pair()
    for c in (2.0, -0.5):
        g_s = optax.tree.scale(c, g)
        d, _ = emitted(optax_sam.gsam(RHO, alpha=0.9), g, g_s)
        harness.assert_close(d, g_s, 1e-12)


def test_gsam_of_zero_gradients():
    """A zero gradient has no direction to be normal to: it is emitted."""
    g, g_s = pair()
    zero = harness.like(g, 0.0)
    d, _ = emitted(optax_sam.gsam(RHO), g, zero)
    harness.assert_equal(d, zero)
    rule = blend.surrogate_gap(0.4, minimize="clean")
    d, _ = emitted(optax_sam.sharpness_aware(ascent.l2(RHO), blend=rule), zero, g_s)
    harness.assert_equal(d, zero)


def test_quadratic_gsam(x64):
    _, g, d, _, _ = on_a_quadratic(optax_sam.gsam(RHO, alpha=0.7))
    g_p = g + RHO * problems.hessian() @ g / np.linalg.norm(g)
    wanted = (1 + 0.7 * (g @ g_p) / (g_p @ g_p)) * g_p - 0.7 * g
    np.testing.assert_allclose(d, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [when.bernoulli(0.4, key=2), when.after(2, when.every_k(2))],
    ids=["bernoulli", "after"],
)
def test_sampled_gsam(rule, x64):
    """On skipped steps it emits the plain gradient, on others GSAM's."""
    member, always = optax_sam.gsam(RHO, when=rule), optax_sam.gsam(RHO)
    g, g_s = pair()
    update = jax.jit(lambda s: member.update(g, s, g, grad_fn=lambda p: g_s))
    wanted, _ = emitted(always, g, g_s)
    state, decisions = member.init(g), []
    for _ in range(12):
        decisions.append(bool(optax_sam.ascends_next(state)))
        d, state = update(state)
        harness.assert_close(d, wanted if decisions[-1] else g, 1e-12)
    assert {True, False} == set(decisions)


# The radius that follows the learning rate.


def line(lr, low, high, rho_min, rho_max):
    share = (np.asarray(lr, np.float64) - low) / (high - low)
    return rho_min + (rho_max - rho_min) * np.clip(share, 0, 1)


def follow(schedule, rho, counts, low, high, tolerance=1e-5):
    lr = [float(schedule(t)) for t in counts]
    found = [float(rho(t)) for t in counts]
    np.testing.assert_allclose(found, line(lr, low, high, 0.05, 0.6), rtol=tolerance)


DECAYS = {
    "cosine": optax.cosine_decay_schedule(0.4, 200, alpha=0.1),
    "linear": optax.linear_schedule(0.4, 0.04, 200),
    "warm-up from below the end": optax.warmup_cosine_decay_schedule(
        0.001, 0.4, 20, 200, end_value=0.04
    ),
    "warm-up from above the end": optax.warmup_cosine_decay_schedule(
        0.1, 0.4, 20, 200, end_value=0.04
    ),
    "steps": optax.piecewise_constant_schedule(0.4, {50: 0.5, 120: 0.2}),
}


@pytest.mark.parametrize("name", DECAYS)
def test_the_radius_follows_the_learning_rate(name):
    schedule = DECAYS[name]
    rho = optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6)
    counts = [0, 3, 19, 20, 21, 50, 51, 110, 119, 130, 199, 200, 5000]
    follow(schedule, rho, counts, 0.04, 0.4)
    lengths = [float(rho(t)) for t in range(0, 201, 5)]
    assert min(lengths) == pytest.approx(0.05, rel=1e-5)
    assert max(lengths) == pytest.approx(0.6, rel=1e-5)


def test_a_learning_rate_that_does_not_change():
    for lr in (0.1, jnp.float32(0.1), optax.constant_schedule(0.1)):
        rho = optax_sam.rho_from_lr(lr, rho_min=0.05, rho_max=0.6)
        assert [float(rho(t)) for t in (0, 1, 1000)] == 3 * [pytest.approx(0.6)]


def test_given_ends_of_the_learning_rate():
    """They are used as they are, and the radius is clipped beyond them."""
    schedule = optax.linear_schedule(0.4, 0.0, 100)
    for low, high in ((0.1, 0.3), (0.1, None), (None, 0.3), (0.0, 1.0)):
        rho = optax_sam.rho_from_lr(
            schedule, rho_min=0.05, rho_max=0.6, lr_min=low, lr_max=high
        )
        low, high = 0.0 if low is None else low, 0.4 if high is None else high
        follow(schedule, rho, range(0, 130, 7), low, high)


def test_equal_radii_are_constant():
    rho = optax_sam.rho_from_lr(DECAYS["cosine"], rho_min=0.2, rho_max=0.2)
    assert [float(rho(t)) for t in (0, 77, 500)] == 3 * [pytest.approx(0.2)]


def test_the_radius_inside_jit_and_scan_first():
    """The search at the first use, while tracing, leaves no tracer behind."""
    schedule = DECAYS["warm-up from below the end"]
    make = lambda: optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6)
    counts = jnp.arange(0, 220, 11)
    wanted = [float(make()(t)) for t in counts]
    for rho, series in (
        (make(), lambda rho: jax.jit(jax.vmap(rho))(counts)),
        (make(), lambda rho: jax.lax.scan(lambda c, t: (c, rho(t)), 0, counts)[1]),
        (make(), lambda rho: jax.jit(jax.lax.map, static_argnums=0)(rho, counts)),
    ):
        np.testing.assert_allclose(series(rho), wanted, rtol=1e-5)
        assert float(rho(20)) == pytest.approx(0.6)  # and afterwards, outside


def test_the_radius_under_inject_hyperparams():
    schedule = DECAYS["linear"]
    rho = optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6)
    static = optax_sam.static_args(optax_sam.gsam)
    tx = optax.inject_hyperparams(optax_sam.gsam, static_args=static)(
        rho=rho, alpha=0.0
    )
    w = jnp.array([3.0, 4.0])

    @jax.jit
    def update(state):
        return tx.update(w, state, w, grad_fn=lambda p: p - w)

    state = tx.init(w)
    for t in range(6):
        d, state = update(state)  # the offset itself
        wanted = line(float(schedule(t)), 0.04, 0.4, 0.05, 0.6)
        np.testing.assert_allclose(np.linalg.norm(d), wanted, rtol=1e-5)
        np.testing.assert_allclose(state.hyperparams["rho"], wanted, rtol=1e-5)


@pytest.mark.parametrize("peak_at", [10**5, 3 * 10**6])
def test_the_radius_of_a_very_long_run(peak_at):
    """The peak and the end lie far beyond the steps that are all looked at."""
    total = 10 * peak_at
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 0.4, peak_at, total, end_value=0.04
    )
    rho = optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6)
    counts = [0, peak_at // 20, peak_at // 2, peak_at, 2 * peak_at, total // 2, total]
    follow(schedule, rho, counts, 0.04, 0.4, tolerance=2e-3)


# AE-SAM and AE-LookSAM.


@functools.cache
def sam_once():
    return trained(optax_sam.sam(RHO, when=when.every_k(EVERY)))


@pytest.mark.parametrize("lag", [0, 1])
def test_ae_sam_with_infinite_thresholds(lag, x64):
    """Minus infinity is SAM, infinity the base optimizer (with a lag, from step 1)."""
    for threshold in (-np.inf, optax.constant_schedule(-np.inf)):
        for method in (optax_sam.ae_sam, optax_sam.ae_looksam):
            member = method(RHO, threshold=threshold, lag=lag)
            harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    never = sam_once() if lag else trained_by("sgd")
    member = optax_sam.ae_sam(RHO, threshold=np.inf, lag=lag)
    harness.assert_close(trained(member), never, 1e-12)
    if not lag:
        member = optax_sam.ae_looksam(RHO, threshold=np.inf)
        harness.assert_close(trained(member), never, 1e-12)


@pytest.mark.parametrize("lag", [0, 1])
def test_ae_looksam_without_reuse_is_ae_sam(lag, x64):
    settings = {"decay": 0.6, "threshold": 0.3, "lag": lag}
    wanted = trained(optax_sam.ae_sam(RHO, **settings))
    member = optax_sam.ae_looksam(RHO, alpha=0.0, **settings)
    harness.assert_close(trained(member), wanted, 1e-12)
    reusing = trained(optax_sam.ae_looksam(RHO, alpha=0.3, **settings))
    for other in (reusing, trained_by("sam"), trained_by("sgd")):
        assert_apart(wanted, other)


def decided(rule, squares):
    """The decisions of a rule for a series of squared norms, and its last state."""
    w = jnp.zeros(())

    def one(state, series):
        t, x = series
        step = when.Step(t, lambda tree: tree)
        decision, state = rule.now(state, jnp.sqrt(x), step)
        return rule.advance(state, decision), decision

    count = jnp.arange(len(squares), dtype=jnp.int32)
    run = jax.jit(lambda squares: jax.lax.scan(one, rule.init(w), (count, squares)))
    state, decisions = run(jnp.asarray(squares))
    return np.asarray(decisions), state


LENGTH = 20_000


@pytest.mark.parametrize(
    ("first", "last", "normal", "log_normal"),
    [
        (-1.0, -1.0, 0.84, None),
        (0.0, 0.0, 0.50, None),
        (1.0, 1.0, 0.16, None),
        (2.0, 2.0, 0.01, None),
        (1.0, -1.0, 0.50, 0.43),
        (2.0, 0.0, 0.196, 0.145),
    ],
)
def test_ae_sam_ascends_as_often_as_the_threshold_says(
    first, last, normal, log_normal, x64
):
    c = optax.linear_schedule(first, last, LENGTH)
    z = np.random.default_rng(0).normal(size=LENGTH)
    for x, share in ((10.0 + z, normal), (np.exp(z), log_normal)):
        if share is None:
            continue
        thresholds = ae_sam_reference.threshold(np.arange(LENGTH), LENGTH, last, first)
        for lag in (0, 1):
            decisions, _ = decided(when.norm_above_trend(0.9, c, lag), x)
            assert abs(np.mean(decisions) - share) < 0.015
            wanted = ae_sam_reference.simulate(x, thresholds, lag=lag)
            # The first norm is its own mean, up to rounding.
            np.testing.assert_array_equal(decisions[1:], wanted[1:])


def test_a_constant_gradient_norm_has_no_deviation(x64):
    decisions, state = decided(when.norm_above_trend(0.5, 0.7), np.full(40, 9.0))
    assert np.all(decisions)
    assert (float(state.mean), float(state.variance)) == (9.0, 0.0)
    _, state = decided(when.norm_above_trend(0.9), np.full(40, 0.3))
    np.testing.assert_allclose(state.mean, 0.3, rtol=1e-12)
    assert float(state.variance) < 1e-28


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_is_not_recorded(bad, x64):
    x = np.random.default_rng(1).uniform(1.0, 2.0, size=60)
    broken = np.insert(x, [0, 20, 20], bad)  # also as the very first
    wanted, state = decided(when.norm_above_trend(0.7, 0.1), x)
    decisions, after = decided(when.norm_above_trend(0.7, 0.1), broken)
    harness.assert_equal(after, state)
    was_bad = ~np.isfinite(broken)
    np.testing.assert_array_equal(decisions[~was_bad], wanted)
    assert not np.any(decisions[was_bad])


# Renyi RSAM.


def renyi_offset(g, rho=0.3, alpha=1.2, **settings):
    rule = ascent.renyi(rho, alpha, **settings)
    return rule.update(g, rule.init(g), count=0)[0]


ORDERS = pytest.mark.parametrize("alpha", [0.3, 0.5, 1.2, 2.0, 5.0])


@ORDERS
def test_renyi_of_equal_coordinates_and_of_one(alpha, x64):
    """``S = dim^(1 - a)`` and ``S = 1``, in offsets of length ``rho S / ||g||``."""
    signs = jax.tree.map(lambda x: 0.2 * jnp.sign(x), harness.tree())
    e = flat(renyi_offset(signs, alpha=alpha))
    n, dim = np.linalg.norm(flat(signs)), e.size
    np.testing.assert_allclose(
        np.linalg.norm(e), 0.3 * dim ** (1 - alpha) / n, rtol=1e-9
    )
    lone = harness.with_entry(harness.like(harness.tree(), 0.0), -1.7)
    e = renyi_offset(lone, alpha=alpha)
    assert np.count_nonzero(flat(e)) == 1
    wanted = -1.0 if alpha > 1 else 1.0
    np.testing.assert_allclose(flat(e).sum(), wanted * 0.3 / 1.7, rtol=1e-9)


@ORDERS
@pytest.mark.parametrize("layerwise", [False, True])
def test_renyi_length_direction_and_scale(alpha, layerwise, x64):
    g = harness.tree(1)
    n = np.linalg.norm(flat(g))
    sizes = [np.linalg.norm(x) for x in jax.tree.leaves(g)] if layerwise else flat(g)
    s = np.sum(np.abs(sizes) ** (2 * alpha)) / n ** (2 * alpha)
    e = flat(renyi_offset(g, alpha=alpha, layerwise=layerwise))
    np.testing.assert_allclose(np.linalg.norm(e), 0.3 * s / n, rtol=1e-9)
    # To first order the loss gains -sign(1 - a) rho S.
    gain = 0.3 * s if alpha > 1 else -0.3 * s
    np.testing.assert_allclose(e @ flat(g), gain, rtol=1e-9)
    np.testing.assert_allclose(e, gain / n**2 * flat(g), rtol=1e-9)
    for c in (0.5, 40.0):  # S does not feel the scale, so c e(c g) = e(g)
        scaled = renyi_offset(optax.tree.scale(c, g), alpha=alpha, layerwise=layerwise)
        np.testing.assert_allclose(c * flat(scaled), e, rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.2])
def test_renyi_offset_is_capped(alpha, x64):
    g = harness.tree(1)
    free = flat(renyi_offset(g, alpha=alpha))
    length = np.linalg.norm(free)
    loose = renyi_offset(g, alpha=alpha, max_offset_norm=1.01 * length)
    np.testing.assert_allclose(flat(loose), free, rtol=1e-12)
    tight = flat(renyi_offset(g, alpha=alpha, max_offset_norm=0.5 * length))
    np.testing.assert_allclose(tight, 0.5 * free, rtol=1e-9)
    tiny = flat(renyi_offset(harness.tree(1, 1e-6), alpha=alpha, max_offset_norm=0.1))
    np.testing.assert_allclose(np.linalg.norm(tiny), 0.1, rtol=1e-9)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e15])
def test_renyi_in_float32_at_extreme_scales(scale, alpha, layerwise):
    """``||g||^(2 a)`` alone does not fit into float32."""
    g = harness.tree(1, scale)
    assert g["gain"].dtype == jnp.float32
    e = renyi_offset(g, alpha=alpha, layerwise=layerwise)
    assert harness.is_finite(e)
    if scale < 1e-6:
        capped = renyi_offset(g, alpha=alpha, max_offset_norm=0.1)
        assert np.linalg.norm(flat(capped)) <= 0.1 * (1 + 1e-5)
        return
    assert np.linalg.norm(flat(e)) > 0
    with jax.enable_x64(True):
        wide = optax.tree.cast(g, "float64")
        exact = flat(renyi_offset(wide, alpha=alpha, layerwise=layerwise))
    np.testing.assert_allclose(flat(e), exact, rtol=1e-4)


def test_renyi_sum_keeps_its_bound():
    """Where the epsilon takes over, in float32 at that: no NaN at ``rho = 0``."""
    g = {"w": jnp.full(100, 1e-5)}
    for rho, length in ((0.0, 0.0), (0.1, 0.1 / 1e-4)):
        rule = optax_sam.ascent.renyi(rho, alpha=5.0)
        e, _ = rule.update(g, rule.init(g))
        np.testing.assert_allclose(optax.tree.norm(e), length, rtol=1e-4)


def test_renyi_of_a_zero_gradient_is_zero():
    zero = harness.like(harness.tree(), 0.0)
    for settings in ({}, {"max_offset_norm": 0.1}, {"layerwise": True}):
        for alpha in (0.5, 1.2, 5.0):  # the last one's epsilon overflows
            harness.assert_equal(renyi_offset(zero, alpha=alpha, **settings), zero)


def test_renyi_of_one_leaf_is_sam_of_another_radius(x64):
    """A single leaf, layer by layer: S = 1, whatever the gradient."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=7))
    for alpha in (1.2, 3.0):
        e = renyi_offset(g, alpha=alpha, layerwise=True)
        np.testing.assert_allclose(e, 0.3 * g / (g @ g), rtol=1e-9)
        np.testing.assert_allclose(
            renyi_offset(g, alpha=0.6, layerwise=True), -e, rtol=1e-9
        )


def test_renyi_sam_warms_up_as_the_base_optimizer(x64):
    member = optax_sam.renyi_sam(RHO, warmup_steps=25)
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)
    one_left = optax_sam.renyi_sam(RHO, warmup_steps=24)
    assert_apart(trained(one_left), trained_by("sgd"), 1e-6)
    none = trained(optax_sam.renyi_sam(RHO, warmup_steps=0))
    harness.assert_close(none, trained(optax_sam.renyi_sam(RHO)), 1e-12)


# R-SAM.


def test_random_sam_without_noise_is_sam(x64):
    for weight in (0.01, 2.0, 300.0):
        member = optax_sam.random_sam(RHO, sigma=0.0, gradient_weight=weight)
        # A small weight leaves the guard beside the norm more of the length.
        harness.assert_close(trained(member), trained_by("sam"), 0, atol=1e-10)
    assert_apart(trained(optax_sam.random_sam(RHO, sigma=0.1)), trained_by("sam"))


def smoothing(key=0, count=0, params=None, noise=None, sigma=0.5, **settings):
    """What R-SAM's rule adds to the weights first, and its offset."""
    given = params is not None
    params = params if given else harness.tree()
    g_1 = params if given else harness.tree(1)
    rule = ascent.smoothed(RHO, sigma, key=key, **settings)
    points = []
    own, _ = rule.update(
        harness.tree(5),
        rule.init(params),
        params,
        grad_fn=lambda p: points.append(p) or g_1,
        count=count,
        noise=noise,
    )
    (point,) = points
    return jax.tree.map(jnp.subtract, point, params), own


def test_random_sam_by_noise_alone(x64):
    delta, own = smoothing(gradient_weight=0.0)
    wanted = RHO * flat(delta) / np.linalg.norm(flat(delta))
    np.testing.assert_allclose(flat(own.offset), wanted, rtol=1e-9)


def test_random_sam_mixes_the_gradient_and_the_noise(x64):
    for weight in (0.3, 2.0):
        delta, own = smoothing(gradient_weight=weight)
        mixed = weight * flat(harness.tree(1)) + flat(delta)
        wanted = RHO * mixed / np.linalg.norm(mixed)
        np.testing.assert_allclose(flat(own.offset), wanted, rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(flat(own.offset)), RHO, rtol=1e-9)
        harness.assert_equal(own.gradient, harness.tree(1))


def test_random_sam_descends_from_the_weights_themselves(x64):
    """The second point is ``w + e``, not ``w + Delta + e``."""
    params = harness.tree()
    _, points, _ = ascended(optax_sam.random_sam(RHO, sigma=0.5, gradient_weight=1.0))
    first, second = (
        flat(jax.tree.map(jnp.subtract, point, params)) for point in points
    )
    mixed = flat(harness.tree(2)) + first  # grad_fn there returns tree(2)
    np.testing.assert_allclose(second, RHO * mixed / np.linalg.norm(mixed), rtol=1e-9)


def test_noise_follows_the_norms_of_output_units(x64):
    rng = np.random.default_rng(3)
    params = {
        "conv": jnp.asarray(rng.normal(size=(2, 3, 4))),
        "bias": jnp.asarray(rng.normal(size=4)),
        "gain": jnp.asarray(-1.5),
    }
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    delta, _ = smoothing(params=params, noise=noise, sigma=0.2)
    units = np.linalg.norm(np.asarray(params["conv"]).reshape(6, 4), axis=0)
    wanted = {
        "conv": 0.2 * units * noise["conv"],
        "bias": 0.2 * np.linalg.norm(params["bias"]) * noise["bias"],
        "gain": 0.2 * 1.5 * noise["gain"],
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(delta[name], value, rtol=1e-9, atol=1e-12)


def test_zero_leaves_get_almost_no_noise(x64):
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}
    points = []
    rule = ascent.smoothed(RHO, 0.5)
    rule.update(
        params,
        rule.init(params),
        params,
        grad_fn=lambda p: points.append(p) or p,
        count=0,
        noise=harness.like(params, 2.0),
    )
    (delta,) = points
    np.testing.assert_array_equal(delta["kernel"], 0)
    np.testing.assert_allclose(delta["bias"], 1e-16, rtol=1e-9)  # 1e-16 * 0.5 * 2


def test_noise_is_a_function_of_the_key_and_the_step(x64):
    params = {name: jnp.ones((4, 4)) for name in ("a", "b")}
    draw = lambda key, count: smoothing(key, count, params, sigma=1.0)[0]
    first = draw(0, 0)
    harness.assert_equal(draw(0, 0), first)
    harness.assert_equal(draw(jax.random.key(0, impl="threefry2x32"), 0), first)
    for other in (draw(0, 1), draw(1, 0), draw(1, 1)):
        assert np.min(np.abs(flat(other) - flat(first))) > 1e-6
    # Leaves of one shape differ, and are not correlated.
    a, b = np.ravel(first["a"]), np.ravel(first["b"])
    assert np.min(np.abs(a - b)) > 1e-6
    drawn = [draw(0, t) for t in range(60)]
    a, b = (np.concatenate([np.ravel(x[name]) for x in drawn]) / 2 for name in "ab")
    np.testing.assert_allclose([a.mean(), b.mean()], 0, atol=0.1)
    np.testing.assert_allclose([a.std(), b.std()], 1, atol=0.1)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


def test_noise_differs_between_devices(x64):
    """Each device smooths by itself; what is emitted is one mean for all."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    params = harness.tree()
    rule = ascent.smoothed(RHO, 0.5, key=3)
    step = optax_sam.when.Step(jnp.zeros((), jnp.int32), axis_name="d")
    member = optax_sam.random_sam(RHO, sigma=0.5, key=3, axis_name="d")

    grad_fn = lambda p: jax.tree.map(jnp.sin, p)

    def look(params):
        local = jax.lax.pcast(params, "d", to="varying")
        points = []
        seen = lambda p: points.append(p) or grad_fn(p)
        rule.update(local, rule.init(params), local, grad_fn=seen, step=step)
        d, _ = member.update(local, member.init(params), local, grad_fn=grad_fn)
        return jax.tree.map(lambda x: x[None], points[0]), d

    run = jax.jit(jax.shard_map(look, mesh=mesh, in_specs=P(), out_specs=(P("d"), P())))
    points, d = run(params)
    keys = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), 0)
    emissions = []
    for device in range(8):
        key = jax.random.fold_in(keys, device)
        noise = optax.tree.random_like(key, params, jax.random.normal)
        delta, _ = smoothing(noise=noise)
        point = jax.tree.map(lambda x: x[device], points)  # noqa: B023
        harness.assert_close(point, optax.tree.add(params, delta), 1e-12)
        single = optax_sam.random_sam(RHO, sigma=0.5)
        alone, _ = single.update(
            params, single.init(params), params, grad_fn=grad_fn, noise=noise
        )
        emissions.append(alone)
    mean = jax.tree.map(lambda *xs: sum(xs) / 8, *emissions)
    harness.assert_close(d, mean, 1e-12)


def test_the_mask_of_random_sam_holds_in_both_passes(x64):
    params = harness.tree()
    kernel = {"layer": {"kernel": True, "bias": False}, "gain": False}
    for mask in (kernel, lambda p: jax.tree.map(lambda x: x.ndim == 2, p)):
        _, points, _ = ascended(optax_sam.random_sam(RHO, sigma=0.5, mask=mask))
        assert len(points) == 2
        for point in points:
            assert np.all(point["layer"]["kernel"] != params["layer"]["kernel"])
            harness.assert_equal(point["layer"]["bias"], params["layer"]["bias"])
            harness.assert_equal(point["gain"], params["gain"])
        moved = points[1]["layer"]["kernel"] - params["layer"]["kernel"]
        np.testing.assert_allclose(np.linalg.norm(moved), RHO, rtol=1e-9)


def test_smoothed_under_the_engines_mask_is_refused():
    rule = ascent.smoothed(RHO)
    member = optax_sam.sharpness_aware(rule, mask={"layer": True, "gain": False})
    g, g_s = pair()
    with pytest.raises(ValueError, match=r"ascent\.smoothed\(\.\.\., mask=mask\)"):
        emitted(member, g, g_s)


def test_random_sam_emits_the_plain_gradient_where_it_skips(x64):
    member = optax_sam.random_sam(RHO, sigma=0.5, when=when.every_k(2))
    g, g_s = pair()
    update = jax.jit(lambda state: member.update(g, state, g, grad_fn=lambda p: g_s))
    state = member.init(g)
    for t in range(4):
        d, state = update(state)
        harness.assert_equal(d, g if t % 2 else g_s)


def test_random_sam_falls_back_on_its_own_gradient(x64):
    """Where the second one is not finite; the incoming one is not looked at."""
    member = optax_sam.random_sam(RHO)
    g, g_1 = pair()
    answers = iter([g_1, harness.with_entry(g_1, np.nan)])
    broken = harness.with_entry(g, np.inf)
    d, state = member.update(broken, member.init(g), g, grad_fn=lambda p: next(answers))
    harness.assert_equal(d, g_1)
    assert int(state.num_rejected) == 1


def test_what_is_no_noise_is_refused():
    params = harness.tree()
    less = {"layer": params["layer"]}
    other = {**params, "gain": jnp.zeros(1)}
    for wrong in (less, other, 1.0):
        with pytest.raises(ValueError, match="noise must be a tree of standard normal"):
            smoothing(noise=wrong)


# ESAM.


def esam_step(member, w, x, state=None, **extra):
    """One update on losses that are linear in the weights, ``w . x_i``."""
    seen = []

    def losses(p, indices=None):
        seen.append((p, indices))
        return (x if indices is None else x[indices]) @ p

    state = member.init(w) if state is None else state
    g = x.mean(axis=0)
    d, state = member.update(
        g, state, w, per_example_loss_fn=losses, ascend=True, **extra
    )
    return d, state, seen


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, 5))), jnp.asarray(rng.normal(size=5))


def test_esam_of_all_leaves_and_examples_is_sam(x64):
    """Up to the authors' 1e-7 beside the norm."""
    w, g = harness.tree(), harness.tree(1)
    _, point, _ = ascended(esam_by_grad_fn(RHO, beta=1.0, gamma=1.0))
    n = np.linalg.norm(flat(g))
    (point,) = point
    e = flat(jax.tree.map(jnp.subtract, point, w))
    np.testing.assert_allclose(e, RHO * flat(g) / (n + 1e-7), rtol=1e-9)
    member = esam_by_grad_fn(RHO, beta=1.0, gamma=1.0)
    harness.assert_close_in_size(trained(member), trained_by("sam"), 5e-7)


@pytest.mark.parametrize("beta", [0.3, 0.6, 1.0])
def test_esam_offset(beta, x64):
    """``(rho / beta) M g / ||M g||`` on the leaves left active, with norm rho/beta."""
    g, n_leaves = harness.tree(1), 3
    rule = ascent.random_leaves(RHO, beta)
    for uniforms in np.random.default_rng(0).uniform(size=(12, n_leaves)):
        state = rule.init(g)
        assert np.all(state.active)
        e, state = rule.update(g, state, count=0, mask_uniforms=uniforms)
        np.testing.assert_allclose(np.linalg.norm(flat(e)), RHO / beta, rtol=1e-6)
        np.testing.assert_array_equal(state.active, uniforms <= beta)
        e, _ = rule.update(g, state, count=1)
        kept = zip(jax.tree.leaves(g), uniforms <= beta, strict=True)
        chosen = flat([float(on) * x for x, on in kept])
        n = np.linalg.norm(chosen)
        wanted = RHO / beta * chosen / (n + 1e-7) if n else chosen
        np.testing.assert_allclose(flat(e), wanted, rtol=1e-9)


def test_esam_draws_leaves_with_probability_beta():
    g = [jnp.ones(()) for _ in range(50)]
    rule = ascent.random_leaves(RHO, 0.3, key=1)
    update = jax.jit(lambda state, t: rule.update(g, state, count=t)[1])
    state, drawn = rule.init(g), []
    for t in range(60):
        state = update(state, t)
        drawn.append(np.asarray(state.active))
    # 3000 draws: the standard error is 0.0084.
    assert abs(np.mean(drawn) - 0.3) < 0.035
    assert len(np.unique(drawn, axis=0)) == 60


def test_a_draw_at_beta_itself_is_active(x64):
    g = harness.tree(1)
    rule = ascent.random_leaves(RHO, 0.5)
    _, state = rule.update(g, rule.init(g), count=0, mask_uniforms=[0.5, 0.6, 0.4])
    np.testing.assert_array_equal(state.active, [True, False, True])


def test_esam_with_all_leaves_frozen_stays_in_place(x64):
    g = harness.tree(1)
    rule = ascent.random_leaves(RHO)
    state = rule.init(g)._replace(active=jnp.zeros(3, bool))
    e, _ = rule.update(g, state, count=0)
    harness.assert_equal(e, harness.like(g, 0.0))
    x, w = examples(8)
    member = optax_sam.esam(RHO, gamma=1.0)
    _, state, _ = esam_step(member, w, x, mask_uniforms=[0.9])
    d, state, _ = esam_step(member, w, x, state)
    np.testing.assert_allclose(d, x.mean(axis=0), rtol=1e-12)
    assert int(state.num_rejected) == 0
    # With a selection the examples then are the first ones.
    member = optax_sam.esam(RHO, gamma=0.5)
    _, state, _ = esam_step(member, w, x, mask_uniforms=[0.9])
    d, _, _ = esam_step(member, w, x, state)
    np.testing.assert_allclose(d, x[:3].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "batch", "kept"),
    [
        (0.5, 8, 3),
        (0.5, 9, 3),
        (0.5, 128, 63),
        (0.3, 10, 2),
        (0.98, 100, 97),
        (0.989, 100, 97),
        (0.99, 100, 100),
        (1.0, 7, 7),
        (0.25, 4, 1),
        (0.25, 8, 1),
        (0.1, 128, 11),
    ],
)
def test_esam_keeps_the_examples_that_rise_most(gamma, batch, kept, x64):
    """With linear losses those of the largest ``<e, grad l_i>``."""
    x, w = examples(batch)
    d, _, seen = esam_step(optax_sam.esam(RHO, gamma=gamma), w, x)
    rise = np.asarray(x @ x.mean(axis=0))
    best = np.argsort(-rise)[:kept]
    np.testing.assert_allclose(d, np.asarray(x)[best].mean(axis=0), rtol=1e-9)
    indices = [i for _, i in seen if i is not None]
    if gamma < 0.99:
        # Two whole forward passes, one of them beside the incoming gradient.
        assert len(seen) == 3
        assert [i.shape for i in indices] == [(kept,)]
        assert sorted(np.asarray(indices[0])) == sorted(best)
    else:
        assert len(seen) == 1
        assert not indices


def test_esam_given_the_losses(x64):
    """The same as computing them, with one pass less; and they are used."""
    x, w = examples(16)
    member = optax_sam.esam(RHO, gamma=0.5)
    d, state, _ = esam_step(member, w, x)
    given, after, seen = esam_step(member, w, x, per_example_losses=x @ w)
    harness.assert_close(given, d, 1e-12)
    harness.assert_close(after, state, 1e-12)
    assert len(seen) == 2
    before = (x @ w).at[4].add(-100.0).at[9].add(-50.0)
    d, _, _ = esam_step(
        optax_sam.esam(RHO, gamma=0.1875), w, x, per_example_losses=before
    )
    np.testing.assert_allclose(d, (x[4] + x[9]) / 2, rtol=1e-12)


def test_esam_refuses():
    x, w = examples(8)
    with pytest.raises(ValueError, match=r"gamma \* B must be at least 1.*0\.125"):
        esam_step(optax_sam.esam(gamma=0.12), w, x)
    with pytest.raises(ValueError, match="mask_uniforms must hold one number for each"):
        esam_step(optax_sam.esam(), w, x, mask_uniforms=[0.1, 0.2])
    member = optax_sam.esam()
    update = functools.partial(member.update, x.mean(axis=0), member.init(w), w)
    for losses in (
        lambda p, indices=None: (x @ p).mean(),
        lambda p, indices=None: (x @ p)[:, None],
    ):
        with pytest.raises(ValueError, match="one loss per example, a vector"):
            update(per_example_loss_fn=losses)
    with pytest.raises(ValueError, match="esam needs per_example_loss_fn"):
        update(grad_fn=lambda p: p)


COSTLY = functools.partial(problems.mlp, (32, 288, 320, 10), batch_size=128)


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("gamma", "kept"), [(0.5, 63), (0.25, 31), (1.0, 128)])
def test_the_second_gradient_of_esam_runs_on_a_part_of_the_batch(gamma, kept):
    """FLOPs of an ascended step: a gradient, a forward pass and kept / B of one."""
    problem = COSTLY()
    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    assert sum(x.size for x in jax.tree.leaves(params)) >= 1e5
    tx = optax_sam.esam(0.05, gamma=gamma)

    def losses(p, batch):
        one = lambda x, y: problem.loss_fn(p, (x[None], y[None]))
        return jax.vmap(one)(*batch)

    mean = lambda p, batch: losses(p, batch).mean()

    def step(params, state, batch):
        def chosen(p, indices=None):
            take = lambda a: a if indices is None else a[indices]
            return losses(p, jax.tree.map(take, batch))

        grads = jax.grad(mean)(params, batch)
        return tx.update(grads, state, params, per_example_loss_fn=chosen, ascend=True)

    gradient = flops(jax.grad(mean), params, batch)
    forward = flops(mean, params, batch) if gamma < 0.99 else 0
    total = flops(step, params, jax.eval_shape(tx.init, params), batch)
    wanted = gradient * (1 + kept / 128) + forward
    assert total == pytest.approx(wanted, rel=0.03)
    assert 0.25 < flops(mean, params, batch) / gradient < 0.45


# Another rule after a number of plain steps.


def drive(rule, squares, gap=0.3):
    """Decisions of a rule on given squared norms, with gradients (||g||, gap t)."""

    def one(state, series):
        t, x, y = series
        step = when.Step(t, lambda tree: tree)
        g, g_s = jnp.stack([jnp.sqrt(x), 0 * y]), jnp.stack([jnp.sqrt(x), y])
        take, state = rule.now(state, g, step)
        take = jnp.asarray(take)
        seen = lambda state: rule.observe(state, g, g_s, step)
        state = jax.lax.cond(take, seen, lambda state: state, state)
        return rule.advance(state, take), take

    squares = jnp.asarray(squares)
    series = jnp.arange(len(squares), dtype=jnp.int32), squares, gap * squares**1.5
    init = rule.init(jnp.zeros(2))
    return np.asarray(jax.jit(lambda: jax.lax.scan(one, init, series)[1])())


RULES = {
    "always": when.always(),
    "every_k": when.every_k(3, phase=1),
    "bernoulli": when.bernoulli(0.4, key=2),
    "bernoulli, a schedule": when.bernoulli(optax.linear_schedule(0, 1, 30), key=2),
    "norm_above_trend": when.norm_above_trend(0.7, 0.2),
    "lagged norm_above_trend": when.norm_above_trend(0.7, 0.2, lag=1),
    "variance_controlled": when.variance_controlled(6, 2, warmup_steps=7, key=1),
    "after": when.after(2, when.every_k(2)),
}


@pytest.mark.parametrize("name", RULES)
def test_after_is_the_rule_later(name, x64):
    """Its clock and its statistics start when the plain steps are over."""
    rule = RULES[name]
    x = np.random.default_rng(4).uniform(0.5, 2.0, size=45)
    wanted = drive(rule, x[5:])
    assert name == "always" or {True, False} == set(wanted.tolist())
    found = drive(when.after(5, rule), x)
    np.testing.assert_array_equal(found, np.append(np.zeros(5, bool), wanted))
    np.testing.assert_array_equal(drive(when.after(0, rule), x), drive(rule, x))


@pytest.mark.parametrize("name", RULES)
def test_the_plan_of_after_is_what_happens(name, x64):
    if name == "norm_above_trend":
        state = optax_sam.sam(when=when.after(3, RULES[name])).init(jnp.ones(2))
        for read in (optax_sam.ascends_next, optax_sam.ascent_plan):
            with pytest.raises(ValueError, match="nothing is known ahead"):
                read(state)
        return
    member = optax_sam.sam(RHO, when=when.after(3, RULES[name]))
    w = jnp.ones(2)
    update = jax.jit(lambda s, g: member.update(g, s, w, grad_fn=lambda p: 1.3 * g)[1])
    state, taken, plans = member.init(w), [], []
    for t in range(30):
        plans.append(optax_sam.ascent_plan(state))
        before = int(state.num_ascents)
        state = update(state, jnp.array([1.0 + t % 3, 0.5]))
        taken.append(int(state.num_ascents) > before)
    assert not any(taken[:3])
    assert any(taken[3:])
    if name == "bernoulli, a schedule":  # the plain steps and one more are known
        assert [len(plan) for plan in plans[:5]] == [4, 3, 2, 1, 1]
    for t, plan in enumerate(plans):
        assert len(plan) >= 1
        np.testing.assert_array_equal(plan[: 30 - t], taken[t : t + len(plan)])


def test_after_hands_the_metrics_of_its_rule_on():
    state = optax_sam.sam(when=when.after(3, RULES["variance_controlled"])).init(1.0)
    assert "samples_per_window" in optax_sam.metrics(state)
    state = optax_sam.sam(when=when.after(3, when.every_k(2))).init(1.0)
    assert "samples_per_window" not in optax_sam.metrics(state)


def test_what_is_no_rule_to_follow_is_refused():
    for wrong in (5, when.every_k, None):
        with pytest.raises(ValueError, match="rule must be a rule of optax_sam.when"):
            when.after(2, wrong)
