"""AE-SAM: an ascent where the gradient is long for its recent past."""

import harness
import numpy as np
import optax
import pytest
from methods_lib import RHO, trained, trained_by
from reference import ae_sam
from trajectories import STEPS, ten_steps, trend

import optax_sam
from optax_sam import when

FALL = optax.linear_schedule(1.0, -1.0, STEPS)


falling = lambda t: ae_sam.threshold(t, STEPS)
CASES = {
    "ae_sam": (
        optax_sam.ae_sam(0.3, decay=0.5, threshold=0.5),
        trend(lambda t: 0.5),
    ),
    "a falling threshold": (
        optax_sam.ae_sam(0.3, decay=0.5, threshold=FALL),
        trend(falling),
    ),
    "lagged": (
        optax_sam.ae_sam(0.3, decay=0.5, threshold=FALL, lag=1),
        trend(falling, lag=1),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


@pytest.mark.parametrize("lag", [0, 1])
def test_infinite_thresholds(lag, x64):
    """Minus infinity is SAM, infinity the base optimizer (with a lag, from step 1)."""
    for threshold in (-np.inf, optax.constant_schedule(-np.inf)):
        for method in (optax_sam.ae_sam, optax_sam.ae_looksam):
            member = method(RHO, threshold=threshold, lag=lag)
            harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    once = optax_sam.sam(RHO, when=when.every_k(10**6))
    never = trained(once) if lag else trained_by("sgd")
    for method in (optax_sam.ae_sam, optax_sam.ae_looksam)[: 1 if lag else 2]:
        member = method(RHO, threshold=np.inf, lag=lag)
        harness.assert_close(trained(member), never, 1e-12)
