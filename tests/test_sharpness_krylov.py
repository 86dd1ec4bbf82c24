"""Lanczos does not go on in noise, and probes know when they have seen everything."""

import functools

import curvature
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree import decomp

from optax_sam import sharpness
from optax_sam.sharpness.krylov import lanczos

N, K = 200, 20
BREAKDOWNS = {
    "identity": np.ones(N),
    "minus identity": -np.ones(N),
    "zero": np.zeros(N),
    "rank 3": np.r_[5.0, 3.0, 1.0, np.zeros(N - 3)],
    "two values": np.repeat([2.0, 1.0], N // 2),
    "geometric": 2.0 ** -np.arange(N),
    "tiny": 1e-12 * np.ones(N),
}
DTYPES = ["float64", "float32"]
eps = lambda dtype: float(jnp.finfo(dtype).eps)


def diagonal(values):
    return sharpness.Operator(lambda v: values * v, values, values.size, lambda v: v)


@functools.cache
def largest(k=1, which="LA"):
    find = lambda d: sharpness.eigenvalues_of(diagonal(d), 0, k=k, which=which)
    return jax.jit(find)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BREAKDOWNS)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_exhausted_spaces(name, dtype, which, x64):
    values = BREAKDOWNS[name]
    result = largest(which=which)(jnp.asarray(values, dtype))
    expected = {"LA": values.max(), "SA": values.min(), "LM": values[0]}[which]
    # A Krylov space of 20 steps has not come to the smallest of 200 powers.
    slack = 1e-4 if (name, which) == ("geometric", "SA") else 0
    error = abs(result.eigenvalues[0] - expected)
    assert error <= 20 * eps(dtype) * abs(values).max() + slack
    assert result.converged[0] or slack
    assert result.eigenvalues.dtype == dtype
    np.testing.assert_allclose(jnp.linalg.norm(result.eigenvectors[0]), 1, rtol=1e-5)


def test_matfree_alone_would_be_wrong(x64):
    # If this fails, matfree has a guard of its own and ours may go.
    run = decomp.tridiag_sym(K, reortho="full")
    T = run(lambda v: v, jax.random.normal(jax.random.key(0), (N,)))[1]
    assert not abs(jnp.linalg.eigvalsh(T).max() - 1) < 1  # 50 to 150, or nan


@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_spaces_are_as_matfree_has_them(dtype, x64):
    values = jnp.arange(1.0, N + 1, dtype=dtype)
    start = jax.random.normal(jax.random.key(0), (N,), dtype)
    ours = jax.jit(lambda d: lanczos(diagonal(d), start, K))(values)
    T = decomp.tridiag_sym(K, reortho="full")(lambda v: values * v, start)[1]
    assert ours.live.all()
    tolerance = 1e4 * eps(dtype) * N
    np.testing.assert_allclose(ours.eigenvalues, jnp.linalg.eigvalsh(T), atol=tolerance)
    top = jnp.argmax(ours.eigenvalues)
    v = ours.vectors(top[None])[0]
    residual = jnp.linalg.norm(values * v - ours.eigenvalues[top] * v)
    np.testing.assert_allclose(ours.residuals[top], residual, rtol=1e-3)
    assert 0.1 < residual < 2  # and no claim to have converged
    assert not largest()(values).converged[0]


def test_weights_sum_to_the_squared_start(x64):
    for values in BREAKDOWNS.values():
        start = jax.random.normal(jax.random.key(1), (N,))
        krylov = lanczos(diagonal(jnp.asarray(values)), start, K)
        np.testing.assert_allclose(krylov.weights.sum(), start @ start, rtol=1e-12)


def test_a_start_of_zero_has_no_weight():
    krylov = lanczos(diagonal(jnp.arange(5.0)), jnp.zeros(5), 5)
    assert krylov.weights.sum() == 0
    assert jnp.isfinite(krylov.eigenvalues).all()


def test_repeated_eigenvalues_are_found_once():
    result = largest(k=3)(jnp.asarray(BREAKDOWNS["two values"], "float32"))
    np.testing.assert_allclose(result.eigenvalues, [2, 1, np.nan], rtol=1e-6)
    assert result.converged.tolist() == [True, True, False]
    assert result.residuals[2] == jnp.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # its square overflows
def test_an_operator_that_is_not_finite_says_so(bad):
    result = largest()(jnp.ones(N).at[3].set(bad))
    assert jnp.isnan(result.eigenvalues[0])
    assert not result.converged[0]


def test_a_start_at_an_eigenvector_still_finds_the_others():
    values = jnp.arange(10.0)
    lesser = jnp.zeros(10).at[5].set(1)
    result = sharpness.eigenvalues_of(diagonal(values), 0, init=lesser)
    np.testing.assert_allclose(result.eigenvalues, [9], rtol=1e-5)
    assert result.converged[0]


def test_more_steps_than_dimensions():
    values = jnp.array([3.0, -1.0, 2.0])
    result = sharpness.eigenvalues_of(diagonal(values), 0, k=3)
    np.testing.assert_allclose(result.eigenvalues, [3, 2, -1], atol=1e-5)
    assert result.num_matvecs == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BREAKDOWNS)
