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

DTYPES = ["float64", "float32"]
pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def dense(dtype):
    """The network, its data as 3 batches of 599, and its Hessian with eigenvalues."""
    params, batch, H = curvature.trained(dtype)
    batches = sharpness.stack_batches(batch, 599)
    return params, batches, H, np.linalg.eigvalsh(H)[::-1]


@functools.cache
def measure(name, dtype, chunked=False, **options):
    """The measure of the trained network, compiled, as a function of the key."""
    params, batches, _, _ = dense(dtype)
    if not chunked:  # one batch, quicker
        batches = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batches)
    function = getattr(sharpness, name)
    compiled = jax.jit(lambda *args: function(curvature.loss_fn, *args, **options))
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
    params, batches, H, _ = dense(dtype)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    v = optax.tree.cast(v, dtype)
    Hv = jax.jit(lambda *a: sharpness.hvp(curvature.loss_fn, *a, mode=mode))
    product, expected = flat(Hv(params, batches, v)), H @ flat(v)
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
    V = np.asarray(
        jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(result.eigenvectors)
    )
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-5)
    off = np.linalg.norm(V @ H - result.eigenvalues[:, None] * V, axis=1)
    assert (off <= 2 * result.residuals + (1e-5 if dtype == "float32" else 1e-12)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_eigenvalue_with_80_products(dtype):
    *_, eigenvalues = dense(dtype)
    run = measure("hessian_eigenvalues", dtype, which="SA", num_matvecs=80)
    # Relative to itself in float64; float32 knows it to a rounding of the largest.
    tolerance = 1e-6 * (abs(eigenvalues[-1]) if dtype == "float64" else eigenvalues[0])
    assert abs(run(0).eigenvalues[0] - eigenvalues[-1]) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_magnitude_and_largest_differ(dtype):
    params, batches, *_ = dense(dtype)
    negative = lambda params, batch: -curvature.loss_fn(params, batch)
    *_, eigenvalues = dense(dtype)
    run = jax.jit(
        lambda p, b: [
            sharpness.hessian_eigenvalues(
                negative, p, b, 0, which=which, num_matvecs=80
            ).eigenvalues[0]
            for which in ("LM", "LA")
        ]
    )
    magnitude, largest = run(params, batches)
    np.testing.assert_allclose(magnitude, -eigenvalues[0], rtol=1e-5)
    np.testing.assert_allclose(largest, -eigenvalues[-1], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "target"), [(100, 0.015), (300, 0.003)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trace(dtype, budget, target):
    trace = dense(dtype)[3].sum()
    run = measure("hessian_trace", dtype, num_matvecs=budget)
    results = [run(key) for key in range(6)]
    assert rms([r.estimate / trace - 1 for r in results]) <= target
    # The standard error is about the error: neither boasts nor cries wolf.
    z = [(r.estimate - trace) / r.stderr for r in results]
    assert 0.3 <= rms(z) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_hutchinson_knows_its_error(dtype):
    trace = dense(dtype)[3].sum()
    run = measure("hessian_trace", dtype, num_matvecs=30, method="hutchinson")
    results = [run(key) for key in range(40)]
    assert 0.7 <= np.std([(r.estimate - trace) / r.stderr for r in results]) <= 1.4


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "target"), [(100, 0.3), (300, 0.08)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_diagonal(dtype, budget, target):
    diagonal = np.diag(dense(dtype)[2])
    result = measure("hessian_diagonal", dtype, num_matvecs=budget)(0)
    off = np.linalg.norm(flat(result.estimate) - diagonal)
    assert off <= target * np.linalg.norm(diagonal)
    assert 0.5 <= np.linalg.norm(flat(result.stderr)) / off <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_hutchinson_diagonal_is_poor_and_says_so(dtype):
    diagonal = np.diag(dense(dtype)[2])
    run = measure("hessian_diagonal", dtype, num_matvecs=100, method="hutchinson")
    result = run(0)
    off = np.linalg.norm(flat(result.estimate) - diagonal)
    assert 0.4 <= off / np.linalg.norm(diagonal) <= 1.2
    assert 0.7 <= np.linalg.norm(flat(result.stderr)) / off <= 1.4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_frobenius_norm(dtype):
    norm = np.linalg.norm(dense(dtype)[3])
    run = measure("hessian_frobenius_norm", dtype)
    results = [run(key) for key in range(8)]
    assert rms([(r.estimate / norm) ** 2 - 1 for r in results]) <= 0.2
    z = [(r.estimate - norm) / r.stderr for r in results]
    assert 0.3 <= rms(z) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_power_sums(dtype):
    params, batches, _, eigenvalues = dense(dtype)
    one = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batches)

    @jax.jit
    def sums(params, batches, key):
        operator = sharpness.hessian_operator(curvature.loss_fn, params, batches)
        quadrature = sharpness.deflated_quadrature(operator, key)
        power = lambda a: lambda x: jnp.abs(x) ** a
        return [sharpness.spectral_sum_of(power(a), quadrature) for a in (1.5, 2.0)]

    results = [sums(params, one, key) for key in range(3)]
    for i, (power, target) in enumerate(((1.5, 0.015), (2.0, 0.005))):
        expected = (abs(eigenvalues) ** power).sum()
        assert rms([r[i].estimate / expected - 1 for r in results]) <= target
        assert all(r[i].stderr <= 2 * target * expected for r in results)
        assert all(10 <= r[i].num_deflated <= 30 for r in results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_renyi(dtype):
    p = abs(dense(dtype)[3])
    p = p[p > 0] / p.sum()
    alpha = (0.5, 1.0, 1.5, 2.0)
    expected = [
        -(p * np.log(p)).sum() if a == 1 else np.log((p**a).sum()) / (1 - a)
        for a in alpha
    ]
    run = measure("renyi_sharpness", dtype, alpha=alpha)
    results = [run(key) for key in range(3)]
    errors = [np.asarray(result.value) + expected for result in results]
    assert (rms(errors) <= [0.5, 0.1, 0.06, 0.06]).all()
    assert all((result.value < 0).all() for result in results)
    assert all((result.stderr > 0).all() for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_density(dtype):
    eigenvalues = dense(dtype)[3]
    result = measure("spectral_density", dtype)(0)
    spread = eigenvalues[0] - eigenvalues[-1]
    nodes, weights = np.ravel(result.nodes), np.ravel(result.weights)
    assert wasserstein_distance(nodes, eigenvalues, weights) <= 2e-3 * spread
    np.testing.assert_allclose(np.trapezoid(result.density, result.grid), 1, atol=1e-2)
    np.testing.assert_allclose(result.sigma, 0.003 * spread, rtol=1e-3)
    assert (result.stderr <= result.density).mean() > 0.9
    # On the grid, not only at the nodes: the smoothed truth, where it is large.
    bumps = jax.scipy.stats.norm.pdf(result.grid[:, None], eigenvalues, result.sigma)
    truth = bumps.mean(1)
    main = truth > 0.01 * truth.max()
    assert (abs(result.density - truth)[main] <= 0.2 * truth.max()).all()


@functools.cache
def softmax_regression(dtype):
    x, y = curvature.digits(dtype)
    x = np.concatenate([x, np.ones((len(x), 1), dtype)], axis=1)
    return jnp.zeros((65, 10), dtype), (x[None], y[None])


def regression_loss(W, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(x @ W, y).mean()


@pytest.mark.parametrize(("dtype", "digits"), [("float64", 1e-13), ("float32", 3e-6)])
def test_softmax_regression_at_zero(dtype, digits):
    # H = (I/10 - 11'/100) (x) X'X/N in closed form.
    W, batches = softmax_regression(dtype)
    result = jax.jit(
        lambda W, b: sharpness.hessian_eigenvalues(
            regression_loss, W, b, 0, k=4, num_matvecs=50
        )
    )(W, batches)
    np.testing.assert_allclose(result.eigenvalues[0], 1.144352838917231, rtol=digits)
    # Each is there nine times; how many copies are found is a matter of rounding.
    known = np.array([1.144352838917, 0.069883436350, 0.063862706956, 0.055257668851])
    off = abs(result.eigenvalues[:, None] / known - 1).min(1)
    assert (off <= 1e-4).all()
    assert result.converged.all()

    trace = jax.jit(lambda W, b: sharpness.hessian_trace(regression_loss, W, b, 0))
    result = trace(W, batches)
    assert abs(result.estimate - 14.412779111018358) <= 4 * result.stderr
    assert result.stderr <= 0.02 * result.estimate


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_of_softmax_regression(dtype):
    W, batches = softmax_regression(dtype)
    run = jax.jit(
        lambda W, b: (
            sharpness.renyi_entropy(regression_loss, W, b, 0, alpha=(0.5, 1.5, 2)),
            sharpness.spectral_sum(jnp.square, regression_loss, W, b, 0),
        )
    )
    entropy, squares = run(W, batches)
    expected = np.array([4.8648346660, 3.0796298175, 2.8568207807])
    # Eight of nine copies of the outlier are left to the probes.
    assert (abs(entropy.value - expected) <= 4 * entropy.stderr).all()
    assert (entropy.stderr <= 0.3).all()
    assert abs(squares.estimate - 11.934217830625641) <= 4 * squares.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_least_squares_everywhere(dtype):
    # H = X'X/N at any point.
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=s).astype(dtype) for s in ((40, 8), (40,)))
    loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    batches = sharpness.stack_batches((x, y), 10)
    w = jnp.asarray(rng.normal(size=8), dtype)
    H = x.T @ x / 40
    exact = np.linalg.eigvalsh(H)[::-1]
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    run = jax.jit(
        lambda w, b: (
            sharpness.hessian_eigenvalues(loss, w, b, 0, k=8),
            sharpness.hessian_trace(loss, w, b, 0),
            sharpness.hessian_diagonal(loss, w, b, 0),
            sharpness.spectral_sum(jnp.square, loss, w, b, 0),
        )
    )
    values, trace, diagonal, squares = run(w, batches)
    np.testing.assert_allclose(values.eigenvalues, exact, rtol=10 * tolerance)
    assert values.converged.all()
    np.testing.assert_allclose(trace.estimate, exact.sum(), rtol=tolerance)
    np.testing.assert_allclose(diagonal.estimate, np.diag(H), rtol=tolerance)
    np.testing.assert_allclose(squares.estimate, (exact**2).sum(), rtol=10 * tolerance)
    assert squares.num_deflated == 8
    assert squares.stderr <= tolerance * squares.estimate


def relu_loss(params, batch):
    x, y = batch
    logits = jax.nn.relu(x @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.mark.slow
def test_entropy_under_rescaled_layers():
    rng = np.random.default_rng(1)
    params = {
        "w1": jnp.array(rng.normal(size=(8, 6))),
        "w2": jnp.array(rng.normal(size=(6, 3))),
    }
    batches = (rng.normal(size=(1, 30, 8)), rng.integers(3, size=(1, 30)))
    measure = lambda layerwise: jax.jit(
        lambda p: sharpness.renyi_entropy(
            relu_loss, p, batches, 0, alpha=1.5, layerwise=layerwise
        )
    )
    by_layer, whole = measure(True), measure(False)

    def values(factor):
        scaled = {"w1": params["w1"] * factor, "w2": params["w2"] / factor}
        layers = by_layer(scaled)
        return layers["w1"].value[0], layers["w2"].value[0], whole(scaled).value[0]

    w1, w2, network = values(1.0)
    for factor in (10.0, 0.01):
        other = values(factor)
        np.testing.assert_allclose(other[:2], (w1, w2), rtol=1e-9)
        assert abs(other[2] - network) > 0.1
    H1 = curvature.dense_hessian(
        lambda w, b: relu_loss({**params, "w1": w}, b),
        params["w1"],
        jax.tree.map(lambda x: x[0], batches),
    )
    p = abs(np.linalg.eigvalsh(H1))
    p /= p.sum()
    # 48 parameters: all that matters is found, so this is nearly exact.
    np.testing.assert_allclose(w1, -2 * np.log((p**1.5).sum()), atol=1e-3)


@pytest.mark.slow
def test_layers_have_their_own_block():
    params, batches, H, _ = dense("float64")
    names = sorted(params)
    start = sum(params[name].size for name in names[: names.index("w2")])
    block = H[start : start + 320, start : start + 320]
    mask = {name: name == "w2" for name in params}
    run = jax.jit(
        lambda p, b: sharpness.hessian_eigenvalues(
            curvature.loss_fn, p, b, 0, num_matvecs=40, mask=mask
        )
    )
    result = run(params, batches)
    top = np.linalg.eigvalsh(block)[-1]
    np.testing.assert_allclose(result.eigenvalues[0], top, rtol=1e-10)
    assert result.eigenvectors["w2"].shape == (1, 32, 10)
    assert result.eigenvectors["w1"].shape == (1, 64, 32)
    assert not result.eigenvectors["w1"].any()
