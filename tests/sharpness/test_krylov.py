"""Lanczos does not go on in noise, and probes know when they have seen everything."""

import functools
import re

import curvature
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
# Rounding is what breaks Lanczos, so the coarser precision is the harder one.
DTYPES = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)]
)
NAMES = pytest.mark.parametrize("name", BREAKDOWNS)
eps = lambda dtype: float(jnp.finfo(dtype).eps)


def diagonal(values):
    return sharpness.Operator(lambda v: values * v, values, values.size, lambda v: v)


@functools.cache
def compiled(function, as_operator=diagonal, **options):
    return jax.jit(lambda x: function(as_operator(x), 0, **options))


def largest(values, **options):
    return compiled(sharpness.eigenvalues, **options)(values)


@DTYPES
@NAMES
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_exhausted_spaces(name, dtype, which, x64):
    values = BREAKDOWNS[name]
    result = largest(jnp.asarray(values, dtype), which=which)
    expected = {"LA": values.max(), "SA": values.min(), "LM": values[0]}[which]
    # A Krylov space of 20 steps has not come to the smallest of 200 powers.
    slack = 1e-4 if (name, which) == ("geometric", "SA") else 0
    error = abs(result.eigenvalues[0] - expected)
    assert error <= 20 * eps(dtype) * abs(values).max() + slack
    assert result.converged[0] or slack
    assert result.eigenvalues.dtype == dtype
    np.testing.assert_allclose(jnp.linalg.norm(result.eigenvectors[0]), 1, rtol=1e-5)


@DTYPES
def test_what_has_not_converged_is_said_to_be_off_by_its_residual(dtype, x64):
    values = jnp.arange(1.0, N + 1, dtype=dtype)
    result = largest(values)
    (v,), (theta,) = result.eigenvectors, result.eigenvalues
    residual = jnp.linalg.norm(values * v - theta * v)
    np.testing.assert_allclose(result.residuals[0], residual, rtol=1e-3)
    assert 0.1 < residual < 2  # and no claim to have converged
    assert not result.converged[0]


SPECTRA = {
    "heavy tail": np.arange(1.0, N + 1) ** -1.5,
    "clusters": np.repeat([10.0, 1.0, 0.01], [8, 72, N - 80]) * np.linspace(1, 1.1, N),
    "both signs": np.r_[3.0, -2.8, 2.5, -2.0, 1.5, np.cos(np.arange(N - 5.0))],
    "no gap": np.linspace(0, 1, N),
}


@pytest.mark.parametrize(
    ("which", "number"), [("LA", 1), ("LA", 3), ("SA", 1), ("LM", 3)]
)
@pytest.mark.parametrize("name", SPECTRA)
def test_restarts_find_the_same_within_their_residuals(which, number, name, x64):
    """With few vectors and many products, to rounding; with 20, nearly as well."""
    H, values = curvature.rotated(SPECTRA[name], "float64"), SPECTRA[name]
    order = {"LA": -values, "SA": values, "LM": -abs(values)}[which]
    true = values[np.argsort(order)][:number]
    run = functools.partial(
        compiled, sharpness.eigenvalues, curvature.matrix, k=number, which=which
    )
    few = number + 6
    for num_matvecs in (few + 1, 20):  # one restart, and several
        result = run(num_matvecs=num_matvecs, num_vectors=few)(H)
        V, theta = result.eigenvectors, result.eigenvalues
        np.testing.assert_allclose(V @ V.T, np.eye(number), atol=1e-12)
        residuals = np.linalg.norm(V @ H - theta[:, None] * V, axis=1)
        np.testing.assert_allclose(result.residuals, residuals, atol=1e-13)
        nearest = abs(theta[:, None] - values).min(1)
        assert (nearest <= result.residuals + 1e-13).all()
        assert result.num_matvecs == num_matvecs
    if which == "LA":
        whole = abs(run(num_matvecs=20)(H).eigenvalues - true).max()
        assert abs(theta - true).max() <= 2 * whole + 1e-4 * abs(true).max()
    result = run(num_matvecs=N, num_vectors=few + 10)(H)
    if name == "both signs" or (which != "SA" and name != "no gap"):
        np.testing.assert_allclose(result.eigenvalues, true, atol=1e-10)


