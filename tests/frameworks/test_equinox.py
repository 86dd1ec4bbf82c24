"""The Equinox helpers: the model's floats, its state, and all that stays as it is."""

import functools
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
import optax_sam.equinox

RHO, RATE = 0.3, 0.1
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
KEY = jax.random.key(7)
floats = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)


class Net(eqx.Module):
    """With a function, an array of integers, a string, and a state."""

    inner: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    outer: eqx.nn.Linear
    order: jax.Array
    activation: object
    name: str

    def __init__(self, key):
        keys = jax.random.split(key)
        self.inner = eqx.nn.Linear(3, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch", momentum=0.9)
        self.dropout = eqx.nn.Dropout(0.5)
        self.outer = eqx.nn.Linear(8, 2, key=keys[1])
        self.order = jnp.arange(8)[::-1]
        self.activation, self.name = jnp.tanh, "net"

    def __call__(self, x, state, key):
        x, state = self.norm(self.inner(x), state)
        x = self.dropout(self.activation(x)[self.order], key=key)
        return self.outer(x), state


def loss_fn(model, state, x, y, *, key):
    keys = jax.random.split(key, len(x))
    on_batch = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
    prediction, state = on_batch(x, state, keys)
    return jnp.mean((prediction - y) ** 2), state


def started(tx):
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    return model, state, tx.init(floats(model))


def make_step(tx):
    def step(model, state, opt_state, x, y, key):
        value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, has_aux=True)
        (loss, state), grads, grad_fn = value_and_grad(model, state, x, y, key=key)
        params = floats(model)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    return step


def test_it_is_sam_by_hand_with_the_statistics_of_passes_at_the_weights():
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(RATE))
    model, state, opt_state = started(tx)
    step = eqx.filter_jit(make_step(tx))
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def by_hand(params, stats, key):
        def loss(params, leaves):
            again = jax.tree.unflatten(structure, leaves)
            value, after = loss_fn(eqx.combine(params, rest), again, X, Y, key=key)
            return value, jax.tree.leaves(after)

        (value, after), g = jax.value_and_grad(loss, has_aux=True)(params, stats)
        norm = optax.tree.norm(g)
        perturbed = jax.tree.map(lambda w, g: w + RHO * g / norm, params, g)
        g_s, _ = jax.grad(loss, has_aux=True)(perturbed, stats)
        return jax.tree.map(lambda w, g: w - RATE * g, params, g_s), after, value

    stats, structure = jax.tree.flatten(state)
    for t in range(4):
        key = jax.random.fold_in(KEY, t)
        params, stats, wanted = by_hand(params, stats, key)
        model, state, opt_state, loss = step(model, state, opt_state, X, Y, key)
        assert loss == pytest.approx(float(wanted), rel=1e-5)
    harness.assert_close(floats(model), params, 1e-5)
    harness.assert_close(jax.tree.leaves(state), stats, 1e-5)
    assert optax_sam.metrics(opt_state)["ascents"] == 4
    assert model.activation is jnp.tanh
    np.testing.assert_array_equal(model.order, np.arange(8)[::-1])


def test_without_jit_the_given_state_stays_valid():
    """``State.set`` makes its object invalid; each pass has a copy."""
    model, state, _ = started(optax.identity())
    value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, has_aux=True)
    (_, after), grads, grad_fn = value_and_grad(model, state, X, Y, key=KEY)
    harness.assert_equal(floats(grad_fn(floats(model))), floats(grads))
    old, new = (
        state.get(model.norm.batch_state_index),
        after.get(model.norm.batch_state_index),
    )
    assert np.all(old[0] == 0)
    assert np.any(new[0] != 0)
    # As the filtered functions of Equinox: None where there is no gradient.
    assert (grads.activation, grads.order, grads.name) == (None, None, None)


class Counter(eqx.Module):
    """It sets its state outside of any transformation."""

    weight: jax.Array
    index: eqx.nn.StateIndex

    def __init__(self):
        self.weight, self.index = jnp.ones(2), eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, x, state):
        count = state.get(self.index)
        return jnp.sum((1 + count) * self.weight * x), state.set(self.index, count + 1)


def test_a_state_may_be_set_once_and_each_pass_has_a_copy():
    model, state = eqx.nn.make_with_state(Counter)()
    call = lambda model, x, state: model(x, state)
    value_and_grad = optax_sam.equinox.value_and_grad(call, has_aux=True)
    again = optax_sam.equinox.grad_fn(call, model, X[0, :2], state, has_aux=True)
    (_, after), grads, grad_fn = value_and_grad(model, X[0, :2], state)
    for gradient in (grad_fn, again, grad_fn):
        np.testing.assert_array_equal(gradient(model).weight, grads.weight)
    np.testing.assert_allclose(grads.weight, X[0, :2], rtol=1e-6)
    assert (state.get(model.index), after.get(model.index)) == (0, 1)
    model(X[0, :2], state)  # by hand, after grad_fn has captured it
    np.testing.assert_array_equal(again(model).weight, grads.weight)


