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


def vsam():
    # Quick to choose: windows of ten steps, so both kinds of step occur.
    method = optax_sam.vsam(0.1, window=10, num_slices=5, sensitivity=0.5, key=1)
    return optax.chain(method, sgd())


class Module(nnx.Module):
    def __init__(self, dropout=0.5):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(jnp.tanh(self.norm(self.inner(x)))))


def loss_fn(model, x=X, *, y=Y):
    loss = jnp.mean((model(x) - y) ** 2)
    return loss, {"loss": loss}


def step(model, optimizer, ascend=None):
    value_and_grad = optax_sam.nnx.value_and_grad(loss_fn, has_aux=True)
    (_, metrics), grads, grad_fn = value_and_grad(model)
    optimizer.update(model, grads, grad_fn=grad_fn, ascend=ascend)
    return metrics["loss"]


def optimized(tx, wrt=nnx.Param):
    model = Module()
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def arrays(node, *filters):
    return nnx.to_pure_dict(nnx.state(node, *filters))


def others(model):
    """All that is no parameter: statistics and random streams, keys as words."""
    raw = lambda x: jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x
    return jax.tree.map(raw, arrays(model, nnx.Not(nnx.Param)))


def test_it_is_sam_by_hand_and_the_model_advances_once():
    model, optimizer = optimized(optax.chain(optax_sam.sam(RHO), sgd()))
    graphdef, params, rest = nnx.split(Module(), nnx.Param, ...)

    def pure_loss(params, rest):
        model = nnx.merge(graphdef, params, rest)
        return loss_fn(model)[0], nnx.state(model, nnx.Not(nnx.Param))

    by_hand = harness.sam_by_hand(pure_loss, RHO, RATE, 0.9)
    carry, jitted = (params, optax.tree.zeros_like(params), rest), nnx.jit(step)
    for t in range(3):
        carry, loss = by_hand(carry)
        assert jitted(model, optimizer) == pytest.approx(float(loss), rel=1e-5)
        assert model.dropout.rngs.count[...] == t + 1
    found, wanted = arrays(model, nnx.Param), nnx.to_pure_dict(carry[0])
    harness.assert_close(found, wanted, 1e-5, atol=ROUNDING)
    harness.assert_close(
        others(model), others(nnx.merge(graphdef, carry[0], carry[2])), 1e-5
    )


@pytest.mark.slow
def test_nnx_statistics_equal_one_clean_pass_exactly():
    model, optimizer = optimized(optax.chain(optax_sam.sam(RHO), sgd()))
    clean = Module()
    nnx.grad(loss_fn, has_aux=True)(clean)
    step(model, optimizer, ascend=True)  # outside jit
    harness.assert_equal(others(model), others(clean))
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 1


