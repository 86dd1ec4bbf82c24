"""Tracks sharpness while SAM trains an MLP on digits.

Each step logs the numbers that its two passes give for free. Every 40 steps the largest
eigenvalue of the Hessian and its trace are measured on 512 fixed examples. All numbers
go to a CSV file, and with --logdir to TensorBoard too: through clu if clu and
TensorFlow are installed, else through tensorboardX. Needs flax and scikit-learn.

Expected: the curvature along SAM's step, which is free, stays below the largest
eigenvalue. The eigenvalue sinks with SAM's edge of stability, far below 2 / lr.

    python examples/track_sharpness.py --csv sharpness.csv --logdir runs/sam
"""

import argparse
import csv
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_sam
from optax_sam import sharpness

RHO, LEARNING_RATE = 0.1, 0.5
SHOWN = {
    "loss": "train/loss",
    "perturbed": "train/loss_perturbed",
    "curvature": "train/rayleigh_quotient",
    "lambda_max": "sharpness/lambda_max/eigenvalues/0",
    "trace": "sharpness/trace/estimate",
    "SAM's edge": "train/stability_edge_sam",
    "2 / lr": "train/stability_edge",
}

model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(10)])
tx = optax.chain(optax_sam.sam(RHO), optax.sgd(LEARNING_RATE))


def loss_fn(params, batch):
    x, y = batch
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def train_step(params, opt_state, batch):
    seen = []  # of each pass: the loss, its gradient, and the point

    def grad_fn(point):
        loss, grads = jax.value_and_grad(loss_fn)(point, batch)
        seen.append((loss, grads, point))
        return grads

    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    (loss, grads, _), (loss_perturbed, grads_perturbed, perturbed) = seen
    perturbation = optax.tree.sub(perturbed, params)
    more = dict(params=params, updates=updates, learning_rate=LEARNING_RATE)
    logged = sharpness.sam_metrics(
        loss, loss_perturbed, grads, grads_perturbed, perturbation, **more
    )
    return optax.apply_updates(params, updates), opt_state, logged


def tensorboard(logdir):
    """A function (step, dict of floats) that writes to TensorBoard."""
    try:
        from clu import metric_writers  # which imports TensorFlow

        return metric_writers.SummaryWriter(logdir).write_scalars
    except ImportError:
        from tensorboardX import SummaryWriter

        add = SummaryWriter(logdir).add_scalar
        return lambda step, row: [add(name, x, step) for name, x in row.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--csv", default="sharpness.csv")
    parser.add_argument("--logdir", help="for TensorBoard")
    args = parser.parse_args()

    x, y = (jnp.asarray(a) for a in load_digits(return_X_y=True))
    x, params = x / 16, model.init(jax.random.key(0), x)
    opt_state = tx.init(params)
    probe = sharpness.Probe(
        loss_fn,
        sharpness.stack_batches((x[:512], y[:512]), 128),
        every=40,
        measures={
            "lambda_max": sharpness.hessian_eigenvalues,
            "trace": functools.partial(sharpness.hessian_trace, num_matvecs=40),
        },
    )
    probe_state = probe.init(params)
    to_tensorboard = tensorboard(args.logdir) if args.logdir else None
    print("step", *(f"{title:>11}" for title in SHOWN))
    with open(args.csv, "w", newline="") as file:
        table = None
        for step in range(args.steps):
            measured, probe_state = probe(step, params, probe_state)
            params, opt_state, logged = train_step(params, opt_state, (x, y))
            row = sharpness.to_scalars(logged, "train/") | measured
            if table is None:  # the first step has all names
                table = csv.DictWriter(file, ["step", *row])
                table.writeheader()
            table.writerow({"step": step} | row)
            if to_tensorboard:
                to_tensorboard(step, row)
            if measured:
                print(f"{step:4}", *(f"{row[name]:11.3f}" for name in SHOWN.values()))


if __name__ == "__main__":
    main()
