"""GNP and G-RST: a share of each gradient; the coupled form of WSAM too."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import problems
import pytest
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
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)
test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    2,
    "wsam_coupled",
    member=lambda name, h: optax_sam.gnp(h["rho"], alpha=h["gamma"] / (1 - h["gamma"])),
    direction=lambda h: lambda t, w, grad: wsam.coupled(w, grad, h["rho"], h["gamma"]),
)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gnp_of_all_or_nothing_is_sam_or_the_base_to_the_bit(dtype, x64):
    g, g_s = lib.pair(dtype=dtype)
    for alpha, wanted in ((1.0, g_s), (0.0, g)):
        member = optax_sam.gnp(lib.RHO, alpha=alpha)
        harness.assert_equal(lib.emitted(member, g, g_s)[0], wanted)
    gnp, sam = (lib.ascended(x(lib.RHO)) for x in (optax_sam.gnp, optax_sam.sam))
    harness.assert_equal(gnp[1], sam[1])


@pytest.mark.parametrize("alpha", [0.3, 4.0])
def test_gnp_on_a_quadratic_is_the_penalized_gradient(alpha, x64):
    """``grad (L + alpha rho ||grad L||)``, by differentiating that."""
    h, w = jnp.asarray(problems.hessian()), jnp.arange(1.0, 6.0)
    penalized = lambda w: w @ h @ w / 2 + alpha * lib.RHO * jnp.linalg.norm(h @ w)
    d, _ = lib.emitted(
        optax_sam.gnp(lib.RHO, alpha=alpha), h @ w, lambda p: h @ p, params=w
    )
    np.testing.assert_allclose(d, jax.grad(penalized)(w), rtol=1e-9, atol=1e-12)


def test_the_unit_of_a_zero_gradient_is_zero(x64):
    g, g_s = lib.pair()
    d = lib.flattened_step(of_unit(lib.RHO, 0.8), harness.like(g, 0.0), g_s)
    np.testing.assert_allclose(d, 0.8 * lib.flat(g_s), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gnp_extrapolates_in_half_precision(dtype, x64):
    """Rounded once: ``9 g_s - 8 g`` of close gradients would cancel."""
    g = harness.tree(1, dtype=dtype)
    g_s = jax.tree.map(lambda x: (x * 1.02).astype(dtype), g)
    d = lib.flattened_step(optax_sam.gnp(lib.RHO, alpha=9.0), g, g_s)
    a, b = lib.flat(g).astype(np.float64), lib.flat(g_s).astype(np.float64)
    half_a_digit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(d, 9 * b - 8 * a, rtol=1.01 * half_a_digit)
