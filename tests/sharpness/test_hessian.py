"""Estimates of the Hessian against the dense one, to the accuracy that is documented.

Targets are the same in both precisions where one number is given.
"""

import functools

import curvature
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import wasserstein_distance

from optax_sam import sharpness

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def dense(dtype):
    """The network, its data as 3 batches of 599, and its Hessian with eigenvalues."""
    params, batch, H = curvature.trained(dtype)
    batches = sharpness.stack_batches(batch, 599)
    return params, batches, H, np.linalg.eigvalsh(H)[::-1]


def measure(name, dtype, chunked=False, loss_fn=curvature.loss_fn, **options):
    """The measure of the trained network, compiled, as a function of the key."""
    params, batches, _, _ = dense(dtype)
    if not chunked:  # one batch, quicker
        batches = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batches)
    function = name if callable(name) else getattr(sharpness, name)
    compiled = jax.jit(lambda *args: function(loss_fn, *args, **options))
    return lambda key: compiled(params, batches, key)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def rms(errors):
    return np.sqrt(np.mean(np.square(errors), axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fwd_rev", "rev_rev"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)]
)
def test_hvp(dtype, tolerance, mode):
    params, _, H, _ = dense(dtype)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    v = optax.tree.cast(v, dtype)
    product = flat(measure("hvp", dtype, True, mode=mode)(v))
    expected = H @ flat(v)
    assert product.dtype == dtype
    assert np.linalg.norm(product - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "top", "five"), [("float64", 1e-10, 1e-8), ("float32", 1e-5, 1e-5)]
)
def test_top_eigenvalues_with_20_products(dtype, top, five):
    *_, H, eigenvalues = dense(dtype)
    result = measure("hessian_eigenvalues", dtype, True, k=5)(0)
    errors = abs(result.eigenvalues / eigenvalues[:5] - 1)
    assert errors[0] <= top
    assert errors.max() <= five
    assert result.converged.all()
    assert result.num_matvecs == 20
    V = np.asarray(jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(
        result.eigenvectors
    ))  # fmt: skip
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-5)
    off = np.linalg.norm(V @ H - result.eigenvalues[:, None] * V, axis=1)
    assert (off <= 2 * result.residuals + (1e-5 if dtype == "float32" else 1e-12)).all()


@pytest.mark.slow
@DTYPES
def test_the_other_ends_of_the_spectrum_with_80_products(dtype):
    """The smallest eigenvalue, and the largest of minus the loss."""
    *_, eigenvalues = dense(dtype)
    find = functools.partial(
        measure, "hessian_eigenvalues", dtype, num_matvecs=80, chunked=True
    )
    negative = lambda params, batch: -curvature.loss_fn(params, batch)
    # Relative to itself in float64; float32 knows it to a rounding of the largest.
    tolerance = 1e-6 * (abs(eigenvalues[-1]) if dtype == "float64" else eigenvalues[0])
    smallest = find(which="SA")(0).eigenvalues[0]
    assert abs(smallest - eigenvalues[-1]) <= tolerance
    largest = find(which="LA", loss_fn=negative)(0).eigenvalues[0]
    np.testing.assert_allclose(largest, -eigenvalues[-1], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "keys", "power", "target", "low", "high"),
    [
        ("trace", dict(num_matvecs=100), 6, 1, 0.015, 0.3, 2),
        ("trace", dict(num_matvecs=300), 6, 1, 0.003, 0.3, 2),
        ("trace", dict(num_matvecs=30, method="hutchinson"), 40, 1, 1, 0.7, 1.4),
        ("frobenius_norm", dict(), 8, 2, 0.2, 0.3, 2),
    ],
)
@DTYPES
def test_numbers_and_their_errors(name, options, keys, power, target, low, high, dtype):
    """The standard error is about the error: neither boasts nor cries wolf."""
    eigenvalues = dense(dtype)[3]
    true = eigenvalues.sum() if name == "trace" else np.linalg.norm(eigenvalues)
    run = measure(f"hessian_{name}", dtype, **options)
    results = [run(key) for key in range(keys)]
    assert rms([(r.estimate / true) ** power - 1 for r in results]) <= target
    z = [(r.estimate - true) / r.stderr for r in results]
    assert low <= rms(z) <= high
    assert name != "trace" or keys < 40 or np.std(z) >= low


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budget", "off_low", "off_high", "low", "high"),
    [
        ("xdiag", 100, 0, 0.3, 0.5, 2),
        ("xdiag", 300, 0, 0.08, 0.5, 2),
        ("hutchinson", 100, 0.4, 1.2, 0.7, 1.4),  # poor, and says so
    ],
)
@DTYPES
def test_diagonals_and_their_errors(
    method, budget, off_low, off_high, low, high, dtype
):
    diagonal = np.diag(dense(dtype)[2])
    run = measure("hessian_diagonal", dtype, num_matvecs=budget, method=method)
    result = run(0)
    off = np.linalg.norm(flat(result.estimate) - diagonal)
    assert off_low <= off / np.linalg.norm(diagonal) <= off_high
    assert low <= np.linalg.norm(flat(result.stderr)) / off <= high


