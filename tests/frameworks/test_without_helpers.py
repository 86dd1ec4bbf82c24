"""The same network in each framework, by its own means, against plain functions."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
from flax import nnx
from flax.training import train_state
from registry import BY_NAME

import optax_sam

# With caches and counters of each kind.
VSAM = BY_NAME["vsam"]
SIZES = (3, 4, 2)


@functools.cache
def plainly_trained(steps=12):
    tx, step = harness.compiled(VSAM)
    params = problems.mlp().params()
    return harness.run(step, params, tx.init(params), problems.mlp(), steps)


def cross_entropy(logits, y):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=-1)
    return -jnp.mean(picked)


def layers(params):
    return [params[f"layer{i}"] for i in range(len(SIZES) - 1)]


def assert_same_network(named):
    """``named``: the trained layers as (kernel, bias) pairs."""
    desired = [(x["kernel"], x["bias"]) for x in layers(plainly_trained()[0])]
    harness.assert_close_in_size(list(named), desired, 5e-6)


def test_flax_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(SIZES[1], name="layer0")(x))
            return nn.Dense(SIZES[2], name="layer1")(x)

    problem, net = problems.mlp(), Net()
    state = train_state.TrainState.create(
        apply_fn=net.apply, params=problem.params(), tx=VSAM.optimizer()
    )

    @jax.jit
    def train_step(state, batch):
        x, y = batch
        loss_fn = lambda p: cross_entropy(state.apply_fn({"params": p}, x), y)
        grad_fn = jax.grad(loss_fn)
        updates, opt_state = state.tx.update(
            grad_fn(state.params), state.opt_state, state.params, grad_fn=grad_fn
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    for t in range(12):
        state = train_step(state, problem.batch(t))
    assert_same_network([(x["kernel"], x["bias"]) for x in layers(state.params)])
    # Readers look through the train state.
    assert optax_sam.metrics(state)["ascents"] > 0
    decision = optax_sam.ascends_next(plainly_trained()[1])
    assert optax_sam.ascends_next(state) == decision


def test_flax_nnx():
    class Net(nnx.Module):
        def __init__(self, start):
            rngs = nnx.Rngs(0)
            for i, layer in enumerate(layers(start)):
                linear = nnx.Linear(SIZES[i], SIZES[i + 1], rngs=rngs)
                linear.kernel[...] = layer["kernel"]
                linear.bias[...] = layer["bias"]
                setattr(self, f"layer{i}", linear)

        def __call__(self, x):
            return self.layer1(jnp.tanh(self.layer0(x)))

    problem = problems.mlp()
    model = Net(problem.params())
    optimizer = nnx.Optimizer(model, VSAM.optimizer(), wrt=nnx.Param)
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 0

    # nnx.jit would do, but that of Flax 0.12.1 does not run on JAX 0.8.2.
    outer = nnx.graphdef((model, optimizer))

    @jax.jit
    def train_step(variables, batch):
        x, y = batch
        model, optimizer = nnx.merge(outer, variables)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params):
            return cross_entropy(nnx.merge(graphdef, params, rest, copy=True)(x), y)

        grad_fn = jax.grad(loss_fn)
        optimizer.update(model, grad_fn(params), grad_fn=grad_fn)
        return nnx.state((model, optimizer))

    plain = plainly_trained()[1]
    for t in range(12):
        variables = train_step(nnx.state((model, optimizer)), problem.batch(t))
        nnx.update((model, optimizer), variables)
    assert_same_network(
        [(m.kernel[...], m.bias[...]) for m in (model.layer0, model.layer1)]
    )
    found, wanted = (optax_sam.metrics(s) for s in (optimizer.opt_state, plain))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert isinstance(value, jax.Array)
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4)
    decision = optax_sam.ascends_next(optimizer.opt_state)
    assert bool(decision) == bool(optax_sam.ascends_next(plain))
    np.testing.assert_array_equal(
        optax_sam.ascent_plan(optimizer.opt_state), optax_sam.ascent_plan(plain)
    )


def test_equinox():
    class Net(eqx.Module):
        layers: list
        activation: Any

        def __call__(self, x):
            first, last = self.layers
            return last(self.activation(first(x)))

    class Linear(eqx.Module):
        weight: jax.Array
        bias: jax.Array
        name: str

        def __call__(self, x):
            return x @ self.weight + self.bias

    problem = problems.mlp()
    parts = [Linear(x["kernel"], x["bias"], "dense") for x in layers(problem.params())]
    model = Net(parts, jnp.tanh)
    tx = VSAM.optimizer()

    @eqx.filter_jit
    def train_step(model, state, batch):
        x, y = batch
        params, static = eqx.partition(model, eqx.is_inexact_array)
        loss_fn = lambda p: cross_entropy(eqx.combine(p, static)(x), y)
        grad_fn = jax.grad(loss_fn)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for t in range(12):
        model, state = train_step(model, state, problem.batch(t))
    assert_same_network([(x.weight, x.bias) for x in model.layers])
    wanted = optax_sam.metrics(plainly_trained()[1])
    assert optax_sam.metrics(state)["ascents"] == wanted["ascents"]
