"""``replica_drift``: a ``pmean`` that was forgotten is seen, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import over_devices
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam

ROWS = np.random.default_rng(0).normal(size=(over_devices.DEVICES * 4, 3))


def loss_fn(w, x):
    return jnp.mean((jnp.tanh(x @ w["w"]) + w["b"]) ** 2)


def trained(forgotten, x):
    """The drift of parameters and state after each of some steps."""
    tx = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1, momentum=0.9))
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    mean = lambda tree: jax.lax.pmean(tree, "data")

    def body(carry, _):
        params, opt_state = carry
        local = lambda p: jax.grad(loss_fn)(p, x)
        inside = local if forgotten == "in grad_fn" else lambda p: mean(local(p))
        g = local(params) if forgotten == "before" else mean(local(params))
        updates, opt_state = tx.update(g, opt_state, params, grad_fn=inside)
        carry = optax.apply_updates(params, updates), opt_state
        return carry, optax_sam.replica_drift(carry, "data")

    return jax.lax.scan(body, (params, tx.init(params)), length=10)[1]


@pytest.mark.parametrize("kind", ["pmap", "shard_map without check_vma"])
def test_a_forgotten_mean_is_seen(kind):
    forgotten = "nothing", "in grad_fn", "before"
    step = lambda _, x: [trained(what, x) for what in forgotten]
    drifts = over_devices.run(kind, step, (), (ROWS,))
    assert all(drift.dtype == jnp.float32 for drift in drifts)
    np.testing.assert_array_equal(drifts[0], 0)
    assert np.min(drifts[1:]) > 0.1


def drift(*copies, dtype=None):
    """Of one copy per lane."""
    stacked = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(a, dtype) for a in x]), *copies
    )
    of_lane = lambda t, _: optax_sam.replica_drift(t, "data")
    found = jax.jit(jax.vmap(of_lane, axis_name="data"))(
        stacked, jnp.arange(len(copies))
    )
    assert np.all((found == found[0]) | np.isnan(found))
    return float(found[0])


def test_the_largest_difference_of_a_sum_in_every_dtype():
    x, other = np.arange(6), np.arange(6) + 2 * (np.arange(6) == 5)
    for dtype in ("float32", "bfloat16", "float16", "int32", "uint8", "int4", "uint4"):
        assert drift(x, x, x, dtype=dtype) == 0
        assert drift(x, x, other, dtype=dtype) == 2
    a = {"w": jnp.ones(3), "b": jnp.zeros(2)}
    b = {"w": jnp.ones(3) + 0.5, "b": jnp.zeros(2) + 0.125}
    assert drift(a, b, a) == 1.5
    assert drift({"w": None}, {"w": None}) == 0


def test_differences_that_no_sum_shows():
    """Two numbers exchanged, one sign of a zero, the last bit under a large sum."""
    x = jnp.array([1.0, 2.0, 3.0, 1e8])
    zero = jnp.array([0.0])
    for a, b in (
        (x, x[jnp.array([1, 0, 2, 3])]),
        (x, x.at[0].set(1 + 2**-23)),
        (zero, -zero),
    ):
        assert 0 < drift(a, b) < 1e-20
    assert drift({"a": x, "b": 2 * x}, {"a": 2 * x, "b": x}) > 0


def test_numbers_that_are_not_finite():
    bad = jnp.array([1.0, jnp.nan])
    assert drift(bad, bad) == 0
    assert drift(bad, jnp.ones(2)) == np.inf
    assert drift(jnp.array([jnp.inf]), jnp.array([1.0])) == np.inf


@pytest.mark.parametrize("kind", ["pmap", "shard_map without check_vma"])
def test_numbers_that_are_not_finite_on_devices(kind):
    """A maximum over devices may ignore NaN."""
    step = lambda w, x: optax_sam.replica_drift(x / w, "data")
    for bad in (np.nan, np.inf, -np.inf):
        rows = np.ones(8, np.float32)
        assert over_devices.run(kind, step, jnp.ones(()), (rows,)) == 0
        rows[3] = bad
        assert over_devices.run(kind, step, jnp.ones(()), (rows,)) == np.inf


def test_keys_flags_and_complex_numbers(x64):
    keys = jax.random.split(jax.random.key(0), 2)
    same = {"key": keys[0], "flag": True, "z": 1 + 2j, "x": np.float64(1 / 3)}
    assert drift(same, same) == 0
    other = {"key": keys[1], "flag": False, "z": 1 + 3j, "x": np.nextafter(1 / 3, 1)}
    for name, value in other.items():
        assert drift(same, {**same, name: value}) > 0


def test_where_jax_knows_that_copies_are_equal():
    step = lambda w, x: [
        optax_sam.replica_drift(tree, "data") for tree in (w, {"w": w, "x": x})
    ]
    found = over_devices.run("shard_map", step, jnp.ones(3), (jnp.arange(8.0),))
    assert found == [0, 7]


def test_outside_of_a_map():
    with pytest.raises(ValueError, match=r"no axis 'data'.*shard_map"):
        optax_sam.replica_drift(jnp.ones(2), "data")


def test_it_sends_two_numbers_per_leaf():
    """And keeps no copy of a leaf: one number in, by the compiler's count."""
    mapped = jax.shard_map(
        lambda tree: optax_sam.replica_drift(tree, "data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    tree = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    text = jax.jit(mapped).lower(tree).compile().as_text()
    reduced = [line for line in text.splitlines() if " all-reduce(" in line]
    assert 1 <= len(reduced) <= 2
    assert all("64,64" not in line for line in reduced)