@pytest.mark.parametrize("num_vectors", [2, 4])
@DTYPES
@NAMES
def test_exhausted_spaces_with_restarts(name, dtype, num_vectors, x64):
    values = BREAKDOWNS[name]
    result = largest(jnp.asarray(values, dtype), num_vectors=num_vectors)
    slack = 1e-4 if name in ("geometric", "rank 3") else 0
    error = abs(result.eigenvalues[0] - values.max())
    assert error <= 20 * eps(dtype) * abs(values).max() + slack
    assert error <= result.residuals[0] + 20 * eps(dtype) * abs(values).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_restarts_of_an_operator_that_is_not_finite_say_so(bad):
    result = largest(jnp.ones(N).at[3].set(bad), num_vectors=4)
    assert jnp.isnan(result.eigenvalues[0])
    assert not result.converged[0]


def test_a_start_of_zero_is_another_one():
    krylov = lanczos(diagonal(jnp.arange(5.0)), jnp.zeros(5), 5)
    assert jnp.isfinite(krylov.rule().nodes).all()


def test_repeated_eigenvalues_are_found_once():
    result = largest(jnp.asarray(BREAKDOWNS["two values"], "float32"), k=3)
    np.testing.assert_allclose(result.eigenvalues, [2, 1, np.nan], rtol=1e-6)
    assert result.converged.tolist() == [True, True, False]
    assert result.residuals[2] == jnp.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # its square overflows
def test_an_operator_that_is_not_finite_says_so(bad):
    result = largest(jnp.ones(N).at[3].set(bad))
    assert jnp.isnan(result.eigenvalues[0])
    assert not result.converged[0]


def test_warm_starts():
    values = jnp.linspace(0.0, 1, N) ** 0.5
    find = jax.jit(
        lambda init: sharpness.eigenvalues(
            diagonal(values), 0, init=init, num_matvecs=4
        )
    )
    top = jnp.zeros(N).at[-1].set(1) + 0.01 * jnp.cos(jnp.arange(N))
    warm, cold = find(top), largest(values, num_matvecs=4)
    assert warm.residuals[0] < 0.3 * cold.residuals[0]
    # A start of zero is a cold one.
    np.testing.assert_allclose(find(0 * top).eigenvalues, cold.eigenvalues, rtol=1e-3)
    # At an eigenvector the others are found still.
    lesser = jnp.zeros(10).at[5].set(1)
    result = sharpness.eigenvalues(diagonal(jnp.arange(10.0)), 0, init=lesser)
    np.testing.assert_allclose(result.eigenvalues, [9], rtol=1e-5)
    assert result.converged[0]


def test_more_steps_than_dimensions():
    values = jnp.array([3.0, -1.0, 2.0])
    result = sharpness.eigenvalues(diagonal(values), 0, k=3)
    np.testing.assert_allclose(result.eigenvalues, [3, 2, -1], atol=1e-5)
    assert result.num_matvecs == 3


@DTYPES
@NAMES
def test_probes_on_exhausted_spaces(name, dtype, x64):
    values = BREAKDOWNS[name]
    H = curvature.rotated(values, dtype)
    trace, diagonal, norm = (
        compiled(function, curvature.matrix, num_matvecs=number)(H)
        for function, number in (
            (sharpness.trace, 60),
            (sharpness.diagonal, 60),
            (sharpness.frobenius_norm, 20),
        )
    )
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


