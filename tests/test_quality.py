"""The quality benchmark: its data, presets, trainings, checkpoints and tables."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_sam

ROOT = Path(__file__).parents[1]
BIG = "resnet18", "wrn28-10", "pyramidnet110"
TIMES = {"images_per_second", "ais", "history"}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    for package in ("flax", "matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])


@pytest.fixture
def quality():
    return importlib.import_module("quality")


@pytest.fixture
def training():
    return importlib.import_module("quality_training")


@pytest.fixture
def presets():
    return importlib.import_module("presets")


@pytest.fixture
def datasets():
    return importlib.import_module("datasets")


def images(rng, count, side=32, channels=3):
    return rng.integers(0, 256, (count, side, side, channels), np.uint8)


@pytest.fixture
def small(datasets):
    """48 images of 8 x 8 in ten classes that a network can tell apart."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 120, (48, 8, 8, 3), np.uint8)
    y = np.arange(48, dtype=np.int32) % 10
    x[np.arange(48), y // 2, y % 2] += 130
    mean, deviation = datasets.moments(x)
    return jax.device_put(datasets.Data(x, y, x[:30], y[:30], mean, deviation))


@pytest.fixture
def trainer(presets, training, small):
    def make(method, model="mlp", scan=False, epochs=1, more=None, **changes):
        changes = {"augmentation": "crop+flip"} | changes
        recipe = dataclasses.replace(
            presets.recipe("cifar10", model), epochs=epochs, batch_size=16, **changes
        )
        values = presets.hyperparameters(method, recipe, 3) | (more or {})
        return training.Trainer(recipe, method, values, small, scan)

    return make


# Data.


def archive(name, form, path, rng):
    """A standard archive with few images, and its arrays."""
    cifar10 = name == "cifar10"
    stems = [f"data_batch_{i}" for i in range(1, 6)] if cifar10 else ["train"]
    arrays = {}
    for stem in [*stems, "test_batch" if cifar10 else "test"]:
        x = images(rng, 4)
        y = rng.integers(0, 10 if cifar10 else 100, 4)
        arrays[stem] = x, y
        rows = x.transpose(0, 3, 1, 2).reshape(4, -1)
        if form == "pickle":
            key = b"labels" if cifar10 else b"fine_labels"
            batch = {b"data": rows, key: y.tolist(), b"batch_label": b"x"}
            (path / stem).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            coarse = [] if cifar10 else [np.zeros((4, 1))]
            record = np.concatenate([*coarse, y[:, None], rows], axis=1)
            (path / f"{stem}.bin").write_bytes(record.astype(np.uint8).tobytes())
    train = [np.concatenate(x) for x in zip(*(arrays[s] for s in stems), strict=True)]
    return *train, *arrays["test_batch" if cifar10 else "test"]


@pytest.mark.parametrize("form", ["pickle", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_archives_are_read(datasets, tmp_path, name, form):
    inner = tmp_path / datasets.ARCHIVES[name][form == "binary"]
    inner.mkdir()
    want = archive(name, form, inner, np.random.default_rng(0))
    for path in (inner, tmp_path):  # the folder, or the one that it lies in
        data = datasets.load(name, path)
        for got, wanted in zip(data[:4], want, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert data.train_x.dtype == np.uint8


def test_an_npz_is_read_and_grey_images_get_a_channel(datasets, tmp_path):
    rng = np.random.default_rng(0)
    x, y = images(rng, 50, 28, 1), np.arange(50, dtype=np.uint8) % 10
    named = {"train_x": x[..., 0], "train_y": y, "test_x": x[:9, ..., 0]}
    np.savez(tmp_path / "f.npz", **named, test_y=y[:9])
    data = datasets.load("fashion-mnist", tmp_path / "f.npz", limit=20)
    assert data.train_x.shape == (20, 28, 28, 1)
    assert np.bincount(data.train_y).tolist() == [2] * 10
    np.testing.assert_array_equal(data.test_x, x[:9])
    noisy = datasets.load("fashion-mnist", tmp_path / "f.npz", label_noise=0.4)
    assert 10 <= np.sum(noisy.train_y != y) <= 20
    np.savez(tmp_path / "g.npz", **named)
    with pytest.raises(SystemExit, match="lacks test_y"):
        datasets.load("fashion-mnist", tmp_path / "g.npz")


def test_a_pickle_that_is_no_array_is_refused(datasets, tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": print}))
    (tmp_path / "test_batch").write_bytes(b"")
    with pytest.raises(pickle.UnpicklingError, match="print"):
        datasets.load("cifar10", tmp_path)


def test_digits_are_there_without_a_file(datasets):
    data = datasets.load("digits", None)
    assert data.train_x.shape == (1437, 8, 8, 1)
    normal = datasets.normalize(data, data.train_x)
    assert abs(normal.mean()) < 1e-5
    assert abs(normal.std() - 1) < 1e-5


# Augmentation.


def test_a_crop_is_a_window_of_the_padded_image(datasets):
    x = images(np.random.default_rng(0), 30, 6)
    cropped = np.asarray(datasets.crop(jax.random.key(0), jnp.asarray(x), 2))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = set()
    for one, whole in zip(cropped, padded, strict=True):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if np.array_equal(whole[i : i + 6, j : j + 6], one)
        ]
        assert places
        corners.update(places)
    assert len(corners) > 10


def test_about_half_are_flipped(datasets):
    x = images(np.random.default_rng(0), 200, 4)
    flipped = np.asarray(datasets.flip(jax.random.key(0), jnp.asarray(x)))
    same = (flipped == x).all((1, 2, 3))
    assert 70 < same.sum() < 130
    np.testing.assert_array_equal(flipped[~same], x[~same][:, :, ::-1])


def test_cutout_leaves_zeros_in_a_square(datasets):
    x = jnp.ones((100, 32, 32, 3))
    zeros = np.asarray(datasets.cutout(jax.random.key(0), x)) == 0
    for hole in zeros:
        rows, columns = hole.any((1, 2)).sum(), hole.any((0, 2)).sum()
        assert 8 <= rows <= 16
        assert 8 <= columns <= 16
        assert hole.sum() == 3 * rows * columns
    assert 0.14 < zeros.mean() < 0.25


def test_augmentation_is_that_of_the_key_and_of_its_name(datasets, small):
    def seen(seed, name):
        args = jax.random.key(seed), small, small.train_x, name
        return np.asarray(datasets.training_images(*args))

    np.testing.assert_array_equal(seen(0, "crop+flip"), seen(0, "crop+flip"))
    assert np.any(seen(0, "crop+flip") != seen(1, "crop+flip"))
    plain = np.asarray(datasets.normalize(small, small.train_x))
    np.testing.assert_array_equal(seen(0, "none"), plain)
    with pytest.raises(ValueError, match="mixup"):
        seen(0, "mixup")


# Networks and presets.


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.174), ("wrn28-10", 36.479), ("pyramidnet110", 28.5)],
)
def test_networks_have_the_published_sizes(name, millions):
    model = importlib.import_module("networks").NETWORKS[name](dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)
    variables = jax.eval_shape(init, x)
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size / 1e6 == pytest.approx(millions, rel=2e-3)


def test_logits_are_float32_and_layers_are_not():
    module = importlib.import_module("networks")
    for name in ("mlp", "cnn", "vit", "tiny-resnet"):
        model = module.NETWORKS[name](dtype=jnp.bfloat16)
        x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        init = lambda x, model=model: model.init_with_output(
            jax.random.key(0), x, train=False
        )
        logits, variables = jax.eval_shape(init, x)
        assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
        params = jax.tree.leaves(variables["params"])
        assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}
        jaxpr = str(jax.make_jaxpr(init)(x))
        assert "bf16" in jaxpr


