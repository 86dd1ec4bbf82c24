"""Renyi SAM: an ascent whose length follows the entropy of the gradient."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods_lib import RHO, STEPS, assert_apart, flat, trained, trained_by
from reference import base, renyi_sam
from trajectories import recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE, ORDER = rising(0.1), lambda t: 1.2 + 0.1 * t


def of(rho, alpha, power_sum=renyi_sam.elementwise):
    return lambda t, w, grad: renyi_sam.renyi_sam(w, grad, rho, alpha, power_sum)


def capped(t, w, grad):
    """Where the offset is longer than 0.02 it has that length instead."""
    g = grad(w)
    n = base.norm(g)
    length = 0.05 * renyi_sam.elementwise(g, 1.2) / n**2.4 / n
    if length > 0.02:
        return grad(base.add(w, base.unit(g, 0.0), 0.02))
    return renyi_sam.renyi_sam(w, grad, 0.05, 1.2)


CASES = {
    "renyi_sam": (optax_sam.renyi_sam(0.3), of(0.3, 1.2)),
    "alpha = 2": (optax_sam.renyi_sam(0.5, alpha=2.0), of(0.5, 2.0)),
    "alpha = 1 / 2": (optax_sam.renyi_sam(0.01, alpha=0.5), of(0.01, 0.5)),
    "schedules": (
        optax_sam.renyi_sam(SIZE, alpha=ORDER),
        lambda t, w, grad: renyi_sam.renyi_sam(w, grad, SIZE(t), ORDER(t)),
    ),
    "layer-wise": (
        optax_sam.renyi_sam(0.15, alpha=1.5, layerwise=True),
        of(0.15, 1.5, renyi_sam.layerwise),
    ),
    # On some of the steps.
    "capped": (optax_sam.renyi_sam(0.05, max_offset_norm=0.02), capped),
    "never capped": (optax_sam.renyi_sam(0.05), of(0.05, 1.2)),
    "after a warm-up": (
        optax_sam.renyi_sam(0.3, warmup_steps=4, when=when.every_k(2)),
        # The clock of the rule starts after the warm-up.
        lambda t, w, grad: of(0.3, 1.2)(t, w, grad) if t in (4, 6, 8) else grad(w),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)
POWER_SUMS = {"NEWRSAM": renyi_sam.elementwise, "RSAM": renyi_sam.layerwise}
test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    5,
    "renyi_sam",
    member=lambda name, h: optax_sam.renyi_sam(
        h["rho"], alpha=h["a"], layerwise=h["cls"] == "RSAM"
    ),
    direction=lambda h: of(h["rho"], h["a"], POWER_SUMS[h["cls"]]),
)


def renyi_offset(g, rho=0.3, alpha=1.2, **settings):
    rule = ascent.renyi(rho, alpha, **settings)
    return rule.update(g, rule.init(g), count=0)[0]


@pytest.mark.parametrize("alpha", [0.3, 1.2, 5.0])
@pytest.mark.parametrize("layerwise", [False, True])
def test_renyi_length_direction_and_scale(alpha, layerwise, x64):
    g = harness.tree(1)
    n = np.linalg.norm(flat(g))
    sizes = [np.linalg.norm(x) for x in jax.tree.leaves(g)] if layerwise else flat(g)
    s = np.sum(np.abs(sizes) ** (2 * alpha)) / n ** (2 * alpha)
    e = flat(renyi_offset(g, alpha=alpha, layerwise=layerwise))
    np.testing.assert_allclose(np.linalg.norm(e), 0.3 * s / n, rtol=1e-9)
    # To first order the loss gains -sign(1 - a) rho S.
    gain = 0.3 * s if alpha > 1 else -0.3 * s
    np.testing.assert_allclose(e @ flat(g), gain, rtol=1e-9)
    np.testing.assert_allclose(e, gain / n**2 * flat(g), rtol=1e-9)
    for c in (0.5, 40.0):  # S does not feel the scale, so c e(c g) = e(g)
        scaled = renyi_offset(optax.tree.scale(c, g), alpha=alpha, layerwise=layerwise)
        np.testing.assert_allclose(c * flat(scaled), e, rtol=1e-9)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e15])
def test_renyi_in_float32_at_extreme_scales(scale, alpha, layerwise):
    """``||g||^(2 a)`` alone does not fit into float32."""
    g = harness.tree(1, scale)
    assert g["gain"].dtype == jnp.float32
    e = renyi_offset(g, alpha=alpha, layerwise=layerwise)
    assert harness.is_finite(e)
    if scale < 1e-6:
        capped = renyi_offset(g, alpha=alpha, max_offset_norm=0.1)
        assert np.linalg.norm(flat(capped)) <= 0.1 * (1 + 1e-5)
        return
    assert np.linalg.norm(flat(e)) > 0
    with jax.enable_x64(True):
        wide = optax.tree.cast(g, "float64")
        exact = flat(renyi_offset(wide, alpha=alpha, layerwise=layerwise))
    np.testing.assert_allclose(flat(e), exact, rtol=1e-4)


def test_renyi_sum_keeps_its_bound():
    """Where the epsilon takes over, in float32 at that: no NaN at ``rho = 0``."""
    g = {"w": jnp.full(100, 1e-5)}
    for rho, length in ((0.0, 0.0), (0.1, 0.1 / 1e-4)):
        rule = optax_sam.ascent.renyi(rho, alpha=5.0)
        e, _ = rule.update(g, rule.init(g))
        np.testing.assert_allclose(optax.tree.norm(e), length, rtol=1e-4)


def test_renyi_of_a_zero_gradient_is_zero():
    zero = harness.like(harness.tree(), 0.0)
    for settings in ({}, {"max_offset_norm": 0.1}, {"layerwise": True}):
        for alpha in (0.5, 1.2, 5.0):  # the last one's epsilon overflows
            harness.assert_equal(renyi_offset(zero, alpha=alpha, **settings), zero)


def test_renyi_sam_warms_up_as_the_base_optimizer(x64):
    member = optax_sam.renyi_sam(RHO, warmup_steps=STEPS)
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)
    one_left = optax_sam.renyi_sam(RHO, warmup_steps=STEPS - 1)
    assert_apart(trained(one_left), trained_by("sgd"), 1e-6)
