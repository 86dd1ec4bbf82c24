"""One step on several devices, by each of the ways that JAX has."""

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

DEVICES = 8
REPLICATED = P()
KINDS = ("shard_map", "shard_map without check_vma", "pmap", "vmap")


def run(kind, step, replicated, rows, out=REPLICATED, devices=DEVICES):
    """``step(replicated, *rows)`` over the axis ``data``, each device with its rows.

    ``out`` is the specification of what it returns, or a tree of them. What is
    replicated must be equal on all devices.
    """
    if kind.startswith("shard_map"):
        mapped = jax.shard_map(
            step,
            mesh=jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), *(P("data") for _ in rows)),
            out_specs=out,
            check_vma=kind == "shard_map",
        )
        return jax.jit(mapped)(replicated, *rows)
    shards = [x.reshape(devices, -1, *x.shape[1:]) for x in rows]
    axes = (None, *(0 for _ in rows))
    mapped = (
        jax.pmap(step, axis_name="data", in_axes=axes)
        if kind == "pmap"
        else jax.jit(jax.vmap(step, axes, axis_name="data"))
    )
    found = jax.device_get(mapped(replicated, *shards))

    def of_spec(spec, tree):
        if spec == P("data"):
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
        for x in jax.tree.leaves(tree):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        return jax.tree.map(lambda x: x[0], tree)

    return jax.tree.map(of_spec, out, found, is_leaf=lambda x: isinstance(x, P))
