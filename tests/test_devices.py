"""Eight simulated devices: the numbers and decisions of one device.

``conftest.py`` asks XLA for the eight devices before JAX starts.
"""

import functools
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS, each

import optax_sam

DEVICES = 8


@pytest.fixture(scope="module")
def mesh():
    assert len(jax.devices()) >= DEVICES
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def problem(dtype, num_batches=4):
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    params = {
        "layer0": {"kernel": normal(keys[0], 16, 32) / 4, "bias": jnp.zeros(32, dtype)},
        "layer1": {"kernel": normal(keys[1], 32, 8) / 6, "bias": jnp.zeros(8, dtype)},
    }
    data = normal(keys[2], num_batches, 64, 16), normal(keys[3], num_batches, 64, 8)
    return params, data


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["layer0"]["kernel"] + params["layer0"]["bias"])
    logits = hidden @ params["layer1"]["kernel"] + params["layer1"]["bias"]
    return jnp.mean((logits - y) ** 2)


def vsam(**more):
    options = {"window": 10, "num_slices": 5, "sensitivity": 0.5, "max_rate": 0.6}
    return optax_sam.vsam(0.1, **options, key=3, **more)


def make_step(tx):
    def train_step(params, opt_state, batch):
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    return train_step


def run_jit(tx, params, data, steps):
    """One jitted step at a time; final parameters, state and the decisions."""
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    opt_state, decisions = tx.init(params), []
    for t in range(steps):
        decisions.append(bool(optax_sam.ascends_next(opt_state)))
        batch = jax.tree.map(lambda x: x[t % x.shape[0]], data)  # noqa: B023
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state, decisions


def run_scan(tx, params, data, steps):
    """All steps in one donated ``lax.scan``."""

    def epochs(params, opt_state, data):
        def body(carry, t):
            ascends = optax_sam.ascends_next(carry[1])
            batch = jax.tree.map(lambda x: x[t % x.shape[0]], data)
            return make_step(tx)(*carry, batch), ascends

        return jax.lax.scan(body, (params, opt_state), jnp.arange(steps))

    params = jax.tree.map(jnp.copy, params)
    run = jax.jit(epochs, donate_argnums=(0, 1))
    (params, opt_state), decisions = run(params, tx.init(params), data)
    return params, opt_state, [bool(x) for x in decisions]


SHARDINGS = {
    "data_parallel": lambda leaf: P(),
    "fsdp": lambda leaf: P("data"),
}


@pytest.mark.parametrize("layout", SHARDINGS)
@pytest.mark.parametrize(
    "precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)
def test_sharded_training_equals_one_device(mesh, layout, precision):
    steps, tolerance = (200, 1e-9) if precision == "float64" else (20, 1e-5)
    with jax.enable_x64(precision == "float64"):
        params, data = problem(jnp.dtype(precision))
        tx = optax.chain(vsam(), optax.sgd(0.05, momentum=0.9))
        expected, expected_state, decisions = run_jit(tx, params, data, steps)
        assert precision == "float32" or 0.2 < np.mean(decisions) < 0.8

        shard = lambda leaf: NamedSharding(mesh, SHARDINGS[layout](leaf))
        placed = jax.device_put(params, jax.tree.map(shard, params))
        spread = jax.device_put(data, NamedSharding(mesh, P(None, "data")))
        for run in (run_jit, run_scan):
            actual, state, chosen = run(tx, placed, spread, steps)
            assert chosen == decisions
            for name in ("rate", "used"):
                np.testing.assert_allclose(
                    optax.tree.get(state, name),
                    optax.tree.get(expected_state, name),
                    atol=tolerance,
                )
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance),  # noqa: B023
                actual,
                expected,
            )


@each(*(m for m in METHODS if "axis_name" in m.static))
def test_nothing_that_stays_varies_over_devices(mesh, method):
    """By JAX's types, for which ``out_specs=P()`` is a proof: nothing is run.

    With the parameters themselves for ``update``, so that their decay is not one of a
    device, and with leaves that are not perturbed.
    """
    params, data = problem(jnp.float32)
    kernels = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    member = method.build(axis_name="data", mask=kernels)
    tx = optax.chain(member, optax.add_decayed_weights(0.1))

    def emitted(params, state, batch, ascend):
        local = jax.lax.pcast(params, "data", to="varying")
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        return tx.update(grad_fn(local), state, params, grad_fn=grad_fn, ascend=ascend)

    state = jax.eval_shape(tx.init, params)
    for ascend in (None, True, False):
        mapped = jax.shard_map(
            functools.partial(emitted, ascend=ascend),
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
        )
        batch = jax.tree.map(lambda x: x[0], data)
        d, after = jax.eval_shape(mapped, params, state, batch)
        assert harness.kinds(d) == harness.kinds(params)
        assert harness.kinds(after) == harness.kinds(state)


