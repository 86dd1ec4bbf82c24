"""Numbers at the edge, by part: tiny and huge gradients, strict dtypes, derivatives."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import each_part
from registry import BY_NAME, every_one

import optax_sam
from optax_sam.ascent import norm
from optax_sam.trees import tiny_norm


def scaled(tree, factor):
    return jax.tree.map(lambda x: jnp.asarray(factor * x), tree)


def emitted(method, factor):
    """What is emitted on an ascended step and on two others, divided by ``factor``."""
    tx, update = harness.compiled_update(method)
    params = harness.tree(1)
    state = tx.init(params)
    found = []
    for t, ascend in enumerate((True, False, False)):
        g, g_s = (scaled(harness.tree(seed + t), factor) for seed in (2, 7))
        d, state, points = update(g, g_s, state, params, ascend=ascend)
        assert harness.is_finite((d, state, points))
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64) / factor, d))
    assert optax_sam.metrics(state)["rejected_ascents"] == 0
    return found


# What is normal to a gradient needs its square, which 1e-20 has not in float32. To lift
# it costs LookSAM half as many operations again as all that it does beside gradients.
REUSES_NO_TINY_NORMAL = ("looksam", "look_layer_sam", "ae_looksam")


@each_part()
def test_a_gradient_gives_what_it_gives_at_any_scale(method):
    """A fixed perturbed gradient: what is emitted scales with both gradients."""
    ordinary = emitted(method, 1.0)
    for factor in (1e-10, 1e-15, 1e-20, 1e-30, 1e18):
        expected = ordinary
        if method.name in REUSES_NO_TINY_NORMAL and factor < 1e-19:
            plain = [jax.tree.map(np.float64, harness.tree(seed)) for seed in (3, 4)]
            expected = [expected[0], *plain]
        for one, other in zip(emitted(method, factor), expected, strict=True):
            harness.assert_close(one, other, 1e-5)


@each_part()
def test_half_precision_gradients_near_overflow(method):
    """A float16 gradient whose norm no float16 holds is an ordinary gradient.

    One that is finite in the float32 of the perturbed point, but not in the float16
    that is emitted, is rejected.
    """
    tx, params = method.build(), harness.tree(dtype="float16")
    large = harness.tree(1, scale=1e4, dtype="float16")
    _, state = tx.update(
        harness.like(large, 0), tx.init(params), params, grad_fn=lambda p: large
    )
    assert np.isfinite(optax_sam.metrics(state)["survival"])
    ordinary, beyond = harness.tree(1, dtype="float16"), harness.tree(2, scale=1e6)
    for g, g_s, rejected in ((large, large, 0), (ordinary, beyond, 1)):
        update = functools.partial(tx.update, g, params=params, grad_fn=lambda p: g_s)  # noqa: B023
        d, state = update(tx.init(params), ascend=True)
        assert optax_sam.metrics(state)["rejected_ascents"] == rejected
        if method.uses_incoming or not rejected:
            harness.assert_equal(d, g)
        if rejected:
            harness.assert_equal(update(state, ascend=False)[0], g)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e18])
def test_norms_of_any_size(factor):
    tree = harness.tree(4)
    wanted = np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(tree)])
    found = np.asarray(tiny_norm(scaled(tree, factor)), np.float64)
    np.testing.assert_allclose(found / factor, wanted, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_the_norm_of_what_has_no_size(value):
    tree = {"a": jnp.array([value, 0.0])}
    np.testing.assert_array_equal(tiny_norm(tree), norm(tree))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_one
def test_strict_promotion(method, dtype):
    """As careful programs set it, by tracing; plain SGD passes as well."""
    params, g = harness.tree(1, dtype=dtype), harness.tree(2, dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        tx = method.optimizer()
        state = tx.init(params)
        for ascend in (None, True, False):
            update = functools.partial(
                tx.update, params=params, grad_fn=lambda p: p, ascend=ascend
            )
            jax.eval_shape(update, g, state)


def test_strict_promotion_of_rules_and_schedules():
    falling = optax.linear_schedule(1.0, 0.0, 5)
    rho = optax.linear_schedule(0.1, 0.0, 10)  # Optax's cosine is not strict
    wide = lambda tree: optax.tree.cast(tree, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        for rule in (
            optax_sam.when.bernoulli(falling),
            optax_sam.when.after(2, optax_sam.when.every_k(2)),
            optax_sam.when.norm_above_trend(threshold=falling),
            optax_sam.when.norm_above_trend(lag=1),
            optax_sam.when.variance_controlled(4, 2),
        ):
            for dtype in ("float32", "bfloat16"):
                params = harness.tree(1, dtype=dtype)
                tx = optax_sam.gsam(rho, alpha=rho, when=rule)
                state = tx.init(params)
                update = functools.partial(tx.update, params=params, grad_fn=wide)
                jax.eval_shape(update, params, state)
                if hasattr(state.when, "ascends"):
                    optax_sam.ascent_plan(state)


def test_strict_promotion_of_what_stands_beside_a_method():
    params = harness.tree(1, dtype="bfloat16")
    loss_fn = lambda p: jnp.sum(p["gain"])
    scaled_up = optax_sam.value_and_grad(loss_fn, loss_scale=128.0)
    decayed = optax_sam.decay_after(0.1)
    around = optax_sam.ascent.weight_scaled(0.1)
    teach = functools.partial(optax_sam.trajectory_loss, jnp.ones((2, 3), "bfloat16"))
    with jax.numpy_dtype_promotion("strict"):
        scaled_up(params)[2](params)
        decayed.update(params, decayed.init(params), params)
        around.update(optax.tree.cast(params, "float32"), optax.EmptyState(), params)
        teach(jnp.ones((2, 3)))


def test_decay_of_complex_parameters():
    """Both parts of them decay, as under Optax's own weight decay."""
    w, g = jnp.array([1 + 2j, -3j]), jnp.array([0j, 1 + 1j])
    tx = optax.chain(optax.sgd(0.1), optax_sam.decay_after(0.1))
    found = optax.apply_updates(w, tx.update(g, tx.init(w), w)[0])
    np.testing.assert_allclose(found, 0.9 * (w - 0.1 * g), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_in_float64_leaves_the_points_in_float32(dtype, x64):
    number, params = np.float64(0.1), harness.tree(1, dtype=dtype)
    for tx in (
        optax_sam.sam(number),
        optax_sam.asam(0.5, eta=number),
        optax_sam.random_sam(gradient_weight=number),
        optax_sam.sharpness_aware(optax.scale(jnp.float64(0.1))),
    ):
        seen = []
        grad_fn = lambda p: seen.append(p) or p  # noqa: B023
        tx.update(params, tx.init(params), params, grad_fn=grad_fn)
        assert {x.dtype.name for x in jax.tree.leaves(seen)} == {"float32"}


# Derivatives through a step, as meta-learning takes them.

TARGET = harness.tree(9)


def loss_fn(w):
    leaves = zip(jax.tree.leaves(w), jax.tree.leaves(TARGET), strict=True)
    return sum(jnp.sum((x - y) ** 2 + 0.1 * jnp.cos(3 * x)) for x, y in leaves)


def after_a_step(method):
    """The loss after one step as a function of the weights and of the radius."""

    def loss(w, rho):
        tx, grad_fn = method.build(**method.of_radius(rho)), jax.grad(loss_fn)
        d, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, ascend=True)
        sign = 1 if method.place == "around" else -0.1
        return loss_fn(jax.tree.map(lambda x, u: x + sign * u, w, d))

    return loss