@pytest.mark.parametrize(
    ("function", "options", "of", "factor"),
    [
        (sharpness.trace, {}, np.trace, 2),
        (sharpness.trace, {"method": "hutchinson"}, np.trace, 1.25),
        (sharpness.diagonal, {}, np.diag, 2),
        (sharpness.diagonal, {"method": "hutchinson"}, np.diag, 1.25),
        (sharpness.frobenius_norm, {}, np.linalg.norm, 1.25),
    ],
)
def test_errors_of_estimates_are_as_large_as_they_say(
    function, options, of, factor, x64
):
    """Over many keys, of a spectrum that no sketch exhausts."""
    H = curvature.rotated(1.1 ** -np.arange(60.0), "float64")
    run = jax.jit(
        lambda H, keys: jax.lax.map(
            lambda key: function(curvature.matrix(H), key, num_matvecs=24, **options),
            keys,
        )
    )
    result = run(H, jax.random.split(jax.random.key(0), 100))
    error, stderr = result.estimate - of(np.asarray(H)), result.stderr
    # No bias beyond what the mean of a hundred may have, and a spread as is said.
    assert np.abs(error.mean(0)).max() <= 5 * stderr.mean() / 10
    ratio = np.sqrt((error**2).mean() / (stderr**2).mean())
    assert 1 / factor <= ratio <= factor


@pytest.mark.parametrize("function", [sharpness.trace, sharpness.diagonal])
def test_errors_of_few_products_are_widened(function):
    """Two of them hold 85 % of the cases or more, as Student's distribution wants."""
    H = curvature.rotated(50 / np.arange(1, 61.0) ** 1.5, "float32")
    of_key = lambda key: function(curvature.matrix(H), key, num_matvecs=4)
    result = jax.jit(jax.vmap(of_key))(jax.random.split(jax.random.key(0), 300))
    true = np.trace(H) if function is sharpness.trace else np.diag(H)
    error = abs(result.estimate - true)
    assert (error <= 2 * result.stderr).mean() >= 0.85


@DTYPES
def test_closed_forms_of_entropies(dtype, x64):
    entropies = compiled(sharpness.renyi_entropy, alpha=(0.5, 1.0, 1.5, 3.0))
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    for scale in (1e-30, 1.0, 1e30) if dtype == "float64" else (1e-8, 1.0, 1e8):
        same = entropies(jnp.full(N, scale, dtype))
        np.testing.assert_allclose(same.value, np.log(N), atol=tolerance)
    # One copy of a repeated eigenvalue is found, so the other six are estimated.
    projector = entropies(jnp.where(jnp.arange(N) < 7, 1, 0).astype(dtype))
    assert (abs(projector.value - np.log(7)) <= 4 * projector.stderr).all()
    assert (projector.stderr < 0.4).all()  # six probes
    p = BREAKDOWNS["rank 3"][:3] / 9
    three = entropies(jnp.asarray(BREAKDOWNS["rank 3"], dtype)).value
    np.testing.assert_allclose(three[1], -(p * np.log(p)).sum(), atol=tolerance)
    np.testing.assert_allclose(three[3], -np.log((p**3).sum()) / 2, atol=tolerance)
    one = entropies(jnp.zeros(N, dtype).at[4].set(-3))
    # Roots of eigenvalues that are rounding add up.
    np.testing.assert_allclose(one.value, 0, atol=N * eps(dtype) ** 0.5)
    np.testing.assert_allclose(one.value[2:], 0, atol=tolerance)
    zero = entropies(jnp.zeros(N, dtype))
    assert zero.is_zero
    assert not one.is_zero
    np.testing.assert_array_equal(zero.value, 0)
    np.testing.assert_array_equal(zero.stderr, 0)


quadrature_of = compiled(sharpness.deflated_quadrature, curvature.matrix)


def test_sums_count_what_is_taken_out_once(x64):
    # f(0) = 1: each direction counts once, whether it was deflated or not.
    values = np.r_[9.0, 7.0, np.linspace(-1, 1, N - 2)]
    quadrature = quadrature_of(curvature.rotated(values, "float64"))
    assert quadrature.is_deflated.any()
    ones = quadrature.sum(jnp.ones_like)
    assert abs(ones.estimate - N) <= 4 * ones.stderr + 1e-9
    exp = quadrature.sum(jnp.exp)
    assert abs(exp.estimate - np.exp(values).sum()) <= 4 * exp.stderr
    assert exp.stderr < 0.001 * exp.estimate


