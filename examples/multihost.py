"""vSAM on many hosts: the same program on each of them, on digits.

Each process loads its own rows of each batch. All processes save one checkpoint with
Orbax and continue from it, and the first one prints. docs/guide/hosts.md has the
commands for TPU pods, SLURM and others. Needs flax, orbax-checkpoint and scikit-learn.

    python examples/multihost.py                    # one process
    python examples/multihost.py --num-processes 2  # two on this machine, to try it
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from multihost_launch import start
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

BATCH_SIZE = 64  # of all processes together

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
tx = optax.chain(optax_sam.vsam(0.2, window=20), optax.sgd(0.1, momentum=0.9))


def loss_fn(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train_step(params, opt_state, x, y, ascend=None):
    """As on one device: means are over the whole batch, wherever its rows are."""
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    grad_fn = lambda p: jax.grad(loss_fn)(p, x, y)
    updates, opt_state = tx.update(
        grads, opt_state, params, grad_fn=grad_fn, ascend=ascend
    )
    return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(model.apply(params, x).argmax(-1) == y)


def train(epochs, out):
    multihost_utils.assert_equal(epochs, "Processes were started with other arguments.")
    # On many hosts, read only the part of the data set that the rows below need.
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), random_state=0
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def init():
        params = model.init(jax.random.key(0), jnp.zeros((1, 64)))
        return params, tx.init(params)

    # Arrays of all processes from the start, as Orbax wants them.
    params, opt_state = jax.jit(init, out_shardings=replicated)()
    step = optax_sam.dispatch(train_step, donate_argnums=(0, 1))
    load = jax.make_array_from_process_local_data

    first = 0
    if out:
        folder = epath.Path(out)  # also one in a bucket
        folder = folder if folder.is_absolute() else folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(folder / "checkpoints", options=options)
        if first := manager.latest_step() or 0:
            like = ocp.args.StandardRestore((params, opt_state))
            params, opt_state = manager.restore(first, args=like)

    for epoch in range(first + 1, epochs + 1):
        # All processes use one order, and each loads its part of the rows.
        order = np.random.default_rng(epoch).permutation(len(x))
        batches = order[: len(x) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        for rows in batches:
            own = np.split(rows, jax.process_count())[jax.process_index()]
            batch = (load(by_row, array[own]) for array in (x, y))
            params, opt_state, loss = step(params, opt_state, *batch)

        # All processes compute what one prints, because the programs use all devices.
        tested = accuracy(params, test_x, test_y)
        ascents = optax_sam.metrics(opt_state)["ascents"]
        if jax.process_index() == 0:
            shown = f"training loss {loss:.4f}, test accuracy {tested:.3f}, {ascents}"
            steps = f"{epoch * len(batches)} steps perturbed"
            print(f"Epoch {epoch:3}: {shown} of {steps}", flush=True)
        if out:
            manager.save(epoch, args=ocp.args.StandardSave((params, opt_state)))
    if out:
        manager.close()  # waits for the last checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", help="folder for checkpoints")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    start(args.coordinator, args.num_processes, args.process_id)
    train(args.epochs, args.out)


if __name__ == "__main__":
    main()
