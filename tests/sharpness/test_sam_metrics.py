"""Live metrics of one SAM step, and the edge of its stability."""

import contextlib
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_sam import plots, sharpness

RHO = 0.1


def quadratic(dtype):
    """``w'Hw/2 - b'w`` of a tree, ``H`` indefinite with largest eigenvalue 5."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    H = Q * np.array([5, 3, 2, 1, 0.5, 0.1, -0.5, -1]) @ Q.T
    b, w = rng.normal(size=8), rng.normal(size=8)
    cast = lambda x: jnp.asarray(x, dtype)
    tree = lambda x: {"a": cast(x[:6]).reshape(2, 3), "b": [cast(x[6:])]}
    flat = lambda w: jnp.concatenate([w["a"].ravel(), w["b"][0]])
    loss = lambda w: flat(w) @ cast(H) @ flat(w) / 2 - flat(w) @ b
    return loss, tree, H, H @ w - b, w


@pytest.mark.parametrize(
    ("double", "tolerance"), [(True, 1e-12), (False, 2e-4)], ids=["f64", "f32"]
)
def test_identities_on_a_quadratic(double, tolerance):
    with harness.x64() if double else contextlib.nullcontext():
        loss, tree, H, g, w = quadratic(jnp.float64 if double else jnp.float32)

        @jax.jit
        def of(w, e):
            (value, g), (value_s, g_s) = (
                jax.value_and_grad(loss)(x) for x in (w, optax.tree.add(w, e))
            )
            more = dict(params=w, updates=optax.tree.scale(-0.05, g_s))
            return sharpness.sam_metrics(
                value, value_s, g, g_s, e, **more, learning_rate=0.05
            )

        g_norm = np.linalg.norm(g)
        e = RHO * g / g_norm
        found = {name: float(x) for name, x in of(tree(w), tree(e)).items()}
        rayleigh = g @ H @ g / g_norm**2
        g_s = g + H @ e
        expected = {
            "sharpness_gap": RHO * g_norm + RHO**2 / 2 * rayleigh,
            "grad_norm": g_norm,
            "perturbed_grad_norm": np.linalg.norm(g_s),
            "grad_norm_ratio": np.linalg.norm(g_s) / g_norm,
            "cosine": g @ g_s / g_norm / np.linalg.norm(g_s),
            "psf_norm": RHO * np.linalg.norm(H @ g) / g_norm,
            "rho": RHO,
            "perturbation_norm": RHO,
            "rayleigh_quotient": rayleigh,
            "moved_fraction": 1,
            "param_norm": np.linalg.norm(w),
            "update_norm": 0.05 * np.linalg.norm(g_s),
            "learning_rate": 0.05,
            "stability_edge": 40,
            "stability_edge_sam": float(
                sharpness.sam_stability_edge(g_norm, RHO, 0.05)
            ),
        }
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=tolerance)
        # The difference of losses has lost digits: some of 1e-7 over rho^2.
        assert found["rayleigh_from_loss"] == pytest.approx(
            rayleigh, rel=1e-10 if double else 2e-2
        )
        assert found["loss_perturbed"] - found["loss"] == found["sharpness_gap"]
        # Along any other offset it is that one's curvature.
        e = np.random.default_rng(1).normal(size=8) / 10
        found = of(tree(w), tree(e))
        for name in ("rayleigh_quotient", "rayleigh_from_loss"):
            assert float(found[name]) == pytest.approx(
                e @ H @ e / (e @ e), rel=1e-10 if double else 2e-3
            )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [True, False])
def test_nothing_divides_by_zero(dtype, jit):
    zero = {"w": jnp.zeros(3, dtype)}
    of = functools.partial(
        sharpness.sam_metrics, 1.0, 1.0, params=zero, updates=zero, learning_rate=0.1
    )
    found = (jax.jit(of) if jit else of)(zero, zero, zero)
    expected = dict.fromkeys(found, 0.0)
    expected |= {"loss": 1, "loss_perturbed": 1, "learning_rate": 0.1}
    # Without an offset both edges are the same.
    expected |= {"stability_edge": 20, "stability_edge_sam": 20}
    assert {k: float(x) for k, x in found.items()} == pytest.approx(expected)


def test_one_zero_gradient_of_two():
    one, zero = {"w": jnp.ones(4)}, {"w": jnp.zeros(4)}
    for g, g_s in (zero, one), (one, zero):
        found = sharpness.sam_metrics(0.0, 1.0, g, g_s, one)
        assert found["cosine"] == found["grad_norm_ratio"] == 0
        assert abs(found["rayleigh_quotient"]) == 1


def test_what_is_not_finite_shows():
    bad, one = {"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.ones(2)}
    found = sharpness.sam_metrics(0.0, 1.0, bad, one, one)
    for name in ("grad_norm", "cosine", "grad_norm_ratio", "rayleigh_quotient"):
        assert jnp.isnan(found[name]), name


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_inert_perturbation_shows(jit, dtype):
    # A step of 1e-4 is lost next to 1, and kept next to 1e-3.
    w = {"lost": jnp.ones(6, dtype), "kept": jnp.full(2, 1e-3, dtype)}
    e = jax.tree.map(lambda x: jnp.full(x.shape, 1e-4, jnp.float32), w)
    g = jax.tree.map(jnp.ones_like, w)
    # Of a loss with the Hessian 3 I, at the point that is reached.
    g_s = {"lost": g["lost"], "kept": g["kept"].astype(jnp.float32) + 3e-4}
    of = lambda w: sharpness.sam_metrics(1.0, 1.1, g, g_s, e, params=w)
    of = jax.jit(of) if jit else of
    found = of(w)
    assert found["moved_fraction"] == 0.25
    np.testing.assert_allclose(found["rho"], 1e-4 * 8**0.5, rtol=1e-5)
    np.testing.assert_allclose(found["perturbation_norm"], 1e-4 * 2**0.5, rtol=0.05)
    np.testing.assert_allclose(found["rayleigh_quotient"], 3, rtol=0.05)
    inert = of(jax.tree.map(jnp.ones_like, w))
    assert inert["moved_fraction"] == inert["perturbation_norm"] == 0
    assert inert["rayleigh_quotient"] == inert["rayleigh_from_loss"] == 0
    alive = of(optax.tree.cast(w, jnp.float32))
    assert alive["moved_fraction"] == 1
    np.testing.assert_allclose(alive["perturbation_norm"], alive["rho"], rtol=1e-3)


def test_norms_of_half_precision_do_not_overflow():
    g = {"w": jnp.full(10_000, 1000, jnp.float16)}
    found = sharpness.sam_metrics(1.0, 2.0, g, g, g)
    np.testing.assert_allclose(found["grad_norm"], 1e5, rtol=1e-6)
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)


def test_the_edge_is_the_largest_stable_curvature(x64):
    """The root of ``eta lambda + eta rho lambda^2 / g = 2``."""
    g, rho, eta = np.meshgrid([1e-6, 0.01, 1, 50], [1e-9, 0.01, 0.5], [1e-3, 0.1, 1])
    found = sharpness.sam_stability_edge(g, rho, eta)
    np.testing.assert_allclose(eta * found + eta * rho * found**2 / g, 2, rtol=1e-12)
    assert np.all((found > 0) & (found < 2 / eta))


def test_the_edge_at_its_ends():
    edge = jax.jit(sharpness.sam_stability_edge)
    assert edge(1.0, 0.0, 0.5) == edge(0.0, 0.0, 0.5) == 4
    assert edge(0.0, 0.1, 0.5) == 0
    assert edge(1.0, 0.1, 0.0) == edge(0.0, 0.1, 0.0) == jnp.inf
    # The form in the paper would have lost all digits here.
    np.testing.assert_allclose(edge(1.0, 1e-9, 0.5), 4, rtol=1e-6)
    np.testing.assert_allclose(edge(1.0, 0.05, 0.1), 12.360680, rtol=1e-6)


def test_the_edge_is_drawn_for_schedules_of_one_step():
    schedule = optax.linear_onecycle_schedule(100, 0.1)
    ax = plots.sharpness_history(np.arange(4), np.ones(4), learning_rate=schedule)
    expected = [2 / float(schedule(step)) for step in range(4)]
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), expected, rtol=1e-6)
