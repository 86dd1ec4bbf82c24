"""Gradient accumulation: SAM on a batch that would not fit, in 8 micro-batches.

SAM takes two gradients per step. Both are accumulated over the whole batch, inside
`grad_fn`. The optimizer does not change. docs/guide/accumulation.md says what
`optax.MultiSteps` would do instead. An MLP is trained on all digits at once, by SAM on
every second step. Needs flax, rich and scikit-learn too.

    python examples/accumulate.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import optax_sam

NUM_IMAGES, NUM_MICRO = 1792, 8
STEPS = 40

hidden = [layer for _ in range(3) for layer in (nn.Dense(256), nn.relu)]
model = nn.Sequential([*hidden, nn.Dense(10)])
every_other = optax_sam.when.every_k(2)
tx = optax.chain(optax_sam.sam(0.05, when=every_other), optax.sgd(0.1, momentum=0.9))


def loss_fn(params, batch):
    x, y = batch
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accumulated(gradients, num_micro):
    """The mean of ``gradients(params, batch)`` over parts of the batch, one by one."""

    def mean(params, batch):
        def add(total, part):
            return optax.tree.add(total, gradients(params, part)), None

        parts = jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), batch)
        # Sums in float32, even if parameters and gradients are bfloat16.
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape), params)
        return optax.tree.scale(1 / num_micro, jax.lax.scan(add, zeros, parts)[0])

    return mean


def make_step(gradients):
    def train_step(params, opt_state, batch):
        grad_fn = lambda p: gradients(p, batch)  # the whole batch, both times
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(train_step)


def main():
    images, labels = load_digits(return_X_y=True)
    x, y = (jnp.asarray(a[:NUM_IMAGES]) for a in (images / 16, labels))
    start = model.init(jax.random.key(0), x[:1])
    gradients = jax.grad(loss_fn)
    ways = {
        "the large batch": gradients,
        f"{NUM_MICRO} micro-batches": accumulated(gradients, NUM_MICRO),
    }
    ended, memory = {}, {}
    for name, way in ways.items():
        params, opt_state = start, tx.init(start)
        step = make_step(way).lower(params, opt_state, (x, y)).compile()
        memory[name] = step.memory_analysis().temp_size_in_bytes / 1e6
        for _ in track(range(STEPS), name.capitalize()):
            params, opt_state = step(params, opt_state, (x, y))
        ended[name] = params
        print(
            f"{name.capitalize()}: {memory[name]:.1f} MB of temporary memory,"
            f" loss {loss_fn(params, (x, y)):.5f} after {STEPS} steps,"
            f" {optax_sam.metrics(opt_state)['ascents']} of them perturbed"
        )
    large, small = ended.values()
    moved = optax.tree.norm(optax.tree.sub(large, start))
    apart = optax.tree.norm(optax.tree.sub(large, small)) / moved
    less = 1 - min(memory.values()) / max(memory.values())
    print(
        f"The weights differ by {apart:.0e} of the way that they moved; memory is"
        f" {less:.0%} less.\nExpected: below 1e-2 (rounding), and more than 50 %."
    )


if __name__ == "__main__":
    main()
