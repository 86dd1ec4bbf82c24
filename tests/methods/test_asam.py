"""ASAM: the perturbation in a ball that follows the sizes of the weights."""

import harness
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
from methods_lib import (
    RHO,
    TREES,
    ascended,
    assert_apart,
    filled,
    flattened,
    offset_of,
    on_a_quadratic,
    points_of,
    rhos,
    seeds,
)
from reference import asam
from side_by_side import only
from trajectories import every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

KERNELS = {"layer0/kernel", "layer1/kernel"}
SIZE, ETA = rising(0.5), rising(0.1)
CASES = {
    "asam": (
        optax_sam.asam(SIZE),
        lambda t, w, grad: asam.asam(w, grad, SIZE(t), KERNELS, 0.01),
    ),
    "eta = 0": (
        optax_sam.asam(1.0, eta=0.0),
        lambda t, w, grad: asam.asam(w, grad, 1.0, KERNELS, 0.0),
    ),
    "all leaves": (
        optax_sam.asam(2.0, eta=0.0, adapt=True),
        lambda t, w, grad: asam.asam(w, grad, 2.0, set(w), 0.0),
    ),
    "a tree of leaves": (
        optax_sam.asam(0.5, eta=ETA, adapt=only("layer1/bias")),
        lambda t, w, grad: asam.asam(w, grad, 0.5, {"layer1/bias"}, ETA(t)),
    ),
    "a function to leaves": (
        optax_sam.asam(0.5, adapt=lambda w: only("layer0/kernel")),
        lambda t, w, grad: asam.asam(w, grad, 0.5, {"layer0/kernel"}, 0.01),
    ),
    "every 3": (
        optax_sam.asam(0.5, when=when.every_k(3, phase=1)),
        every(3, lambda t, w, grad: asam.asam(w, grad, 0.5, KERNELS), phase=1),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


def member(name, h):
    if "davda54" in name:
        return optax_sam.asam(h["rho"], adapt=True, eta=0.0)
    # The one leaf of quad is called "weight" in the authors' code.
    adapt = True if "quad" in name else None
    return optax_sam.asam(h["rho"], eta=h["eta"], adapt=adapt)


def direction(h):
    def emitted(t, w, grad):
        if "eta" not in h:
            return asam.asam(w, grad, h["rho"], set(w), eta=0.0)
        adapted = {leaf for leaf in w if not leaf.endswith("bias")}
        return asam.asam(w, grad, h["rho"], adapted, h["eta"], eps=1e-16)

    return emitted


test_the_reference_meets_the_recorded_runs, test_the_recorded_runs_are_met = (
    recorded_runs(5, "asam", member=member, direction=direction)
)


def test_norm_gains_are_adapted_by_default():
    ones = jnp.ones(2)
    w = {"kernel": jnp.ones((2, 2)), "norm": {"scale": ones, "bias": ones}}
    tx = optax_sam.asam(1.0, eta=1.0)
    # The gradient of ||w||^2 / 2 at w is w.
    d, _ = tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    # T = 2 on six of the eight weights, T = 1 on the bias: ||T g||^2 = 6 * 4 + 2.
    e = {"kernel": 4.0, "norm": {"scale": 4.0, "bias": 1.0}}
    for found, offset in zip(jax.tree.leaves(d), jax.tree.leaves(e), strict=True):
        np.testing.assert_allclose(found, 1.0 + offset / np.sqrt(26), rtol=1e-6)


def test_asam_of_unit_sizes_is_sam(x64):
    signs = jax.tree.map(jnp.sign, harness.tree())
    half = jax.tree.map(lambda x: x / 2, signs)
    for member, params in (
        (optax_sam.asam(RHO, eta=0.0, adapt=True), signs),
        (optax_sam.asam(RHO, eta=0.5, adapt=True), half),
        # And on leaves of any size, if none is adapted.
        (optax_sam.asam(RHO, adapt=False), harness.tree()),
    ):
        sam = ascended(optax_sam.sam(RHO), params)
        harness.assert_close(ascended(member, params)[1], sam[1], 1e-12)


def test_on_a_quadratic_both_points_are_known(x64):
    w, g, g_s, point, _ = on_a_quadratic(optax_sam.asam(RHO, eta=0.2, adapt=True))
    t = np.abs(w) + 0.2
    offset = RHO * t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(point - w, offset, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(g_s - g, problems.hessian() @ offset, rtol=1e-9)


def test_asam_follows_a_rescaling_of_layers(x64):
    """Layers scaled by c and 1/c: the same function, and the same perturbation."""
    c, rng = 3.0, np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    loss_fn = lambda w: jnp.mean((jax.nn.relu(x @ w["in"]) @ w["out"] - y) ** 2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"in": draw(3, 4), "out": draw(4, 2)}
    rescale = lambda w, c: {"in": c * w["in"], "out": w["out"] / c}
    grad = jax.grad(loss_fn)
    point = lambda member, w: points_of(member, w, grad(w))[-1]
    member = optax_sam.asam(RHO, eta=0.0, adapt=True)
    found, seen = point(member, rescale(params, c)), point(member, params)
    harness.assert_close(found, rescale(seen, c), 1e-12)
    harness.assert_close(grad(found), rescale(grad(seen), 1 / c), 1e-10)
    # SAM does not, or the test would be blind.
    sam = optax_sam.sam(RHO)
    found, seen = point(sam, rescale(params, c)), point(sam, params)
    assert_apart(found, rescale(seen, c), 0.01)


@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, seeds, rhos, st.sampled_from([0.0, 0.01, 1.0]))
def test_adaptive_on_random_trees(description, seed, rho, eta):
    with harness.x64():
        g, w = filled(description, seed), filled(description, seed + 1)
        e = offset_of(ascent.adaptive(rho, eta, adapt=True), g, w)
        t = np.abs(flattened(w)) + eta
        size = np.linalg.norm(t * flattened(g))
        wanted = rho * t**2 * flattened(g) / size if size else 0 * e
        # In half precision |w| + eta is rounded to 11 or 8 bits.
        np.testing.assert_allclose(e, wanted, rtol=0.03, atol=1e-30)
