"""The Flax helpers: one clean pass, and a second one that leaves nothing behind."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

import optax_sam
import optax_sam.linen
import optax_sam.nnx

RHO, RATE = 0.3, 0.1
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
KEY = jax.random.key(7)
# BatchNorm subtracts the bias before it, which is thus trained by rounding alone.
ROUNDING = 1e-6


def sgd():
    return optax.sgd(RATE, momentum=0.9)


def sam():
    return optax.chain(optax_sam.sam(RHO), sgd())


@functools.cache  # a train state's structure includes its optimizer
def vsam():
    # Quick to choose: windows of ten steps, so both kinds of step occur.
    method = optax_sam.vsam(0.1, window=10, num_slices=5, sensitivity=0.5, key=1)
    return optax.chain(method, sgd())


def along(grads, rho=RHO):
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda g: rho * g / norm, grads)


# Linen.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(2)(x)


NET = Net()


def loss_fn(params, model_state, batch, key):
    x, y = batch
    prediction, model_state = NET.apply(
        {"params": params, **model_state},
        x,
        mutable=list(model_state),
        rngs={"dropout": key},
    )
    loss = jnp.mean((prediction - y) ** 2)
    return loss, ({"loss": loss}, model_state)


def train_step(state, batch, ascend=None):
    value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
    (_, (metrics, model_state)), grads, grad_fn = value_and_grad(
        state.params, state.model_state, batch, jax.random.fold_in(KEY, state.step)
    )
    state = state.apply_gradients(
        grads=grads, grad_fn=grad_fn, ascend=ascend, model_state=model_state
    )
    return state, metrics["loss"]


@functools.cache
def initial_variables():
    init = jax.jit(NET.init, static_argnames="train")
    return init(jax.random.key(0), X, train=False)


def started(tx):
    variables = jax.tree.map(jnp.copy, initial_variables())  # may be donated
    return optax_sam.linen.TrainState.create(
        apply_fn=NET.apply,
        params=variables.pop("params"),
        tx=tx,
        model_state=variables,
    )


def test_linen_is_sam_by_hand_with_the_statistics_of_clean_passes():
    state, step = started(sam()), jax.jit(train_step)
    params, stats = state.params, state.model_state
    trace = jax.tree.map(jnp.zeros_like, params)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    @jax.jit
    def by_hand(params, trace, stats, key):
        (loss, (_, new_stats)), grads = value_and_grad(params, stats, (X, Y), key)
        perturbed = jax.tree.map(jnp.add, params, along(grads))
        _, second = value_and_grad(perturbed, stats, (X, Y), key)
        trace = jax.tree.map(lambda v, g: 0.9 * v + g, trace, second)
        params = jax.tree.map(lambda w, v: w - RATE * v, params, trace)
        return params, trace, new_stats, loss

    for t in range(4):
        key = jax.random.fold_in(KEY, t)
        params, trace, stats, loss = by_hand(params, trace, stats, key)
        state, found = step(state, (X, Y))
        assert found == pytest.approx(float(loss), rel=1e-5)
    harness.assert_close(state.params, params, 1e-5, atol=ROUNDING)
    harness.assert_close(state.model_state, stats, 1e-5)
    assert state.step == 4


@pytest.mark.slow
def test_linen_statistics_equal_one_clean_pass_exactly():
    state = started(sam())
    _, (_, stats) = loss_fn(
        state.params, state.model_state, (X, Y), jax.random.fold_in(KEY, 0)
    )
    after, _ = train_step(state, (X, Y), ascend=True)  # outside jit, operation by it
    harness.assert_equal(after.model_state, stats)
    assert optax_sam.metrics(after)["ascents"] == 1
    mean = after.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.any(mean != 0)


class Revealing(nn.Module):
    """Its gradient is 2 where dropout keeps and 0 elsewhere, plus 10 times a count."""

    @nn.compact
    def __call__(self):
        count = self.variable("counts", "calls", jnp.zeros, ())
        w = self.param("w", nn.initializers.ones, (32,))
        before = count.value
        count.value = before + 1
        return jnp.sum(nn.Dropout(0.5, deterministic=False)(w) + 10 * before * w)


def test_linen_second_pass_has_the_mask_and_the_state_of_the_first():
    def loss_fn(params, model_state, key):
        variables = {"params": params, **model_state}
        return Revealing().apply(variables, mutable=["counts"], rngs={"dropout": key})

    value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
    model_state = {"counts": {"calls": jnp.zeros(())}}
    params, masks = {"w": jnp.ones(32)}, []
    for t in range(3):
        (_, model_state), grads, grad_fn = value_and_grad(
            params, model_state, jax.random.fold_in(KEY, t)
        )
        moved = {"w": params["w"] + 0.5}
        for _ in range(2):
            np.testing.assert_array_equal(grad_fn(moved)["w"], grads["w"])
        assert set(np.unique(grads["w"])) == {10 * t, 10 * t + 2}
        assert model_state["counts"]["calls"] == t + 1
        masks.append(grads["w"] - 10 * t)
    assert np.any(masks[0] != masks[1])


@pytest.mark.slow
def test_linen_with_vsam_dispatched_scanned_and_plain():
    steps = 40
    plain = jax.jit(train_step, donate_argnums=0)
    dispatched = optax_sam.dispatch(train_step, donate_argnums=0)
    one, two = started(vsam()), started(vsam())
    for _ in range(steps):
        (one, _), (two, _) = plain(one, (X, Y)), dispatched(two, (X, Y))
    scanned = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, _: train_step(state, (X, Y)), state, length=steps
        )
    )
    three, losses = scanned(started(vsam()))
    assert losses[-1] < losses[0]
    for other in (two, three):
        assert harness.kinds(other) == harness.kinds(one)
        found, wanted = optax_sam.metrics(other), optax_sam.metrics(one)
        assert 20 < found["ascents"] == wanted["ascents"] < steps
        harness.assert_close(other.params, one.params, 1e-3, atol=10 * ROUNDING)
        harness.assert_close(other.model_state, one.model_state, 1e-3)


def test_linen_dispatches():
    tx = optax.chain(optax_sam.sam(0.1, when=optax_sam.when.every_k(2)), sgd())
    state = optax_sam.linen.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=tx
    )

    @functools.partial(optax_sam.dispatch, donate_argnums=0)
    def step(state, target, ascend=None):
        loss_fn = lambda params: jnp.sum((params["w"] - target) ** 2)
        loss, grads, grad_fn = optax_sam.linen.value_and_grad(loss_fn)(state.params)
        after = state.apply_gradients(grads=grads, grad_fn=grad_fn, ascend=ascend)
        return after, loss

    for _ in range(5):
        state, _ = step(state, 3.0)
    assert (state.step, optax_sam.metrics(state)["ascents"]) == (5, 3)


@pytest.mark.parametrize("through", ["msgpack", "orbax"])
def test_linen_resumes_from_a_file(through, tmp_path):
    step = jax.jit(train_step)
    half = started(vsam())
    for _ in range(3):
        half, _ = step(half, (X, Y))
    target = started(half.tx)
    if through == "msgpack":
        saved = flax.serialization.to_bytes(half)
        restored = flax.serialization.from_bytes(target, saved)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", half)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", target)
    assert type(restored) is optax_sam.linen.TrainState
    harness.assert_equal(restored, half)
    harness.assert_equal(step(restored, (X, Y)), step(half, (X, Y)))
    assert restored.step == 3


def test_linen_keywords_are_fields_or_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    class WithNotes(optax_sam.linen.TrainState):
        notes: int = 0

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    state = WithNotes.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    grads = {"w": jnp.ones(2)}
    after = state.apply_gradients(grads=grads, notes=3, value=1.5)
    assert (seen, after.notes, after.step) == ({"value": 1.5}, 3, 1)
    state.apply_gradients(grads=grads, grad_fn=abs, ascend=False)
    assert seen == {"value": 1.5, "grad_fn": abs, "ascend": False}
    assert after.tx is tx
    np.testing.assert_array_equal(after.params["w"], 2)


def test_linen_baseline_in_the_same_loop_is_that_of_flax():
    state = started(sgd())
    ours, _ = jax.jit(functools.partial(train_step, ascend=True))(state, (X, Y))
    key = jax.random.fold_in(KEY, 0)
    gradients = jax.jit(jax.grad(loss_fn, has_aux=True))
    grads, _ = gradients(state.params, state.model_state, (X, Y), key)
    theirs = train_state.TrainState.create(
        apply_fn=state.apply_fn, params=state.params, tx=state.tx
    ).apply_gradients(grads=grads)
    harness.assert_close(ours.params, theirs.params, 1e-6)


def test_linen_hands_on_what_overwrites_parameters():
    """Scales of fp8: the gradient is the new value, and SAM has no part in it."""
    params = {"params": {"w": jnp.array([3.0, 4.0])}}
    params[OVERWRITE_WITH_GRADIENT] = {"scale": jnp.array(2.0)}
    tx = optax.chain(optax_sam.sam(0.5), optax.sgd(0.1))
    state = optax_sam.linen.TrainState.create(apply_fn=None, params=params, tx=tx)

    def loss_fn(params):
        w, scale = params["params"]["w"], params[OVERWRITE_WITH_GRADIENT]["scale"]
        return jnp.sum(w**2) / 2 + 7 * scale

    _, grads, grad_fn = optax_sam.linen.value_and_grad(loss_fn)(params)
    after = state.apply_gradients(grads=grads, grad_fn=grad_fn).params
    assert after[OVERWRITE_WITH_GRADIENT]["scale"] == 7
    np.testing.assert_allclose(after["params"]["w"], [2.67, 3.56], rtol=1e-6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "got none in model_state.*mutable=list.*To keep the old one"),
        ({"model_state": {}}, "got none in model_state"),
        ({"model_state": None}, "got none in model_state"),
        ({"model_state": {"losses": 1}}, r"a model_state with \['losses'\]"),
        ({"batch_stats": {}}, "batch_stats is a collection of model_state"),
    ],
)
def test_linen_advises_on_forgotten_collections(keywords, message):
    state = started(sgd())
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=state.params, **keywords)


class WithStatistics(optax_sam.linen.TrainState):
    """The usual subclass."""

    batch_stats: Any


class WithMore(optax_sam.linen.TrainState):
    """Fields that a step need not name."""

    batch_stats: Any
    dropout_key: Any
    ema_params: Any
    ema_batch_stats: Any
    dynamic_scale: Any = None
    metrics: Any = None
    best: dict = flax.struct.field(default_factory=dict)


class Renamed(optax_sam.linen.TrainState):
    """Other names for the same."""

    running: Any = None
    mutable: Any = None


STATISTICS = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
GRADS = {"w": jnp.ones(2)}


def created(kind, **fields):
    return kind.create(apply_fn=None, params=GRADS, tx=sgd(), **fields)


def test_linen_subclasses_have_fields_without_a_default():
    state = created(WithStatistics, batch_stats={})
    assert (state.batch_stats, state.model_state) == ({}, {})
    assert state.apply_gradients(grads=GRADS).step == 1  # nothing to forget
    state = created(WithStatistics, batch_stats=STATISTICS)
    new = jax.tree.map(lambda x: x + 1, STATISTICS)
    after = jax.jit(lambda s: s.apply_gradients(grads=GRADS, batch_stats=new))(state)
    harness.assert_equal(after.batch_stats, new)
    with pytest.raises(TypeError, match="batch_stats"):
        created(WithStatistics)
    own = created(WithStatistics, batch_stats=STATISTICS, model_state={"a": {}})
    assert own.model_state == {"a": {}}


@pytest.mark.parametrize(
    ("kind", "fields", "keywords", "message"),
    [
        (
            WithStatistics,
            {"batch_stats": STATISTICS},
            {},
            "statistics batch_stats, but",
        ),
        (
            WithStatistics,
            {"batch_stats": flax.core.freeze(STATISTICS)},
            {},
            r'batch_stats=updates\["batch_stats"\].*batch_stats=state.batch_stats',
        ),
        (
            WithStatistics,
            {"batch_stats": {"custom": {"ema": jnp.ones(3)}}},
            {},
            "keep the old ones for ever",
        ),
        (
            WithStatistics,
            {"batch_stats": STATISTICS},
            {"batch_stats": {}},
            r"batch_stats holds \['BatchNorm_0'\].*got batch_stats with \[\]",
        ),
        (
            WithStatistics,
            {"batch_stats": STATISTICS},
            {"batch_stats": {"batch_stats": STATISTICS}},
            r"got batch_stats with \['batch_stats'\]",
        ),
        (Renamed, {"running": STATISTICS}, {}, "statistics running, but"),
        (Renamed, {"mutable": {"batch_stats": STATISTICS}}, {}, "mutable=updates"),
    ],
)
def test_linen_advises_on_forgotten_fields_of_subclasses(
    kind, fields, keywords, message
):
    state = created(kind, **fields)
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=GRADS, **keywords)
    kept = {name: getattr(state, name) for name in fields}
    assert state.apply_gradients(grads=GRADS, **kept).step == 1


def test_linen_lets_ordinary_fields_be():
    fields = {
        "batch_stats": STATISTICS,
        "dropout_key": jax.random.key(0),
        "ema_params": {"w": jnp.ones(2), "layer": {"mean_head": jnp.ones(3)}},
        "ema_batch_stats": STATISTICS,
        "dynamic_scale": DynamicScale(),
        "metrics": {"loss": jnp.zeros(()), "count": jnp.zeros((), int)},
        "best": {"params": GRADS, "accuracy": jnp.zeros(())},
    }
    state = created(WithMore, **fields)
    after = state.apply_gradients(grads=GRADS, batch_stats=STATISTICS)
    harness.assert_equal(after.ema_batch_stats, STATISTICS)
    fields["batch_stats"] = {}
    fields["ema_batch_stats"] = None
    assert created(WithMore, **fields).apply_gradients(grads=GRADS).step == 1


def test_losses_with_and_without_aux_are_told_apart():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    w = jnp.ones(2)
    alone, pair = lambda w, *_: 1.0 * w, lambda w, *_: (1.0 * w, {})
    linen, module = optax_sam.linen.value_and_grad, optax_sam.nnx.value_and_grad
    for has_aux, loss, message in (
        (True, alone, r"must return a pair, \(loss, aux\)"),
        (False, pair, r"return \(loss, aux\) and write .*has_aux=True"),
    ):
        with pytest.raises(ValueError, match=message):
            linen(loss, has_aux=has_aux)(w[0])
        on_model = lambda model, loss=loss: loss(jnp.sum(model.kernel[...]))
        with pytest.raises(ValueError, match=message):
            module(on_model, has_aux=has_aux)(model)
    with pytest.raises(ValueError, match="takes the module first.*nnx.merge"):
        module(alone)(nnx.state(model))


# NNX.


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = jnp.tanh(self.norm(self.inner(x)))
        return self.outer(self.dropout(x, rngs=rngs))


def module_loss(model, batch, rngs=None):
    x, y = batch
    loss = jnp.mean((model(x, rngs) - y) ** 2)
    return loss, {"loss": loss}


def module_step(model, optimizer, batch, rngs=None, ascend=None):
    value_and_grad = optax_sam.nnx.value_and_grad(module_loss, has_aux=True)
    args = (batch,) if rngs is None else (batch, rngs)
    (_, metrics), grads, grad_fn = value_and_grad(model, *args)
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


def test_nnx_is_sam_by_hand_and_the_model_advances_once():
    model, optimizer = optimized(optax.chain(optax_sam.sam(RHO), optax.sgd(RATE)))
    other = Module()
    step = nnx.jit(module_step)
    gradients = nnx.grad(module_loss, has_aux=True)

    @nnx.jit
    def by_hand(other):
        twin = nnx.clone(other)  # for the second pass, from before the first
        grads, _ = gradients(other, (X, Y))
        params = nnx.state(other, nnx.Param)
        nnx.update(twin, jax.tree.map(jnp.add, params, along(grads)))
        second, _ = gradients(twin, (X, Y))
        nnx.update(other, jax.tree.map(lambda w, g: w - RATE * g, params, second))

    for t in range(3):
        step(model, optimizer, (X, Y))
        by_hand(other)
        assert model.dropout.rngs.count[...] == t + 1
    found, wanted = (arrays(m, nnx.Param) for m in (model, other))
    harness.assert_close(found, wanted, 1e-5, atol=ROUNDING)
    harness.assert_close(others(model), others(other), 1e-5)


def test_nnx_statistics_equal_one_clean_pass_exactly():
    model, optimizer = optimized(sam())
    clean = Module()
    nnx.grad(module_loss, has_aux=True)(clean, (X, Y))
    module_step(model, optimizer, (X, Y), ascend=True)  # outside jit
    harness.assert_equal(others(model), others(clean))
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 1


class RevealingModule(nnx.Module):
    """As its namesake in Linen."""

    def __init__(self, rngs=None):
        self.w = nnx.Param(jnp.ones(32))
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.dropout = nnx.Dropout(0.5, rngs=rngs or nnx.Rngs(1))

    def __call__(self, rngs=None):
        before = self.calls[...]
        self.calls[...] = before + 1
        w = self.w[...]
        return jnp.sum(self.dropout(w, rngs=rngs) + 10 * before * w)


@pytest.mark.parametrize("given", ["inside", "as an argument"])
def test_nnx_second_pass_has_the_mask_and_the_state_of_the_first(given):
    model, rngs, masks = RevealingModule(), nnx.Rngs(dropout=3), []
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


def test_nnx_grad_fn_captures_the_moment():
    """Why it has to be called before the clean pass."""
    model, loss = RevealingModule(), lambda model: model()
    params = nnx.State({"w": jnp.ones(32)})
    before = optax_sam.nnx.grad_fn(loss, model)
    grads = nnx.grad(loss)(model)["w"][...]
    after = optax_sam.nnx.grad_fn(loss, model)
    np.testing.assert_array_equal(before(params)["w"], grads)
    assert np.all(after(params)["w"] - grads >= 8)


@pytest.mark.slow
def test_nnx_with_vsam_jitted_and_dispatched():
    steps = 40
    model, optimizer = optimized(vsam())
    jitted = nnx.jit(module_step)
    for _ in range(steps):
        jitted(model, optimizer, (X, Y))

    # Modules are trees, so a step that returns them can be compiled by JAX itself.
    @optax_sam.dispatch
    def dispatched(model, optimizer, batch, ascend=None):
        loss = module_step(model, optimizer, batch, ascend=ascend)
        return model, optimizer, loss

    two, two_optimizer = optimized(vsam())
    for _ in range(steps):
        two, two_optimizer, _ = dispatched(two, two_optimizer, (X, Y))
    found, wanted = (
        optax_sam.metrics(x.opt_state)["ascents"] for x in (two_optimizer, optimizer)
    )
    assert 20 < found == wanted < steps
    assert two.dropout.rngs.count[...] == steps
    found, wanted = (arrays(m, nnx.Param) for m in (two, model))
    harness.assert_close(found, wanted, 1e-3, atol=10 * ROUNDING)
    harness.assert_close(others(two), others(model), 1e-3)


def test_nnx_trains_a_part():
    last = nnx.All(nnx.Param, nnx.PathContains("outer"))
    model, optimizer = optimized(sam(), wrt=last)
    before = arrays(model, nnx.Param)
    loss = lambda model, batch: module_loss(model, batch)[0]
    _, grads, grad_fn = optax_sam.nnx.value_and_grad(loss, wrt=last)(model, (X, Y))
    optimizer.update(model, grads, grad_fn=grad_fn)
    after = arrays(model, nnx.Param)
    assert np.any(after["outer"]["kernel"] != before["outer"]["kernel"])
    harness.assert_equal(after["inner"], before["inner"])


def test_statistics_for_msam_are_estimated_at_its_parameters():
    """The recipe of docs/flax.md."""
    tx = optax_sam.msam(optax.sgd(RATE, momentum=0.9), rho=3.0)
    state, step = started(tx), jax.jit(train_step)
    for _ in range(3):
        state, _ = step(state, (X, Y))
    params = optax_sam.msam_eval_params(state.opt_state, state.params)
    hidden = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]

    @functools.partial(jax.jit, static_argnames="train")
    def apply(model_state, train):
        return NET.apply(
            {"params": params, **model_state},
            X,
            train=train,
            mutable=list(model_state),
            rngs={"dropout": KEY},
        )

    model_state = state.model_state
    error = lambda s: np.max(
        abs(s["batch_stats"]["BatchNorm_0"]["mean"] - hidden.mean(0))
    )
    assert error(model_state) > 0.1
    for _ in range(100):
        _, model_state = apply(model_state, train=True)
    assert error(model_state) < 1e-3

    model, optimizer = optimized(tx)
    module_step(model, optimizer, (X, Y))
    before, live = arrays(model, nnx.Param), nnx.state(model, nnx.Param)
    nnx.update(model, optax_sam.msam_eval_params(optimizer.opt_state, live))
    after = arrays(model, nnx.Param)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, before, after))
    assert moved == pytest.approx(3.0, rel=1e-4)


def test_statistics_for_mesa_begin_with_estimated_ones():
    """The recipe of docs/flax.md, and what it avoids."""
    decay, step = 0.9998, jax.jit(train_step)
    state = started(optax.chain(sgd(), optax_sam.mesa(decay)))

    @jax.jit
    def estimated(params, model_state):
        def one(model_state, _):
            variables = {"params": params, **model_state}
            mutable = list(model_state)
            _, model_state = NET.apply(
                variables, X, mutable=mutable, rngs={"dropout": KEY}
            )
            return model_state, None

        return jax.lax.scan(one, model_state, length=50)[0]

    @jax.jit
    def averages(old, model_state):
        new = lambda average: optax.incremental_update(model_state, average, 1 - decay)
        return [new(average) for average in old]

    first = state.model_state
    model_state = estimated(state.params, first)
    state, found = state.replace(model_state=model_state), [first, model_state]
    for _ in range(400):
        state, _ = step(state, (X, Y))
        found = averages(found, state.model_state)
    params = optax_sam.mesa_params(state)["Dense_0"]
    hidden = X @ params["kernel"] + params["bias"]
    mean, var = hidden.mean(0), hidden.var(0)
    errors = {
        "mean": lambda found: np.max(abs(found - mean) / np.sqrt(var)),
        "var": lambda found: np.max(abs(found / var - 1)),
    }
    for moment, error in errors.items():
        naive, recipe, trained = (
            error(s["batch_stats"]["BatchNorm_0"][moment])
            for s in (*found, state.model_state)
        )
        assert recipe < 0.2 * min(naive, trained)
    # What the page says of the variances.
    assert (round(naive + 1), round(recipe, 1)) == (28, 0.5)


# Files, imports and examples.


@pytest.mark.slow
def test_nnx_resumes_from_a_file(tmp_path):
    """To the bit: parameters, statistics, random streams, and what vSAM remembers."""
    step, model, optimizer = nnx.jit(module_step), *optimized(vsam())
    for _ in range(3):
        step(model, optimizer, (X, Y))
    again, its_optimizer = optimized(vsam())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        target = nnx.state((again, its_optimizer))
        restored = checkpointer.restore(tmp_path / "state", target)
    nnx.update((again, its_optimizer), restored)
    for pair in ((model, optimizer), (again, its_optimizer)):
        for _ in range(3):
            step(*pair, (X, Y))
    for node in (lambda m, o: others(m), lambda m, o: arrays(m, nnx.Param)):
        harness.assert_equal(node(again, its_optimizer), node(model, optimizer))
    harness.assert_equal(arrays(its_optimizer), arrays(optimizer))
    assert optax_sam.metrics(its_optimizer.opt_state)["ascents"] == 6
    assert again.dropout.rngs.count[...] == its_optimizer.step[...] == 6


def test_flax_is_optional():
    program = """
import sys
sys.modules["flax"] = None
import optax_sam
for name in ("linen", "nnx"):
    try:
        __import__(f"optax_sam.{name}")
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
    advice = 'optax_sam.{} needs Flax: pip install "optax_sam[flax]".\n'
    assert output == advice.format("linen") + advice.format("nnx")


@pytest.mark.slow
def test_the_page_runs():
    names = {}
    exec("\n".join(harness.code("flax.md")), names)
    assert names["state"].step == 7
    # Read from the file.
    assert optax_sam.metrics(names["optimizer"].opt_state)["ascents"] == 3
    assert names["module"].dropout.rngs.count[...] == 3
    assert harness.is_finite((names["logits"], names["averaged"], names["loss"]))
    scaled = names["scaled_state"]
    for x in jax.tree.leaves(scaled):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    # The scale fell until both gradients were finite.
    scale, finite = (
        getattr(scaled.dynamic_scale, name)[0] for name in ("scale", "fin_steps")
    )
    assert 2.0**8 < scale < 2.0**24
    assert optax_sam.metrics(jax.tree.map(lambda x: x[0], scaled))["ascents"] == finite
    assert 3 < finite < 20
    assert names["logged"]["loss"][0] < np.log(10)
    assert np.all(scaled.step == 20)
