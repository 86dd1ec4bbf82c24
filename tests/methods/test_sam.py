"""SAM, of one ascent step and of several, and on some steps only."""

import harness
import methods_lib as lib
import pytest
from reference import base, sam
from side_by_side import draws
from trajectories import every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when


def n_step(*args, **kwargs):
    return optax_sam.sharpness_aware(ascent.n_step(*args, **kwargs))


LENGTH = rising(0.12)
ONE = lambda t, w, grad: sam.sam(w, grad, 0.3)
CASES = {
    "sam": (optax_sam.sam(0.3), ONE),
    "rho = 0": (optax_sam.sam(0.0), lambda t, w, grad: grad(w)),
    "3 ascent steps": (
        optax_sam.sam(0.3, num_ascent_steps=3),
        lambda t, w, grad: sam.n_step(w, grad, 0.3, 3, 0.3),
    ),
    "4 short steps that leave the ball": (
        n_step(0.3, 4, step_size=LENGTH),
        lambda t, w, grad: sam.n_step(w, grad, 0.3, 4, LENGTH(t)),
    ),
    "2 steps longer than the radius": (
        n_step(0.3, 2, step_size=0.7),
        lambda t, w, grad: sam.n_step(w, grad, 0.3, 2, 0.7),
    ),
    "3 unprojected steps": (
        n_step(0.1, 3, project=False),
        lambda t, w, grad: sam.n_step(w, grad, 0.1, 3, 0.1, project=False),
    ),
    "12 steps, in a loop": (
        n_step(0.3, 12, step_size=0.05),
        lambda t, w, grad: sam.n_step(w, grad, 0.3, 12, 0.05),
    ),
    "every 3": (optax_sam.sam(0.3, when=when.every_k(3)), every(3, ONE)),
    "every 4, phase 3": (
        optax_sam.sam(0.3, when=when.every_k(4, phase=3)),
        every(4, ONE, phase=3),
    ),
    "with probability 0.4": (
        optax_sam.sam(0.3, when=when.bernoulli(0.4, key=5)),
        lambda t, w, grad: sam.bernoulli(draws(5, 10)[t], w, grad, 0.3, 0.4),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES, ())


def direction(h):
    if "rho" not in h:
        return lambda t, w, grad: grad(w)
    if "clip_global_norm" in h:
        clip = lambda d: base.clip(d, h["clip_global_norm"])
        return lambda t, w, grad: clip(sam.sam(w, grad, h["rho"], 0.0))
    return lambda t, w, grad: sam.sam(w, grad, h["rho"])


test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    9,
    "sgd",
    "sam_",
    member=lambda name, h: optax_sam.sam(h.get("rho", 0.0)),
    direction=direction,
)


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax_sam.sharpness_aware(ascent.l2(lib.RHO)),
        lambda: optax_sam.sam(lib.RHO, when=when.every_k(1)),
        lambda: optax_sam.sam(lib.RHO, when=when.bernoulli(1.0)),
        lambda: optax_sam.vsam(lib.RHO, window=4, num_slices=2, warmup_steps=lib.STEPS),
        lambda: optax_sam.sharpness_aware(
            ascent.l2(lib.RHO), blend=optax_sam.blend.reuse_difference()
        ),
    ],
    ids=["l2", "k = 1", "p = 1", "vSAM in warm-up", "reuse without a gap"],
)
def test_is_sam(build, x64):
    harness.assert_close(lib.trained(build()), lib.trained_by("sam"), 1e-12)


def test_never_ascending_is_the_base_optimizer(x64):
    member = optax_sam.sam(lib.RHO, when=when.bernoulli(0.0))
    harness.assert_close(lib.trained(member), lib.trained_by("sgd"), 1e-12)
    lib.assert_apart(lib.trained_by("sam"), lib.trained_by("sgd"), 1e-3)
