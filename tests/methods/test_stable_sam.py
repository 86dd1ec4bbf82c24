"""StableSAM: the ascended gradient at the plain one's length."""

import harness
import methods_lib as lib
import numpy as np
import pytest
from reference import gsam, stable_sam
from trajectories import every, rising, ten_steps

import optax_sam
from optax_sam import ascent, blend, when

SIZE = rising(0.2)


def direction(t, w, grad):
    return stable_sam.stable_sam(w, grad, SIZE(t))


CASES = {
    "stable_sam": (optax_sam.stable_sam(SIZE), direction),
    "every 3": (
        optax_sam.stable_sam(SIZE, when=when.every_k(3)),
        every(3, direction),
    ),
    "stable gsam": (
        optax_sam.sharpness_aware(
            ascent.l2(SIZE), blend=blend.renormalize(blend.surrogate_gap(0.4))
        ),
        lambda t, w, grad: stable_sam.renormalized(
            gsam.gsam(w, grad, SIZE(t), 0.4), grad(w)
        ),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_stable_sam_has_the_length_of_one_and_the_direction_of_the_other(
    dtype, scale, x64
):
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    g, g_s = harness.tree(1, scale, dtype), harness.tree(2, 7 / scale, dtype)
    d = lib.flattened_step(optax_sam.stable_sam(lib.RHO), g, g_s)
    a, b = map(lib.flattened, (g, g_s))
    wanted = np.linalg.norm(a) / np.linalg.norm(b) * b
    np.testing.assert_allclose(d, wanted, rtol=tolerance)
    assert np.linalg.norm(d) == pytest.approx(np.linalg.norm(a), rel=tolerance)


def test_stable_sam_of_a_zero_gradient(x64):
    g, g_s = lib.pair()
    zero = harness.like(g, 0.0)
    for first, second in ((g, zero), (zero, g_s), (zero, zero)):
        d, state = lib.emitted(optax_sam.stable_sam(lib.RHO), first, second)
        harness.assert_equal(d, zero)
        assert int(state.num_rejected) == 0


def test_a_renormalized_memory(x64):
    """The difference that is kept and reused is of the gradients as they came."""
    g, g_s = lib.pair()
    rule = blend.renormalize(blend.reuse_difference(0.5, max_reuse=1))
    member = optax_sam.sharpness_aware(ascent.l2(lib.RHO), blend=rule)
    d, state = lib.emitted(member, g, g_s)
    wanted = np.linalg.norm(lib.flat(g)) / np.linalg.norm(lib.flat(g_s)) * lib.flat(g_s)
    np.testing.assert_allclose(lib.flat(d), wanted, rtol=1e-12)
    later = harness.tree(5)
    for weight in (0.5, 0.0):
        d, state = lib.emitted(member, later, g_s, state, ascend=False)
        wanted = lib.flat(later) + weight * (lib.flat(g_s) - lib.flat(g))
        np.testing.assert_allclose(lib.flat(d), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="renormalize needs a rule of optax_sam.blend"):
        blend.renormalize(0.4)
