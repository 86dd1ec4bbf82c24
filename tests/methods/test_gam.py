"""GAM: flatness of first order, from four gradients."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import pytest
from reference import gam
from trajectories import (
    biases,
    every,
    mask_of_biases,
    recorded_runs,
    rising,
    ten_steps,
)

import optax_sam
from optax_sam import when

NORM_RHO, GRAD_RHO, ALPHA, BETA, GAMMA = map(rising, (0.2, 0.1, 0.4, 0.4, 0.5))


def member(**changes):
    settings = {"norm_rho": NORM_RHO, "beta0": BETA, "beta1": ALPHA, "gamma": GAMMA}
    return optax_sam.gam(GRAD_RHO, **settings | changes)


def direction(h_minus="paper", masked=False):
    def emitted(t, w, grad):
        numbers = (x(t) for x in (NORM_RHO, GRAD_RHO, ALPHA, BETA, GAMMA))
        leaves = biases(w) if masked else None
        return gam.gam(w, grad, *numbers, h_minus=h_minus, leaves=leaves)

    return emitted


CASES = {
    "gam": (member(), direction()),
    "as in the code": (member(h_minus="code"), direction("code")),
    "every 2": (
        member(when=when.every_k(2, phase=1)),
        every(2, direction(), phase=1),
    ),
    "masked": (member(mask=mask_of_biases), direction(masked=True)),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def recorded_member(name, h):
    return optax_sam.gam(
        h["grad_rho"],
        norm_rho=h["grad_norm_rho"],
        beta0=h["grad_beta_0"],
        beta1=h["grad_beta_1"],
        gamma=h["grad_gamma"],
        h_minus="code",
    )


def recorded_direction(h):
    numbers = ("grad_norm_rho", "grad_rho", "grad_beta_1", "grad_beta_0", "grad_gamma")
    numbers = [h[name] for name in numbers]
    return lambda t, w, grad: gam.gam(w, grad, *numbers, h_minus="code")


test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    2, "gam", member=recorded_member, direction=recorded_direction
)


def test_gam_without_the_norm_is_sam(x64):
    member = optax_sam.gam(lib.RHO, gamma=0.0, beta1=1.0)
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-12)
    # The other share is that of a gradient elsewhere.
    lib.assert_apart(
        lib.trained(optax_sam.gam(lib.RHO, gamma=0.0)), lib.trained_by("sam")
    )


def test_gam_without_the_step_along_the_difference_is_gsam(x64):
    gsam = lib.trained(optax_sam.gsam(lib.RHO, alpha=0.4))
    for beta1, beta0 in ((0.0, 0.5), (0.6, 1.0)):
        member = optax_sam.gam(
            lib.RHO, norm_rho=0.0, gamma=0.4, beta0=beta0, beta1=beta1
        )
        harness.assert_close(lib.trained(member), gsam, 1e-11)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_does_not_follow_rounding(h_minus, precision):
    """With no radius the difference is rounding, however large the other radius.

    In ``grad_fn`` the gradient has rounding of its own, as another program gives.
    """
    with jax.enable_x64(precision == "float64"):
        w, g = harness.tree(), harness.tree(1)
        member = optax_sam.gam(0.0, norm_rho=100.0, gamma=0.5, h_minus=h_minus)
        eps, points = float(jnp.finfo(precision).eps), []

        def grad_fn(p):
            points.append(p)
            noise = 1 + 4 * eps * np.sign(harness.tree(len(points))["gain"])
            return jax.tree.map(lambda x: (x * noise).astype(x.dtype), g)

        d, _ = member.update(g, member.init(w), w, grad_fn=grad_fn)
        assert len(points) == 3
        for point in points:
            harness.assert_equal(point, w)
        harness.assert_close(d, g, 100 * eps)


def test_gam_of_zero_gradients(x64):
    """A zero gradient has no direction to be normal to: it is emitted."""
    g, _ = lib.pair()
    zero = harness.like(g, 0.0)
    member = optax_sam.gam(lib.RHO, gamma=0.5)
    grad_fn, _ = lib.answering(zero, g, zero)
    d, state = member.update(g, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal(d, zero)
    grad_fn, points = lib.answering(zero, zero, zero)
    d, state = member.update(zero, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal((d, points), (zero, 3 * [g]))
    assert int(state.num_rejected) == 0