@pytest.mark.parametrize("given", ["filtered", "whole"])
def test_grad_fn_takes_a_model_or_its_floats(given):
    model, state, _ = started(optax.identity())
    moved = jax.tree.map(lambda w: w + 0.3, floats(model))
    wanted = eqx.filter_grad(loss_fn, has_aux=True)(
        eqx.combine(moved, model), jax.tree.map(lambda x: x, state), X, Y, key=KEY
    )[0]
    at = moved if given == "filtered" else eqx.combine(moved, model)
    options = {"has_aux": True, "key": KEY}
    alone = optax_sam.equinox.grad_fn(loss_fn, model, state, X, Y, **options)
    value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, has_aux=True)
    _, _, grad_fn = value_and_grad(model, state, X, Y, key=KEY)
    for found in (alone, grad_fn):
        harness.assert_close(floats(found(at)), floats(wanted), 1e-6)
    # The state that was captured is the old one, whatever becomes of the object.
    loss_fn(model, state, X, Y, key=KEY)
    harness.assert_close(floats(alone(at)), floats(wanted), 1e-6)


def test_a_part_of_the_model_trains():
    model, state, _ = started(optax.identity())
    wrt = jax.tree.map(lambda _: False, model)
    wrt = eqx.tree_at(lambda m: m.outer, wrt, replace=True)
    value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, True, wrt=wrt)
    _, grads, grad_fn = value_and_grad(model, state, X, Y, key=KEY)
    assert grads.inner.weight is None
    params = eqx.filter(model, wrt)
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(RATE))
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    after = eqx.apply_updates(model, updates)
    assert np.any(after.outer.weight != model.outer.weight)
    np.testing.assert_array_equal(after.inner.weight, model.inner.weight)


def on_two_devices(step, check_vma, held, x, y):
    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(held, x, y)


def mean_of_halves(step, held):
    halves = [step(held, X[i], Y[i]) for i in (slice(8), slice(8, 16))]
    return jax.tree.map(lambda a, b: (a + b) / 2, *halves)


def test_means_over_devices_of_a_state():
    """It is as long as the rows of a device, and averaged all the same.

    Without check_vma, under which JAX has no mean over a vmapped axis.
    """
    model, state, _ = started(optax.identity())
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(state)

    def step(held, x, y, axis_name="data"):
        params, leaves = held
        model = eqx.combine(params, rest)
        state = jax.tree.unflatten(structure, leaves)
        value_and_grad = optax_sam.equinox.value_and_grad(
            loss_fn, True, axis_name=axis_name
        )
        (loss, state), grads, grad_fn = value_and_grad(model, state, x, y, key=KEY)
        moved = jax.tree.map(lambda w: w + 0.3, params)
        after = [x * 1.0 for x in jax.tree.leaves(state)]  # one is a flag
        return loss, after, floats(grads), floats(grad_fn(moved))

    found = on_two_devices(step, False, (params, leaves), X, Y)
    alone = jax.jit(functools.partial(step, axis_name=None))
    # Absolute: the gradient of a bias before BatchNorm is zero but for rounding.
    halves = mean_of_halves(alone, (params, leaves))
    harness.assert_close(found, halves, 1e-5, atol=1e-7)


def test_means_over_devices_where_jax_tracks_what_varies():
    model = eqx.nn.MLP(3, 2, 8, 1, key=KEY)
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    loss_fn = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)

    def step(params, x, y, axis_name="data"):
        value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, axis_name=axis_name)
        loss, grads, grad_fn = value_and_grad(eqx.combine(params, rest), x, y)
        moved = jax.tree.map(lambda w: w + 0.3, params)
        return loss, floats(grads), floats(grad_fn(moved))

    found = on_two_devices(step, True, params, X, Y)
    alone = jax.jit(functools.partial(step, axis_name=None))
    harness.assert_close(found, mean_of_halves(alone, params), 1e-5)


def test_scaled_losses():
    model, state, _ = started(optax.identity())
    plain, scaled = (
        optax_sam.equinox.value_and_grad(loss_fn, True, loss_scale=scale)(
            model, state, X, Y, key=KEY
        )
        for scale in (None, 1024.0)
    )
    assert plain[0][0] == scaled[0][0]
    harness.assert_close(floats(scaled[1]), floats(plain[1]), 1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(loss_fn)(X, 1), "wrt leaves no leaf.*loss_fn.model, batch"),
        (lambda f: f("mse"), "takes the loss function"),
        (lambda f: f(lambda m: m.weight)(eqx.nn.Linear(2, 1, key=KEY)), "jnp.mean"),
    ],
)
def test_it_says_what_to_write(call, message):
    f = functools.partial(optax_sam.equinox.value_and_grad, wrt=eqx.is_inexact_array)
    if "wrt leaves" in message:
        f = functools.partial(f, wrt=lambda x: False)
    with pytest.raises(ValueError, match=message):
        call(f)


def test_equinox_is_optional():
    program = """
import sys
sys.modules["equinox"] = None
import optax_sam
try:
    optax_sam.equinox
except ImportError as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    advice = 'optax_sam.equinox needs Equinox: pip install "optax_sam[equinox]".\n'
    assert output == advice