def test_every_preset_is_an_optimizer(presets):
    tasks = [(d, m) for d in ("cifar10", "cifar100") for m in BIG]
    tasks += [("digits", "mlp"), ("fashion-mnist", "cnn"), ("cifar10", "vit")]
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    for data, model in tasks:
        recipe = presets.recipe(data, model)
        for method in presets.METHODS:
            values = presets.hyperparameters(method, recipe, 390)
            assert json.loads(json.dumps(values)) == values
            built = presets.build(
                method, values, recipe, steps=400, examples=9, classes=2, seed=0
            )
            built.tx.init(params)


def test_what_lasts_epochs_is_scaled_with_the_run(presets):
    for epochs, warmup, decay in ((200, 1170, 0.9998), (20, 117, 0.998)):
        recipe = dataclasses.replace(
            presets.recipe("cifar10", "resnet18"), epochs=epochs
        )
        values = presets.hyperparameters("vSAM", recipe, 390)
        assert values["warmup_steps"] == warmup
        values = presets.hyperparameters("MESA", recipe, 390)
        assert values["decay"] == pytest.approx(decay, abs=1e-5)


def test_the_published_table(presets):
    rows = presets.published("cifar10", "resnet18")
    assert {*rows} <= {*presets.METHODS}
    assert [r["accuracy"] for r in rows["ESAM"]] == ["96.55", "96.56"]
    assert rows["vSAM"][0]["ascents"] == "23579"
    assert presets.published("digits", "mlp") == {}


