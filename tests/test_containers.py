"""What parameters come in: containers, frameworks and files."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import problems
import pytest
from flax import nnx
from flax.training import train_state
from registry import BY_NAME, METHODS, OTHERS, each, every_one

import optax_sam

# One with caches and counters of each kind, and one with next to none.
some_methods = pytest.mark.parametrize(
    "method", [BY_NAME["vsam"], BY_NAME["asam"]], ids=lambda m: m.name
)


class Layer(NamedTuple):
    kernel: Any
    bias: Any


KERNEL = np.linspace(-1, 1, 6).reshape(3, 2)
BIAS = np.array([0.5, -0.5])
CONTAINERS = {
    "dict": {"kernel": KERNEL, "bias": BIAS},
    "list": [KERNEL, [BIAS]],
    "tuple": (KERNEL, (BIAS,)),
    "named tuple": Layer(KERNEL, BIAS),
    "with none": {"kernel": KERNEL, "bias": (BIAS, None), "rest": {}},
    "one array": KERNEL,
    "scalar": np.array(2.0),
    "scalars": {"a": np.array(2.0), "b": np.array(-1.0)},
    "zero-size leaf": {"kernel": KERNEL, "empty": np.zeros((0, 3))},
    "only zero-size": {"empty": np.zeros((0,))},
    "empty": {},
}


def cases():
    """Some methods with every container, and the others with the odd ones."""
    for method in METHODS + OTHERS:
        if method.variant:  # the same trees go through the same parts
            continue
        thorough = method.name in ("sam", "vsam", "esam", "msam", "sampa", "mesa")
        for name in CONTAINERS if thorough else ("with none", "zero-size leaf"):
            marks = [pytest.mark.slow] if method.seldom else []
            yield pytest.param(method, name, marks=marks, id=f"{method.name}-{name}")


@pytest.mark.parametrize(("method", "name"), [*cases()])
def test_containers(method, name):
    """The structure goes through, and what is emitted is the ascended gradient."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), CONTAINERS[name])
    grad_fn = jax.grad(lambda p: sum((jnp.sum(x**3) for x in jax.tree.leaves(p)), 0.0))
    mask = lambda p: jax.tree.map(lambda x: x.ndim != 1, p)
    tx = method.build(**({"mask": mask} if "mask" in method.static else {}))
    state = jax.eval_shape(tx.init, params)
    for ascend in (None, True, False):
        update = functools.partial(tx.update, grad_fn=grad_fn, ascend=ascend)
        d, after = jax.eval_shape(update, params, state, params)
        assert harness.kinds(d) == harness.kinds(params)
        assert harness.kinds(after) == harness.kinds(state)


@some_methods
@pytest.mark.parametrize("name", ["empty", "only zero-size", "zero-size leaf"])
def test_nothing_to_perturb(method, name):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), CONTAINERS[name])
    tx = method.build()
    update = jax.jit(
        lambda s: tx.update(params, s, params, grad_fn=lambda p: p, ascend=True)
    )
    d, state = update(tx.init(params))
    assert harness.is_finite((d, state))
    assert optax_sam.metrics(state)["survival"] == pytest.approx(1)
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


@some_methods
def test_python_and_numpy_numbers_as_parameters(method):
    tx = method.build()
    params = {"w": 1.0, "b": np.ones(2, np.float32)}
    grad_fn = jax.grad(lambda p: p["w"] ** 2 + jnp.sum(p["b"] ** 3))
    grads = jax.tree.map(np.asarray, grad_fn(params))
    d, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    assert d["w"] > 2
    assert np.all(d["b"] >= 3)
    assert optax_sam.metrics(state)["ascents"] == 1


# Frameworks. The same network and batches in each, against the plain functions.

SIZES = (3, 4, 2)


@functools.cache
def plainly_trained(method, steps=12):
    tx, step = harness.compiled(method)
    params = problems.mlp().params()
    return harness.run(step, params, tx.init(params), problems.mlp(), steps)


def cross_entropy(logits, y):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=-1)
    return -jnp.mean(picked)


def layers(params):
    return [params[f"layer{i}"] for i in range(len(SIZES) - 1)]


def assert_same_network(named, method):
    """``named``: the trained layers as (kernel, bias) pairs."""
    desired = [(x["kernel"], x["bias"]) for x in layers(plainly_trained(method)[0])]
    harness.assert_close_in_size(list(named), desired, 5e-6)


@some_methods
def test_flax_linen(method):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(SIZES[1], name="layer0")(x))
            return nn.Dense(SIZES[2], name="layer1")(x)

    problem, net = problems.mlp(), Net()
    state = train_state.TrainState.create(
        apply_fn=net.apply, params=problem.params(), tx=method.optimizer()
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
    assert_same_network(
        [(x["kernel"], x["bias"]) for x in layers(state.params)], method
    )
    # Readers look through the train state.
    assert optax_sam.metrics(state)["ascents"] > 0
    decision = optax_sam.ascends_next(plainly_trained(method)[1])
    assert optax_sam.ascends_next(state) == decision


@some_methods
def test_flax_nnx(method):
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
    optimizer = nnx.Optimizer(model, method.optimizer(), wrt=nnx.Param)
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

    plain = plainly_trained(method)[1]
    for t in range(12):
        variables = train_step(nnx.state((model, optimizer)), problem.batch(t))
        nnx.update((model, optimizer), variables)
    assert_same_network(
        [(m.kernel[...], m.bias[...]) for m in (model.layer0, model.layer1)], method
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


@some_methods
def test_equinox(method):
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
    tx = method.optimizer()

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
    assert_same_network([(x.weight, x.bias) for x in model.layers], method)
    wanted = optax_sam.metrics(plainly_trained(method)[1])
    assert optax_sam.metrics(state)["ascents"] == wanted["ascents"]


# Files.


def through_msgpack(state, path, target):
    del path
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def through_orbax(state, path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def resume(method, through, path):
    """Ten steps, a file, ten more; and the same without the file."""
    problem = problems.mlp()
    tx, step = harness.compiled(method)
    params = problem.params()
    half = harness.run(step, params, tx.init(params), problem, 10)
    whole = harness.run(step, *half, problem, 10, first=10)
    target = problem.params(), tx.init(problem.params())
    restored = through(half, path, target)
    harness.assert_equal(restored, half)
    kinds_after = jax.tree.map(jnp.asarray, restored)
    assert harness.kinds(kinds_after) == harness.kinds(half)
    readers = [optax_sam.metrics] if method.calls else []
    for reader in readers + [optax_sam.ascent_plan][: method.lookahead * method.calls]:
        harness.assert_equal(reader(restored[1]), reader(half[1]))
    resumed = harness.run(step, *restored, problem, 10, first=10)
    harness.assert_equal(resumed, whole)


@every_one
def test_resume_from_msgpack(method, tmp_path):
    resume(method, through_msgpack, tmp_path)


@each(*METHODS, *OTHERS, slow=lambda m: m.name not in ("sam", "vsam"))
def test_resume_from_orbax(method, tmp_path):
    resume(method, through_orbax, tmp_path)
