"""docs/measures/tracking.md runs as printed, and so does its example."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import pytest

from optax_sam import sharpness


def written():
    with open("sharpness.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    """All blocks but those of writers, which run where they are installed."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names, writers = {}, []
    for block in harness.code("tracking.md"):
        if block.startswith("from "):
            writers.append(block)
        else:
            exec(block, names)
    rows, read = names["rows"], written()
    assert len(read) == 60
    probed = [row for row in read if row["sharpness/trace/estimate"]]
    assert [int(row["step"]) for row in probed] == [0, 20, 40]
    for row in probed:
        top = float(row["sharpness/lambda_max/eigenvalues/0"])
        assert float(row["train/rayleigh_quotient"]) < 1.5 * top
        assert float(row["sharpness/lambda_max/converged/0"]) == 1
        assert float(row["train/stability_edge_sam"]) < 4
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    # The table of the page names what is logged.
    documented = {
        name
        for cells in harness.table("tracking.md", "Free, on each step")
        for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert {f"train/{name}" for name in documented} == {
        name for name in rows[0] if name.startswith("train/")
    }
    assert names["counted"].count == 80
    whole = jax.tree.map(lambda x: x[None], names["data"])
    params = names["params"]
    exact = sharpness.hvp(names["loss_fn"], params, whole, params)
    harness.assert_close_in_size(names["Hg"], exact, 1e-5)
    assert ["clu" in block for block in writers] == [True, False]


@pytest.mark.parametrize("writer", ["clu.metric_writers", "tensorboardX"])
def test_writers_take_what_is_logged(writer, tmp_path, monkeypatch):
    pytest.importorskip(writer, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    start = f"from {writer.split('.')[0]} "
    (block,) = [x for x in harness.code("tracking.md") if x.startswith(start)]
    logged = sharpness.to_scalars({"a": jnp.float32(1.5), "flag": True})
    exec(block, {"rows": [{"step": 3} | logged]})
    (written,) = (tmp_path / "runs/sam").iterdir()
    assert b"sharpness/flag" in written.read_bytes()


@pytest.mark.slow
def test_the_example_tracks(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("flax")
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, root / "examples/track_sharpness.py", "--steps", "121"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    _, *shown = (line.split() for line in output.splitlines())
    assert [int(row[0]) for row in shown] == [0, 40, 80, 120]
    assert len(written()) == 121
    for row in shown:
        loss, perturbed, curvature, top, _, edge, gd = map(float, row[1:])
        assert loss < perturbed
        assert curvature < top
        assert edge < gd == 4
    # With SAM it goes down with its edge; gradient descent would end at 2 / lr.
    assert top < 1.3 * edge < 2.2