# Training.


def results(trainer, seed=0, folder=Path("nowhere")):
    return trainer.run(seed, folder)


@pytest.mark.parametrize(
    "method",
    [
        *(
            "SGD",
            "SAM",
            "SAM-5",
            "SAM-10",
            "LookSAM-5",
            "ESAM",
            "AE-SAM",
            "SAF",
            "MESA",
        ),
        *(
            "vSAM",
            "vSAM-A",
            "MSAM",
            "R-SAM",
            "RSAM",
            "ASAM",
            "GSAM",
            "quarter-batch SAM",
        ),
    ],
)
def test_every_method_trains(trainer, method):
    made = trainer(method, epochs=2)
    after = results(made)
    ascents, cost = after["ascents"], after["gradients_per_step"]
    assert after["steps"] == 6
    assert after["train_loss"] is not None
    always = ascents == 6
    expected = {
        "SGD": cost == 1,
        "MSAM": cost == 1,
        "SAF": cost == 1,
        "MESA": cost == pytest.approx(4 / 3),
        "SAM-5": ascents == 2,
        "LookSAM-5": ascents == 2,
        "SAM-10": ascents == 1,
        "AE-SAM": 1 <= ascents <= 6 and cost == 1 + ascents / 6,
        "ESAM": always and cost == pytest.approx(1 + 1 / 3 + 7 / 16),
        "R-SAM": always and cost == pytest.approx(2 + 1 / 3),
        "quarter-batch SAM": always and cost == 1.25,
    }
    assert expected.get(method, always and cost == 2)


def test_the_tests_know_all_methods(presets):
    marks = test_every_method_trains.pytestmark
    assert tuple(marks[0].args[1]) == presets.METHODS


def test_sgd_learns(trainer):
    after = results(trainer("SGD", epochs=30, augmentation="none", smoothing=0.0))
    assert after["accuracy"] == 100
    assert after["accuracy_last_epochs"] > 90
    assert after["train_loss"] < 0.3


@pytest.mark.parametrize("method", ["SGD", "SAM-5", "AE-SAM"])
def test_a_scan_computes_what_the_loop_does(trainer, method):
    one, two = (results(trainer(method, scan=s, epochs=2)) for s in (True, False))
    assert one["ascents"] == two["ascents"]
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(
            one["history"][name], two["history"][name], rtol=1e-4
        )


@pytest.mark.slow
def test_an_epoch_of_each_method_is_a_program_in_half_precision(trainer, presets):
    for method in presets.METHODS:
        made = trainer(method, "tiny-resnet", scan=True, dtype="bfloat16")
        # Of MESA the averaged statistics are those of forward passes, so not abstract.
        like = made.start(0)
        after = jax.eval_shape(made.scanned, like, made.data, jax.random.key(0), 0)
        kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        assert kinds(after) == kinds(like), method
        assert {x.dtype for x in jax.tree.leaves(after.params)} == {
            jnp.dtype("float32")
        }


def test_seeds_change_what_a_method_draws(trainer):
    made = trainer("R-SAM")
    leaves = [jax.tree.leaves(made.build(seed).tx.init(jnp.ones(2))) for seed in (0, 1)]
    differ = [np.any(a != b) for a, b in zip(*leaves, strict=True)]
    assert sum(differ) == 1  # the key
    # One program for both: nothing is traced again.
    first = results(made, 0)
    traces = made.traces
    assert results(made, 1)["train_loss"] != first["train_loss"]
    assert made.traces == traces
    assert results(made, 0)["train_loss"] == first["train_loss"]