class Revealing(nnx.Module):
    """Its gradient is 2 where dropout keeps and 0 elsewhere, plus 10 times a count."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(32))
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, rngs=None):
        before = self.calls[...]
        self.calls[...] = before + 1
        w = self.w[...]
        return jnp.sum(self.dropout(w, rngs=rngs) + 10 * before * w)


@pytest.mark.parametrize("given", ["inside", "as an argument"])
def test_nnx_second_pass_has_the_mask_and_the_state_of_the_first(given):
    model, rngs, masks = Revealing(), nnx.Rngs(dropout=3), []
    args = () if given == "inside" else (rngs,)
    value_and_grad = optax_sam.nnx.value_and_grad(lambda model, *args: model(*args))
    moved = nnx.State({"w": 1.5 * jnp.ones(32)})
    for t in range(3):
        _, grads, grad_fn = value_and_grad(model, *args)
        for _ in range(2):
            np.testing.assert_array_equal(grad_fn(moved)["w"], grads["w"][...])
        assert set(np.unique(grads["w"][...])) == {10 * t, 10 * t + 2}
        assert model.calls[...] == t + 1
        stream = model.dropout.rngs if given == "inside" else rngs.dropout
        assert stream.count[...] == t + 1
        masks.append(grads["w"][...] - 10 * t)
    assert np.any(masks[0] != masks[1])


def test_grad_fn_captures_the_moment():
    """Why it has to be called before the clean pass."""
    model, loss = Revealing(), lambda model: model()
    params = nnx.State({"w": jnp.ones(32)})
    before = optax_sam.nnx.grad_fn(loss, model)
    grads = nnx.grad(loss)(model)["w"][...]
    after = optax_sam.nnx.grad_fn(loss, model)
    np.testing.assert_array_equal(before(params)["w"], grads)
    assert np.all(after(params)["w"] - grads >= 8)


@pytest.mark.slow
def test_vsam_jitted_and_dispatched():
    steps, jitted = 40, nnx.jit(step)
    model, optimizer = optimized(vsam())
    for _ in range(steps):
        jitted(model, optimizer)

    # Modules are trees, so a step that returns them can be compiled by JAX itself.
    @optax_sam.dispatch
    def dispatched(model, optimizer, ascend=None):
        loss = step(model, optimizer, ascend=ascend)
        return model, optimizer, loss

    two, two_optimizer = optimized(vsam())
    for _ in range(steps):
        two, two_optimizer, _ = dispatched(two, two_optimizer)
    found, wanted = (
        optax_sam.metrics(x.opt_state)["ascents"] for x in (two_optimizer, optimizer)
    )
    assert 20 < found == wanted < steps
    assert two.dropout.rngs.count[...] == steps
    found, wanted = (arrays(m, nnx.Param) for m in (two, model))
    harness.assert_close(found, wanted, 1e-3, atol=10 * ROUNDING)
    harness.assert_close(others(two), others(model), 1e-3)


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


def test_msam_parameters_go_into_the_model():
    """The recipe of docs/flax.md: then statistics are estimated at them."""
    model, optimizer = optimized(optax_sam.msam(sgd(), rho=3.0))
    nnx.jit(step)(model, optimizer)
    before, live = arrays(model, nnx.Param), nnx.state(model, nnx.Param)
    nnx.update(model, optax_sam.msam_eval_params(optimizer.opt_state, live))
    after = arrays(model, nnx.Param)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, before, after))
    assert moved == pytest.approx(3.0, rel=1e-4)


@pytest.mark.slow
def test_training_resumes_from_a_file(tmp_path):
    """To the bit: parameters, statistics, random streams, and what vSAM remembers."""
    jitted, model, optimizer = nnx.jit(step), *optimized(vsam())
    for _ in range(3):
        jitted(model, optimizer)
    again, its_optimizer = optimized(vsam())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        target = nnx.state((again, its_optimizer))
        restored = checkpointer.restore(tmp_path / "state", target)
    nnx.update((again, its_optimizer), restored)
    for pair in ((model, optimizer), (again, its_optimizer)):
        for _ in range(3):
            jitted(*pair)
    for node in (lambda m, o: others(m), lambda m, o: arrays(m, nnx.Param)):
        harness.assert_equal(node(again, its_optimizer), node(model, optimizer))
    harness.assert_equal(arrays(its_optimizer), arrays(optimizer))
    assert optax_sam.metrics(its_optimizer.opt_state)["ascents"] == 6
    assert again.dropout.rngs.count[...] == its_optimizer.step[...] == 6


# On several devices.


@pytest.mark.parametrize("kind", over_devices.KINDS)
def test_gradients_and_statistics_are_averaged_over_devices(kind, x64):
    graphdef, state = nnx.split(Module(dropout=0.0))
    floats = lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x
    state = jax.tree.map(floats, state)

    def on_device(state, x, y, axis_name="data"):
        model = nnx.merge(graphdef, state)
        params = nnx.state(model, nnx.Param)
        moved = jax.tree.map(lambda w: w + 0.3, params)
        both = optax_sam.nnx.value_and_grad(loss_fn, True, axis_name=axis_name)
        (loss, aux), grads, grad_fn = both(model, x, y=y)
        found = grads, grad_fn(moved), nnx.state(model, nnx.BatchStat)
        kept = nnx.state(model, nnx.Param)
        return tuple(map(nnx.to_pure_dict, (*found, kept))), loss, aux

    found = over_devices.run(kind, on_device, state, (X, Y), devices=2)
    alone = jax.jit(functools.partial(on_device, axis_name=None))
    halves = [alone(state, X[i], Y[i]) for i in (slice(8), slice(8, 16))]
    wanted = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    # Absolute: the gradient of a bias before BatchNorm is zero but for rounding.
    harness.assert_close(found, wanted, 1e-10, atol=1e-14)


def test_training_under_nnx_pmap():
    model, optimizer = optimized(optax.chain(optax_sam.sam(0.1), optax.sgd(0.1)))

    @nnx.pmap(axis_name="data", in_axes=(None, None, 0, 0), out_axes=0)
    def step(model, optimizer, x, y):
        both = optax_sam.nnx.value_and_grad(loss_fn, True, axis_name="data")
        (loss, _), grads, grad_fn = both(model, x, y=y)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss

    shards = [x.reshape(8, 2, -1) for x in (X, Y)]
    losses = [step(model, optimizer, *shards) for _ in range(31)]
    assert np.all(losses[0] == losses[0][0])
    assert losses[-1][0] < losses[0][0]
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 31


# What is refused.


@pytest.mark.parametrize(
    ("has_aux", "returned", "message"),
    [
        (True, lambda w: w, r"must return a pair, \(loss, aux\)"),
        (False, lambda w: (w, {}), r"return \(loss, aux\) and write .*has_aux=True"),
    ],
)
def test_losses_with_and_without_aux_are_told_apart(has_aux, returned, message):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    loss = lambda model: returned(jnp.sum(model.kernel[...]))
    with pytest.raises(ValueError, match=message):
        optax_sam.nnx.value_and_grad(loss, has_aux=has_aux)(model)


def test_a_state_in_place_of_the_module_is_refused():
    state = nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="takes the module first.*nnx.merge"):
        optax_sam.nnx.value_and_grad(lambda state: 1.0)(state)
