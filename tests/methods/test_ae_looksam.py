"""AE-LookSAM: AE-SAM that reuses, as LookSAM does, where it does not ascend."""

import harness
import optax
import pytest
from methods_lib import RHO, assert_apart, trained, trained_by
from reference import ae_sam
from trajectories import STEPS, ten_steps, trend

import optax_sam

FALL_TO_ZERO = optax.linear_schedule(2.0, 0.0, STEPS)
CASES = {
    "ae_looksam": (
        optax_sam.ae_looksam(0.3, decay=0.5, threshold=FALL_TO_ZERO, alpha=0.4),
        trend(lambda t: ae_sam.threshold(t, STEPS, 0.0, 2.0), alpha=0.4),
    ),
    "ae_looksam, lagged": (
        optax_sam.ae_looksam(0.3, decay=0.5, threshold=0.2, alpha=0.6, lag=1),
        trend(lambda t: 0.2, alpha=0.6, lag=1),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


@pytest.mark.parametrize("lag", [0, 1])
def test_ae_looksam_without_reuse_is_ae_sam(lag, x64):
    settings = {"decay": 0.6, "threshold": 0.3, "lag": lag}
    wanted = trained(optax_sam.ae_sam(RHO, **settings))
    member = optax_sam.ae_looksam(RHO, alpha=0.0, **settings)
    harness.assert_close(trained(member), wanted, 1e-12)
    reusing = trained(optax_sam.ae_looksam(RHO, alpha=0.3, **settings))
    for other in (reusing, trained_by("sam"), trained_by("sgd")):
        assert_apart(wanted, other)