def test_targets_are_smoothed_over_the_wrong_classes(trainer, small):
    made = trainer("SGD")
    targets = made.batch(small, jnp.arange(4), jax.random.key(0)).targets
    np.testing.assert_allclose(targets.max(-1), 0.9, rtol=1e-6)
    np.testing.assert_allclose(targets.min(-1), 0.1 / 9, rtol=1e-6)


def test_msam_is_judged_without_its_perturbation(trainer, small):
    made = trainer("MSAM", epochs=20, more={"rho": 30.0}, smoothing=0.0)
    state = made.start(0)
    for epoch in range(20):
        state = made.epoch(state, jax.random.key(1), epoch, lambda steps: None)
    w = optax_sam.msam_eval_params(state.opt_state, state.params)
    x = made.model.apply(
        {"params": w}, (small.test_x - small.mean) / small.deviation, 0
    )
    right = 100 * np.mean(x.argmax(-1) == small.test_y)
    assert made.accuracy(state, 0) == pytest.approx(right)
    assert made.accuracy(state._replace(opt_state=made.start(0).opt_state), 0) != right


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SAM", "ESAM", "LookSAM-5"])
def test_statistics_are_those_of_the_clean_pass(trainer, method):
    key = jax.random.key(0)
    states = []
    for name in ("SGD", method):
        made = trainer(name, "tiny-resnet")
        order = made.order(key, 0)
        args = order, jnp.int32(0), key, jnp.int32(0)
        states.append(made.step(made.start(0), made.data, *args))
    for a, b in zip(*(jax.tree.leaves(s.model_state) for s in states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True)
    ]
    assert max(moved) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["MESA", "MSAM", "quarter-batch SAM", "R-SAM"])
def test_networks_with_batchnorm_train(trainer, method):
    after = results(trainer(method, "tiny-resnet", epochs=2))
    assert after["train_loss"] < 4
    assert after["parameters"] > 1000


# Stopping, going on, and not doing twice.


def command(quality, tmp_path, *more):
    arguments = ["--epochs", "3", "--seeds", "0", "--limit", "200"]
    arguments += ["--batch-size", "50", "--out", str(tmp_path / "new/rows.jsonl")]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints"), *more]
    return quality.parser().parse_args(arguments)


def run(quality, options):
    from rich.console import Console

    log = io.StringIO()
    finished = quality.train(options, Console(file=log, width=120))
    return finished, log.getvalue()


@pytest.mark.slow
def test_a_stopped_training_goes_on_where_it_was(quality, tmp_path):
    methods = "--methods", "LookSAM-5", "MSAM", "SAF"
    once = command(quality, tmp_path / "once", *methods)
    assert run(quality, once)[0]
    parts = command(quality, tmp_path / "parts", *methods, "--minutes", "0")
    calls = 0
    while not run(quality, parts)[0]:
        calls += 1
        assert calls < 12
    assert calls == 8  # two stops within each training, and one after all but the last
    rows = [quality.read(o.out) for o in (once, parts)]
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {
            k: v for k, v in two.items() if k not in TIMES
        }
        assert one["history"]["loss"] == two["history"]["loss"]
        assert one["history"]["accuracy"] == two["history"]["accuracy"]
    assert not list((tmp_path / "parts/checkpoints").glob("*"))


def test_what_the_file_holds_is_not_trained_again(quality, tmp_path):
    options = command(quality, tmp_path, "--methods", "SGD")
    assert "SGD, seed 0" in run(quality, options)[1]
    with options.out.open("a") as file:
        file.write('{"id": "cut of')  # as a killed process leaves it
    finished, log = run(quality, options)
    assert finished
    assert log.strip() == ""
    options.seeds = [1]
    assert run(quality, options)[0]
    assert [row["seed"] for row in quality.read(options.out)] == [0, 1]


