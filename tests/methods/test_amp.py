"""AMP: raw ascent inside a ball for each leaf, or in one for all."""

import harness
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods_lib import (
    ROUNDING,
    TREES,
    answering,
    filled,
    flat,
    flattened,
    offset_of,
    points_of,
    seeds,
    trained,
    trained_by,
)
from reference import amp
from side_by_side import problem
from trajectories import STEPS, every, reference, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

LIMIT, LEAF_LIMIT, ZETA = map(rising, (0.7, 0.4, 0.6))


def case(projection="leaf", n=1, limit=LEAF_LIMIT, **settings):
    settings |= {"inner_lr": ZETA, "inner_iter": n, "projection": projection}
    name = {"leaf": "by_leaf", "global": "shortened"}[projection]

    def direction(t, w, grad):
        # Looked up when called: a test below counts how often a ball is left.
        return amp.amp(w, grad, limit(t), ZETA(t), n, getattr(amp, name))

    return optax_sam.amp(limit, **settings), direction


CASES = {
    "amp": case(),
    "global": case("global", limit=LIMIT),
    "3 steps": case(n=3),
    "global, 10 steps in a loop": case("global", 10, LIMIT),
    "every 2": (
        case(when=when.every_k(2, phase=1))[0],
        every(2, case()[1], phase=1),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


@pytest.mark.parametrize("name", ["amp", "global"])
def test_bounds_are_reached_at_times(name, monkeypatch):
    shorten, reached = amp.shortened, []

    def counted(x, limit):
        short = shorten(x, limit)
        reached.append(short is not x and amp.norm(short) < amp.norm(x))
        return short

    monkeypatch.setattr(amp, "shortened", counted)
    reference(CASES[name][1], *problem(0, STEPS))
    assert 0.05 < np.mean(reached) < 0.95


def test_amp_inside_its_ball_is_raw_ascent(x64):
    """So that small gradients make small offsets."""
    w = harness.tree()
    for scale in (1e-3, 1e-6):
        g = harness.tree(1, scale)
        for projection in ("leaf", "global"):
            member = optax_sam.amp(0.5, inner_lr=0.7, projection=projection)
            (point,) = points_of(member, w, g)
            wanted = jax.tree.map(lambda w, x: w + 0.7 * x, w, g)
            harness.assert_close(point, wanted, 1e-15)


def test_amp_of_one_long_leaf_is_sam(x64):
    w, g = harness.tree()["layer"]["kernel"], 9 * harness.tree(1)["layer"]["kernel"]
    sam = points_of(optax_sam.sam(0.5), w, g)
    for projection in ("leaf", "global"):
        amp = optax_sam.amp(0.5, projection=projection)
        harness.assert_close(points_of(amp, w, g), sam, 1e-11)


def test_amp_without_radius_or_step_is_the_base_optimizer(x64):
    w, g = harness.tree(), harness.tree(1)
    for member in (
        optax_sam.amp(0.0, inner_iter=3),
        optax_sam.amp(0.5, inner_lr=0.0, inner_iter=3),
        optax_sam.amp(0.0, inner_iter=3, projection="global"),
    ):
        for point in points_of(member, w, g, harness.tree(2), harness.tree(3)):
            harness.assert_equal(point, w)
    member = optax_sam.amp(0.0, inner_iter=2)
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 9, 11])
@pytest.mark.parametrize("projection", ["leaf", "global"])
def test_amp_by_hand(projection, num_steps, x64):
    """More than eight steps are a loop, compiled differently; on a quadratic."""
    epsilon, factor = 0.35, 0.04
    member = optax_sam.amp(
        epsilon, inner_lr=factor, inner_iter=num_steps, projection=projection
    )
    params = problems.quadratic().params()
    grad_fn = lambda p: jax.grad(problems.quadratic().loss_fn)(p, np.zeros(5))
    step = lambda: member.update(
        grad_fn(params), member.init(params), params, grad_fn=grad_fn
    )[0]
    h, w = problems.hessian(), flat(params)
    delta = np.zeros(5)
    shortened = {"leaf": 0, "global": 0}
    for _ in range(num_steps):
        delta = delta + factor * h @ (w + delta)
        parts = [delta[:3], delta[3:]] if projection == "leaf" else [delta]
        shortened[projection] += sum(np.linalg.norm(x) > epsilon for x in parts)
        shorten = lambda x: x * min(1, epsilon / np.linalg.norm(x))
        delta = np.concatenate([shorten(x) for x in parts])
    # After one step nothing is too long yet.
    assert num_steps == 2 or (shortened[projection] > 0) == (num_steps > 2)
    np.testing.assert_allclose(flat(jax.jit(step)()), h @ (w + delta), rtol=1e-9)


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, st.sampled_from([0.0, 1e-3, 0.5]))
def test_amp_offsets_lie_in_their_balls(description, seed, epsilon):
    """In one for each leaf, so together within ``epsilon sqrt(n)``; and by hand."""
    with harness.x64():
        g, other = filled(description, seed), filled(description, seed + 1)
        leaves = jax.tree.leaves(g)
        for projection in ("leaf", "global"):
            rule = ascent.raw_steps(epsilon, 0.3, 2, projection=projection)
            grad_fn, _ = answering(other)
            e, _ = rule.update(g, None, g, grad_fn=grad_fn)
            total = np.linalg.norm(flattened(e))
            count = len(leaves) if projection == "leaf" else 1
            assert total <= epsilon * np.sqrt(count) * (1 + ROUNDING)
            for x in jax.tree.leaves(e):
                assert np.linalg.norm(flattened(x)) <= epsilon * (1 + ROUNDING)
            grad_fn, _ = answering(other)
            rule = ascent.raw_steps(1e9, 0.3, 2, projection=projection)
            e = offset_of(rule, g, g, grad_fn=grad_fn)
            wanted = 0.3 * (flattened(g) + flattened(other))
            size = np.linalg.norm(wanted)
            np.testing.assert_allclose(e, wanted, atol=ROUNDING * size)


