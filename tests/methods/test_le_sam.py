"""LE-SAM: a rise of the loss in place of a radius."""

import harness
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import pytest
from reference import le_sam
from trajectories import every, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIGMA, LIMIT = rising(0.15), rising(0.3)


def direction(t, w, grad):
    return le_sam.le_sam(w, grad, SIGMA(t), LIMIT(t))


CASES = {
    # The norms lie on both sides of the cap.
    "le_sam": (optax_sam.le_sam(SIGMA, max_rho=LIMIT), direction),
    "without a cap": (
        optax_sam.le_sam(0.1, max_rho=1e9),
        lambda t, w, grad: le_sam.le_sam(w, grad, 0.1, 1e9),
    ),
    "every 3": (
        optax_sam.le_sam(SIGMA, max_rho=LIMIT, when=when.every_k(3)),
        every(3, direction),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def test_a_large_budget_is_sam_of_the_cap(x64):
    member = optax_sam.le_sam(1e9, max_rho=lib.RHO)
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e18])
def test_the_loss_rises_by_the_budget_or_the_cap_holds(scale):
    g = scale * jnp.array([3.0, -4.0])
    e, _ = ascent.loss_budget(0.2, 0.5).update(g, None)
    length = float(jnp.linalg.norm(e))
    wanted = min(0.2 / (5 * scale), 0.5) if scale > 1e-20 else 0.0
    assert length == pytest.approx(wanted, rel=1e-5)
    if 0 < length < 0.5:
        np.testing.assert_allclose(e @ g, 0.2, rtol=1e-5)