def test_a_plan_is_a_list_of_options(quality, tmp_path):
    plan = [
        {"methods": ["SGD", "SAM"], "seeds": [0, 1], "hyper": {"SAM": {"rho": 0.3}}},
        {"data-set": "cifar10", "model": "resnet18", "epochs": 7, "methods": ["vSAM"]},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = quality.parser().parse_args(["--plan", str(tmp_path / "plan.json")])
    jobs = quality.all_jobs(options)
    assert [(j.method, j.seed) for j in jobs[:4]] == [
        *(("SGD", 0), ("SAM", 0), ("SGD", 1), ("SAM", 1))
    ]
    assert [j.recipe.epochs for j in jobs] == [60] * 4 + [7] * 3
    assert jobs[-1].recipe.model == "resnet18"
    trainer = quality.Bench().trainer(jobs[1])
    assert trainer.values["rho"] == 0.3
    assert trainer.scan
    (tmp_path / "plan.json").write_text('[{"modle": "cnn"}]')
    with pytest.raises(SystemExit, match="modle"):
        quality.all_jobs(options)


def test_the_plans_of_the_repository_can_be_read(quality, presets):
    seen = []
    for path in sorted((ROOT / "benchmarks/plans").glob("*.json")):
        jobs = quality.all_jobs(quality.parser().parse_args(["--plan", str(path)]))
        assert jobs
        if path.name.startswith("gpu"):
            seen += [job.method for job in jobs if job.seed == 0]
    assert len(seen) == len({*seen}) == 10


# The report.


def row(method, seed, accuracy, ais, ascents=0, **more):
    return {
        **{"method": method, "seed": seed, "accuracy": accuracy, "ais": ais},
        **{"hyperparameters": {}, "data": "cifar10", "model": "resnet18"},
        **{"epochs": 15, "batch_size": 128, "learning_rate": 0.05, "momentum": 0.9},
        **{"weight_decay": 1e-3, "smoothing": 0.1, "augmentation": "crop"},
        **{"label_noise": 0.0, "limit": 0, "dtype": "bfloat16", "device": "GPU"},
        **{"steps": 100, "ascents": ascents, "train_loss": 0.5},
        "gradients_per_step": 1 + ascents / 100,
        "accuracy_last_epochs": accuracy,
        **more,
    }


def test_the_report_shows_ours_beside_the_published(tmp_path):
    report = importlib.import_module("quality_report")
    rows = [
        row("SAM", 0, 95.0, 1000.0, 100),
        row("vSAM", 1, 95.5, 1500.0, 30),
        row("SGD", 0, 94.0, 2000.0),
        row("SAM", 1, 96.0, 1000.0, 100),
        row("vSAM", 0, 95.5, 1500.0, 30),
        row("SGD", 0, 94.0, None, epochs=20, train_loss=None),
    ]
    tables = report.markdown(rows)
    assert len(tables) == 2
    lines = next(iter(tables.values())).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    found = {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}
    assert list(found) == ["SGD", "SAM", "vSAM"]
    vsam = found["vSAM"]
    assert vsam["test accuracy (%)"] == "95.50 ± 0.00"
    assert vsam["minus SAM"] == "+0.00 ± 0.50"
    assert vsam["AIS / SAM's"] == "150 %"
    assert vsam["of what its gradients allow"] == "98 %"  # 1.3 * 1500 / 2000
    assert vsam["ascents"] == "30 (30 %)"
    assert vsam["published (%)"] == "96.64 ± 0.12 (vSAM paper)"
    assert vsam["published AIS / SAM's"] == "140 %"
    assert found["SGD"]["minus SAM"] == "-1.00"
    assert "not finite" in list(tables.values())[1]
    counted = next(iter(report.markdown(rows, times=False).values()))
    assert "AIS" not in counted
    assert "23579" in counted
    report.draw(rows, tmp_path / "new/figure.png")
    assert (tmp_path / "new/figure.png").read_bytes().startswith(b"\x89PNG")


def test_choices_of_hyperparameters_are_told_apart():
    report = importlib.import_module("quality_report")
    rows = [
        row("SAM", 0, 95.0, None, 100, hyperparameters={"rho": 0.1}),
        row("SAM", 0, 96.0, None, 100, hyperparameters={"rho": 0.2}),
    ]
    (text,) = report.markdown(rows).values()
    assert "SAM (rho 0.1)" in text
    assert "SAM (rho 0.2)" in text
