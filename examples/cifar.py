"""A trainer for CIFAR-10: vSAM, BatchNorm, checkpoints and TensorBoard.

Trains a small ResNet on crops and mirror images. Each epoch ends with a checkpoint, and
the same command continues from the last one. Accuracy, the share of perturbed steps and
the sharpness gap, which a perturbed step gives for free, go to TensorBoard. Running
statistics come from the pass at `w`. `dispatch` keeps convolutions out of conditionals,
where they are slow on a CPU. Needs flax, orbax-checkpoint, rich, scikit-learn and
tensorboardX too.

    python examples/cifar.py    # on digits as 32x32x3 images, so that it runs anywhere
    python examples/cifar.py --data cifar-10-batches-py --width 64 --epochs 100

--data is the Python archive's folder, or an .npz with train_x, train_y, test_x, test_y.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from cifar_parts import ResNet, augmented, load, normalized
from rich.progress import Progress
from tensorboardX import SummaryWriter

import optax_sam
import optax_sam.linen

BATCH_SIZE = 64


def train_step(state, x, y, ascend=None):
    seen = []  # of each pass: the loss, and the new statistics

    def loss_fn(params):
        variables = {"params": params, **state.model_state}
        logits, model_state = state.apply_fn(variables, x, True, mutable="batch_stats")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), model_state

    def grad_fn(params):
        found, grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        seen.append(found)
        return grads

    grads, options = grad_fn(state.params), dict(grad_fn=grad_fn, ascend=ascend)
    state = state.apply_gradients(grads=grads, model_state=seen[0][1], **options)
    loss, *perturbed = (loss for loss, _ in seen)  # the second on perturbed steps
    return state, (loss, *(x - loss for x in perturbed))


@jax.jit
def hits(state, x, y):
    variables = {"params": state.params, **state.model_state}
    return jnp.sum(state.apply_fn(variables, x, False).argmax(-1) == y)


def accuracy(state, x, y):
    parts = [slice(i, i + 500) for i in range(0, len(x), 500)]
    return 100 * sum(int(hits(state, normalized(x[p]), y[p])) for p in parts) / len(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 (digits)")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    args = parser.parse_args()

    x, y, test_x, test_y = load(args.data)
    steps = len(x) // BATCH_SIZE  # in an epoch
    rate = optax.cosine_decay_schedule(0.1, args.epochs * steps)
    tx = optax.chain(
        optax_sam.vsam(rho=0.1, window=20),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    )
    model = ResNet(args.width)
    variables = model.init(jax.random.key(0), normalized(x[:1]), train=False)
    state = optax_sam.linen.TrainState.create(
        apply_fn=model.apply,
        params=variables.pop("params"),
        tx=tx,
        model_state=variables,
    )
    step = optax_sam.dispatch(train_step, donate_argnums=0)
    manager = ocp.CheckpointManager(args.out.resolve() / "checkpoints")
    if first := manager.latest_step() or 0:
        state = manager.restore(first, args=ocp.args.StandardRestore(state))
    with Progress() as progress, SummaryWriter(str(args.out)) as writer:
        bar = progress.add_task("Training", total=(args.epochs - first) * steps)
        for epoch in range(first, args.epochs):
            rng, seen = np.random.default_rng(epoch), []
            for i in rng.permutation(len(x))[: steps * BATCH_SIZE].reshape(steps, -1):
                batch = normalized(augmented(rng, x[i], flips=args.data is not None))
                state, logged = step(state, batch, y[i])
                seen.append(logged)
                progress.advance(bar)
            row = {"loss": np.mean([loss for loss, *_ in seen])}
            if gaps := [gap for _, *gaps in seen for gap in gaps]:
                row["sharpness_gap"] = np.mean(gaps)
            row["ascent_rate"] = float(optax_sam.metrics(state)["ascent_rate"])
            row["test_accuracy"] = accuracy(state, test_x, test_y)
            for name, value in row.items():
                writer.add_scalar(name, value, epoch + 1)
            manager.save(epoch + 1, args=ocp.args.StandardSave(state))
            shown = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
            progress.console.print(f"Epoch {epoch + 1}: {shown}")
    manager.close()  # waits for the last checkpoint
    if args.data is None:
        print("Expected: above 80 % accuracy, less than 40 % of steps perturbed.")


if __name__ == "__main__":
    main()
