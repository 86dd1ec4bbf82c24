"""LookSAM: the part of the ascended gradient that the plain one lacked, reused."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
from methods_lib import (
    RHO,
    assert_apart,
    emitted,
    flat,
    flattened,
    on_a_quadratic,
    pair,
    trained,
    trained_by,
)
from reference import looksam
from trajectories import (
    Fresh,
    assert_descends_as_recorded,
    assert_met,
    base_optimizer,
    hyperparameters,
    runs,
    runs_of_package,
    ten_steps,
)

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
        Fresh(lambda: looksam.LookSAM(rho=0.3, alpha=0.7, k=3).direction),
    ),
    "a schedule": (
        optax_sam.looksam(0.2, k=4, alpha=ALPHA),
        Fresh(lambda: looking(ALPHA)),
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


@runs(3, "looksam")
def test_the_reference_meets_the_recorded_runs(name):
    h = hyperparameters(name)
    method = looksam.LookSAM(h["rho"], h["alpha"], h["k"])
    direction = lambda t, w, batch: method.direction(t, w, batch.grad)
    _, batches = assert_descends_as_recorded(name, direction)
    ascended = [len(batch.losses_taken) == 2 for batch in batches]
    np.testing.assert_array_equal(ascended, recorded.arrays(name)["is_sam_step"])


@runs_of_package(3, "looksam")
def test_the_recorded_runs_are_met(name, x64):
    h = hyperparameters(name)
    member = optax_sam.looksam(h["rho"], k=h["k"], alpha=h["alpha"])
    states = assert_met(name, optax.chain(member, base_optimizer(name)))
    decisions = optax_sam.ascends_next(states)[:-1]
    np.testing.assert_array_equal(decisions, recorded.arrays(name)["is_sam_step"])


def test_without_reuse_it_is_sam_k(x64):
    wanted = trained(optax_sam.sam(RHO, when=when.every_k(3)))
    member = functools.partial(optax_sam.looksam, RHO, k=3)
    harness.assert_close(trained(member(alpha=0.0)), wanted, 1e-12)
    assert_apart(trained(member(alpha=0.1)), wanted)


def test_on_every_step_it_is_sam(x64):
    member = optax_sam.looksam(RHO, k=1)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)


LOOKING = {
    "looksam": lambda: optax_sam.looksam(0.0, k=3),
    "look_layer_sam": lambda: optax_sam.look_layer_sam(0.0, k=3),
    "ae_looksam": lambda: optax_sam.ae_looksam(0.0, decay=0.5),
}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", LOOKING)
def test_without_radius_rounding_is_not_reused(name, precision):
    """The normal part is then rounding, which must not grow to a gradient."""
    with jax.enable_x64(precision == "float64"):
        base = optax.with_extra_args_support(optax.identity())
        tolerance = 1e-12 if precision == "float64" else 1e-5
        harness.assert_close(trained(LOOKING[name]()), trained(base), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_parallel_gradients_have_no_normal_part(dtype, scale, x64):
    member = optax_sam.looksam(RHO)
    for seed in range(3):
        g = harness.tree(seed, scale, dtype)
        for c in (3.0, 1 / 3, -0.7, 1e-4):
            g_s = jax.tree.map(lambda x: (c * x).astype(x.dtype), g)  # noqa: B023
            d, state = emitted(member, g, g_s)
            harness.assert_equal(d, g_s)
            harness.assert_equal(state.blend.normal, harness.like(g, 0.0))
            later = harness.tree(9, scale, dtype)
            d, _ = emitted(member, later, g_s, state, ascend=False)
            harness.assert_equal(d, later)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_normal_part_is_reused(dtype, x64):
    """The guard is against rounding alone."""
    g, other = pair(dtype=dtype)
    g_s = jax.tree.map(lambda a, b: a + 1e-3 * b, g, other)
    _, state = emitted(optax_sam.looksam(RHO), g, g_s)
    normal, a, b = map(flattened, (state.blend.normal, g, other))
    wanted = b - (a @ b) / (a @ a) * a
    tolerance = 1e-2 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(
        normal, wanted / np.linalg.norm(wanted), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_normal_part_is_normal_and_the_reuse_has_its_length(scale, x64):
    member = optax_sam.looksam(RHO, alpha=0.4)
    g, g_s = pair(scale)
    d, state = emitted(member, g, g_s, ascend=False)
    harness.assert_equal(d, g)  # before the first ascent nothing is reused
    d, state = emitted(member, g, g_s)
    harness.assert_equal(d, g_s)
    v = flat(state.blend.normal)
    # The epsilon beside the squared norm leaves 1e-12 / ||g||^2 of it.
    assert abs(v @ flat(g)) < (1e-12 + 1e-12 / scale**2) * 10 * scale
    np.testing.assert_allclose(np.linalg.norm(v), 1.0, rtol=1e-12)
    assert v @ flat(g_s) > 0
    for seed in range(3, 9):  # it stays, undamped, until the next ascent
        g = harness.tree(seed, scale)
        d, state = emitted(member, g, g_s, state, ascend=False)
        wanted = flat(g) + 0.4 * np.linalg.norm(flat(g)) * v
        np.testing.assert_allclose(flat(d), wanted, rtol=1e-12)


def test_the_normal_part_of_devices_is_the_mean_of_theirs(x64):
    """One for all, made of the normal part of each device's own pair."""
    member = optax_sam.looksam(RHO, axis_name="d")
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


def test_a_gradient_that_is_not_finite_passes_where_the_normal_part_is_reused():
    member = optax_sam.looksam(RHO)
    g, g_s = pair()
    _, state = emitted(member, g, g_s)
    for bad in (np.nan, np.inf):
        broken = harness.with_entry(g, bad)
        d, after = emitted(member, broken, g_s, state, ascend=False)
        harness.assert_equal(d, broken)
        harness.assert_equal(after.blend, state.blend)


def test_on_a_quadratic_the_normal_part_is_known(x64):
    """``g_v = rho (H u - (u'Hu) u)``, and none along an eigenvector."""
    h = problems.hessian()
    _, g, g_s, _, state = on_a_quadratic(optax_sam.looksam(RHO))
    u = g / np.linalg.norm(g)
    np.testing.assert_allclose(g_s - g, RHO * h @ u, rtol=1e-9, atol=1e-12)
    g_v = RHO * (h @ u - (u @ h @ u) * u)
    normal = flat(state.blend.normal)
    np.testing.assert_allclose(normal, g_v / np.linalg.norm(g_v), atol=1e-9)

    grad_fn = lambda w: jnp.asarray(h) @ w
    w = jnp.asarray(np.linalg.eigh(h)[1][:, 3])
    member = optax_sam.looksam(RHO)
    _, state = member.update(grad_fn(w), member.init(w), w, grad_fn=grad_fn)
    np.testing.assert_array_equal(state.blend.normal, 0)
