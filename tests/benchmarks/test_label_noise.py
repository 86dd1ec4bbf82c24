"""The study of wrong labels counts, adds to its file and draws."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import printed
import pytest

from benchmarks.lib.study import RESULTS, read
from benchmarks.studies import label_noise as study


@pytest.fixture
def run(monkeypatch):
    """Runs the script with ``--quick``, and returns the rows that it leaves."""

    def main(out, *more):
        command = ["label_noise.py", "--quick", "--out", out, *more]
        monkeypatch.setattr(sys, "argv", [str(x) for x in command])
        study.main()
        return read(out)["rows"]

    return main


def gradients(rows):
    return {name: row["gradients_per_step"][0] for name, row in rows.items()}


@pytest.mark.slow
def test_it_trains_and_draws(run, tmp_path):
    out, picture = tmp_path / "new/out.json", tmp_path / "drawn/out.png"
    rows = run(out, "--methods", "vsam", "--figure", picture)
    assert list(rows) == ["SGD", "vSAM"]  # after the reference for times
    assert gradients(rows) == {"SGD": 1, "vSAM": 2}  # vSAM warms up
    assert rows["SGD"]["time_to_sgd"] == 1
    assert all(np.shape(row["accuracy"]) == (1, 2) for row in rows.values())
    assert np.shape(rows["vSAM"]["psf_norm"]) == (1, 2)
    assert rows["vSAM"]["sampling_rate"] == [[None, None]]
    printed.assert_is_picture(picture, 1200, 600, 30_000)


def test_it_adds_in_the_order_of_the_list_and_keeps_what_is_there(
    run, monkeypatch, tmp_path, capsys
):
    out, trained = tmp_path / "out.json", []

    def train(names, num_seeds, num_epochs, progress):
        trained.append(names)
        row = {"gradients_per_step": [1.0], "accuracy": [[50.0, 60.0]]}
        return {x: row | {"settings": x, "time_to_sgd": len(trained)} for x in names}

    monkeypatch.setattr(study, "train", train)
    first = run(out, "--methods", "vsam, SAM-5")
    second = run(out, "--methods", "SAM-5,msam")
    assert run(out, "--methods", "msam") == second
    assert trained == [["SGD", "SAM-5", "vSAM"], ["SGD", "MSAM"]]
    assert list(second) == ["SGD", "SAM-5", "vSAM", "MSAM"]
    assert {name: second[name] for name in first} == first
    shown = {name: second[name] for name in ("SGD", "SAM-5", "MSAM")}
    assert study.markdown({"rows": shown})["all"] in capsys.readouterr().out


@pytest.mark.slow
def test_it_knows_all_methods(run, tmp_path):
    found = gradients(run(tmp_path / "out.json", "--figure", tmp_path / "out.png"))
    adaptive = {"AE-SAM", "AE-LookSAM", "RST", "G-RST"}
    known = study.all_methods(1, 1)
    exact = {k: method.cost.whole for k, method in known.items() if k not in adaptive}
    exact |= dict.fromkeys(("SAM-5", "LookSAM", "Look-LayerSAM"), 1 + 9 / 44)
    assert exact["vSAM"] == 2  # it warms up in these 44 steps
    assert list(found) == list(known)
    assert {k: found[k] for k in exact} == pytest.approx(exact, abs=1e-4)
    assert all(1 < found[k] < 2 for k in adaptive)
    printed.assert_is_picture(tmp_path / "out.png", 1200, 600, 30_000)


def test_it_names_its_methods():
    assert study.chosen("mesa, Msam") == ["SGD", "MSAM", "MESA"]
    with pytest.raises(
        argparse.ArgumentTypeError, match="no method sgld; .*, ESAM, AE"
    ):
        study.chosen("SAM,SGLD")


def test_the_committed_results_are_of_all_methods():
    results, known = read(RESULTS / "label_noise.json"), study.all_methods(1, 1)
    settings = {name: row["settings"] for name, row in results["rows"].items()}
    assert settings == {name: method.settings for name, method in known.items()}
    assert list(settings) == list(known)
    for row in results["rows"].values():
        assert np.shape(row["accuracy"]) == (3, 100)
