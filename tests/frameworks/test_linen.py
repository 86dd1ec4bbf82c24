"""Flax Linen: one clean pass, and a second one that leaves nothing behind."""

import functools
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
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.dynamic_scale import DynamicScale

import optax_sam
from optax_sam.linen import TrainState, value_and_grad

RHO, RATE = 0.3, 0.1
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
KEY = jax.random.key(7)
# BatchNorm subtracts the bias before it, which is thus trained by rounding alone.
ROUNDING = 1e-6
W = {"w": jnp.ones(2)}


def sgd():
    return optax.sgd(RATE, momentum=0.9)


def sam():
    return optax.chain(optax_sam.sam(RHO), sgd())


@functools.cache  # a train state's structure includes its optimizer
def vsam():
    # Quick to choose: windows of ten steps, so both kinds of step occur.
    method = optax_sam.vsam(0.1, window=10, num_slices=5, sensitivity=0.5, key=1)
    return optax.chain(method, sgd())


class Net(nn.Module):
    """Its loss depends on the mask, and on a count that each pass moves on."""

    @nn.compact
    def __call__(self, x, train=True):
        count = self.variable("counts", "calls", jnp.zeros, ())
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        before, count.value = count.value, count.value + 1
        return nn.Dense(2)(x) * (1 + 0.01 * (before % 2))


NET = Net()


def applied(params, model_state, key=KEY):
    """The prediction and the new state of a pass in training."""
    return NET.apply(
        {"params": params, **model_state},
        X,
        mutable=list(model_state),
        rngs={"dropout": key},
    )


def loss_fn(params, model_state, key):
    prediction, model_state = applied(params, model_state, key)
    return jnp.mean((prediction - Y) ** 2), model_state


def train_step(state):
    (loss, model_state), grads, grad_fn = value_and_grad(loss_fn, has_aux=True)(
        state.params, state.model_state, jax.random.fold_in(KEY, state.step)
    )
    after = state.apply_gradients(grads=grads, grad_fn=grad_fn, model_state=model_state)
    return after, loss


jitted = jax.jit(train_step)


@functools.cache
def initial_variables():
    init = jax.jit(NET.init, static_argnames="train")
    return init(jax.random.key(0), X, train=False)


def started(tx):
    model_state = dict(initial_variables())
    return created(tx=tx, params=model_state.pop("params"), model_state=model_state)


def created(kind=TrainState, tx=None, **fields):
    params = fields.pop("params", W)
    return kind.create(apply_fn=None, params=params, tx=tx or sgd(), **fields)


def test_it_is_sam_by_hand_with_one_mask_and_the_state_of_clean_passes():
    state = started(sam())
    by_hand = harness.sam_by_hand(loss_fn, RHO, RATE, 0.9)
    carry = state.params, optax.tree.zeros_like(state.params), state.model_state
    for t in range(4):
        carry, loss = by_hand(carry, jax.random.fold_in(KEY, t))
        state, found = jitted(state)
        assert found == pytest.approx(float(loss), rel=1e-5)
    harness.assert_close(state.params, carry[0], 1e-5, atol=ROUNDING)
    harness.assert_close(state.model_state, carry[2], 1e-5)
    assert state.step == optax_sam.metrics(state)["ascents"] == 4


def test_a_train_state_is_dispatched_donated_and_scanned():
    tx = optax.chain(optax_sam.sam(0.1, when=optax_sam.when.every_k(2)), sgd())

    def step(state, target, ascend=None):
        loss_fn = lambda params: jnp.sum((params["w"] - target) ** 2)
        loss, grads, grad_fn = value_and_grad(loss_fn)(state.params)
        after = state.apply_gradients(grads=grads, grad_fn=grad_fn, ascend=ascend)
        return after, loss

    start = lambda: created(tx=tx, params={"w": jnp.ones(2)})
    dispatched, state = optax_sam.dispatch(step, donate_argnums=0), start()
    for _ in range(5):
        state, _ = dispatched(state, 3.0)
    assert (state.step, optax_sam.metrics(state)["ascents"]) == (5, 3)
    scanned = jax.jit(lambda state: jax.lax.scan(step, state, jnp.full(5, 3.0))[0])
    again = scanned(start())
    assert harness.kinds(again) == harness.kinds(state)
    harness.assert_close(again, state, 1e-6)


def test_training_resumes_from_a_file(tmp_path):
    half = started(vsam())
    for _ in range(3):
        half, _ = jitted(half)
    target, after = started(vsam()), jitted(half)
    saved = flax.serialization.to_bytes(half)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half)
        checkpointer.wait_until_finished()
        by_orbax = checkpointer.restore(tmp_path / "state", target)
    for restored in (flax.serialization.from_bytes(target, saved), by_orbax):
        assert type(restored) is TrainState
        harness.assert_equal(restored, half)
        harness.assert_equal(jitted(restored), after)
        assert restored.step == 3


