"""AMP: raw ascent inside a ball for each leaf, or in one for all."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import optax
from reference import amp
from trajectories import every, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

LIMIT, LEAF_LIMIT, ZETA = map(rising, (0.7, 0.4, 0.6))


def case(projection="leaf", n=1, limit=LEAF_LIMIT, **settings):
    settings |= {"inner_lr": ZETA, "inner_iter": n, "projection": projection}
    project = {"leaf": amp.by_leaf, "global": amp.shortened}[projection]

    def direction(t, w, grad):
        return amp.amp(w, grad, limit(t), ZETA(t), n, project)

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
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def test_amp_of_one_long_leaf_is_sam(x64):
    w, g = harness.tree()["layer"]["kernel"], 9 * harness.tree(1)["layer"]["kernel"]
    sam = lib.points_of(optax_sam.sam(0.5), w, g)
    for projection in ("leaf", "global"):
        amp = optax_sam.amp(0.5, projection=projection)
        harness.assert_close(lib.points_of(amp, w, g), sam, 1e-11)


def test_amp_without_radius_or_step_stays_in_place(x64):
    w, *gradients = (harness.tree(seed) for seed in range(4))
    for settings in ({"inner_lr": 0.0}, {"epsilon": 0.0, "projection": "global"}):
        member = optax_sam.amp(**settings, inner_iter=3)
        for point in lib.points_of(member, w, *gradients):
            harness.assert_equal(point, w)


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
