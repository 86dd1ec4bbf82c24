"""SAM, of one ascent step and of several, and on some steps only."""

import harness
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from methods_lib import (
    RHO,
    ROUNDING,
    STEPS,
    TREES,
    answering,
    assert_apart,
    filled,
    flat,
    flattened,
    offset_of,
    on_a_quadratic,
    problems,
    rhos,
    seeds,
    trained,
    trained_by,
)
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
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES, ())


def direction(h):
    if "rho" not in h:
        return lambda t, w, grad: grad(w)
    if "clip_global_norm" in h:
        clip = lambda d: base.clip(d, h["clip_global_norm"])
        return lambda t, w, grad: clip(sam.sam(w, grad, h["rho"], 0.0))
    return lambda t, w, grad: sam.sam(w, grad, h["rho"])


test_the_reference_meets_the_recorded_runs, test_the_recorded_runs_are_met = (
    recorded_runs(
        9,
        "sgd",
        "sam_",
        member=lambda name, h: optax_sam.sam(h.get("rho", 0.0)),
        direction=direction,
    )
)


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax_sam.sharpness_aware(ascent.l2(RHO)),
        lambda: optax_sam.sam(RHO, when=when.every_k(1)),
        lambda: optax_sam.sam(RHO, when=when.bernoulli(1.0)),
        lambda: optax_sam.vsam(RHO, window=4, num_slices=2, warmup_steps=STEPS),
        lambda: optax_sam.sharpness_aware(
            ascent.l2(RHO), blend=optax_sam.blend.reuse_difference()
        ),
    ],
    ids=["l2", "k = 1", "p = 1", "vSAM in warm-up", "reuse without a gap"],
)
def test_is_sam(build, x64):
    harness.assert_close(trained(build()), trained_by("sam"), 1e-12)


def test_never_ascending_is_the_base_optimizer(x64):
    member = optax_sam.sam(RHO, when=when.bernoulli(0.0))
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)
    assert_apart(trained_by("sam"), trained_by("sgd"), 1e-3)


def test_on_a_quadratic_the_difference_is_known(x64):
    """It is ``rho H g / ||g||``, to the last digits."""
    _, g, g_s, _, _ = on_a_quadratic(optax_sam.sam(RHO))
    wanted = RHO * problems.hessian() @ g / np.linalg.norm(g)
    np.testing.assert_allclose(g_s - g, wanted, rtol=1e-9, atol=1e-12)


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, rhos)
def test_l2_on_random_trees(description, seed, rho):
    with harness.x64():
        g = filled(description, seed)
        e, x = offset_of(ascent.l2(rho), g), flattened(g)
        size = np.linalg.norm(x)
        wanted = rho * x / size if size else 0 * x
        np.testing.assert_allclose(e, wanted, rtol=ROUNDING, atol=0)
        assert np.linalg.norm(e) <= rho * (1 + ROUNDING)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    TREES, seeds, rhos, st.integers(1, 3), st.sampled_from([None, 0.01, 1.0])
)
def test_several_steps_on_random_trees(description, seed, rho, num_steps, step_size):
    with harness.x64():
        g = filled(description, seed)
        others = [filled(description, seed + i) for i in range(1, num_steps)]
        length = rho if step_size is None else step_size
        for project in (True, False):
            grad_fn, seen = answering(*others)
            rule = ascent.n_step(rho, num_steps, step_size=step_size, project=project)
            e = offset_of(rule, g, g, grad_fn=grad_fn)
            wanted = np.zeros_like(e)
            for x in map(flattened, (g, *others)):
                size = np.linalg.norm(x)
                wanted = wanted + (length * x / size if size else 0)
                if project and np.linalg.norm(wanted) > rho:
                    wanted = wanted * (rho / np.linalg.norm(wanted))
            assert len(seen) == num_steps - 1
            np.testing.assert_allclose(e, wanted, rtol=1e-3, atol=1e-4 * length)
            assert not project or np.linalg.norm(e) <= rho * (1 + ROUNDING)


def test_many_steps_run_in_a_loop_and_agree(x64):
    """Nine steps are a loop, eight are unrolled: the ninth must not differ in kind."""
    problem = problems.quadratic()
    params, gradient = problem.params(), jax.jit(jax.grad(problem.loss_fn))
    grad_fn = lambda p: gradient(p, problem.batch(0))
    run = lambda n: ascent.n_step(RHO, n, step_size=0.02).update(
        grad_fn(params), (), params, grad_fn=grad_fn
    )[0]
    w, h = flat(params), problems.hessian()
    wanted = np.zeros(5)
    for n in range(1, 12):
        g = h @ (w + wanted)
        wanted = wanted + 0.02 * g / np.linalg.norm(g)
        wanted *= min(1, RHO / np.linalg.norm(wanted))
        if n in (8, 9, 11):
            np.testing.assert_allclose(flat(run(n)), wanted, rtol=1e-9)
