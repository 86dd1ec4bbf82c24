"""Sparse SAM (Mi et al., arXiv 2210.05177), which is not in the library, on digits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import optax_sam


def sparse_sam(rho, share=0.5, when=optax_sam.when.always()):
    """Perturbs only the weights with the largest gradients: an ascent of our own."""

    def offset(g, state, params=None, **extra):
        sizes = jnp.concatenate([jnp.abs(x).ravel() for x in jax.tree.leaves(g)])
        least = jnp.quantile(sizes, 1 - share)
        kept = jax.tree.map(lambda x: jnp.where(jnp.abs(x) >= least, x, 0), g)
        return optax_sam.ascent.rescale(kept, optax_sam.ascent.norm(kept), rho), state

    ascent = optax.GradientTransformationExtraArgs(optax.init_empty_state, offset)
    return optax_sam.sharpness_aware(ascent, when, name="sparse_sam")


x, y = (jnp.asarray(a) for a in load_digits(return_X_y=True))
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
loss_fn = lambda p, x, y: cross_entropy(model.apply(p, x / 16), y).mean()
tx = optax.chain(sparse_sam(0.1, when=optax_sam.when.every_k(2)), optax.sgd(0.1))


@jax.jit
def train_step(params, opt_state, x, y):
    grad_fn = lambda p: jax.grad(loss_fn)(p, x, y)
    updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state


params = model.init(jax.random.key(0), x)
opt_state = tx.init(params)
for _ in range(200):
    params, opt_state = train_step(params, opt_state, x, y)
ascents = int(optax_sam.metrics(opt_state)["ascents"])
print(f"Loss {loss_fn(params, x, y):.3f} after 200 steps, {ascents} of them perturbed.")