def test_probes_on_exhausted_spaces(name, dtype, x64):
    values = BREAKDOWNS[name]

    @jax.jit
    def estimates(H):
        operator = curvature.matrix(H)
        return (
            sharpness.trace_of(operator, 0, num_matvecs=60),
            sharpness.diagonal_of(operator, 0, num_matvecs=60),
            sharpness.frobenius_norm_of(operator, 0, num_matvecs=20),
        )

    H = curvature.rotated(values, dtype)
    trace, diagonal, norm = estimates(H)
    size = abs(values).sum()
    rounding = 100 * eps(dtype) * size
    assert abs(trace.estimate - values.sum()) <= 5 * trace.stderr + rounding
    assert trace.stderr <= 0.01 * size
    off = jnp.linalg.norm(diagonal.estimate - jnp.diagonal(H))
    assert off <= 2 * jnp.linalg.norm(diagonal.stderr) + rounding
    true = np.linalg.norm(values)
    assert abs(norm.estimate - true) <= 5 * norm.stderr + rounding
    if name in ("rank 3", "zero"):
        # All of the range was seen, so both are exact.
        assert abs(trace.estimate - values.sum()) <= rounding
        assert off <= rounding


def test_as_many_products_as_dimensions_are_exact():
    H = curvature.rotated(np.arange(-3.0, 9.0), "float32")
    operator = curvature.matrix(H)
    trace = sharpness.trace_of(operator, 0, num_matvecs=12)
    diagonal = sharpness.diagonal_of(operator, 0, num_matvecs=12)
    np.testing.assert_allclose(trace.estimate, jnp.trace(H), rtol=1e-5)
    np.testing.assert_allclose(diagonal.estimate, jnp.diagonal(H), atol=1e-5)
    assert trace.stderr == 0
    assert not diagonal.stderr.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_closed_forms_of_entropies(dtype, x64):
    @jax.jit
    def entropies(d):
        return sharpness.renyi_entropy_of(diagonal(d), 0, alpha=(0.5, 1.0, 1.5, 3.0))

    tolerance = 1e-4 if dtype == "float32" else 1e-10
    for scale in (1e-30, 1.0, 1e30) if dtype == "float64" else (1e-8, 1.0, 1e8):
        same = entropies(jnp.full(N, scale, dtype))
        np.testing.assert_allclose(same.value, np.log(N), atol=tolerance)
    # One copy of a repeated eigenvalue is found, so the other six are estimated.
    projector = entropies(jnp.where(jnp.arange(N) < 7, 1, 0).astype(dtype))
    assert (abs(projector.value - np.log(7)) <= 4 * projector.stderr).all()
    assert (projector.stderr < 0.3).all()
    one = entropies(jnp.zeros(N, dtype).at[4].set(-3))
    # Roots of eigenvalues that are rounding add up.
    np.testing.assert_allclose(one.value, 0, atol=N * eps(dtype) ** 0.5)
    np.testing.assert_allclose(one.value[2:], 0, atol=tolerance)
    zero = entropies(jnp.zeros(N, dtype))
    assert zero.is_zero
    assert not one.is_zero
    np.testing.assert_array_equal(zero.value, 0)
    np.testing.assert_array_equal(zero.stderr, 0)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_power_sums_of_a_geometric_spectrum(power, x64):
    quadrature = jax.jit(lambda d: sharpness.deflated_quadrature(diagonal(d), 0))(
        jnp.asarray(BREAKDOWNS["geometric"])
    )
    result = sharpness.spectral_sum_of(lambda x: jnp.abs(x) ** power, quadrature)
    expected = 1 / (1 - 2.0**-power)  # up to 2^-100
    # Thirty powers of two are found; roots of the rest are what is left.
    rest = 2.0 ** (-30 * power) / (1 - 2.0**-power)
    assert abs(result.estimate - expected) <= rest + 1e-9
    assert result.num_deflated == 30


def test_sums_count_what_is_taken_out_once(x64):
    # f(0) = 1: each direction counts once, whether it was deflated or not.
    values = np.r_[9.0, 7.0, np.linspace(-1, 1, N - 2)]
    H = curvature.rotated(values, "float64")
    quadrature = sharpness.deflated_quadrature(curvature.matrix(H), 0)
    assert quadrature.is_deflated.any()
    ones = sharpness.spectral_sum_of(jnp.ones_like, quadrature)
    assert abs(ones.estimate - N) <= 4 * ones.stderr + 1e-9
    exp = sharpness.spectral_sum_of(jnp.exp, quadrature)
    assert abs(exp.estimate - np.exp(values).sum()) <= 4 * exp.stderr
    assert exp.stderr < 0.001 * exp.estimate


def test_only_what_has_converged_is_taken_out(x64):
    values = np.arange(1.0, N + 1)
    quadrature = jax.jit(
        lambda d: sharpness.deflated_quadrature(diagonal(d), 0, num_top_matvecs=8)
    )(values)
    result = sharpness.spectral_sum_of(jnp.square, quadrature)
    assert result.num_deflated == 0
    assert abs(result.estimate - (values**2).sum()) <= 4 * result.stderr


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_density_integrates_to_one(name, x64):
    values = BREAKDOWNS[name]
    result = jax.jit(
        lambda d: sharpness.spectral_density_of(
            diagonal(d), 0, num_lanczos=20, num_probes=3
        )
    )(jnp.asarray(values))
    assert jnp.isfinite(result.density).all()
    np.testing.assert_allclose(np.trapezoid(result.density, result.grid), 1, atol=1e-2)
    np.testing.assert_allclose(result.weights.sum(), 1, rtol=1e-12)
    mean = (result.weights * result.nodes).sum()
    assert abs(mean - values.mean()) <= 0.3 * abs(values).max()
    assert result.grid[0] <= values.min() + 1e-3
    assert result.grid[-1] >= values.max()
