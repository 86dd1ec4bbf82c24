"""ESAM: some of the leaves are perturbed, and some of the examples descend."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
import side_by_side
import trajectories as beside
from methods_lib import RHO, ascended, flat, trained, trained_by
from reference import base, esam
from registry import esam_by_grad_fn
from side_by_side import generator
from trajectory_runs import flops

import optax_sam
from optax_sam import ascent


def uniforms(key, w):
    """One number per leaf, in the order of ``jax.tree.leaves``, for every step."""
    leaves, structure = jax.tree.flatten(w)
    draw = lambda t: np.asarray(jax.random.uniform(generator(key, t), (len(leaves),)))
    return [jax.tree.unflatten(structure, list(draw(t))) for t in range(beside.STEPS)]


def select(rise, gamma):
    """The authors' rule, unless it keeps none: losses are equal, or gamma = 1 / B.

    Then their number of examples, ties by order.
    """
    kept, count = esam.strictly_above(rise, gamma), int(gamma * len(rise)) - 1
    return kept if kept.any() else esam.largest(rise, count / len(rise))


def esam_reference(method, u, w, batches):
    """Its trajectory, and which leaves and how many examples were chosen."""
    leaves, examples = [], []

    def direction(t, w, _):
        x, y = batches[t]
        leaves.append(method.active)
        d = method.direction(
            w,
            lambda p, kept: base.mlp(p, x[kept], y[kept])[1],
            lambda p: base.mlp_losses(p, x, y),
            u[t],
        )
        examples.append(int(method.kept.sum()))
        return d

    return side_by_side.reference(direction, w, batches), leaves, examples


CASES = {
    "default": ({"rho": 0.1, "beta": 0.6, "gamma": 0.5}, 3),
    "few leaves, many examples": ({"rho": 0.1, "beta": 0.3, "gamma": 0.8}, 5),
    "all leaves, few examples": ({"rho": 0.3, "beta": 1.0, "gamma": 0.25}, 1),
    "one example": ({"rho": 0.1, "beta": 0.6, "gamma": 0.125}, 1),
    "all examples": ({"rho": 0.2, "beta": 0.5, "gamma": 0.99}, 8),
}


@beside.double
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@beside.each_way(CASES)
def test_ten_steps_meet_the_reference(name, compiled, given):
    settings, kept = CASES[name]
    optimizer = lambda **key: side_by_side.optimizer(optax_sam.esam(**settings, **key))
    step, seeds = beside.steps_and_seeds(optimizer(), compiled)
    drawn = set()
    for seed in seeds:
        w, batches = side_by_side.problem(seed, beside.STEPS)
        u = uniforms(seed + 7 if given else seed, w)
        # As a tree, and as an array in the order of the leaves.
        form = lambda x: x if compiled else np.array(jax.tree.leaves(x))
        extras = [{"mask_uniforms": form(x)} for x in u] if given else None
        state = optimizer(key=seed).init(w)
        trajectory, states = side_by_side.package(step, w, state, batches, extras)
        method = esam.ESAM(**settings, select=select)
        expected, leaves, examples = esam_reference(method, u, w, batches)
        side_by_side.assert_equal(trajectory, expected)
        active = optax.tree.get(states, "active")
        for t in range(1, beside.STEPS):
            order = [leaf for leaf, on in zip(sorted(w), active[t], strict=True) if on]
            assert set(order) == leaves[t]
            drawn.add(frozenset(order))
        assert examples == beside.STEPS * [kept]
    assert len(drawn) > 3 or settings["beta"] == 1.0


# The recorded runs.


@beside.runs(5, "esam")
def test_the_reference_chooses_tensors_and_examples_as_recorded(name):
    h, run = beside.hyperparameters(name), recorded.arrays(name)
    method, log = esam.ESAM(h["rho"], h["beta"], h["gamma"]), []
    tensors = list(recorded.initial(name))

    def direction(t, w, batch):
        active = [method.active is None or leaf in method.active for leaf in tensors]
        u = dict(zip(tensors, run["mask_uniforms"][t], strict=True))
        d = method.direction(w, batch.grad, batch.losses, u)
        log.append((active, method.kept, method.rise))
        return d

    beside.assert_descends_as_recorded(name, direction)
    active, kept, rise = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(active, run["active_tensors_first_pass"])
    np.testing.assert_array_equal(kept, run["selected"])
    beside.assert_near(rise, run["instance_sharpness"])


@beside.runs_of_package(5, "esam")
def test_it_is_as_recorded(name, x64):
    h, run = beside.hyperparameters(name), recorded.arrays(name)
    order = ("w",) if "quad" in name else recorded.TENSORS
    member = optax_sam.esam(h["rho"], beta=h["beta"], gamma=h["gamma"])
    uniforms = lambda u, w: {"mask_uniforms": dict(zip(order, u, strict=True))}
    given = {"given": run["mask_uniforms"], "extra": uniforms}
    tx = optax.chain(member, beside.base_optimizer(name))
    states = beside.assert_met(name, tx, **given if "mask_uniforms" in run else {})
    if "active_tensors_first_pass" in run:
        active = optax.tree.get(states, "active")[:-1]
        in_our_order = [order.index(leaf) for leaf in sorted(order)]
        wanted = run["active_tensors_first_pass"][:, in_our_order]
        np.testing.assert_array_equal(active, wanted)


# What it must equal.


def esam_step(member, w, x, state=None, **extra):
    """One update on losses that are linear in the weights, ``w . x_i``."""
    seen = []

    def losses(p, indices=None):
        seen.append((p, indices))
        return (x if indices is None else x[indices]) @ p

    state = member.init(w) if state is None else state
    g = x.mean(axis=0)
    d, state = member.update(
        g, state, w, per_example_loss_fn=losses, ascend=True, **extra
    )
    return d, state, seen


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, 5))), jnp.asarray(rng.normal(size=5))


def test_esam_of_all_leaves_and_examples_is_sam(x64):
    """Up to the authors' 1e-7 beside the norm."""
    member, g = esam_by_grad_fn(RHO, beta=1.0, gamma=1.0), flat(harness.tree(1))
    _, (point,), _ = ascended(member)
    e = flat(point) - flat(harness.tree())
    wanted = RHO * g / (np.linalg.norm(g) + 1e-7)
    np.testing.assert_allclose(e, wanted, rtol=1e-9)
    harness.assert_close_in_size(trained(member), trained_by("sam"), 5e-7)


