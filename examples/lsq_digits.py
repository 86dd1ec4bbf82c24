"""4-bit weights and activations: quantization-aware training with SAM and vSAM.

A network is trained on a few of scikit-learn's digits. Then its weights and activations
are quantized to 4 bits, and it is fine-tuned together with the quantizers' step sizes
(LSQ) by SGD, SAM and vSAM. Prints a table, within half a minute on two cores. Needs
flax, scikit-learn and rich too.

    python examples/lsq_digits.py
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam


def initial_step(values: jax.Array, q_p: int, axis: Any = None) -> jax.Array:
    """LSQ's first step size; ``axis``, those to average over, ``None`` for all."""
    mean = jnp.abs(values).mean(axis, keepdims=axis is not None)
    return 2 * mean / q_p**0.5


def quantize(
    values: jax.Array, step: jax.Array, q_n: int, q_p: int, scale: float
) -> jax.Array:
    """Rounds to multiples of ``step`` from ``-q_n`` to ``q_p``, differentiably.

    Args:
      values: what is quantized.
      step: the step size, of a shape that broadcasts.
      q_n: number of levels below zero.
      q_p: number of levels above zero.
      scale: factor on the gradient of ``step``, which sums over all values.

    Returns:
      The quantized values. For ``values`` their gradient is one within the range, its
      bounds included, and zero outside; rounding passes gradients straight through.
    """
    step = jnp.maximum(step, 1e-8)  # an update, or an offset, could cross zero
    value = jax.lax.stop_gradient(step)
    step = value + scale * (step - value)  # the same number: only its gradient changes
    level = values / step
    inside = (level >= -q_n) & (level <= q_p)
    level = jnp.where(inside, level, jnp.where(level > 0, q_p, -q_n))
    level += jax.lax.stop_gradient(jnp.round(level) - level)
    return level * step


class QuantizedDense(nn.Module):
    """A dense layer on a grid of ``2**bits`` levels; ``None`` is full precision.

    Its inputs must not be negative: pixels, or what a ReLU returns.
    """

    features: int
    bits: int | None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        size = inputs.shape[-1]
        shape = size, self.features
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.bits is not None:
            top = 2**self.bits - 1
            signed, unsigned = (top // 2 + 1, top // 2), (0, top)
            kernel = self.quantized("weight_step", kernel, *signed, kernel.size)
            # The features of an example count, whatever the size of the batch.
            inputs = self.quantized("input_step", inputs, *unsigned, size)
        return inputs @ kernel + bias

    def quantized(
        self, name: str, values: jax.Array, q_n: int, q_p: int, count: int
    ) -> jax.Array:
        """Quantizes with a learnt step, which starts from the values it first sees."""
        step = self.param(name, lambda key: initial_step(values, q_p))
        return quantize(values, step, q_n, q_p, (count * q_p) ** -0.5)


class Network(nn.Module):
    """Three hidden layers; quantized, the first and the last layer keep 8 bits."""

    bits: int | None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        outer = None if self.bits is None else 8
        hidden = nn.relu(QuantizedDense(64, outer)(images))
        for _ in range(2):
            hidden = nn.relu(QuantizedDense(64, self.bits)(hidden))
        return QuantizedDense(10, outer)(hidden)


def not_steps(params: Any) -> Any:
    """A mask of what SAM perturbs and decay shrinks: all but the step sizes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.endswith("_step"), params
    )


NUM_IMAGES = 320  # of 898 that are not tested on; with few, methods differ more
BATCH_SIZE = 32
PRETRAINING_RATE, RATE = 0.05, 0.02  # at 0.05 SAM's larger radii diverge, FP too

# Whether the network is quantized, and what stands before weight decay and SGD. Radii
# from 0.1, 0.2, 0.3, 0.5 and 0.7 (vSAM to 0.5) and windows of 10, 15, 20 and 30 steps:
# twelve seeds not used here, judged on the images that are neither trained on nor
# tested. SAM's 0.2 to 0.5 are equally good. 500 steps want vSAM's windows short.
SGD = optax.identity()
SAM = optax_sam.sam(rho=0.3, mask=not_steps)
VSAM = optax_sam.vsam(rho=0.2, window=15, mask=not_steps)
METHODS = {
    "FP + SGD": (False, SGD),
    "FP + SAM": (False, SAM),
    "LSQ + SGD": (True, SGD),
    "LSQ + SAM": (True, SAM),
    "LSQ + vSAM": (True, VSAM),
}


def make_fit(model: Network, member: Any, rate: float, num_steps: int) -> Any:
    """Compiles a whole training: a scan of the training step over its batches."""
    schedule = optax.cosine_decay_schedule(rate, num_steps)
    decay = optax.add_decayed_weights(5e-4, mask=not_steps)
    tx = optax.chain(member, decay, optax.sgd(schedule, momentum=0.9))
    tx = optax.with_extra_args_support(tx)  # SGD alone takes no grad_fn

    def train_step(state: Any, batch: Any) -> tuple[Any, None]:
        params, opt_state = state
        images, labels = batch

        def loss_fn(params: Any) -> jax.Array:
            logits = model.apply(params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        grad_fn = jax.grad(loss_fn)
        grads = grad_fn(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), None

    def fit(params: Any, batches: Any) -> Any:
        return jax.lax.scan(train_step, (params, tx.init(params)), batches)[0]

    return jax.jit(fit)


def train(num_seeds: int, num_epochs: int, bits: int, progress: Progress) -> Any:
    """Trains a full-precision network per seed, and fine-tunes it with all methods.

    Args:
      num_seeds: number of runs; a seed sets the images, the weights and the batches.
      num_epochs: epochs of the first training, and as many of each fine-tuning.
      bits: of the inner layers' weights and activations.
      progress: where to report.

    Returns:
      What was measured at the end, by method and name: lists over the seeds.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=0.5, stratify=labels, random_state=0
    )
    models = {False: Network(None), True: Network(bits)}
    num_steps = num_epochs * NUM_IMAGES // BATCH_SIZE
    pretrain = make_fit(models[False], SGD, PRETRAINING_RATE, num_steps)
    fine_tune = {
        name: make_fit(models[quantized], member, RATE, num_steps)
        for name, (quantized, member) in METHODS.items()
    }
    measured: Any = defaultdict(lambda: defaultdict(list))
    task = progress.add_task("", total=num_seeds * len(METHODS))
    for seed in range(num_seeds):
        progress.update(task, description=f"Seed {seed + 1} of {num_seeds}")
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        chosen = rng.permutation(len(images))[:NUM_IMAGES]
        order = np.concatenate([rng.permutation(chosen) for _ in range(num_epochs)])
        order = order.reshape(num_steps, BATCH_SIZE)
        batches = images[order], labels[order]
        params = models[False].init(key, batches[0][0])
        pretrained, _ = pretrain(params, batches)
        # The step sizes are what these parameters lack: Flax adds them, as it would in
        # `init`, from the weights and the activations of this batch.
        _, with_steps = models[True].apply(
            pretrained, batches[0][0], mutable="params", rngs=key
        )
        start = {False: pretrained, True: with_steps}
        for name, (quantized, member) in METHODS.items():
            params, opt_state = fine_tune[name](start[quantized], batches)
            logits = models[quantized].apply(params, test_images)
            row = {"accuracy": 100 * np.mean(logits.argmax(-1) == test_labels)}
            # SGD has no ascents to read.
            rate = member is not SGD and optax_sam.metrics(opt_state)["ascent_rate"]
            row["gradients"] = 1 + rate
            now, then = params["params"], start[quantized]["params"]
            if quantized:
                for kind in ("weight_step", "input_step"):
                    row[kind] = np.mean([now[k][kind] / then[k][kind] for k in now])
            for quantity, value in row.items():
                measured[name][quantity].append(float(value))
            progress.advance(task)
    return measured