def test_keywords_are_fields_or_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    class WithNotes(TrainState):
        notes: int = 0

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    state = created(WithNotes, tx)
    after = state.apply_gradients(
        grads=W, notes=3, value=1.5, grad_fn=abs, ascend=False
    )
    assert seen == {"value": 1.5, "grad_fn": abs, "ascend": False}
    assert (after.notes, after.step) == (3, 1)
    assert after.tx is tx
    np.testing.assert_array_equal(after.params["w"], 2)


def test_multi_steps_around_a_method_gets_the_gradient():
    """As Flax's own train state takes it; its type does not say that it passes it."""
    w = {"w": jnp.array([3.0, 4.0])}
    square = lambda p: jax.tree.map(lambda x: x**2, p)
    for around in (lambda tx: tx, optax.MultiSteps.gradient_transformation):
        tx = optax.MultiSteps(optax.chain(optax_sam.sam(5.0), optax.sgd(RATE)), 1)
        state = TrainState.create(apply_fn=None, params=w, tx=around(tx))
        after = state.apply_gradients(grads=w, grad_fn=square)
        # The perturbed weights are (6, 8).
        np.testing.assert_allclose(after.params["w"], [3 - 3.6, 4 - 6.4], rtol=1e-5)


def test_a_baseline_ignores_what_the_loop_gives():
    for params in (W, W["w"]):
        state = created(params=params)
        after = state.apply_gradients(grads=params, grad_fn=abs, ascend=True)
        (w,) = jax.tree.leaves(after.params)
        np.testing.assert_allclose(w, 1 - RATE, rtol=1e-6)


@pytest.mark.parametrize("params", [W, jnp.ones(2)])
def test_micro_sharpness_needs_no_gradients(params):
    square = lambda p, i: jax.tree.map(lambda x: 2 * x, p)
    method = optax_sam.micro_sharpness(optax_sam.sam(0.0, axis_name="shards"), 2)
    state = created(tx=optax.chain(method, optax.sgd(RATE)), params=params)
    after = state.apply_gradients(grads=None, grad_fn=square)
    (w,) = jax.tree.leaves(after.params)
    np.testing.assert_allclose(w, 1 - 2 * RATE, rtol=1e-6)
    assert after.step == 1
    assert after.tx is state.tx


def test_what_overwrites_parameters_is_handed_on():
    """Scales of fp8: the gradient is the new value, and SAM has no part in it."""
    params = {"params": {"w": jnp.array([3.0, 4.0])}}
    params[OVERWRITE_WITH_GRADIENT] = {"scale": jnp.array(2.0)}
    tx = optax.chain(optax_sam.sam(0.5), optax.sgd(0.1))

    def loss_fn(params):
        w, scale = params["params"]["w"], params[OVERWRITE_WITH_GRADIENT]["scale"]
        return jnp.sum(w**2) / 2 + 7 * scale

    _, grads, grad_fn = value_and_grad(loss_fn)(params)
    state = created(tx=tx, params=params)
    after = state.apply_gradients(grads=grads, grad_fn=grad_fn).params
    assert after[OVERWRITE_WITH_GRADIENT]["scale"] == 7
    np.testing.assert_allclose(after["params"]["w"], [2.67, 3.56], rtol=1e-6)


# The model's state may not be forgotten.


class WithStatistics(TrainState):
    """The usual subclass."""

    batch_stats: Any


class WithMore(TrainState):
    """Fields that a step need not name."""

    batch_stats: Any
    dropout_key: Any
    ema_params: Any
    ema_batch_stats: Any
    dynamic_scale: Any = None
    metrics: Any = None
    best: dict = flax.struct.field(default_factory=dict)


class Renamed(TrainState):
    """Other names for the same."""

    running: Any = None
    mutable: Any = None


STATISTICS = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
NESTED = {"batch_stats": STATISTICS}
CUSTOM = {"custom": {"ema": jnp.ones(3)}}
# The beginnings of messages, and the advice at the end.
NONE = "got none in model_state.*mutable=list.*To keep the old one"
FROZEN = "statistics batch_stats, but.*keep the old ones for ever.*"
HOLDS = r"batch_stats holds \['BatchNorm_0'\].*got batch_stats with "
ADVICE = r'batch_stats=updates\["batch_stats"\].*batch_stats=state.batch_stats'


