"""Flax NNX: a perturbed pass that mutates nothing and draws the same dropout."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import over_devices
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_sam
import optax_sam.linen
import optax_sam.nnx

RHO, RATE = 0.3, 0.1
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
# BatchNorm subtracts the bias before it, which is thus trained by rounding alone.
ROUNDING = 1e-6


def sgd():
    return optax.sgd(RATE, momentum=0.9)


class Module(nnx.Module):
    """Its loss depends on masks, and on a count that each pass moves on."""

    def __init__(self, rate=0.5):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs if rate else None)
        self.outer = nnx.Linear(8, 2, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x, rngs=None):
        x = self.dropout(jnp.tanh(self.norm(self.inner(x))))
        before, self.calls[...] = self.calls[...], self.calls[...] + 1
        return self.outer(self.dropout(x, rngs=rngs)) * (1 + 0.01 * (before % 2))


def loss_fn(model, rngs=None, x=X, *, y=Y):
    loss = jnp.mean((model(x, rngs) - y) ** 2)
    return loss, {"loss": loss}


def step(model, optimizer, rngs=None):
    options = {"has_aux": True, "loss_scale": 1024.0}
    captured = optax_sam.nnx.grad_fn(loss_fn, model, rngs, **options)
    both = optax_sam.nnx.value_and_grad(loss_fn, **options)
    (_, metrics), grads, grad_fn = both(model, rngs)
    elsewhere = [f(nnx.state(model, nnx.Param)) for f in (captured, grad_fn)]
    optimizer.update(model, grads, grad_fn=grad_fn)
    return metrics["loss"], [grads, *elsewhere]


def optimized(tx, wrt=nnx.Param, rate=0.5):
    model = Module(rate)
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def arrays(node, *filters):
    return nnx.to_pure_dict(nnx.state(node, *filters))


def others(model):
    """All that is no parameter: statistics and random streams, keys as words."""
    raw = lambda x: jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x
    return jax.tree.map(raw, arrays(model, nnx.Not(nnx.Param)))


def test_it_is_sam_by_hand_with_one_mask_and_the_model_advances_once():
    model, optimizer = optimized(optax.chain(optax_sam.sam(RHO), sgd()))
    rngs, jitted = nnx.Rngs(dropout=3), nnx.jit(step)
    graphdef, params, rest = nnx.split((Module(), nnx.Rngs(dropout=3)), nnx.Param, ...)

    def pure_loss(params, rest):
        pair = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(*pair)[0], nnx.state(pair, nnx.Not(nnx.Param))

    by_hand = harness.sam_by_hand(pure_loss, RHO, RATE, 0.9)
    carry = params, optax.tree.zeros_like(params), rest
    for t in range(3):
        carry, wanted = by_hand(carry)
        loss, (grads, *elsewhere) = jitted(model, optimizer, rngs)
        assert loss == pytest.approx(float(wanted), rel=1e-5)
        # What was captured before the pass at the weights, which moved the model on.
        for found in map(nnx.to_pure_dict, elsewhere):
            harness.assert_close(found, nnx.to_pure_dict(grads), 1e-5, atol=ROUNDING)
        assert model.dropout.rngs.count[...] == rngs.dropout.count[...] == t + 1
    found, wanted = arrays(model, nnx.Param), nnx.to_pure_dict(carry[0])
    harness.assert_close(found, wanted[0], 1e-5, atol=ROUNDING)
    again = nnx.merge(graphdef, carry[0], carry[2])
    harness.assert_close(others((model, rngs)), others(again), 1e-5)
    assert model.calls[...] == 3


def test_readers_find_a_state_among_variables():
    tx = optax.chain(optax_sam.vsam(0.1, key=1), sgd())
    model, optimizer = optimized(tx)
    plain = tx.init(arrays(model, nnx.Param))
    for reader in (optax_sam.metrics, optax_sam.ascends_next, optax_sam.ascent_plan):
        harness.assert_equal(reader(optimizer.opt_state), reader(plain))


def test_a_part_of_the_model_trains():
    last = nnx.All(nnx.Param, nnx.PathContains("outer"))
    model, optimizer = optimized(optax.chain(optax_sam.sam(RHO), sgd()), wrt=last)
    before = arrays(model, nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        both = optax_sam.nnx.value_and_grad(lambda m: loss_fn(m)[0], wrt=last)
        _, grads, grad_fn = both(model)
        optimizer.update(model, grads, grad_fn=grad_fn)

    step(model, optimizer)
    after = arrays(model, nnx.Param)
    assert np.any(after["outer"]["kernel"] != before["outer"]["kernel"])
    harness.assert_equal(after["inner"], before["inner"])


@pytest.mark.slow
def test_training_resumes_from_a_file(tmp_path):
    """To the bit: parameters, statistics, random streams, and what vSAM remembers."""
    tx, jitted = optax.chain(optax_sam.vsam(0.1, key=1), sgd()), nnx.jit(step)
    pair, again = optimized(tx), optimized(tx)
    for _ in range(3):
        jitted(*pair)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(pair))
        checkpointer.wait_until_finished()
        nnx.update(again, checkpointer.restore(tmp_path / "state", nnx.state(again)))
    for _ in range(3):
        harness.assert_equal(jitted(*pair)[0], jitted(*again)[0])
    for model, optimizer in (pair, again):
        assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 6
        assert optimizer.step[...] == 6
        assert model.dropout.rngs.count[...] == 12  # two masks in a pass
    harness.assert_equal(others(pair), others(again))
    harness.assert_equal(*(arrays(model, nnx.Param) for model, _ in (pair, again)))


# On several devices.


@pytest.mark.parametrize("kind", over_devices.KINDS)
def test_gradients_and_statistics_are_averaged_over_devices(kind, x64):
    graphdef, state = nnx.split(Module(rate=0.0))
    floats = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = jax.tree.map(floats, state)

    def on_device(state, x, y, axis_name="data"):
        model = nnx.merge(graphdef, state)
        params = nnx.state(model, nnx.Param)
        moved = jax.tree.map(lambda w: w + 0.3, params)
        both = optax_sam.nnx.value_and_grad(loss_fn, True, axis_name=axis_name)
        (loss, aux), grads, grad_fn = both(model, None, x, y=y)
        found = grads, grad_fn(moved), nnx.state(model, nnx.BatchStat)
        kept = nnx.state(model, nnx.Param)
        return tuple(map(nnx.to_pure_dict, (*found, kept))), loss, aux

    found = over_devices.run(kind, on_device, state, (X, Y), devices=2)
    alone = jax.jit(functools.partial(on_device, axis_name=None))
    halves = [alone(state, X[i], Y[i]) for i in (slice(8), slice(8, 16))]
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    # Absolute: the gradient of a bias before BatchNorm is zero but for rounding.
    harness.assert_close(found, wanted, 1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", over_devices.KINDS)
def test_rows_of_a_batch_from_outside_stay_on_their_device(kind):
    graphdef, state = nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))

    def step(state, x):
        def loss_fn(model):
            outputs = model(x)
            return jnp.mean(outputs**2), outputs

        both = optax_sam.nnx.value_and_grad(loss_fn, True, axis_name="data")
        return both(nnx.merge(graphdef, state))[0][1]

    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    found = over_devices.run(kind, step, state, (x,), out=P("data"))
    wanted = nnx.merge(graphdef, state)(x)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_training_under_nnx_pmap():
    tx = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1))
    model, optimizer = optimized(tx, rate=0.0)

    @nnx.pmap(axis_name="data", in_axes=(None, None, 0, 0), out_axes=0)
    def step(model, optimizer, x, y):
        both = optax_sam.nnx.value_and_grad(loss_fn, True, axis_name="data")
        (loss, _), grads, grad_fn = both(model, None, x, y=y)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss

    shards = [x.reshape(8, 2, -1) for x in (X, Y)]
    losses = [step(model, optimizer, *shards) for _ in range(31)]
    assert np.all(losses[0] == losses[0][0])
    assert losses[-1][0] < losses[0][0]
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 31


@pytest.mark.parametrize(
    ("has_aux", "returned", "message"),
    [
        (True, lambda w: w, r"must return a pair, \(loss, aux\)"),
        (False, lambda w: (w, {}), r"return \(loss, aux\) and write .*has_aux=True"),
        (False, lambda w: w, "must be the module.*nnx.merge"),
    ],
)
def test_it_says_what_to_write(has_aux, returned, message):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    given = nnx.state(model) if "merge" in message else model
    loss = lambda model: returned(jnp.sum(model.kernel[...]))
    with pytest.raises(ValueError, match=message):
        optax_sam.nnx.value_and_grad(loss, has_aux=has_aux)(given)
