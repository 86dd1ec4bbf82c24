"""Rises of the loss at random offsets, the noise that weights bear, and logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness
from optax_sam.sharpness import probes

RHO = 0.1
ONE = jnp.zeros((1, 1))  # a batch for losses that look at none


def quadratic(slope=1.0, size=12):
    """A Hessian with both signs, a gradient, and a point off the origin."""
    rng = np.random.default_rng(3)
    A = rng.normal(size=(size, size))
    H = A @ A.T / size - 0.3 * np.eye(size)
    g, w = slope * rng.normal(size=size), rng.normal(size=size)
    loss = lambda v, batch: g @ (v["a"] - w) + (v["a"] - w) @ H @ (v["a"] - w) / 2
    return H, g, w, loss, {"a": jnp.asarray(w)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("norm", "factor"), [("l2", 2), ("linf", 6)])
def test_average_has_its_closed_form(adaptive, norm, factor):
    H, _, w, loss, params = quadratic()

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss, rho):
        options = dict(adaptive=adaptive, norm=norm, num_samples=4000)
        return sharpness.average_sharpness(loss, params, ONE, rho, 0, **options)

    result = run(loss, RHO)
    c = np.abs(w) if adaptive else np.ones(12)
    CHC = c[:, None] * H * c
    wanted = RHO**2 / factor * np.trace(CHC)
    assert abs(result.value - wanted) < 4 * result.stderr
    assert result.stderr < 0.05 * abs(wanted)
    if norm == "l2":  # the known variance of a quadratic form in normals
        spread = RHO**2 / 2 * math.sqrt(2) * np.linalg.norm(CHC) / math.sqrt(4000)
        np.testing.assert_allclose(result.stderr, spread, rtol=0.1)
    # A term of first order cancels in each pair, and the second scales with rho^2.
    same = run(quadratic(slope=0.0)[3], RHO)
    np.testing.assert_allclose(result.value, same.value, rtol=1e-9)
    np.testing.assert_allclose(run(loss, 10 * RHO).value, 100 * result.value)


@pytest.mark.usefixtures("x64")
def test_average_without_pairs_has_the_noise_of_the_slope():
    H, g, _, loss, params = quadratic()
    options = dict(num_samples=4000, antithetic=False)
    result = sharpness.average_sharpness(loss, params, ONE, RHO, 0, **options)
    assert abs(result.value - RHO**2 / 2 * np.trace(H)) < 4 * result.stderr
    slope = RHO * np.linalg.norm(g) / math.sqrt(4000)
    np.testing.assert_allclose(result.stderr, slope, rtol=0.1)


def test_average_over_batches_uses_the_same_draws():
    """A sum of squares, scaled: every batch's rise is a multiple of the first one's."""
    loss = lambda w, batch: jnp.mean(batch) * jnp.sum(w["a"] ** 2 + w["b"] ** 2)
    batches = jnp.array([[1.0], [2.0], [5.0]])
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    measure = sharpness.average_sharpness
    run = functools.partial(measure, loss, params, batches, RHO, jax.random.key(4))
    result, close = run(), functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(result.per_batch / result.per_batch[0], [1, 2, 5])
    close(result.value, result.per_batch.mean())
    weighted = run(weights=jnp.array([1.0, 0.0, 1.0]))
    close(weighted.value, 3 * result.per_batch[0])
    close(weighted.stderr / weighted.value, result.stderr / result.value)
    assert jnp.isnan(run(num_samples=1).stderr)
    # The leaves have draws of their own.
    apart = lambda w, batch: jnp.sum((w["a"] - w["b"]) ** 2)
    assert measure(apart, params, ONE, RHO, 0).value > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_has_its_closed_form(adaptive):
    H, g, w, loss, params = quadratic()
    run = functools.partial(sharpness.sam_sharpness, adaptive=adaptive)
    result = jax.jit(lambda p: run(loss, p, ONE, RHO))(params)
    T = np.abs(w) if adaptive else 1
    e = RHO * T**2 * g / np.linalg.norm(T * g)
    np.testing.assert_allclose(result.value, g @ e + e @ H @ e / 2, rtol=1e-9)
    assert run(quadratic(slope=0.0)[3], params, ONE, RHO).value == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1e-14, 0.0])
def test_sam_takes_whole_steps_near_a_minimum(size, adaptive):
    loss = lambda w, batch: 2 * w[1] ** 2 + w[0] ** 2
    w = jnp.array([0.0, size])
    rise = sharpness.sam_sharpness(loss, w, ONE, RHO, adaptive=adaptive).value
    step = size and RHO * (size if adaptive else 1)
    np.testing.assert_allclose(rise, 2 * (size + step) ** 2 - 2 * size**2, rtol=1e-9)


@pytest.mark.parametrize("magnitude_aware", [False, True])
def test_noise_that_a_linear_classifier_bears(magnitude_aware):
    """Examples that each see another weight, all with the same margin."""
    accuracy = lambda w, batch: jnp.mean(batch @ w > 0)
    gamma, length, size = 1.5, 2.0, 2000
    w, x = jnp.full(size, gamma / length), length * jnp.eye(size)[None]
    result = sharpness.pac_bayes_flatness(
        accuracy, w, x, 0, magnitude_aware=magnitude_aware
    )
    sigma = gamma / (1.2815515655 * length)
    if magnitude_aware:
        sigma = math.sqrt(sigma**2 - 1e-6) / (gamma / length)
    np.testing.assert_allclose(result.sigma, sigma, rtol=0.03)
    np.testing.assert_allclose(result.value, 1 / result.sigma**2, rtol=1e-6)
    np.testing.assert_allclose(result.drop, 0.1, atol=0.002)
    # One of 2000 times 10 independent examples: the draws' own spread.
    np.testing.assert_allclose(result.stderr, 0.3 / math.sqrt(20_000), rtol=0.7)
    assert result.converged


def test_weights_that_are_nan_are_not_flat():
    metric = lambda w, batch: jnp.mean(batch * w)
    result = sharpness.pac_bayes_flatness(metric, jnp.array(jnp.nan), ONE, 0)
    assert jnp.isnan(result.value)
    assert jnp.isnan(result.sigma)
    assert not result.converged


def test_at_a_weight_of_zero_there_is_a_little_relative_noise_left():
    options = dict(magnitude_aware=True, num_samples=2000, target=1.0)
    result = sharpness.pac_bayes_flatness(
        lambda w, batch: -(w**2), jnp.array(0.0), ONE, 0, **options
    )
    np.testing.assert_allclose(result.drop, 1e-6, rtol=0.2)


def test_noise_for_a_rise_of_the_loss():
    h = jnp.linspace(0.5, 4, 60)
    rise = lambda w, batch: -0.5 * jnp.mean(batch) * jnp.sum(h * w**2)
    batches = jnp.array([[1.0], [3.0]])
    run = lambda **options: sharpness.pac_bayes_flatness(
        rise, jnp.zeros(60), batches, 7, num_samples=200, **options
    )
    result = run()
    known = math.sqrt(2 * 0.1 / (2 * h.sum()))
    np.testing.assert_allclose(result.sigma, known, rtol=0.02)
    assert result.converged
    assert result.drop <= 0.1
    # The resolution is that of the bisection, as the draws are the same at all steps.
    unit = result.drop / result.sigma**2
    exact = math.sqrt(0.1 / unit)
    assert 0 <= exact - result.sigma < 2 / 2**14 + 1e-6
    fine = run(num_steps=20)
    assert 0 <= exact - fine.sigma + 1e-6 < 2 / 2**19 + 1e-5
    first = run(weights=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(first.sigma, math.sqrt(2) * exact, rtol=1e-2)


def test_noise_without_end_and_without_mercy_is_said_to_be_so():
    run = lambda metric, **options: sharpness.pac_bayes_flatness(
        metric, jnp.ones(3), ONE, 0, **options
    )
    flat = run(lambda w, batch: 0 * jnp.sum(w), sigma_max=1.5)
    assert (flat.sigma, flat.drop, bool(flat.converged)) == (1.5, 0, False)
    # A metric that any noise ruins.
    cliff = run(lambda w, batch: jnp.mean(w == 1))
    assert not cliff.converged
    np.testing.assert_allclose(cliff.sigma, 2 / 2**14)
    assert cliff.drop > 0.1
    assert not run(lambda w, batch: jnp.sum(w) * jnp.nan).converged


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reference", ["init", "orig"])
def test_bounds_are_as_the_papers_write_them(reference):
    rng = np.random.default_rng(5)
    w, w_0 = rng.normal(size=(2, 9))
    tree = lambda x: {"a": jnp.asarray(x[:4].reshape(2, 2)), "b": jnp.asarray(x[4:])}
    bound = functools.partial(
        sharpness.pac_bayes_bound, tree(w), 0.3, 500, reference=reference
    )
    rest = math.log(500 / 0.3) + 10
    square = np.sum((w - w_0 * (reference == "init")) ** 2)
    expected = square / 0.36 + rest
    np.testing.assert_allclose(bound(initial=tree(w_0)), expected)
    if reference == "orig":
        np.testing.assert_allclose(bound(), expected)
    terms = (1e-6 + 1.09 * square / 9) / (1e-6 + 0.09 * (w - w_0) ** 2)
    np.testing.assert_allclose(
        bound(initial=tree(w_0), magnitude_aware=True), np.log(terms).sum() / 4 + rest
    )


def test_bounds_count_weights_only():
    """As the measure of the noise does: the same mask leaves out the same leaves."""
    w, w_0 = jnp.array([3.0, 4.0]), jnp.zeros(2)
    bound = sharpness.pac_bayes_bound
    right = bound(w, 0.5, 1000, initial=w_0, magnitude_aware=True)
    whole = lambda w, x: {"params": w, "batch_stats": {"mean": w + x}, "n": 7}
    some = bound(
        whole(w, 5),
        0.5,
        1000,
        initial=whole(w_0, 3),
        magnitude_aware=True,
        mask=lambda variables: {name: name == "params" for name in variables},
    )
    assert some == right


@pytest.mark.usefixtures("x64")
def test_normalized_logits_have_no_scale():
    rng = np.random.default_rng(6)
    f, s, b = rng.normal(size=(5, 7)), rng.uniform(0.01, 100, (5, 1)), 3.0
    of = sharpness.normalize_logits
    g = of(f)
    np.testing.assert_allclose(of(s * f + b), g, atol=1e-13)
    np.testing.assert_allclose(np.sum(g, -1), 0, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(g, axis=-1), 1)
    np.testing.assert_allclose(of(f.T, axis=0), g.T)


def test_normalized_logits_at_zero_and_in_half_precision():
    equal = jnp.full(4, 3.0, jnp.float16)
    g, pull = jax.vjp(sharpness.normalize_logits, equal)
    assert g.dtype == jnp.float32
    assert not g.any()
    assert jnp.isfinite(pull(jnp.zeros(4))[0]).all()
    grown = sharpness.normalize_logits(jnp.array([0.0, 1e-12]), eps=1e-10)
    np.testing.assert_allclose(grown, [-0.005, 0.005], rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "mean", "low"),
    [(jax.random.normal, 0, 0.94), (lambda *x: jax.random.normal(*x) ** 2, 1, 0.88)],
)
@pytest.mark.parametrize("number", [10, 20])
def test_two_standard_errors_of_few_draws_hold_their_mean(draw, mean, low, number):
    draws = draw(jax.random.key(0), (number, 10_000))
    off = jnp.abs(draws.mean(0) - mean)
    share = (off <= 2 * probes.standard_error(draws)).mean()
    assert low <= share <= 0.97
    assert (off <= 2 * draws.std(0, ddof=1) / number**0.5).mean() < share - 0.01
