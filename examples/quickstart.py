"""Quick start: SGD and SAM on digits, some of whose labels are wrong, cell by cell.

Editors run the cells between `# %%`, and `jupytext --to ipynb examples/quickstart.py`
makes a notebook of it. Needs scikit-learn too.

    python examples/quickstart.py
"""

# %% [markdown]
# # SAM in five minutes
# Handwritten digits of 8 by 8 pixels. 40 % of the training labels are drawn again from
# all ten classes. A network that memorizes them is wrong about new digits.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

rng = np.random.default_rng(0)
x, y = load_digits(return_X_y=True)
order = rng.permutation(len(x))
x, y = jnp.asarray(x[order] / 16, jnp.float32), y[order]
train_x, test_x, test_y = x[:1000], x[1000:], y[1000:]
drawn_again = rng.random(1000) < 0.4
train_y = jnp.asarray(np.where(drawn_again, rng.integers(0, 10, 1000), y[:1000]))

# %% [markdown]
# ## The network
# Plain JAX, with two layers.


# %%
def init(key):
    first, second = jax.random.split(key)
    draw = jax.nn.initializers.he_normal()
    return {
        "first": {"kernel": draw(first, (64, 128)), "bias": jnp.zeros(128)},
        "second": {"kernel": draw(second, (128, 10)), "bias": jnp.zeros(10)},
    }


def logits(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


# %% [markdown]
# ## The training step
# SAM needs one line: `grad_fn` computes the gradient of the same batch at other
# parameters. `optax.with_extra_args_support` lets an optimizer without SAM ignore it.


# %%
def train(tx, epochs=60, batch_size=50):
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def train_step(params, opt_state, x, y):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x, y)
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    params = init(jax.random.key(0))
    opt_state = tx.init(params)
    for epoch in range(epochs):
        shuffled = np.random.default_rng(epoch).permutation(1000)
        for rows in shuffled.reshape(-1, batch_size):
            params, opt_state = train_step(
                params, opt_state, train_x[rows], train_y[rows]
            )
    return params, opt_state


def accuracy(params):
    return 100 * np.mean(np.argmax(logits(params, test_x), axis=1) == test_y)


# %% [markdown]
# ## Without SAM, and with it
# SAM goes before SGD in the chain. `rho` is the size of its perturbation, and the
# first number to tune. Held-out images chose both learning rates and `rho`. One seed
# shows little: `docs/results/accuracy.md` compares both on several tasks and seeds.

# %%
params, _ = train(optax.sgd(0.002, momentum=0.9))
print(f"SGD {accuracy(params):.1f} % test accuracy")

# %%
tx = optax.chain(optax_sam.sam(rho=0.2), optax.sgd(0.005, momentum=0.9))
params, opt_state = train(tx)
print(f"SAM {accuracy(params):.1f} % test accuracy")

# %% [markdown]
# If SAM works, the perturbed gradient is longer than the gradient at `w`.

# %%
for name in ("gradient_norm", "ascended_norm"):
    print(name, f"{optax_sam.metrics(opt_state)[name]:.2f}")