def test_functions_may_be_infinite_at_zero(x64):
    """Where no eigenvalue is, although what was taken out leaves zeros."""
    values = 0.1 + 50 / np.arange(1.0, N + 1) ** 1.5
    quadrature = quadrature_of(curvature.rotated(values, "float64"))
    for fn in (jnp.log, lambda x: x**-2.0):
        result = quadrature.sum(fn)
        assert abs(result.estimate - fn(values).sum()) <= 4 * result.stderr
        assert result.stderr < 0.05 * abs(result.estimate)


def test_only_what_has_converged_is_taken_out(x64):
    values = np.arange(1.0, N + 1)
    quadrature = compiled(sharpness.deflated_quadrature, num_top_matvecs=8)(values)
    result = quadrature.sum(jnp.square)
    assert result.num_deflated == 0
    assert abs(result.estimate - (values**2).sum()) <= 4 * result.stderr


def test_a_density_is_that_of_the_eigenvalues(x64):
    """Smoothed by ``sigma``, where a space holds them all."""
    values = jnp.array([-1.0, 0.5, 2.0])
    result = sharpness.spectral_density(
        diagonal(values), 0, num_lanczos=3, num_probes=400, sigma=0.1
    )
    truth = jax.scipy.stats.norm.pdf(result.grid[:, None], values, 0.1).mean(1)
    assert (abs(result.density - truth) <= 5 * result.stderr + 1e-6).all()
    assert result.stderr.max() < 0.06 * truth.max()


@pytest.mark.parametrize("name", SPECTRA)
def test_a_quadrature_stays_if_few_vectors_are_kept(name):
    """In float32, in which the others are found again and again."""
    values = jnp.asarray(SPECTRA[name], "float32")
    start = jnp.cos(jnp.arange(N) ** 2.0)
    moments = []
    for num_vectors in (None, 4):
        run = functools.partial(lanczos, num_matvecs=80, num_vectors=num_vectors)
        rule = jax.jit(lambda x, run=run: run(diagonal(x), start).rule())(values)
        assert rule.live.sum() > 40
        powers = rule.nodes ** jnp.arange(1, 6)[:, None], jnp.exp(rule.nodes)[None]
        moments.append(jnp.concatenate(powers) @ rule.weights)
        steps = jnp.linspace(values.min(), values.max(), 9)[:, None] + 0.01
        shares = jax.nn.sigmoid((steps - rule.nodes) / 0.05) @ rule.weights
        moments[-1] = jnp.concatenate([moments[-1], shares])
    np.testing.assert_allclose(*moments, rtol=1e-4, atol=1e-3)


def test_under_vmap_matrices_are_factorized_one_by_one():
    """XLA's runtime for CPUs hangs where two batches of them are at the same time."""
    operator = diagonal(jnp.arange(1.0, 13))
    run = lambda key: (
        sharpness.trace(operator, key, num_matvecs=8).estimate,
        sharpness.eigenvalues(operator, key, num_matvecs=4).eigenvalues,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    batched = jax.jit(jax.vmap(run))
    text = batched.lower(keys).as_text()
    calls = re.findall(
        r"@lapack_\w+(syevd|geqrf|orgqr)\w*\(.*-> \(?tensor<(\S+)x", text
    )
    assert {name for name, _ in calls} == {"syevd", "geqrf", "orgqr"}
    assert all(shape.count("x") == 1 for _, shape in calls)
    for found, expected in zip(batched(keys), jax.lax.map(run, keys), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # They have derivatives still: of the trace by the scale of the operator.
    scaled = lambda s: sharpness.trace(
        diagonal(s * jnp.arange(1.0, 13)), 0, num_matvecs=8
    )
    slope = jax.grad(lambda s: scaled(s).estimate)(2.0)
    np.testing.assert_allclose(slope, scaled(2.0).estimate / 2, rtol=1e-4)
