"""The studies of errors and costs run, and what the page says of them holds."""

import sys

import numpy as np
import pytest

from benchmarks.lib.study import RESULTS, read
from benchmarks.studies import coverage, measures

HELD = read(RESULTS / "coverage.json")["rows"]
COSTS = read(RESULTS / "measures.json")


def test_every_spectrum_was_run_in_both_precisions():
    names = {*coverage.drawn(), "dense net", "conv net"}
    assert {*HELD} == {f"{x}, {d}" for x in names for d in ("float32", "float64")}
    assert len({tuple(rows) for rows in HELD.values()}) == 1  # all have all estimates


def test_two_errors_hold_the_truth_in_the_share_of_keys_that_is_documented():
    for case, rows in HELD.items():
        for name, (share, *_, exact) in rows.items():
            least = 0.88 if name == "PAC-Bayes drop" else 0.9
            assert exact or share >= least, (case, name)


def test_streams_are_their_stack_and_need_a_batch_and_twelve_vectors():
    for name, row in COSTS["stream"].items():
        assert row["difference"] <= 1e-5, name
        assert row.get("vectors", 0) <= 12, name


def test_entropies_of_known_spectra():
    for order in coverage.ORDERS:
        two = coverage.entropy(np.array([2.0, -2.0, 0.0]), order)
        assert two == pytest.approx(np.log(2))
    assert coverage.entropy(np.array([3.0, 1.0]), 2.0) == pytest.approx(np.log(1.6))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_coverage_runs(monkeypatch, tmp_path, capsys):
    spectrum = np.r_[5.0, -3.0, 0.1 * np.cos(np.arange(118))]
    monkeypatch.setattr(coverage, "drawn", lambda: {"one": spectrum})
    monkeypatch.setattr(coverage, "networks", dict)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--quick", "--out", str(out)])
    coverage.main()
    rows = read(out)["rows"]
    assert list(rows) == ["one, float64", "one, float32"]
    for share, error, _, stderr, exact in rows["one, float64"].values():
        assert share > 0.4 or exact
        assert error < 5 * stderr + 1e-6
    assert "Renyi, order 0.5" in capsys.readouterr().out


@pytest.mark.slow
def test_costs_are_counted_and_streams_are_measured(monkeypatch):
    sizes = {"IMAGES": 40, "BATCH": 8, "EXPERTS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(measures, name, value)
    (row,) = measures.streamed(
        "float32", {"trace": measures.trace}, measures.network(3, 2, "float32")
    ).values()
    assert row["parameters"] == 2 * (784 * 3 + 3 * 10)
    assert row["difference"] < 1e-5
    counted = {x.name: measures.cost(x)[0] for x in measures.MEASURES[:2]}
    assert counted == {"hvp": 1, "hessian_eigenvalues": 20}
