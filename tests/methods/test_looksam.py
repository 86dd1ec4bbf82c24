"""LookSAM: the part of the ascended gradient that the plain one lacked, reused."""

import functools

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import pytest
import recorded
import trajectories as beside
from reference import looksam

import optax_sam
from optax_sam import when

ALPHA = lambda t: 0.9 - 0.05 * t


def looking(scheduled):
    method = looksam.LookSAM(rho=0.2, k=4)

    def direction(t, w, grad):
        method.alpha = scheduled(t)
        return method.direction(t, w, grad)

    return direction


CASES = {
    "looksam": (
        optax_sam.looksam(0.3, k=3),
        beside.Fresh(lambda: looksam.LookSAM(rho=0.3, alpha=0.7, k=3).direction),
    ),
    "a schedule": (
        optax_sam.looksam(0.2, k=4, alpha=ALPHA),
        beside.Fresh(lambda: looking(ALPHA)),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = beside.ten_steps(CASES)


@beside.runs(3, "looksam")
def test_the_reference_is_as_recorded(name):
    h = beside.hyperparameters(name)
    method = looksam.LookSAM(h["rho"], h["alpha"], h["k"])
    direction = lambda t, w, batch: method.direction(t, w, batch.grad)
    _, batches = beside.assert_descends_as_recorded(name, direction)
    ascended = [len(batch.losses_taken) == 2 for batch in batches]
    np.testing.assert_array_equal(ascended, recorded.arrays(name)["is_sam_step"])


@beside.runs_of_package(3, "looksam")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    member = optax_sam.looksam(h["rho"], k=h["k"], alpha=h["alpha"])
    states = beside.assert_met(name, optax.chain(member, beside.base_optimizer(name)))
    decisions = optax_sam.ascends_next(states)[:-1]
    np.testing.assert_array_equal(decisions, recorded.arrays(name)["is_sam_step"])


def test_without_reuse_it_is_sam_k(x64):
    wanted = lib.trained(optax_sam.sam(lib.RHO, when=when.every_k(3)))
    member = functools.partial(optax_sam.looksam, lib.RHO, k=3)
    harness.assert_close(lib.trained(member(alpha=0.0)), wanted, 1e-12)
    lib.assert_apart(lib.trained(member(alpha=0.1)), wanted)


def test_on_every_step_it_is_sam(x64):
    member = optax_sam.looksam(lib.RHO, k=1)
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-12)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_without_radius_rounding_is_not_reused(precision):
    """The normal part is then rounding, which must not grow to a gradient."""
    with jax.enable_x64(precision == "float64"):
        base = optax.with_extra_args_support(optax.identity())
        tolerance = 1e-12 if precision == "float64" else 1e-5
        member = optax_sam.looksam(0.0, k=3)
        harness.assert_close(lib.trained(member), lib.trained(base), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_parallel_gradients_have_no_normal_part(dtype, scale, x64):
    member = optax_sam.looksam(lib.RHO)
    g, later = harness.tree(0, scale, dtype), harness.tree(9, scale, dtype)
    for c in (3.0, 1 / 3, -0.7, 1e-4):
        g_s = jax.tree.map(lambda x: (c * x).astype(x.dtype), g)  # noqa: B023
        d, state = lib.emitted(member, g, g_s)
        harness.assert_equal((d, state.blend.normal), (g_s, harness.like(g, 0.0)))
        d, _ = lib.emitted(member, later, g_s, state, ascend=False)
        harness.assert_equal(d, later)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_normal_part_is_reused(dtype, x64):
    """The guard is against rounding alone."""
    g, other = lib.pair(dtype=dtype)
    g_s = jax.tree.map(lambda a, b: a + 1e-3 * b, g, other)
    _, state = lib.emitted(optax_sam.looksam(lib.RHO), g, g_s)
    normal, a, b = map(lib.flattened, (state.blend.normal, g, other))
    wanted = b - (a @ b) / (a @ a) * a
    tolerance = 1e-2 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(
        normal, wanted / np.linalg.norm(wanted), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_normal_part_is_normal_and_the_reuse_has_its_length(scale, x64):
    member = optax_sam.looksam(lib.RHO, alpha=0.4)
    g, g_s = lib.pair(scale)
    d, state = lib.emitted(member, g, g_s, ascend=False)
    harness.assert_equal(d, g)  # before the first ascent nothing is reused
    d, state = lib.emitted(member, g, g_s)
    harness.assert_equal(d, g_s)
    v = lib.flat(state.blend.normal)
    # The epsilon beside the squared norm leaves 1e-12 / ||g||^2 of it.
    assert abs(v @ lib.flat(g)) < (1e-12 + 1e-12 / scale**2) * 10 * scale
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-12)
    assert v @ lib.flat(g_s) > 0
    for seed in range(3, 9):  # it stays, undamped, until the next ascent
        g = harness.tree(seed, scale)
        d, state = lib.emitted(member, g, g_s, state, ascend=False)
        wanted = lib.flat(g) + 0.4 * np.linalg.norm(lib.flat(g)) * v
        np.testing.assert_allclose(lib.flat(d), wanted, rtol=1e-12)


def test_the_normal_part_of_devices_is_the_mean_of_theirs(x64):
    """One for all, made of the normal part of each device's own pair."""
    member = optax_sam.looksam(lib.RHO, axis_name="d")
    a, b = (np.random.default_rng(seed).normal(size=(8, 5)) for seed in (0, 1))

    def look(g, g_s):
        w = jnp.ones(5)
        _, state = member.update(g, member.init(w), w, grad_fn=lambda p: g_s)
        return state.blend.normal

    normals = jax.vmap(look, axis_name="d")(jnp.asarray(a), jnp.asarray(b))
    along = np.sum(a * b, axis=1, keepdims=True) / np.sum(a * a, axis=1, keepdims=True)
    wanted = np.mean(b - along * a, axis=0)
    for normal in normals:
        np.testing.assert_allclose(normal, wanted / np.linalg.norm(wanted), rtol=1e-9)
