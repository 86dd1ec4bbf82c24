"""mRWP: the gradient at w, and one at w with noise."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import problems
import pytest
import recorded
import side_by_side
import trajectories as beside
import trajectory_runs
from reference import mrwp
from side_by_side import generator

import optax_sam
from optax_sam import ascent
from optax_sam.keys import normal_like

SIZE, SHARE = beside.rising(0.1), beside.rising(0.4)


@beside.double
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_ten_steps_meet_the_reference(given):
    w, batches = side_by_side.problem(0, beside.STEPS)
    of = lambda t: normal_like(generator(7 if given else 3, t), w)
    z = [jax.tree.map(np.asarray, of(t)) for t in range(beside.STEPS)]
    tx = side_by_side.optimizer(optax_sam.mrwp(SIZE, alpha=SHARE, key=3))
    extras = [{"noise": x} for x in z] if given else None
    step = side_by_side.uncompiled(tx)
    found, _ = side_by_side.package(step, w, tx.init(w), batches, extras)
    direction = lambda t, w, grad: mrwp.mrwp(w, grad, z[t], SIZE(t), SHARE(t))
    side_by_side.assert_equal(found, side_by_side.reference(direction, w, batches))


def normals(h, t):
    """Those of the recorded run: drawn by the layout of PyTorch."""
    draw = np.random.RandomState(h["noise_seed"] + t).randn
    shapes = [recorded.PROBLEM[f"init/{leaf}"].T.shape for leaf in recorded.TENSORS]
    return {k: draw(*s).T for k, s in zip(recorded.TENSORS, shapes, strict=True)}


@beside.runs(1, "mrwp")
def test_the_reference_is_as_recorded(name):
    h = beside.hyperparameters(name)
    numbers = h["gamma"], h["alpha"]
    beside.assert_descends_as_recorded(
        name, lambda t, w, batch: mrwp.mrwp(w, batch.grad, normals(h, t), *numbers)
    )


@beside.runs(1, "mrwp")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    given = beside.stacked([normals(h, t) for t in range(recorded.RUNS[name]["steps"])])
    member = optax_sam.mrwp(h["gamma"], alpha=h["alpha"])
    tx = optax.chain(member, beside.base_optimizer(name))
    beside.assert_met(name, tx, given=given, extra=lambda z, w: {"noise": z})


def test_the_points_do_not_wait_for_the_gradient_at_w():
    """Nor does the second batch have to be the first one."""
    w, g, second = harness.tree(), harness.tree(1), harness.tree(2)
    member = optax_sam.mrwp(0.1, alpha=0.25)
    points = [lib.points_of(member, w, g, second) for g in (g, harness.like(g, 7.0))]
    harness.assert_equal(*points)
    d, _ = lib.emitted(member, g, second, params=w)
    wanted = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, g, second)
    harness.assert_close(d, wanted, 1e-6)
    lib.assert_apart(
        points[0][0], lib.points_of(optax_sam.mrwp(0.1, key=1), w, g, g)[0]
    )


def test_shards_draw_apart_and_their_mean_is_that_of_low_pass_filtering(x64):
    w, g = harness.tree(), harness.tree(1)
    member = optax_sam.sharpness_aware(ascent.filter_noise(0.1), axis_name="shards")
    seen = []
    tx = optax_sam.micro_sharpness(member, num_shards=2)
    grad_fn = lambda p, i: seen.append(p) or jax.tree.map(jnp.sin, p)
    d, _ = tx.update(None, tx.init(w), w, grad_fn=grad_fn)
    assert optax.tree.norm(d) > 0.1
    step = jax.vmap(
        lambda _: lib.points_of(member, w, g, g)[0], axis_name="shards", axis_size=2
    )
    a, b = (jax.tree.map(lambda x: x[i], step(jnp.arange(2))) for i in range(2))  # noqa: B023
    lib.assert_apart(a, b)
    wanted = jax.tree.map(lambda a, b: (jnp.sin(a) + jnp.sin(b)) / 2, a, b)
    harness.assert_close(d, wanted, 1e-9)


def test_the_noise_alone_costs_one_gradient():
    """RWP, on zeros in place of the gradient at w."""
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params, batch = jax.eval_shape(lambda: (problem.params(), problem.batch(0)))
    member = optax_sam.sharpness_aware(ascent.filter_noise(0.1))

    def emitted(params, batch, normals):
        zeros = jax.tree.map(jnp.zeros_like, params)
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, batch)
        given = {"grad_fn": grad_fn, "noise": normals}
        return member.update(zeros, member.init(params), params, **given)[0]

    one = trajectory_runs.flops(jax.grad(problem.loss_fn), params, batch)
    found = trajectory_runs.flops(emitted, params, batch, params)
    assert found / one == pytest.approx(1, rel=0.02)
