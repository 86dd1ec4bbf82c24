"""Training with a framework's own means alone, against plain functions."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import problems
from flax import nnx
from registry import BY_NAME

import optax_sam


class Net(nnx.Module):
    def __init__(self, start):
        for name, layer in start.items():
            linear = nnx.Linear(*layer["kernel"].shape, rngs=nnx.Rngs(0))
            linear.kernel[...], linear.bias[...] = layer["kernel"], layer["bias"]
            setattr(self, name, linear)

    def weights(self):
        layers = {"layer0": self.layer0, "layer1": self.layer1}
        found = lambda m: {"kernel": m.kernel[...], "bias": m.bias[...]}
        return {name: found(m) for name, m in layers.items()}


def test_nnx_without_helpers_is_the_plain_loop():
    """With caches and counters of each kind, which the readers find."""
    method, problem, steps = BY_NAME["vsam"], problems.mlp(), 12
    model = Net(problem.params())
    optimizer = nnx.Optimizer(model, method.optimizer(), wrt=nnx.Param)
    # nnx.jit would do, but that of Flax 0.12.1 does not run on JAX 0.8.2.
    outer = nnx.graphdef((model, optimizer))

    @jax.jit
    def train_step(variables, batch):
        model, optimizer = nnx.merge(outer, variables)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params):
            net = nnx.merge(graphdef, params, rest, copy=True)
            return problem.loss_fn(net.weights(), batch)

        grad_fn = jax.grad(loss_fn)
        optimizer.update(model, grad_fn(params), grad_fn=grad_fn)
        return nnx.state((model, optimizer))

    tx, step = harness.compiled(method)
    start = problem.params()
    wanted, plain = harness.run(step, start, tx.init(start), problem, steps)
    for t in range(steps):
        variables = train_step(nnx.state((model, optimizer)), problem.batch(t))
        nnx.update((model, optimizer), variables)
    harness.assert_close_in_size(model.weights(), wanted, 5e-6)
    state = optimizer.opt_state
    metrics = optax_sam.metrics(state)
    assert all(isinstance(x, jax.Array) for x in metrics.values())
    harness.assert_close(metrics, optax_sam.metrics(plain), 1e-4)
    for reader in (optax_sam.ascends_next, optax_sam.ascent_plan):
        np.testing.assert_array_equal(reader(state), reader(plain))
    assert jnp.all(metrics["ascents"] > 0)
