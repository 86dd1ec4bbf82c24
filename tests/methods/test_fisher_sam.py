"""Fisher SAM: the perturbation in a ball of the Fisher metric."""

import harness
import methods_lib as lib
import pytest
from reference import fisher_sam
from side_by_side import draws
from trajectories import STEPS, rising, ten_steps

import optax_sam
from optax_sam import when

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
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def test_fisher_sam_in_the_euclidean_metric_is_sam(x64):
    member = optax_sam.fisher_sam(lib.RHO, eta=0.0)
    harness.assert_close(
        lib.ascended(member)[1], lib.ascended(optax_sam.sam(lib.RHO))[1], 1e-12
    )
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-12)
    lib.assert_apart(
        lib.trained(optax_sam.fisher_sam(lib.RHO, eta=50.0)), lib.trained_by("sam")
    )


@pytest.mark.parametrize("eta", [1.0, 1e8])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e18, 1e25])
def test_fisher_of_huge_and_tiny_gradients_in_float32(scale, eta):
    g, g_s = lib.pair(scale)
    d, state = lib.emitted(optax_sam.fisher_sam(lib.RHO, eta=eta), g, g_s)
    points = lib.points_of(optax_sam.fisher_sam(lib.RHO, eta=eta), g, g)
    assert harness.is_finite((d, points, state))
    rejected = scale > 1e19  # the squared norm overflows
    assert int(state.num_rejected) == rejected
    harness.assert_equal(d, g if rejected else g_s)
