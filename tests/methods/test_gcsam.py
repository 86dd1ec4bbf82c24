"""GCSAM: the ascent without the mean of each output unit."""

import harness
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
from reference import gcsam
from trajectories import every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE = rising(0.3)
direction = lambda t, w, grad: gcsam.gcsam(w, grad, SIZE(t))
CASES = {
    "gcsam": (optax_sam.gcsam(SIZE), direction),
    "every 3": (optax_sam.gcsam(SIZE, when=when.every_k(3)), every(3, direction)),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)
test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    1,
    "gcsam",
    member=lambda name, h: optax_sam.gcsam(h["rho"]),
    direction=lambda h: lambda t, w, grad: gcsam.gcsam(w, grad, h["rho"]),
)


def offset(params, g, **settings):
    rule = ascent.centralized(lib.RHO, **settings)
    return rule.update(g, rule.init(params), params)[0]


def test_units_of_layouts_stacks_and_what_has_none(x64):
    """Kernels (out, in) too; biases are SAM's, layers of a stack by themselves."""
    draw = lambda seed, *shape: jnp.asarray(
        np.random.default_rng(seed).normal(size=shape)
    )
    norm = lambda seed: {"scale": draw(seed, 6, 4), "bias": draw(seed + 1, 6, 4)}
    tree = lambda seed: {
        "dense": {"kernel": draw(seed, 6, 5, 4), "bias": draw(seed + 3, 6, 4)},
        "norm": norm(seed + 7),
    }
    params, g = tree(0), tree(20)
    e, plain = offset(params, g), ascent.l2(lib.RHO).update(g, None)[0]
    kernel = plain["dense"]["kernel"]
    wanted = kernel - kernel.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(e["dense"]["kernel"], wanted, rtol=1e-9, atol=1e-12)
    harness.assert_close(
        (e["norm"], e["dense"]["bias"]), (plain["norm"], plain["dense"]["bias"]), 1e-12
    )
    roles = lambda params: optax_sam.roles(params, output="first")
    one = {"w": draw(3, 5, 4)}
    e = offset(one, one, roles=roles)["w"]
    np.testing.assert_allclose(e.mean(axis=1), 0, atol=1e-12)
    assert np.abs(e.mean(axis=0)).max() > 1e-3
