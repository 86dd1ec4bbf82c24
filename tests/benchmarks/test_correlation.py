"""The correlation study runs and resumes, and its committed results are whole."""

import sys

import jax
import numpy as np
import pytest

from benchmarks.lib.study import RESULTS, read
from benchmarks.studies import correlation as study
from optax_sam import sharpness

COMMITTED = read(RESULTS / "correlation.json")


def test_the_whole_grid_was_run():
    assert set(COMMITTED["sets"]) == set(study.TITLES)
    for part in COMMITTED["sets"].values():
        settings = [tuple(row["settings"].values()) for row in part["rows"]]
        assert len(set(settings)) == len(settings) == np.prod(study.SHAPE)


def test_correlations_are_of_the_grid_in_its_order():
    rows = [{**row, "measures": {}} for row in COMMITTED["sets"]["digits"]["rows"]]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    (line, *_) = found = study.correlations(rows)
    assert study.correlations(shuffled) == found
    assert line["measure"] == "weight norm"
    # Along the weight decay alone: pairs of neighbours, the last axis being fastest.
    norms = np.array([row["weight norm"] for row in rows])
    gaps = np.array([row["test error (%)"] - row["training error (%)"] for row in rows])
    agree = np.sign(norms[1::2] - norms[::2]) * np.sign(gaps[1::2] - gaps[::2])
    assert line["by_axis"][-1] == pytest.approx(agree.mean(), abs=1e-3)
    everything = np.sign(norms[:, None] - norms) * np.sign(gaps[:, None] - gaps)
    assert line["tau"] == pytest.approx(everything.sum() / 48 / 47)


def test_geodesic_sharpness_stays_and_the_others_move():
    first, *_ = rows = COMMITTED["transformer"]["rows"]
    change = lambda name: max(abs(row[name] / first[name] - 1) for row in rows)
    assert max(map(change, ("loss", "geodesic, mix", "geodesic, inv"))) < 1e-5
    assert min(map(change, ("adaptive", "plain", "lambda_max"))) > 1


@pytest.mark.slow
def test_it_trains_measures_and_resumes(monkeypatch, tmp_path, capsys):
    one = lambda params, batches: {
        name: sharpness.sam_sharpness(study.loss_fn, params, batches, 0.1).value
        for name in study.SHOWN
    }
    monkeypatch.setattr(study, "measures", lambda: {"one": jax.jit(one)})
    row = {"spread": 1.0, "adaptive": 1.0, "loss": 2.0}
    monkeypatch.setattr(study, "transformer", lambda quick: {"rows": [row]})
    out, figure = tmp_path / "out.json", tmp_path / "figure.png"
    command = ["correlation.py", "--quick", "--out", str(out), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    rows = read(out)["sets"]["digits"]["rows"]
    assert len(rows) == 3
    assert all(np.isfinite(row["measures"]["trace"]) for row in rows)
    assert all(0 <= row["test error (%)"] <= 100 for row in rows)
    assert figure.stat().st_size > 10_000
    study.main()
    more = read(out)["sets"]["digits"]["rows"]
    assert more[:3] == rows  # kept as they were
    assert len(more) == len({tuple(row["settings"].values()) for row in more}) == 6
    assert "| trace |" in capsys.readouterr().out
