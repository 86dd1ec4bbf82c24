"""The correlation study runs and resumes, and its committed results are whole."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_sam import sharpness

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/correlation.json"


@pytest.fixture
def study(benchmark):
    return benchmark("correlation")


def test_the_whole_grid_was_run(study):
    results = json.loads(RESULTS.read_text())
    assert set(results["sets"]) == set(study.TITLES)
    for part in results["sets"].values():
        settings = [tuple(row["settings"].values()) for row in part["rows"]]
        assert len(set(settings)) == len(settings) == np.prod(study.SHAPE)


def test_correlations_are_of_the_grid_in_its_order(study):
    rows = json.loads(RESULTS.read_text())["sets"]["digits"]["rows"]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert study.correlations(shuffled)[0] == study.correlations(rows)[0]
    # Along the weight decay alone: pairs of neighbours, the last axis being fastest.
    norms = np.array([row["weight norm"] for row in rows])
    gaps = np.array([row["test error (%)"] - row["training error (%)"] for row in rows])
    agree = np.sign(norms[1::2] - norms[::2]) * np.sign(gaps[1::2] - gaps[::2])
    (line,) = [x for x in study.correlations(rows) if x["measure"] == "weight norm"]
    assert line["by_axis"][-1] == pytest.approx(agree.mean(), abs=1e-3)
    everything = np.sign(norms[:, None] - norms) * np.sign(gaps[:, None] - gaps)
    assert line["tau"] == pytest.approx(everything.sum() / 48 / 47)


def test_geodesic_sharpness_stays_and_the_others_move():
    rows = json.loads(RESULTS.read_text())["transformer"]["rows"]
    first = rows[0]
    change = lambda name: max(abs(row[name] / first[name] - 1) for row in rows)
    assert change("loss") < 1e-5
    assert change("geodesic, mix") < 1e-5
    assert change("geodesic, inv") < 1e-5
    assert change("adaptive") > 1
    assert change("plain") > 1
    assert change("lambda_max") > 1


@pytest.mark.slow
def test_transformed_weights_are_the_same_function(study):
    net = study.Transformer()
    images = jnp.asarray(np.random.default_rng(0).random((5, 64)), "float32")
    params = net.init(jax.random.key(0), images)
    params = optax.tree.random_like(jax.random.key(1), params)
    params = jax.tree.map(lambda x: 0.3 * x, params)  # no bias is zero
    other = study.transformed(params, 3, 3.0)
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(
        apply(other, images), apply(params, images), rtol=1e-3, atol=1e-4
    )
    moved = optax.tree.norm(optax.tree.sub(other, params)) / optax.tree.norm(params)
    assert moved > 0.3


@pytest.mark.slow
def test_it_trains_measures_and_resumes(study, monkeypatch, tmp_path, capsys):
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
    rows = json.loads(out.read_text())["sets"]["digits"]["rows"]
    assert len(rows) == 3
    assert all(np.isfinite(row["measures"]["trace"]) for row in rows)
    assert all(0 <= row["test error (%)"] <= 100 for row in rows)
    assert figure.stat().st_size > 10_000
    study.main()
    more = json.loads(out.read_text())["sets"]["digits"]["rows"]
    assert more[:3] == rows  # kept as they were
    assert len(more) == 6
    assert len({tuple(row["settings"].values()) for row in more}) == 6
    assert "| trace |" in capsys.readouterr().out