@pytest.mark.parametrize(
    ("field", "held", "given", "message"),
    [
        ("model_state", NESTED, {}, NONE),
        ("model_state", NESTED, {"model_state": {}}, NONE),
        ("model_state", NESTED, {"model_state": None}, NONE),
        ("model_state", NESTED, {"model_state": {"a": 1}}, r"a model_state with \['a'"),
        ("model_state", NESTED, {"batch_stats": {}}, "batch_stats is a collection of"),
        ("batch_stats", STATISTICS, {}, FROZEN + ADVICE),
        ("batch_stats", flax.core.freeze(STATISTICS), {}, FROZEN + ADVICE),
        ("batch_stats", CUSTOM, {}, FROZEN + ADVICE),
        ("batch_stats", STATISTICS, {"batch_stats": {}}, HOLDS + r"\[\]"),
        (
            "batch_stats",
            STATISTICS,
            {"batch_stats": NESTED},
            HOLDS + r"\['batch_stats'",
        ),
        ("running", STATISTICS, {}, "statistics running, but"),
        ("mutable", NESTED, {}, "mutable=updates"),
    ],
)
def test_forgotten_collections_and_statistics_are_named(field, held, given, message):
    kinds = {"model_state": TrainState, "batch_stats": WithStatistics}
    state = created(kinds.get(field, Renamed), **{field: held})
    with pytest.raises(ValueError, match=message):
        state.apply_gradients(grads=W, **given)
    assert state.apply_gradients(grads=W, **{field: held}).step == 1


def test_subclasses_have_fields_without_a_default():
    state = created(WithStatistics, batch_stats={})
    assert (state.batch_stats, state.model_state) == ({}, {})
    assert state.apply_gradients(grads=W).step == 1  # nothing to forget
    new = jax.tree.map(lambda x: x + 1, STATISTICS)
    state = created(WithStatistics, batch_stats=STATISTICS, model_state={"a": {}})
    assert state.model_state == {"a": {}}
    given = {"batch_stats": new, "model_state": {"a": {}}}
    after = jax.jit(lambda s: s.apply_gradients(grads=W, **given))(state)
    harness.assert_equal(after.batch_stats, new)
    with pytest.raises(TypeError, match="batch_stats"):
        created(WithStatistics)


def test_ordinary_fields_may_be_forgotten():
    fields = {
        "batch_stats": STATISTICS,
        "dropout_key": jax.random.key(0),
        "ema_params": {"w": jnp.ones(2), "layer": {"mean_head": jnp.ones(3)}},
        "ema_batch_stats": STATISTICS,
        "dynamic_scale": DynamicScale(),
        "metrics": {"loss": jnp.zeros(()), "count": jnp.zeros((), int)},
        "best": {"params": W, "accuracy": jnp.zeros(())},
    }
    state = created(WithMore, **fields)
    after = state.apply_gradients(grads=W, batch_stats=STATISTICS)
    harness.assert_equal(after.ema_batch_stats, STATISTICS)
    fields |= {"batch_stats": {}, "ema_batch_stats": None}
    assert created(WithMore, **fields).apply_gradients(grads=W).step == 1


# Recipes of docs/guide/flax.md: statistics at parameters that the model did not see.


@functools.partial(jax.jit, static_argnames="steps")
def estimated(params, model_state, steps):
    one = lambda state, _: (applied(params, state)[1], None)
    return jax.lax.scan(one, model_state, length=steps)[0]


def errors(params, model_state):
    """Of means, in deviations, and of variances, as a share: at the parameters."""
    hidden = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    (found,) = model_state["batch_stats"].values()
    mean = abs(found["mean"] - hidden.mean(0)) / hidden.std(0)
    return np.max([mean, abs(found["var"] / hidden.var(0) - 1)], axis=1)


def test_statistics_for_msam_are_estimated_at_its_parameters():
    state = started(optax_sam.msam(sgd(), rho=3.0))
    for _ in range(3):
        state, _ = jitted(state)
    params = optax_sam.msam_eval_params(state.opt_state, state.params)
    assert np.all(errors(params, state.model_state) > 0.1)
    assert np.all(errors(params, estimated(params, state.model_state, 100)) < 1e-3)


@pytest.mark.slow
def test_statistics_for_mesa_begin_with_estimated_ones():
    decay = 0.9998
    state = started(optax.chain(sgd(), optax_sam.mesa(decay)))
    first = state.model_state
    state = state.replace(model_state=estimated(state.params, first, 50))
    averages = first, state.model_state

    @jax.jit
    def averaged(model_state, averages):
        new = lambda old: optax.incremental_update(model_state, old, 1 - decay)
        return tuple(map(new, averages))

    for _ in range(400):
        state, _ = jitted(state)
        averages = averaged(state.model_state, averages)
    params = optax_sam.mesa_params(state)
    live, naive, recipe = (errors(params, s) for s in (state.model_state, *averages))
    assert np.all(recipe < 0.2 * np.minimum(naive, live))
    # What the page says of the variances.
    assert (round(naive[1] + 1), round(recipe[1], 1)) == (28, 0.5)
