"""AWP: a share of the norm of each matrix."""

import harness
import methods_lib as lib
from reference import awp
from trajectories import every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE = rising(0.1)
direction = lambda t, w, grad: awp.awp(w, grad, SIZE(t))
CASES = {
    "awp": (optax_sam.awp(SIZE), direction),
    "after 4": (
        optax_sam.awp(SIZE, when=when.after(4)),
        lambda t, w, grad: direction(t, w, grad) if t >= 4 else grad(w),
    ),
    "every 3": (optax_sam.awp(SIZE, when=when.every_k(3)), every(3, direction)),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)
test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    1,
    "awp",
    member=lambda name, h: optax_sam.awp(h["gamma"]),
    direction=lambda h: lambda t, w, grad: awp.awp(w, grad, h["gamma"]),
)


def test_what_is_a_matrix(x64):
    """By its role: a stack of biases has two axes and is none, an embedding is one."""
    tree = harness.tree()
    assert ascent.matrices(tree) == {
        "layer": {"kernel": True, "bias": False},
        "gain": False,
    }
    member = optax_sam.awp(lib.RHO)
    _, (point,), _ = lib.ascended(member)
    harness.assert_equal(
        (point["gain"], point["layer"]["bias"]), (tree["gain"], tree["layer"]["bias"])
    )
    masked = optax_sam.sharpness_aware(
        ascent.trust_ratio(lib.RHO), mask=ascent.matrices
    )
    harness.assert_equal(lib.ascended(masked)[1], [point])
    biases = lambda params: optax_sam.roles(params, kinds={"layer/bias": "embedding"})
    _, (point,), _ = lib.ascended(optax_sam.awp(lib.RHO, roles=biases))
    lib.assert_apart(point["layer"]["bias"], tree["layer"]["bias"])
