"""LoRA with SAM that perturbs the adapters, or the weights with the adapters merged.

A network that knows the digits learns to read them turned by a quarter, from ten images
of each, through adapters of rank 4. SAM perturbs the adapters or the merged weights. Or
noise perturbs the merged weights, for one gradient evaluation. Other seeds choose each
radius with held-out images. Needs scikit-learn too.

    python examples/lora.py [--wrong 0.2] [--quick]
"""

import argparse

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

import optax_sam

RANK, SHOTS, BATCH_SIZE = 4, 10, 25
RHOS, SEARCH = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), range(100, 105)


def forward(params, x):
    *hidden, (kernel, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ kernel + bias


def loss_fn(params, batch):
    logits = forward(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def new_adapters(params, rng):
    """Two thin matrices for each layer, whose product is zero."""
    draw = lambda n: rng.normal(size=(n, RANK)) / n**0.5
    return [(draw(len(w)), np.zeros((RANK, len(bias)))) for w, bias in params]


def merge(params, adapters):
    """The merged weights, with which the network computes."""
    pairs = zip(params, adapters, strict=True)
    return [(w + a @ b, bias) for (w, bias), (a, b) in pairs]


def noise(rho):
    """The noise of Flat-LoRA: a share of the size of the weights of each output."""
    rule = optax_sam.ascent.filter_noise(rho / 128**0.5)  # so many inputs
    return optax_sam.sharpness_aware(rule)


METHODS = {  # the method, and whether it perturbs the merged weights
    "SAM of the adapters": (optax_sam.sam, False),
    "SAM of the merged weights": (optax_sam.sam, True),
    "noise on the merged weights": (noise, True),
}


@jax.jit(static_argnames=("make", "is_merged"))
def fit(make, is_merged, rho, params, adapters, batches):
    """A whole run, and the merged weights after it."""
    method, adam = make(rho), optax.adam(1e-2)
    both = lambda q: q, lambda q: merge(params, q)
    # From the adapters to what is perturbed, and from there to the network's weights.
    view, rest = reversed(both) if is_merged else both

    def train_step(state, batch):
        adapters, method_state, adam_state = state
        w, pull_back = jax.vjp(view, adapters)
        grad_fn = jax.grad(lambda w: loss_fn(rest(w), batch))
        grads = grad_fn(w)
        grads, method_state = method.update(grads, method_state, w, grad_fn=grad_fn)
        updates, adam_state = adam.update(*pull_back(grads), adam_state)
        return (optax.apply_updates(adapters, updates), method_state, adam_state), None

    state = adapters, method.init(view(adapters)), adam.init(adapters)
    return merge(params, jax.lax.scan(train_step, state, batches)[0][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds")
    parser.add_argument("--wrong", type=float, default=0.0, help="labels to redraw")
    options = parser.parse_args()
    steps, seeds = (30, 2) if options.quick else (300, 20)
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    known = MLPClassifier((128, 128), random_state=0).fit(x[:600], y[:600])
    params = [*zip(known.coefs_, known.intercepts_, strict=True)]
    x = np.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    held_out, test = slice(1000, 1400), slice(1400, None)

    def accuracies(method, rho, seeds, judge):
        for seed in seeds:
            rng = np.random.default_rng(seed)
            order = rng.permutation(range(600, 1000))
            few = np.concatenate([order[y[order] == c][:SHOTS] for c in range(10)])
            drawn = np.where(rng.random(len(y)) < options.wrong, rng.permutation(y), y)
            rows = rng.permuted(np.tile(few, (steps, 1)), axis=1)[:, :BATCH_SIZE]
            adapters = new_adapters(params, rng)
            tuned = fit(*method, rho, params, adapters, (x[rows], drawn[rows]))
            yield 100 * np.mean(forward(tuned, x[judge]).argmax(-1) == y[judge])

    base = np.array([*accuracies((optax_sam.sam, False), 0.0, range(seeds), test)])
    print(f"no perturbation: {base.mean():.1f} % right")
    for name, method in METHODS.items():
        means = [np.mean([*accuracies(method, r, SEARCH, held_out)]) for r in RHOS]
        rho = RHOS[np.argmax(means)]
        gain = np.array([*accuracies(method, rho, range(seeds), test)]) - base
        mean, error = gain.mean(), 2 * gain.std() / seeds**0.5
        print(f"{name}, rho {rho:g}: {mean:+.1f} ± {error:.1f}")


if __name__ == "__main__":
    main()