def summary(values: Any, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread}"


def gains(measured: Any, name: str) -> np.ndarray:
    """By how much a method beats LSQ + SGD, seed by seed."""
    return np.subtract(measured[name]["accuracy"], measured["LSQ + SGD"]["accuracy"])


def results_table(measured: Any, bits: int) -> Table:
    """One line per method."""
    seeds = len(measured["LSQ + SGD"]["accuracy"])
    table = Table(
        "Method",
        title=f"{bits}-bit weights and activations, {NUM_IMAGES} training images",
        caption="Last epoch, mean ± standard deviation over the seeds"
        f" ({seeds}); differences are taken seed by seed. Step sizes relative to where"
        " they started, mean of the layers. FP: full precision.",
    )
    headers = "Test accuracy (%)", "vs. LSQ + SGD", "Gradients per step"
    for header in (*headers, "Weight steps", "Input steps"):
        table.add_column(header, justify="right")
    for name, values in measured.items():
        cells = [summary(values["accuracy"]), summary(gains(measured, name), "+")]
        cells.append(f"{np.mean(values['gradients']):.2f}")
        for kind in ("weight_step", "input_step"):
            cells.append(f"{np.mean(values[kind]):.2f}" if kind in values else "-")
        table.add_row(name, *cells)
    return table


def conclusion(measured: Any) -> str:
    """What the reader may conclude."""
    seeds = len(measured["LSQ + SGD"]["accuracy"])
    if seeds < 3:
        return "Too few seeds to tell the methods apart."
    wins = {k: f"{np.sum(gains(measured, k) > 0)} of {seeds}" for k in measured}
    cost = np.mean(measured["LSQ + vSAM"]["gradients"])
    return (
        f"SAM beats SGD on the quantized network in {wins['LSQ + SAM']} seeds for two"
        f" gradients per step, vSAM in {wins['LSQ + vSAM']} for {cost:.2f}. Compare"
        " FP + SAM with FP + SGD before calling this a matter of quantization."
    )


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs per method (10)")
    parser.add_argument("--epochs", type=int, default=50, help="of each training (50)")
    parser.add_argument("--bits", type=int, default=4, help="of the inner layers (4)")
    parser.add_argument("--quick", action="store_true", help="one seed, ten epochs")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs = 1, 10
    if min(args.seeds, args.epochs) < 1 or args.bits < 2:
        parser.error("--seeds and --epochs must be at least 1, and --bits 2")

    console = Console()
    with Progress(console=console, refresh_per_second=4) as progress:
        measured = train(args.seeds, args.epochs, args.bits, progress)
    console.print(results_table(measured, args.bits))
    console.print(conclusion(measured))


if __name__ == "__main__":
    main()