def test_one_bad_device_rejects_the_ascent_for_all(mesh):
    params, data = problem(jnp.float32)
    tx = optax_sam.sam(0.1, axis_name="data")

    def emitted(params, batch):
        local = jax.lax.pcast(params, "data", to="varying")
        g = jax.grad(loss_fn)(local, batch)
        # Only device 3 has a second gradient that is not finite.
        bad = jnp.where(jax.lax.axis_index("data") == 3, jnp.nan, 1.0)
        grad_fn = lambda p: jax.tree.map(lambda x: x * bad, jax.grad(loss_fn)(p, batch))
        d, state = tx.update(g, tx.init(params), local, grad_fn=grad_fn)
        return d, jax.lax.pmean(g, "data"), state.num_rejected

    d, g, rejected = jax.jit(
        jax.shard_map(emitted, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )(params, jax.tree.map(lambda x: x[0], data))
    assert int(rejected) == 1
    jax.tree.map(np.testing.assert_array_equal, d, g)


def test_a_gradient_summed_already_is_refused(mesh):
    params, data = problem(jnp.float32)
    tx = optax_sam.sam(0.1, axis_name="data")

    def emitted(params, batch):
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)

    with pytest.raises(ValueError, match=re.escape("pcast(params, 'data', to=\"var")):
        jax.jit(
            jax.shard_map(emitted, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        )(params, jax.tree.map(lambda x: x[0], data))


def test_averaging_by_hand_gives_one_perturbation_for_all(mesh):
    params, data = problem(jnp.float32)
    batch = jax.tree.map(lambda x: x[0], data)
    tx = optax_sam.sam(0.1)
    grad = jax.grad(loss_fn)
    expected, _ = tx.update(
        grad(params, batch), tx.init(params), params, grad_fn=lambda p: grad(p, batch)
    )

    def emitted(params, batch):
        def grad_fn(p):
            p = jax.lax.pcast(p, "data", to="varying")
            return jax.lax.pmean(grad(p, batch), "data")

        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    actual = jax.jit(
        jax.shard_map(emitted, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )(params, batch)
    harness.assert_close_in_size(actual, expected, 5e-6)


def all_reduced_elements(compiled):
    """Numbers sent through all-reduces of a compiled program."""
    total = 0
    for line in compiled.as_text().splitlines():
        if match := re.search(r"= (.*?) all-reduce(?:-start)?\(", line):
            for shape in re.findall(r"\[([\d,]*)\]", match[1]):
                total += int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


def test_communication_is_one_reduction_per_gradient(mesh):
    params, data = problem(jnp.float32)
    batch = jax.tree.map(lambda x: x[0], data)
    size = sum(x.size for x in jax.tree.leaves(params))
    scalars = 20

    def elements(method, ascend):
        tx = optax.chain(method, optax.sgd(0.05))

        def train_step(params, opt_state, batch):
            local = jax.lax.pcast(params, "data", to="varying")
            grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
            updates, opt_state = tx.update(
                grad_fn(local), opt_state, local, grad_fn=grad_fn, ascend=ascend
            )
            return optax.apply_updates(params, updates), opt_state

        mapped = jax.shard_map(
            train_step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
        )
        lowered = jax.jit(mapped).lower(params, tx.init(params), batch)
        return all_reduced_elements(lowered.compile())

    # m-sharpness averages what is emitted, once, and a cached tree once more.
    sam = optax_sam.sam(0.1, axis_name="data")
    assert size <= elements(sam, True) <= size + scalars
    assert size <= elements(sam, False) <= size + scalars
    assert 2 * size <= elements(vsam(axis_name="data"), True) <= 2 * size + scalars
    assert size <= elements(vsam(axis_name="data"), False) <= size + scalars


def test_pmap_smoke():
    """What is carried by each device is the same, and that of ``vmap`` on one."""
    params, data = problem(jnp.float32)
    member = optax_sam.looksam(0.1, k=2, axis_name="data")
    step, start = make_step(member), (params, member.init(params))
    on_one = jax.jit(jax.vmap(step, (None, None, 0), None, axis_name="data"))
    on_each = jax.pmap(step, axis_name="data")
    copies = lambda tree: jax.tree.map(lambda x: np.stack([x] * DEVICES), tree)
    expected, found = start, copies(start)
    for t in range(4):
        shards = [x[t].reshape(DEVICES, -1, *x.shape[2:]) for x in data]
        expected, found = on_one(*expected, shards), on_each(*found, shards)
    found = jax.device_get(found)
    harness.assert_equal(found, copies(jax.tree.map(lambda x: x[0], found)))
    # Absolute: the normal that is kept is a difference of nearly equal gradients.
    harness.assert_close(found, copies(expected), 0, atol=1e-5)
