"""MESA: whole runs, and the average of the weights."""

import conformance
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import trajectory_runs as runs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import trajectory

import optax_sam


def test_mesa_is_the_authors_procedure(x64):
    tx = optax.chain(runs.sgd(), optax_sam.mesa(0.95))
    losses, w, state = runs.train(tx, runs.mesa_term)
    method = trajectory.MESA(recorded.initial("sgd"), 0.95, 2, 0.8, 5.0)
    wanted, wanted_w = runs.transcribed(method)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-10)
    assert recorded.deviation(w, wanted_w) < 1e-10
    conformance.hold(conformance.PAPER, w, wanted_w, len(losses))
    assert recorded.deviation(optax_sam.mesa_params(state), method.v) < 1e-10
    assert np.max(np.abs(losses - runs.plain())) > 1e-3


def test_average_of_the_weights(x64):
    """Against its closed form, with a decay that follows its own count."""
    decays, steps = [0.5, 0.9, 0.2], harness.tree(1)
    tx = optax.chain(
        optax.scale(-0.3), optax_sam.mesa(lambda count: jnp.array(decays)[count])
    )
    w = harness.tree(0)
    state = tx.init(w)
    average = w
    for decay in decays:
        updates, state = tx.update(steps, state, w)
        w = optax.apply_updates(w, updates)
        average = jax.tree.map(
            lambda v, x: decay * v + (1 - decay) * x,  # noqa: B023
            average,
            w,
        )
        harness.assert_close(optax_sam.mesa_params(state), average, 1e-14)
    assert int(state[1].count) == 3


def test_decay_zero_is_the_weights_and_one_the_first_weights():
    w, u = harness.tree(0), harness.tree(1)
    for decay, wanted in ((0.0, optax.apply_updates(w, u)), (1.0, w)):
        tx = optax_sam.mesa(decay)
        emitted, state = tx.update(u, tx.init(w), w)
        assert emitted is u
        harness.assert_equal(optax_sam.mesa_params(state), wanted)


def test_weights_that_are_not_finite_do_not_enter_the_average():
    w, u = harness.tree(0), harness.tree(1)
    tx = optax_sam.mesa(0.5)
    emitted, state = tx.update(harness.with_entry(u, np.nan), tx.init(w), w)
    assert not harness.is_finite(emitted)
    harness.assert_equal(state.average, w)
    assert int(state.count) == 1
    _, state = tx.update(u, state, w)
    harness.assert_close(
        state.average, jax.tree.map(lambda a, b: a + 0.5 * b, w, u), 1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_average_is_kept_in_float32_or_better(dtype, x64):
    w = harness.tree(0, dtype=dtype)
    u = harness.tree(1, scale=0.01, dtype=dtype)
    wide = jnp.promote_types(dtype, "float32")
    # A schedule in another precision does not change the state's.
    tx = optax_sam.mesa(lambda count: jnp.array(0.999, "float64"))
    state = tx.init(w)
    assert {x.dtype for x in jax.tree.leaves(state.average)} == {wide}
    for _ in range(20):
        _, after = tx.update(u, state, w)
        assert harness.kinds(after) == harness.kinds(state)
        state = after
    # Each step is far below what half precision resolves.
    cast = lambda tree: optax.tree.cast(tree, wide)
    new = cast(optax.apply_updates(w, u))
    wanted = jax.tree.map(
        lambda v, x: 0.999**20 * v + (1 - 0.999**20) * x, cast(w), new
    )
    harness.assert_close(optax_sam.mesa_params(state), wanted, 1e-6)
    back = optax_sam.mesa_params(state, w)
    assert harness.kinds(back) == harness.kinds(w)
    harness.assert_equal(back, optax.tree.cast(state.average, dtype))


def test_the_average_is_a_copy():
    w = harness.tree(0)
    state = optax_sam.mesa().init(w)
    pointers = lambda tree: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
    assert not pointers(w) & pointers(state)
    values = {"w": np.ones(3, np.float32)}
    state = optax_sam.mesa().init(values)
    values["w"][:] = 7
    assert np.all(state.average["w"] == 1)


def test_it_stands_after_an_optimizer_and_disturbs_it_in_no_form():
    runs.assert_stands_beside("last", optax_sam.mesa(0.7), optax.adamw(0.01))


def test_a_decay_put_into_the_state_counts():
    assert optax_sam.static_args(optax_sam.mesa) == ()
    injected = optax.inject_hyperparams(optax_sam.mesa)(decay=0.9)
    w = jnp.array([1.0])
    state = injected.init(w)
    state.hyperparams["decay"] = jnp.array(0.25)
    _, state = jax.jit(injected.update)(w, state, w)
    np.testing.assert_allclose(optax_sam.mesa_params(state), [1.75])


def test_the_average_keeps_the_sharding_of_the_parameters():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data")))
    tx = optax_sam.mesa(0.5)
    state = tx.init(w)
    for _ in range(2):
        assert state.average.sharding.is_equivalent_to(w.sharding, 1)
        _, state = jax.jit(tx.update)(w, state, w)
    np.testing.assert_allclose(state.average, 1.75 * np.arange(16.0))


# Errors.


@pytest.mark.parametrize("decay", [-0.1, 1.1, "much"])
def test_refused_decay(decay):
    with pytest.raises(ValueError, match=r"decay must be.*\[0\.0, 1\.0\]"):
        optax_sam.mesa(decay)


def test_mesa_needs_all_parameters():
    tx, params = optax_sam.mesa(), harness.tree()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"mesa needs the parameters: tx\.update"):
        tx.update(params, state)
    message = r"mesa is inside.*lack the other.*partition\(.*optax_sam\.mesa\(\)"
    with pytest.raises(ValueError, match=message):
        optax.masked(tx, {"layer": True, "gain": False}).init(params)
    placeholders = {**params, "gain": optax.MaskedNode()}
    with pytest.raises(ValueError, match=message):
        tx.update(placeholders, state, placeholders)
