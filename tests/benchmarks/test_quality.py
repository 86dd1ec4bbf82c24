"""The quality benchmark stops, goes on, reads its plans and reports."""

from __future__ import annotations

import io
import json

import printed
import pytest
from rich.console import Console

from benchmarks.lib import study
from benchmarks.quality import quality, report

TIMES = {"images_per_second", "ais", "history"}


def parsed(*arguments):
    return quality.parser().parse_args([str(x) for x in arguments])


def command(folder, *more):
    given = ["--epochs", 3, "--seeds", 0, "--limit", 200, "--batch-size", 50]
    given += ["--out", folder / "new/rows.jsonl", "--checkpoints", folder / "kept"]
    return parsed(*given, *more)


def run(options):
    log = io.StringIO()
    finished = quality.train(options, Console(file=log, width=120))
    return finished, log.getvalue()


@pytest.mark.slow
def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    methods = "--methods", "LookSAM-5", "MSAM", "SAF"
    once = command(tmp_path / "once", *methods)
    assert run(once)[0]
    parts = command(tmp_path / "parts", *methods, "--minutes", "0")
    calls = 0
    while not run(parts)[0]:
        calls += 1
        assert calls < 12
    assert calls == 8  # two stops within each training, and one after all but the last
    for one, two in zip(*(quality.read(x.out) for x in (once, parts)), strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {
            k: v for k, v in two.items() if k not in TIMES
        }
        for name in ("loss", "accuracy"):
            assert one["history"][name] == two["history"][name]
    assert not list(parts.checkpoints.glob("*"))


@pytest.mark.slow
def test_what_the_file_holds_is_not_trained_again(tmp_path):
    options = command(tmp_path, "--methods", "SGD")
    assert "SGD, seed 0" in run(options)[1]
    with options.out.open("a") as file:
        file.write('{"id": "cut of')  # as a killed process leaves it
    finished, log = run(options)
    assert finished
    assert log.strip() == ""
    options.seeds = [1]
    assert run(options)[0]
    assert [row["seed"] for row in quality.read(options.out)] == [0, 1]


def test_a_plan_is_a_list_of_options(tmp_path):
    plan = [
        {"methods": ["SGD", "SAM"], "seeds": [0, 1], "hyper": {"SAM": {"rho": 0.3}}},
        {"data-set": "cifar10", "model": "resnet18", "epochs": 7, "methods": ["vSAM"]},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = parsed("--plan", tmp_path / "plan.json")
    jobs = quality.all_jobs(options)
    order = [("SGD", 0), ("SAM", 0), ("SGD", 1), ("SAM", 1)]
    assert [(j.method, j.seed) for j in jobs[:4]] == order
    assert [j.recipe.epochs for j in jobs] == [60] * 4 + [7] * 3
    assert jobs[-1].recipe.model == "resnet18"
    trainer = quality.Bench().trainer(jobs[1])
    assert trainer.values["rho"] == 0.3
    assert trainer.scan
    (tmp_path / "plan.json").write_text('[{"modle": "cnn"}]')
    with pytest.raises(SystemExit, match="modle"):
        quality.all_jobs(options)


def test_the_plans_of_the_repository_can_be_read():
    plans = sorted((study.ROOT / "benchmarks/quality/plans").glob("*.json"))
    jobs = {path.stem: quality.all_jobs(parsed("--plan", path)) for path in plans}
    assert all(jobs.values())
    on_gpus = [job for name in jobs if name.startswith("gpu") for job in jobs[name]]
    seen = [job.method for job in on_gpus if job.seed == 0]
    assert len(seen) == len({*seen}) == 10


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
    rows = [
        row("SAM", 0, 95.0, 1000.0, 100),
        row("vSAM", 1, 95.5, 1500.0, 30),
        row("SGD", 0, 94.0, 2000.0),
        row("SAM", 1, 96.0, 1000.0, 100),
        row("vSAM", 0, 95.5, 1500.0, 30),
        row("SGD", 0, 94.0, None, epochs=20, train_loss=None),
    ]
    first, second = report.markdown(rows).values()
    found = printed.markdown_table(first)
    assert list(found) == ["SGD", "SAM", "vSAM"]
    wanted = {
        "test accuracy (%)": "95.50 ± 0.00",
        "minus SAM": "+0.00 ± 0.50",
        "AIS / SAM's": "150 %",
        "of what its gradients allow": "98 %",  # 1.3 * 1500 / 2000
        "ascents": "30 (30 %)",
        "published (%)": "96.64 ± 0.12 (vSAM paper)",
        "published AIS / SAM's": "140 %",
    }
    assert found["vSAM"].items() >= wanted.items()
    assert found["SGD"]["minus SAM"] == "-1.00"
    assert "not finite" in second
    counted = next(iter(report.markdown(rows, times=False).values()))
    assert "AIS" not in counted
    assert "23579" in counted
    report.draw(rows, tmp_path / "new/figure.png")
    printed.assert_is_picture(tmp_path / "new/figure.png")


def test_choices_of_hyperparameters_are_told_apart():
    radii = [row("SAM", 0, 95.0, None, hyperparameters={"rho": x}) for x in (0.1, 0.2)]
    (text,) = report.markdown(radii).values()
    assert "SAM (rho 0.1)" in text
    assert "SAM (rho 0.2)" in text
