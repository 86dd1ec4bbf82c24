"""Equinox: the model's floats, its state, and all that stays as it is."""

import functools

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import over_devices
import pytest

import optax_sam
from optax_sam.equinox import grad_fn as gradient_of
from optax_sam.equinox import value_and_grad

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


def started():
    return eqx.nn.make_with_state(Net)(jax.random.key(0))


def test_it_is_sam_by_hand_with_the_statistics_of_passes_at_the_weights():
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(RATE))
    model, state = started()
    opt_state = tx.init(floats(model))

    @eqx.filter_jit
    def step(model, state, opt_state, key):
        both = value_and_grad(loss_fn, has_aux=True)
        (loss, state), grads, grad_fn = both(model, state, X, Y, key=key)
        params = floats(model)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    params, rest = eqx.partition(model, eqx.is_inexact_array)
    stats, structure = jax.tree.flatten(state)

    def pure_loss(params, stats, key):
        state = jax.tree.unflatten(structure, stats)
        loss, after = loss_fn(eqx.combine(params, rest), state, X, Y, key=key)
        return loss, jax.tree.leaves(after)

    by_hand = harness.sam_by_hand(pure_loss, RHO, RATE)
    carry = params, optax.tree.zeros_like(params), stats
    for t in range(4):
        key = jax.random.fold_in(KEY, t)
        carry, wanted = by_hand(carry, key)
        model, state, opt_state, loss = step(model, state, opt_state, key)
        assert loss == pytest.approx(float(wanted), rel=1e-5)
    harness.assert_close(floats(model), carry[0], 1e-5)
    harness.assert_close(jax.tree.leaves(state), carry[2], 1e-5)
    assert optax_sam.metrics(opt_state)["ascents"] == 4
    assert model.activation is jnp.tanh
    np.testing.assert_array_equal(model.order, np.arange(8)[::-1])


class Counter(eqx.Module):
    """It sets its state outside of any transformation."""

    weight: jax.Array
    order: jax.Array
    index: eqx.nn.StateIndex
    activation: object

    def __init__(self):
        self.weight, self.order = jnp.ones(2), jnp.arange(2)
        self.activation = jnp.tanh
        self.index = eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, state, *, x):
        count = state.get(self.index)
        loss = jnp.sum((1 + count) * self.weight**2 * x) / 2
        return loss, state.set(self.index, count + 1)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_state_may_be_set_once_and_each_pass_has_a_copy(scale):
    model, state = eqx.nn.make_with_state(Counter)()
    call, x = Counter.__call__, X[0, :2]
    again = gradient_of(call, model, state, has_aux=True, loss_scale=scale, x=x)
    both = value_and_grad(call, True, loss_scale=scale)
    (loss, after), grads, grad_fn = both(model, state, x=x)
    assert loss == pytest.approx(x.sum() / 2, rel=1e-6)
    assert (state.get(model.index), after.get(model.index)) == (0, 1)
    np.testing.assert_array_equal(grads.weight, x)
    # As the filtered functions of Equinox: None where there is no gradient.
    assert (grads.activation, grads.order) == (None, None)
    moved = jax.tree.map(lambda w: w + 0.3, floats(model))
    for gradient in (grad_fn, again, grad_fn):
        np.testing.assert_array_equal(gradient(model).weight, x)
        for at in (moved, eqx.combine(moved, model)):  # its floats, or a model
            found = gradient(at)
            np.testing.assert_allclose(found.weight, moved.weight * x, rtol=1e-6)
            assert (found.activation, found.order) == (None, None)
    model(state, x=x)  # by hand, after grad_fn has captured it
    np.testing.assert_array_equal(again(model).weight, x)


def test_a_part_of_the_model_trains():
    keys = jax.random.split(KEY)
    sizes = {"inner": (3, 4), "outer": (4, 2)}
    model = {
        name: eqx.nn.Linear(*size, key=key)
        for (name, size), key in zip(sizes.items(), keys, strict=True)
    }
    wrt = {"inner": False, "outer": True}
    loss_fn = lambda m, x: jnp.sum(m["outer"](m["inner"](x)) ** 2)
    _, grads, grad_fn = value_and_grad(loss_fn, wrt=wrt)(model, X[0])
    assert grads["inner"].weight is None
    params = eqx.filter(model, wrt)
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(RATE))
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    after = eqx.apply_updates(model, updates)
    assert np.any(after["outer"].weight != model["outer"].weight)
    np.testing.assert_array_equal(after["inner"].weight, model["inner"].weight)


def test_the_whole_model_in_place_of_its_floats():
    """As Optax's own weight decay takes it: what has no gradient stays as it is."""
    model, _ = started()
    some, g = floats(model), jax.tree.map(jnp.ones_like, floats(model))
    for tx in (
        optax.chain(optax.sgd(RATE), optax_sam.mesa(0.9)),
        optax.chain(optax.sgd(RATE), optax_sam.decay_after(0.1)),
    ):
        state = tx.init(some)
        harness.assert_equal(tx.update(g, state, model), tx.update(g, state, some))
    mesa = optax.chain(optax.sgd(RATE), optax_sam.mesa(0.9))
    _, state = mesa.update(g, mesa.init(some), some)
    whole = optax_sam.mesa_params(state, model)
    assert (whole.activation, whole.name) == (jnp.tanh, "net")
    np.testing.assert_array_equal(whole.order, model.order)
    harness.assert_equal(floats(whole), optax_sam.mesa_params(state, some))
    msam = optax_sam.msam(optax.sgd(RATE, momentum=0.9))
    with pytest.raises(ValueError, match=r"eqx.filter\(model, eqx.is_inexact_array\)"):
        optax_sam.msam_eval_params(msam.init(some), model)


def test_means_over_devices_of_a_state():
    """It is as long as the rows of a device, and averaged all the same.

    Without check_vma, under which JAX has no mean over a vmapped axis.
    """
    model, state = started()
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(state)

    def step(held, x, y, axis_name="data"):
        params, leaves = held
        model = eqx.combine(params, rest)
        state = jax.tree.unflatten(structure, leaves)
        both = value_and_grad(loss_fn, True, axis_name=axis_name)
        (loss, state), grads, grad_fn = both(model, state, x, y, key=KEY)
        moved = jax.tree.map(lambda w: w + 0.3, params)
        after = [x * 1.0 for x in jax.tree.leaves(state)]  # one is a flag
        return loss, after, floats(grads), floats(grad_fn(moved))

    kind, held = "shard_map without check_vma", (params, leaves)
    found = over_devices.run(kind, step, held, (X, Y), devices=2)
    alone = jax.jit(functools.partial(step, axis_name=None))
    halves = [alone(held, X[i], Y[i]) for i in (slice(8), slice(8, 16))]
    # Absolute: the gradient of a bias before BatchNorm is zero but for rounding.
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    harness.assert_close(found, wanted, 1e-5, atol=1e-7)


def test_it_says_what_to_write():
    with pytest.raises(ValueError, match="takes the loss function"):
        value_and_grad("mse")
    with pytest.raises(ValueError, match="wrt leaves no leaf.*loss_fn.model, batch"):
        value_and_grad(loss_fn, wrt=lambda x: False)(X, 1)