def test_a_draw_at_beta_itself_is_active(x64):
    g = harness.tree(1)
    rule = ascent.random_leaves(RHO, 0.5)
    _, state = rule.update(g, rule.init(g), count=0, mask_uniforms=[0.5, 0.6, 0.4])
    np.testing.assert_array_equal(state.active, [True, False, True])


def test_esam_with_all_leaves_frozen_stays_in_place(x64):
    g = harness.tree(1)
    rule = ascent.random_leaves(RHO)
    state = rule.init(g)._replace(active=jnp.zeros(3, bool))
    harness.assert_equal(rule.update(g, state, count=0)[0], harness.like(g, 0.0))
    x, w = examples(8)
    # With a selection the examples then are the first ones.
    for gamma, kept in ((1.0, 8), (0.5, 3)):
        member = optax_sam.esam(RHO, gamma=gamma)
        _, state, _ = esam_step(member, w, x, mask_uniforms=[0.9])
        d, state, _ = esam_step(member, w, x, state)
        np.testing.assert_allclose(d, x[:kept].mean(axis=0), rtol=1e-12)
        assert int(state.num_rejected) == 0


SELECTED = [(0.5, 9, 3), (0.25, 4, 1), (0.1, 128, 11)]
ALMOST_ALL = [(0.989, 100, 97), (0.99, 100, 100)]


@pytest.mark.parametrize(("gamma", "batch", "kept"), SELECTED + ALMOST_ALL)
def test_esam_keeps_the_examples_that_rise_most(gamma, batch, kept, x64):
    """With linear losses those of the largest ``<e, grad l_i>``."""
    x, w = examples(batch)
    d, _, seen = esam_step(optax_sam.esam(RHO, gamma=gamma), w, x)
    rise = np.asarray(x @ x.mean(axis=0))
    best = np.argsort(-rise)[:kept]
    np.testing.assert_allclose(d, np.asarray(x)[best].mean(axis=0), rtol=1e-9)
    indices = [i for _, i in seen if i is not None]
    if gamma < 0.99:
        # Two whole forward passes, one of them beside the incoming gradient.
        assert len(seen) == 3
        assert [i.shape for i in indices] == [(kept,)]
        assert sorted(np.asarray(indices[0])) == sorted(best)
    else:
        assert len(seen) == 1
        assert not indices


def test_esam_given_the_losses(x64):
    """The same as computing them, with one pass less; and they are used."""
    x, w = examples(16)
    member = optax_sam.esam(RHO, gamma=0.5)
    d, state, _ = esam_step(member, w, x)
    given, after, seen = esam_step(member, w, x, per_example_losses=x @ w)
    harness.assert_close(given, d, 1e-12)
    harness.assert_close(after, state, 1e-12)
    assert len(seen) == 2
    before = (x @ w).at[4].add(-100.0).at[9].add(-50.0)
    d, _, _ = esam_step(
        optax_sam.esam(RHO, gamma=0.1875), w, x, per_example_losses=before
    )
    np.testing.assert_allclose(d, (x[4] + x[9]) / 2, rtol=1e-12)


def test_esam_refuses():
    x, w = examples(8)
    with pytest.raises(ValueError, match=r"gamma \* B must be at least 1.*0\.125"):
        esam_step(optax_sam.esam(gamma=0.12), w, x)
    with pytest.raises(ValueError, match="mask_uniforms must hold one number for each"):
        esam_step(optax_sam.esam(), w, x, mask_uniforms=[0.1, 0.2])
    for losses in (
        lambda p, i=None: (x @ p).mean(),
        lambda p, i=None: (x @ p)[:, None],
    ):
        with pytest.raises(ValueError, match="one loss per example, a vector"):
            optax_sam.esam().update(
                w, optax_sam.esam().init(w), w, per_example_loss_fn=losses
            )


def test_the_second_gradient_of_esam_runs_on_a_part_of_the_batch():
    """FLOPs of an ascended step: a gradient, a forward pass and 63 / 128 of one."""
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params, batch = problem.params(), problem.batch(0)
    tx = optax_sam.esam(0.05, gamma=0.5)

    def losses(p, indices=None):
        x, y = batch if indices is None else [a[indices] for a in batch]
        one = lambda x, y: problem.loss_fn(p, (x[None], y[None]))
        return jax.vmap(one)(x, y)

    mean = lambda p: losses(p).mean()
    step = lambda p, state: tx.update(
        jax.grad(mean)(p), state, p, per_example_loss_fn=losses, ascend=True
    )
    gradient, forward = flops(jax.grad(mean), params), flops(mean, params)
    assert 0.25 < forward / gradient < 0.45
    wanted = gradient * (1 + 63 / 128) + forward
    assert flops(step, params, tx.init(params)) == pytest.approx(wanted, rel=0.03)