def test_loops_of_steps_in_half_precision_keep_their_types():
    """A loop's carry cannot change its type, and the points are float32."""
    w = harness.tree(dtype="bfloat16")
    for rule in (
        ascent.raw_steps(optax.constant_schedule(0.1), 0.5, 9),
        ascent.n_step(optax.constant_schedule(0.1), 9, step_size=0.05),
    ):
        member = optax_sam.sharpness_aware(rule)
        grad_fn, points = lambda p: harness.tree(2, dtype="bfloat16"), []
        seen = lambda p: points.append(p) or grad_fn(p)  # noqa: B023
        d, _ = member.update(w, member.init(w), w, grad_fn=seen)
        assert harness.kinds(d) == harness.kinds(w)
        assert len(points) == 2  # one in the loop's body, traced
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(points))


def test_schedules_of_several_steps_are_read_at_the_step(x64):
    """Of the step of training, not of the ascent."""
    rho, length = (lambda t: 0.1 * (t + 1)), (lambda t: 0.03 * (t + 1))
    g = harness.tree(1)
    unit = flat(g) / np.linalg.norm(flat(g))
    for t in (0, 4):
        grad_fn, _ = answering(g, g)
        rule = ascent.n_step(rho, 3, step_size=length)
        e, _ = rule.update(g, None, g, grad_fn=grad_fn, count=t)
        np.testing.assert_allclose(flat(e), 0.09 * (t + 1) * unit, rtol=1e-9)
        grad_fn, _ = answering(g, g)
        rule = ascent.raw_steps(1e9, length, 3)
        e, _ = rule.update(g, None, g, grad_fn=grad_fn, count=t)
        np.testing.assert_allclose(flat(e), 0.09 * (t + 1) * flat(g), rtol=1e-9)
        rule = ascent.raw_steps(rho, 1e9, projection="global")
        e, _ = rule.update(g, None, count=t)
        np.testing.assert_allclose(flat(e), 0.1 * (t + 1) * unit, rtol=1e-9)