@pytest.mark.slow
@DTYPES
def test_power_sums(dtype):
    def sums(loss_fn, params, batches, key):
        operator = sharpness.hessian(loss_fn, params, batches)
        quadrature = sharpness.deflated_quadrature(operator, key)
        power = lambda a: lambda x: jnp.abs(x) ** a
        return [quadrature.sum(power(a)) for a in (1.5, 2.0)]

    run = measure(sums, dtype)
    results = [run(key) for key in range(3)]
    for i, (power, target) in enumerate(((1.5, 0.015), (2.0, 0.005))):
        expected = (abs(dense(dtype)[3]) ** power).sum()
        assert rms([r[i].estimate / expected - 1 for r in results]) <= target
        assert all(r[i].stderr <= 2 * target * expected for r in results)
        assert all(10 <= r[i].num_deflated <= 30 for r in results)


def entropy(eigenvalues, alpha):
    p = abs(eigenvalues[eigenvalues != 0])
    p = p / p.sum()
    if alpha == 1:
        return -(p * np.log(p)).sum()
    return np.log((p**alpha).sum()) / (1 - alpha)


@pytest.mark.slow
@DTYPES
def test_renyi(dtype):
    alpha = (0.5, 1.0, 1.5, 2.0)
    expected = [entropy(dense(dtype)[3], a) for a in alpha]
    run = measure("renyi_sharpness", dtype, alpha=alpha)
    results = [run(key) for key in range(3)]
    errors = [np.asarray(result.value) + expected for result in results]
    assert (rms(errors) <= [0.5, 0.1, 0.06, 0.06]).all()
    assert all((result.value < 0).all() for result in results)
    assert all((result.stderr > 0).all() for result in results)


@pytest.mark.slow
@DTYPES
def test_density(dtype):
    eigenvalues = dense(dtype)[3]
    result = measure("spectral_density", dtype)(0)
    spread = eigenvalues[0] - eigenvalues[-1]
    nodes, weights = np.ravel(result.nodes), np.ravel(result.weights)
    assert wasserstein_distance(nodes, eigenvalues, weights) <= 2e-3 * spread
    np.testing.assert_allclose(np.trapezoid(result.density, result.grid), 1, atol=1e-2)
    np.testing.assert_allclose(result.sigma, 0.003 * spread, rtol=1e-3)
    assert (result.stderr <= result.density).mean() > 0.9


@functools.cache
def softmax_regression(dtype):
    x, y = curvature.digits(dtype)
    x = np.concatenate([x, np.ones((len(x), 1), dtype)], axis=1)
    return jnp.zeros((65, 10), dtype), (x[None], y[None])


def regression_loss(W, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(x @ W, y).mean()


@pytest.mark.parametrize(
    ("dtype", "digits"),
    [pytest.param("float64", 1e-13, marks=pytest.mark.slow), ("float32", 3e-6)],
)
def test_softmax_regression_at_zero(dtype, digits):
    # H = (I/10 - 11'/100) (x) X'X/N in closed form.
    few = dict(num_top_matvecs=30, num_lanczos=10)
    top, trace, squares = jax.jit(
        lambda *args: (
            sharpness.hessian_eigenvalues(
                regression_loss, *args, 0, k=4, num_matvecs=50
            ),
            sharpness.hessian_trace(regression_loss, *args, 0),
            sharpness.spectral_sum(jnp.square, regression_loss, *args, 0, **few),
        )
    )(*softmax_regression(dtype))
    np.testing.assert_allclose(top.eigenvalues[0], 1.144352838917231, rtol=digits)
    # Each is there nine times; how many copies are found is a matter of rounding.
    known = np.array([1.144352838917, 0.069883436350, 0.063862706956, 0.055257668851])
    off = abs(top.eigenvalues[:, None] / known - 1).min(1)
    assert (off <= 1e-4).all()
    assert top.converged.all()
    assert abs(trace.estimate - 14.412779111018358) <= 4 * trace.stderr
    assert trace.stderr <= 0.02 * trace.estimate
    # Eight of nine copies of the outlier are left to the probes.
    assert abs(squares.estimate - 11.934217830625641) <= 4 * squares.stderr
    assert squares.stderr <= 0.3 * squares.estimate


def relu_loss(params, batch):
    x, y = batch
    logits = jax.nn.relu(x @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.mark.slow
def test_entropy_under_rescaled_layers():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.array(rng.normal(size=shape))
    params = {"w1": draw(8, 6), "w2": draw(6, 3)}
    batches = (rng.normal(size=(1, 30, 8)), rng.integers(3, size=(1, 30)))
    by_layer, whole = (
        jax.jit(
            lambda p, layerwise=layerwise: sharpness.renyi_entropy(
                relu_loss, p, batches, 0, alpha=1.5, layerwise=layerwise
            )
        )
        for layerwise in (True, False)
    )

    def values(factor):
        scaled = {"w1": params["w1"] * factor, "w2": params["w2"] / factor}
        layers = by_layer(scaled)
        return layers["w1"].value[0], layers["w2"].value[0], whole(scaled).value[0]

    w1, w2, network = values(1.0)
    for factor in (10.0, 0.01):
        other = values(factor)
        np.testing.assert_allclose(other[:2], (w1, w2), rtol=1e-9)
        assert abs(other[2] - network) > 0.1
