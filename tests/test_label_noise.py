"""The study of wrong labels counts, adds to its file and draws."""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("flax", "matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)

RESULTS = Path(__file__).parents[1] / "benchmarks/results/label_noise.json"


@pytest.fixture
def study(benchmark):
    return benchmark("label_noise")


def gradients(path: Path) -> dict[str, float]:
    rows = json.loads(path.read_text())["rows"]
    return {name: row["gradients_per_step"][0] for name, row in rows.items()}


def check_picture(picture: Path) -> None:
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1200
    assert height >= 600
    assert len(content) > 30_000


def test_it_trains_adds_and_draws(study, monkeypatch, tmp_path, capsys):
    out, picture = tmp_path / "new/out.json", tmp_path / "drawn/out.png"
    command = ["label_noise.py", "--quick", "--out", str(out), "--methods"]
    monkeypatch.setattr(
        sys, "argv", [*command, "vsam, SAM-5", "--figure", str(picture)]
    )
    study.main()
    first = json.loads(out.read_text())["rows"]
    # In the order of the list, after the reference for times; vSAM warms up.
    exact = {"SGD": 1, "SAM-5": 1 + 9 / 44, "vSAM": 2}
    assert gradients(out) == pytest.approx(exact, abs=1e-4)
    assert list(first) == list(exact)
    assert first["SGD"]["time_to_sgd"] == 1
    assert all(np.shape(row["accuracy"]) == (1, 2) for row in first.values())
    assert np.shape(first["vSAM"]["psf_norm"]) == (1, 2)
    assert first["vSAM"]["sampling_rate"] == [[None, None]]
    check_picture(picture)
    monkeypatch.setattr(sys, "argv", [*command, "SAM-5,msam"])
    study.main()
    second = json.loads(out.read_text())["rows"]
    assert list(second) == ["SGD", "SAM-5", "vSAM", "MSAM"]
    assert {name: second[name] for name in first} == first  # kept as they were
    shown = {name: second[name] for name in ("SGD", "SAM-5", "MSAM")}
    assert study.markdown({"rows": shown})["all"] in capsys.readouterr().out


@pytest.mark.slow
def test_it_knows_all_methods(study, monkeypatch, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = ["label_noise.py", "--quick", "--out", str(out), "--figure", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    exact = {"SGD": 1, "MSAM": 1, "SAF": 1, "MESA": 4 / 3, "ESAM": 4 / 3 + 31 / 64}
    exact |= dict.fromkeys(("SAM", "ASAM", "GSAM", "R-SAM", "RSAM", "GNP", "F-SAM"), 2)
    exact |= dict.fromkeys(("WSAM", "Fisher SAM", "AMP", "StableSAM", "SAMPa"), 2)
    exact |= {"GAM": 4, "SAM 1/4": 1.25, "SAM 1/16": 1.0625}
    exact |= dict.fromkeys(("SAM-5", "LookSAM", "Look-LayerSAM"), 1 + 9 / 44)
    # Those that choose: vSAM warms up in these 44 steps.
    exact |= {"vSAM": 2, "vSAM-A": 2}
    adaptive = {"AE-SAM", "AE-LookSAM", "RST", "G-RST"}
    found = gradients(out)
    assert found.keys() == exact.keys() | adaptive
    assert {k: found[k] for k in exact} == pytest.approx(exact, abs=1e-4)
    assert all(1 < found[k] < 2 for k in adaptive)
    check_picture(picture)


def test_it_names_its_methods(study):
    assert study.chosen("mesa, Msam") == ["SGD", "MSAM", "MESA"]
    with pytest.raises(
        argparse.ArgumentTypeError, match="no method sgld; .*, ESAM, AE"
    ):
        study.chosen("SAM,SGLD")


def test_the_committed_results_are_of_all_methods(study):
    results = json.loads(RESULTS.read_text())
    known = study.all_methods(1, 1)
    assert list(results["rows"]) == list(known)
    seeds, epochs = results["settings"]["seeds"], results["settings"]["epochs"]
    for name, row in results["rows"].items():
        assert row["settings"] == known[name].settings
        assert np.shape(row["accuracy"]) == (seeds, epochs) == (3, 100)
