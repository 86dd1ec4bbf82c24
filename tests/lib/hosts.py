"""The training runs that ``test_processes.py`` compares, and what a process does.

A run is a function of the devices alone. Whether they belong to one process or to
several makes no difference to it, so the test calls it for the numbers to expect, and
starts this file in several processes for the others:

    python tests/hosts.py localhost:PORT NUM_PROCESSES PROCESS_ID FOLDER RUN...
"""

import functools
import os
import signal
import sys

import harness
import jax
import numpy as np
import optax
import problems
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam

STEPS = 200
SAVED_AFTER, KILLED_AFTER = 60, 64


def replicated(x, mesh):
    return P()


def split(x, mesh):
    """A rule for whole train states, which splits vSAM's rings too."""
    return P("data") if x.ndim and x.shape[0] % mesh.size == 0 else P()


def vsam(**more):
    options = {"window": 8, "num_slices": 4, "sensitivity": 0.5, "max_rate": 0.6}
    return optax_sam.vsam(0.1, **options, key=3, **more)


def mapped(step, **options):
    """Each device's step on its own part of the batch, with its own perturbation."""
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    mesh = jax.tree.leaves(options["out_shardings"])[0].mesh
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=False), **options)


# Each: the member, where parameters and state are, and what compiles the step.
RUNS = {
    "conditional": (vsam, replicated, jax.jit),
    "dispatch": (vsam, replicated, optax_sam.dispatch),
    "m_sharpness": (functools.partial(vsam, axis_name="data"), replicated, mapped),
    "split": (vsam, split, jax.jit),
}


def train(name, devices, checkpoints=None):
    """Decisions, ascents so far after each step, and what there is in the end.

    With a folder for checkpoints, a run that finds none saves one and is killed, and a
    run that finds one continues from it.
    """
    member, spec, compiled = RUNS[name]
    problem = problems.mlp((16, 32, 8), batch_size=64)
    tx = optax.chain(member(), optax.sgd(0.1, momentum=0.9))
    axes = {"axis_types": (AxisType.Auto,), "devices": devices}
    mesh = jax.make_mesh((len(devices),), ("data",), **axes)

    def start(params):
        return params, tx.init(params)

    place = lambda x: NamedSharding(mesh, spec(x, mesh))
    shardings = jax.tree.map(place, jax.eval_shape(start, problem.params()))
    trained = jax.jit(start, out_shardings=shardings)(problem.params())
    step = compiled(
        harness.make_step(tx, problem.loss_fn),
        donate_argnums=(0, 1),
        out_shardings=shardings,
    )

    first = found = None
    if checkpoints is not None:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(checkpoints)
        found = manager.latest_step()
    if found is not None:
        trained = manager.restore(found, args=ocp.args.StandardRestore(trained))
    first = found or 0

    decisions, ascents = [], []
    for t in range(first, STEPS):
        decisions.append(bool(optax_sam.ascends_next(trained)))
        trained = step(*trained, own_part(problem, t, mesh))
        ascents.append(harness.ascents(trained))
        if checkpoints is not None and found is None:
            if t + 1 == SAVED_AFTER:
                manager.save(t + 1, args=ocp.args.StandardSave(trained))
                manager.wait_until_finished()
            if t + 1 == KILLED_AFTER and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    left = trained, optax_sam.metrics(trained)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    leaves = jax.tree_util.tree_leaves_with_path(everywhere(left))
    return {
        "decisions": np.array(decisions),
        "ascents": np.array(ascents),
        "plan": optax_sam.ascent_plan(trained),
    } | {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def on_one_device(name):
    """What is to be expected of any number of devices; in the precision of the call."""
    return train(name, jax.devices()[:1])


def assert_equal(actual, expected, first=0):
    """The same decisions, counters and keys; numbers to rounding."""
    assert 0.2 < np.mean(expected["decisions"]) < 0.8
    np.testing.assert_array_equal(expected["ascents"], np.cumsum(expected["decisions"]))
    assert set(actual) == set(expected)
    for key, value in expected.items():
        wanted = value[first:] if key in ("decisions", "ascents") else value
        tolerance = 1e-9 if np.issubdtype(value.dtype, np.floating) else 0
        np.testing.assert_allclose(
            actual[key], wanted, rtol=tolerance, atol=tolerance, err_msg=key
        )


def own_part(problem, t, mesh):
    """A batch of which each process has only its own rows in hand."""

    def load(stack):
        rows = np.split(stack[t % len(stack)], jax.process_count())
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, P("data")), rows[jax.process_index()]
        )

    return jax.tree.map(load, problem.stack)


def main(coordinator, num_processes, process_id, folder, *names):
    jax.distributed.initialize(coordinator, int(num_processes), int(process_id))
    jax.config.update("jax_enable_x64", True)
    for name in names:
        checkpoints = f"{folder}/checkpoints" if name == "split" else None
        found = train(name, jax.devices(), checkpoints)
        np.savez(f"{folder}/{name}_{process_id}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
