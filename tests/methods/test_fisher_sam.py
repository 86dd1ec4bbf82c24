"""Fisher SAM: the perturbation in a ball of the Fisher metric."""

import harness
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from methods_lib import (
    RHO,
    ROUNDING,
    TREES,
    ascended,
    assert_apart,
    emitted,
    filled,
    flat,
    flattened,
    offset_of,
    pair,
    points_of,
    seeds,
    trained,
    trained_by,
)
from reference import fisher_sam
from side_by_side import draws
from trajectories import STEPS, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE, ETA = map(rising, (0.2, 1.5))


def direction(t, w, grad):
    return fisher_sam.fisher_sam(w, grad, SIZE(t), ETA(t))


CASES = {
    "fisher_sam": (optax_sam.fisher_sam(SIZE, eta=ETA), direction),
    "with probability": (
        optax_sam.fisher_sam(SIZE, eta=ETA, when=when.bernoulli(0.5, key=5)),
        lambda t, w, grad: (
            direction(t, w, grad) if draws(5, STEPS)[t] < 0.5 else grad(w)
        ),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


def test_fisher_sam_in_the_euclidean_metric_is_sam(x64):
    member = optax_sam.fisher_sam(RHO, eta=0.0)
    harness.assert_close(ascended(member)[1], ascended(optax_sam.sam(RHO))[1], 1e-12)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    assert_apart(trained(optax_sam.fisher_sam(RHO, eta=50.0)), trained_by("sam"))


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, st.sampled_from([0.0, 1.0, 1e3, 1e6]))
def test_fisher_offsets_have_one_length_in_the_metric(description, seed, eta):
    with harness.x64():
        g = filled(description, seed)
        e, flat_g = offset_of(ascent.fisher(0.3, eta), g), flattened(g)
        f = 1 + eta * flat_g**2
        length = 0.3 if np.any(flat_g) else 0.0
        np.testing.assert_allclose(np.sqrt(e @ (f * e)), length, rtol=ROUNDING)
        # Along F^-1 g, all with one factor.
        np.testing.assert_allclose(
            e * (flat_g @ (flat_g / f)) ** 0.5, length * flat_g / f, rtol=ROUNDING
        )


def test_fisher_offset_where_the_information_is_large(x64):
    """``e -> rho / (g sqrt(dim eta))``: the smaller the gradient, the longer."""
    g = harness.tree(1)
    e = flat(ascent.fisher(RHO, 1e12).update(g, None)[0])
    wanted = RHO / flat(g) / np.sqrt(e.size * 1e12)
    np.testing.assert_allclose(e, wanted, rtol=1e-6)


@pytest.mark.parametrize("eta", [1.0, 1e8])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-12, 1e12, 1e18, 1e25])
def test_fisher_of_huge_and_tiny_gradients_in_float32(scale, eta):
    g, g_s = pair(scale)
    d, state = emitted(optax_sam.fisher_sam(RHO, eta=eta), g, g_s)
    points = points_of(optax_sam.fisher_sam(RHO, eta=eta), g, g)
    assert harness.is_finite((d, points, state))
    rejected = scale > 1e19  # the squared norm overflows
    assert int(state.num_rejected) == rejected
    harness.assert_equal(d, g if rejected else g_s)
