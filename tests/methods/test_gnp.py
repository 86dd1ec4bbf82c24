"""GNP and G-RST: a share of each gradient; the coupled form of WSAM too."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from methods_lib import (
    RHO,
    ascended,
    emitted,
    flat,
    flattened_step,
    on_a_quadratic,
    pair,
    trained,
    trained_by,
)
from reference import gnp, wsam
from side_by_side import draws
from trajectories import STEPS, every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, blend, when

SIZE, ALPHA, ABOVE, GAMMA, P = map(rising, (0.2, 0.7, 1.8, 0.4, 0.4))


def of_unit(rho, alpha):
    rule = blend.interpolate(alpha, unit_gradient=True)
    return optax_sam.sharpness_aware(ascent.l2(rho), blend=rule)


CASES = {
    "gnp": (
        optax_sam.gnp(SIZE, alpha=ALPHA),
        lambda t, w, grad: gnp.gnp(w, grad, SIZE(t), ALPHA(t)),
    ),
    "every 3": (
        optax_sam.gnp(SIZE, alpha=0.6, when=when.every_k(3)),
        every(3, lambda t, w, grad: gnp.gnp(w, grad, SIZE(t), 0.6)),
    ),
    "unit gradient": (
        of_unit(SIZE, 0.4),
        lambda t, w, grad: gnp.gnp(w, grad, SIZE(t), 0.4, True),
    ),
    "g-rst": (
        optax_sam.gnp(SIZE, alpha=ABOVE, when=when.bernoulli(P, key=5)),
        lambda t, w, grad: gnp.g_rst(
            draws(5, STEPS)[t], w, grad, SIZE(t), ABOVE(t), P(t)
        ),
    ),
    "wsam, coupled": (
        optax_sam.gnp(SIZE, alpha=lambda t: GAMMA(t) / (1.0 - GAMMA(t))),
        lambda t, w, grad: wsam.coupled(w, grad, SIZE(t), GAMMA(t)),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)
test_the_reference_meets_the_recorded_runs, test_the_recorded_runs_are_met = (
    recorded_runs(
        2,
        "wsam_coupled",
        member=lambda name, h: optax_sam.gnp(
            h["rho"], alpha=h["gamma"] / (1 - h["gamma"])
        ),
        direction=lambda h: (
            lambda t, w, grad: wsam.coupled(w, grad, h["rho"], h["gamma"])
        ),
    )
)


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
    member = of_unit(RHO, 0.8)
    g, g_s = pair(scale=20.0)
    wanted = 0.2 * flat(g) / np.linalg.norm(flat(g)) + 0.8 * flat(g_s)
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
