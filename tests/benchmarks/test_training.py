"""The networks and trainings of the quality benchmark."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_sam
from benchmarks.lib import datasets, networks
from benchmarks.quality import presets, training

FLOAT = jnp.dtype("float32")


@pytest.fixture(scope="module")
def small():
    """48 images of 8 x 8 in ten classes that a network can tell apart."""
    x = np.random.default_rng(0).integers(0, 120, (48, 8, 8, 3), np.uint8)
    y = np.arange(48, dtype=np.int32) % 10
    x[np.arange(48), y // 2, y % 2] += 130
    return jax.device_put(datasets.Data(x, y, x[:30], y[:30], *datasets.moments(x)))


@pytest.fixture
def trainer(small):
    def make(method, model="mlp", scan=False, epochs=1, more=None, **changes):
        changes = {"augmentation": "crop+flip", "epochs": epochs} | changes
        recipe = presets.recipe("cifar10", model)
        recipe = dataclasses.replace(recipe, batch_size=16, **changes)
        values = presets.hyperparameters(method, recipe, 3) | (more or {})
        return training.Trainer(recipe, method, values, small, scan)

    return make


def results(trainer, seed=0):
    return trainer.run(seed, Path("nowhere"))


slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.174), slow("wrn28-10", 36.479), slow("pyramidnet110", 28.5)],
)
def test_networks_have_the_published_sizes(name, millions):
    model = networks.NETWORKS[name](dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)
    variables = jax.eval_shape(init, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {FLOAT}
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "tiny-resnet"])
def test_logits_are_float32_and_layers_are_not(name):
    model = networks.NETWORKS[name](dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = lambda x: model.init_with_output(jax.random.key(0), x, train=False)
    jaxpr, (logits, variables) = jax.make_jaxpr(init, return_shape=True)(x)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    params = jax.tree.leaves(variables["params"])
    assert {leaf.dtype for leaf in params} == {FLOAT}
    assert "bf16" in str(jaxpr)


TASKS = [("cifar10", "resnet18"), ("cifar100", "pyramidnet110"), ("digits", "mlp")]
TASKS += [("fashion-mnist", "cnn")]


def test_every_preset_is_an_optimizer():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    size = {"steps": 400, "examples": 9, "classes": 2, "seed": 0}
    for task in TASKS:
        recipe = presets.recipe(*task)
        for method in presets.METHODS:
            values = presets.hyperparameters(method, recipe, 390)
            assert json.loads(json.dumps(values)) == values
            built = presets.build(method, values, recipe, **size)
            jax.eval_shape(built.tx.init, params)


def test_what_lasts_epochs_is_scaled_with_the_run():
    recipe = presets.recipe("cifar10", "resnet18")
    for epochs, warmup, decay in ((200, 1170, 0.9998), (20, 117, 0.998)):
        recipe = dataclasses.replace(recipe, epochs=epochs)
        of = lambda method, recipe=recipe: presets.hyperparameters(method, recipe, 390)
        assert of("vSAM")["warmup_steps"] == warmup
        assert of("MESA")["decay"] == pytest.approx(decay, abs=1e-5)


def test_the_published_table():
    rows = presets.published("cifar10", "resnet18")
    assert {*rows} <= {*presets.METHODS}
    assert [r["accuracy"] for r in rows["ESAM"]] == ["96.55", "96.56"]
    assert rows["vSAM"][0]["ascents"] == "23579"
    assert presets.published("digits", "mlp") == {}


# With skipped steps, a gradient of a part, and without ascents.
TRAINED = "LookSAM-5", "quarter-batch SAM", "SAF"


@pytest.mark.parametrize(
    "method", [x if x in TRAINED else slow(x) for x in presets.METHODS]
)
def test_every_method_trains(trainer, method):
    made = trainer(method, epochs=2)
    after = results(made)
    ascents = after["ascents"]
    assert after["gradients_per_step"] == made.built.cost.mean(ascents / 6)
    assert (after["steps"], after["train_loss"] is None) == (6, False)
    if method == "AE-SAM":
        assert 1 <= ascents <= 6
    else:
        each = {"SAM-5": 5, "LookSAM-5": 5, "SAM-10": 10}.get(method, 1)
        assert ascents == made.built.ascends * -(-6 // each)


def test_sgd_learns(trainer):
    still = {"augmentation": "none", "smoothing": 0.0}
    after = results(trainer("SGD", scan=True, epochs=30, **still))
    assert after["accuracy"] == 100
    assert after["accuracy_last_epochs"] > 90
    assert after["train_loss"] < 0.3


@pytest.mark.parametrize("method", [slow("SGD"), "SAM-5", slow("AE-SAM")])
def test_a_scan_computes_what_the_loop_does(trainer, method):
    one, two = (results(trainer(method, scan=s, epochs=2)) for s in (True, False))
    assert one["ascents"] == two["ascents"]
    for name in ("loss", "accuracy"):
        wanted = two["history"][name]
        np.testing.assert_allclose(one["history"][name], wanted, rtol=1e-4)


@pytest.mark.slow
def test_an_epoch_of_each_method_is_a_program_in_half_precision(trainer):
    for method in presets.METHODS:
        made = trainer(method, "tiny-resnet", scan=True, dtype="bfloat16")
        # Of MESA the averaged statistics are those of forward passes, so not abstract.
        like = made.start(0)
        after = jax.eval_shape(made.scanned, like, made.data, jax.random.key(0), 0)
        kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        assert kinds(after) == kinds(like), method
        assert {x.dtype for x in jax.tree.leaves(after.params)} == {FLOAT}


def test_seeds_change_what_a_method_draws(trainer):
    made = trainer("ESAM")
    leaves = [jax.tree.leaves(made.build(seed).tx.init(jnp.ones(2))) for seed in (0, 1)]
    differ = [np.any(a != b) for a, b in zip(*leaves, strict=True)]
    assert sum(differ) == 1  # the key
    # One program for both: nothing is traced again.
    first = results(made, 0)
    assert first["gradients_per_step"] == pytest.approx(1 + 1 / 3 + 7 / 16)
    traces = made.traces
    assert results(made, 1)["train_loss"] != first["train_loss"]
    assert made.traces == traces
    assert results(made, 0)["train_loss"] == first["train_loss"]


def test_targets_are_smoothed_over_the_wrong_classes(trainer, small):
    targets = trainer("SGD").batch(small, jnp.arange(4), jax.random.key(0)).targets
    np.testing.assert_allclose(targets.max(-1), 0.9, rtol=1e-6)
    np.testing.assert_allclose(targets.min(-1), 0.1 / 9, rtol=1e-6)


def test_msam_is_judged_without_its_perturbation(trainer, small):
    made = trainer("MSAM", scan=True, epochs=20, more={"rho": 30.0}, smoothing=0.0)
    state = made.start(0)
    for epoch in range(20):
        state = made.epoch(state, jax.random.key(1), epoch, lambda steps: None)
    w = optax_sam.msam_eval_params(state.opt_state, state.params)
    x = (small.test_x - small.mean) / small.deviation
    logits = made.model.apply({"params": w}, x, 0)
    right = 100 * np.mean(logits.argmax(-1) == small.test_y)
    assert made.accuracy(state, 0) == pytest.approx(right)
    assert made.accuracy(state._replace(opt_state=made.start(0).opt_state), 0) != right


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SAM", "ESAM", "LookSAM-5"])
def test_statistics_are_those_of_the_clean_pass(trainer, method):
    key, states = jax.random.key(0), []
    for name in ("SGD", method):
        made = trainer(name, "tiny-resnet")
        args = made.order(key, 0), jnp.int32(0), key, jnp.int32(0)
        states.append(made.step(made.start(0), made.data, *args))
    plain, other = states
    harness.assert_close(other.model_state, plain.model_state, 0, atol=1e-5)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), plain.params, other.params)
    assert max(jax.tree.leaves(moved)) > 1e-5
