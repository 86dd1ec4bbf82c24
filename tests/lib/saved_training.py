"""A training of every method at once that saves as it goes and resumes where it was.

``test_processes.py`` runs it as a process of its own::

    python tests/saved_training.py DIRECTORY STEPS EVERY

trains up to ``STEPS`` steps on all devices that there are, with parameters and state
sharded over them, and saves with Orbax after each ``EVERY`` steps. What it reached is
written to ``end.npz`` in the directory, under the paths of the leaves.
"""

import sys
from pathlib import Path

import harness
import jax
import numpy as np
import orbax.checkpoint as ocp
import problems
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS, OTHERS

STEPS, EVERY = 24, 3
# After as many steps in a process as drawn, and a little later; then in a write.
KILLS_BETWEEN, KILLS_IN_A_WRITE = 2, 1
TRAINED = [method for method in METHODS + OTHERS if not method.variant]
# Each axis of a parameter, and of a batch, divides by eight devices.
PROBLEM = problems.mlp((8, 8), batch_size=16)


def say(*words):
    """A line for who watches, on time."""
    print(*words, flush=True)


def main(directory, steps, every):
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    spread, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())

    def start(tx):
        params = jax.device_put(PROBLEM.params(), spread)
        state = tx.init(params)
        # Trees like the parameters are sharded as they are; the rest is on all devices.
        on_mesh = lambda x: x if x.sharding == spread else jax.device_put(x, whole)
        return params, jax.tree.map(on_mesh, state)

    txs = {method.name: method.optimizer() for method in TRAINED}
    runs = {name: start(tx) for name, tx in txs.items()}
    train_steps = {
        method.name: jax.jit(
            harness.make_step(txs[method.name], PROBLEM.loss_fn, method.extra_args),
            donate_argnums=(0, 1),
        )
        for method in TRAINED
    }
    ascents = {name: np.zeros(steps, np.int32) for name in runs}

    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (runs, ascents))
            runs, ascents = manager.restore(
                first, args=ocp.args.StandardRestore(target)
            )
        say("from", first)
        for t in range(first, steps):
            batch = jax.device_put(PROBLEM.batch(t), spread)
            for name, step in train_steps.items():
                runs[name] = step(*runs[name], batch)
                ascents[name][t] = harness.ascents(runs[name])
            if (t + 1) % every == 0:
                manager.save(t + 1, args=ocp.args.StandardSave((runs, ascents)))
            say("step", t + 1)
    reached = jax.tree_util.tree_flatten_with_path((runs, ascents))[0]
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in reached}
    np.savez(directory / "end.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
