"""Use an installed optax_sam that has nothing but what it requires.

python -I try_installed.py VERSION
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import optax_sam  # noqa: E402

home = Path(optax_sam.__file__).parent
assert home.is_relative_to(sys.prefix), f"{home} is not the installed package"
assert (home / "py.typed").exists(), "py.typed is not installed"
installed = importlib.metadata.version("optax_sam")
assert optax_sam.__version__ == installed == sys.argv[1], (installed, sys.argv[1])
for name in ("equinox", "flax", "matplotlib"):
    assert name not in sys.modules, f"importing optax_sam imports {name}"
    assert importlib.util.find_spec(name) is None, f"{name} was installed, no extra"


def advice(use):
    """What the error says where an extra is missing."""
    try:
        use()
    except ImportError as error:
        return str(error)
    raise AssertionError("It works without its extra.")


assert "pip install equinox" in advice(lambda: optax_sam.equinox)
assert "pip install flax" in advice(lambda: optax_sam.linen)
assert "pip install flax" in advice(lambda: optax_sam.nnx)
w = jnp.ones(2)
assert optax_sam.sharpness.hvp(lambda w, _: w @ w, w, jnp.ones((1, 1)), w)[0] == 2
assert "pip install matplotlib" in advice(
    lambda: optax_sam.plots.loss_line([0, 1], [1, 0])
)


def loss_fn(w):
    """A parabola."""
    return jnp.sum((w - 1.0) ** 2)


tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))


@jax.jit
def train_step(w, opt_state):
    """The step of the README."""
    grad_fn = jax.grad(loss_fn)
    updates, opt_state = tx.update(grad_fn(w), opt_state, w, grad_fn=grad_fn)
    return optax.apply_updates(w, updates), opt_state


start = jnp.zeros(3)
w, opt_state = train_step(start, tx.init(start))
assert loss_fn(w) < loss_fn(start)
assert optax_sam.metrics(opt_state)["ascents"] == 1
versions = " ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax")
)
print(f"dist: optax_sam {installed} alone, with {versions}, trains")
