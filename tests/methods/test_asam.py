"""ASAM: the perturbation in a ball that follows the sizes of the weights."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
from reference import asam
from side_by_side import only
from trajectories import every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import when

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
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


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


test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    5, "asam", member=member, direction=direction
)


def test_asam_of_unit_sizes_is_sam(x64):
    signs = jax.tree.map(jnp.sign, harness.tree())
    half = jax.tree.map(lambda x: x / 2, signs)
    for member, params in (
        (optax_sam.asam(lib.RHO, eta=0.0, adapt=True), signs),
        (optax_sam.asam(lib.RHO, eta=0.5, adapt=True), half),
        # And on leaves of any size, if none is adapted.
        (optax_sam.asam(lib.RHO, adapt=False), harness.tree()),
    ):
        sam = lib.ascended(optax_sam.sam(lib.RHO), params)
        harness.assert_close(lib.ascended(member, params)[1], sam[1], 1e-12)


def test_asam_follows_a_rescaling_of_layers(x64):
    """Layers scaled by c and 1/c: the same function, and the same perturbation."""
    c, rng = 3.0, np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    loss_fn = lambda w: jnp.mean((jax.nn.relu(x @ w["in"]) @ w["out"] - y) ** 2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"in": draw(3, 4), "out": draw(4, 2)}
    rescale = lambda w, c: {"in": c * w["in"], "out": w["out"] / c}
    grad = jax.grad(loss_fn)
    point = lambda member, w: lib.points_of(member, w, grad(w))[-1]
    member = optax_sam.asam(lib.RHO, eta=0.0, adapt=True)
    found, seen = point(member, rescale(params, c)), point(member, params)
    harness.assert_close(found, rescale(seen, c), 1e-12)
    harness.assert_close(grad(found), rescale(grad(seen), 1 / c), 1e-10)
    # SAM does not, or the test would be blind.
    sam = optax_sam.sam(lib.RHO)
    found, seen = point(sam, rescale(params, c)), point(sam, params)
    lib.assert_apart(found, rescale(seen, c), 0.01)