asking = [BY_NAME["wsam"], BY_NAME["sampa"]]


@each_part(quick="gsam", more=asking)
def test_derivatives_equal_finite_differences(method, x64):
    w = harness.tree(1)
    loss = after_a_step(method)
    direction = harness.tree(5)
    at = lambda t: loss(optax.tree.add(w, scaled(direction, t)), 0.1 + 0.3 * t)
    found = jax.grad(at)(0.0)
    h = 1e-5
    wanted = (at(h) - at(-h)) / (2 * h)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def minimum(w):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w))


@each_part(quick="sam friendly_sam", more=asking)
def test_derivatives_are_finite_at_a_minimum(method, x64):
    """The gradient is exactly zero there, and so may the radius be."""
    zero = jax.tree.map(jnp.zeros_like, harness.tree())
    grad_fn = jax.grad(minimum)

    def loss(w, rho):
        tx = method.build(**method.of_radius(rho))
        d, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn, ascend=True)
        return minimum(optax.tree.sub(w, scaled(d, 0.1)))

    for rho in (0.0, 0.1):
        for w in (zero, jax.tree.map(jnp.ones_like, zero)):
            assert harness.is_finite(jax.grad(loss)(w, rho))


def test_derivatives_where_some_entries_are_zero(x64):
    """Of a gradient with zeros, Renyi's powers have no derivative but zero."""
    tx = BY_NAME["renyi_sam"].build()
    f = lambda w: jnp.sum(w[:2] ** 2)
    w = jnp.array([1.0, 2.0, 3.0])
    after = lambda w: f(
        w - 0.1 * tx.update(jax.grad(f)(w), tx.init(w), w, grad_fn=jax.grad(f))[0]
    )
    found = jax.grad(after)(w)
    for i in range(3):
        e = 1e-6 * jnp.eye(3)[i]
        wanted = (after(w + e) - after(w - e)) / 2e-6
        np.testing.assert_allclose(found[i], wanted, rtol=1e-6, atol=1e-9)


def test_the_derivative_by_a_radius_of_zero(x64):
    """Where the radius is at the end of its range, its derivative is whole."""
    w = harness.tree(1)
    loss = after_a_step(BY_NAME["sam"])
    found = jax.grad(lambda rho: loss(w, rho))(0.0)
    h = 1e-6
    wanted = (loss(w, h) - loss(w, 0.0)) / h
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


# Arguments.


def test_gamma_at_the_end_of_its_range_makes_no_nan():
    """Under jit a value cannot be refused."""
    params = harness.tree(1)
    grad_fn = lambda p: jax.tree.map(jnp.sin, p)

    @jax.jit
    def emitted(gamma):
        late, found = lambda count: jnp.where(count < 1, 0.5, gamma), []
        for given in (gamma, late):
            tx = optax_sam.wsam(optax.sgd(0.1), learning_rate=1e-9, gamma=given)
            state = tx.init(params)
            for _ in range(2):
                d, state = tx.update(params, state, params, grad_fn=grad_fn)
                found.append(d)
        return found

    for value in (1.0, 1.5, np.inf):
        assert harness.is_finite(emitted(value))
