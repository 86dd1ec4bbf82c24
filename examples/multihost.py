"""vSAM on many hosts: the same program on each of them, on digits.

Each process loads its own rows of each batch, all of them save one checkpoint with
Orbax and continue from it, and the first prints. Needs flax, orbax-checkpoint and
scikit-learn too.

    python examples/multihost.py                    # one process
    python examples/multihost.py --num-processes 2  # two on this machine, to try it

Where there are many hosts, this file is started unchanged, with one folder for all:

    # A TPU pod: on each worker. JAX finds the others.
    gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all \
        --command "python examples/multihost.py --out gs://BUCKET/run"

    # SLURM: a task for each GPU. JAX finds the others.
    srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 \
        python examples/multihost.py --out /shared/run

    # Hosts without a scheduler: on each of them, with its own --process-id, 0 to 3.
    python examples/multihost.py --out /shared/run \
        --coordinator HOST_OF_PROCESS_0:1234 --num-processes 4 --process-id 0
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

BATCH_SIZE = 64  # of all processes together

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
tx = optax.chain(
    optax_sam.vsam(0.2, window=20, warmup_steps=40), optax.sgd(0.1, momentum=0.9)
)


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
    # On many hosts the data set would be read here, as far as the rows below need it.
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), random_state=0
    )
    if BATCH_SIZE % jax.device_count():
        sys.exit(f"{jax.device_count()} devices cannot share {BATCH_SIZE} rows evenly.")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def init():
        params = model.init(jax.random.key(0), jnp.zeros((1, 64)))
        return params, tx.init(params)

    # Arrays of all processes from the start, as Orbax wants them.
    params, opt_state = jax.jit(init, out_shardings=replicated)()
    step = optax_sam.dispatch(train_step, donate_argnums=(0, 1))

    first = 0
    if out:
        folder = epath.Path(out)  # also one in a bucket
        folder = folder if folder.is_absolute() else folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(folder / "checkpoints", options=options)
        if manager.latest_step() is not None:
            first = manager.latest_step()
            like = ocp.args.StandardRestore((params, opt_state))
            params, opt_state = manager.restore(first, args=like)

    for epoch in range(first + 1, epochs + 1):
        # The order is one for all processes, and of the rows each loads its part.
        order = np.random.default_rng(epoch).permutation(len(x))
        for rows in order[: len(x) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            own = np.split(rows, jax.process_count())[jax.process_index()]
            batch = [
                jax.make_array_from_process_local_data(by_row, array[own])
                for array in (x, y)
            ]
            params, opt_state, loss = step(params, opt_state, *batch)

        # Everyone computes what one prints: these are programs of all devices.
        row = {
            "epoch": epoch,
            "loss": float(loss),
            "test_accuracy": float(accuracy(params, test_x, test_y)),
            "ascent_rate": float(optax_sam.metrics(opt_state)["ascent_rate"]),
        }
        if jax.process_index() == 0:
            print(
                "Epoch {epoch:3}: training loss {loss:.4f}, test accuracy"
                " {test_accuracy:.3f}, ascents per step {ascent_rate:.2f}".format(
                    **row
                ),
                flush=True,
            )
        if out:
            manager.save(epoch, args=ocp.args.StandardSave((params, opt_state)))
            if jax.process_index() == 0:
                log = folder / "metrics.json"
                rows = json.loads(log.read_text()) if log.exists() else []
                log.write_text(json.dumps([*rows[: epoch - 1], row], indent=1))
    if out:
        manager.close()  # waits for the last checkpoint


def launch(count):
    """Starts this program on this machine once per process, without accelerators."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen([*command, str(i)], env=env) for i in range(count)]
    try:
        # The first failure ends the others, which would wait for it.
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return int(any(codes))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", help="folder for checkpoints and metrics")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    if args.num_processes and not args.coordinator:
        sys.exit(launch(args.num_processes))
    if args.coordinator:
        jax.distributed.initialize(
            args.coordinator, args.num_processes, args.process_id
        )
    else:
        try:
            jax.distributed.initialize()
        except ValueError:
            print("JAX finds no cluster: one process.", flush=True)
    train(args.epochs, args.out)


if __name__ == "__main__":
    main()
