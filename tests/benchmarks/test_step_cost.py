"""The step costs are timed and judged."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/step_cost_cpu.json"


def test_the_rows_of_the_results_are_those_that_are_timed(benchmark):
    methods = benchmark("cost_methods")
    studies = json.loads(RESULTS.read_text())["models"]
    for name, study in studies.items():
        found = {(row["method"], row["form"]) for row in study["rows"]}
        timed = set(methods.rows(name, "cpu", list(methods.METHODS)))
        assert found == timed


@pytest.mark.slow
def test_it_times_and_adds_rows(benchmark, monkeypatch, tmp_path, capsys):
    out, cost = tmp_path / "out.json", benchmark("step_cost")

    def timed(*methods):
        command = ["step_cost.py", "--quick", "--models", "MLP", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods])
        cost.main()
        rows = json.loads(out.read_text())["models"]["MLP"]["rows"]
        for row in rows:
            assert 0 < row["to_sgd"][0] <= row["to_sgd"][1] <= row["to_sgd"][2]
            assert row["peak_mib"] > 0
        return {(x["method"], x["form"]): x for x in rows}

    rows = timed(cost.cost_methods.OPAQUE, "sam", "sam_5")
    names = [
        ("SGD", ""),
        (cost.cost_methods.OPAQUE, ""),
        ("sam", ""),
        ("sam_5", "dispatched"),
        ("sam_5", "conditional"),
    ]
    assert list(rows) == names
    assert (rows["SGD", ""]["gradients"], rows["sam", ""]["gradients"]) == (1, 2)
    assert 1.9 < rows["sam", ""]["flops_to_sgd"] < 2.3
    two, one = rows["sam_5", "dispatched"], rows["sam_5", "conditional"]
    assert two["gradients"] == one["gradients"] == 1.2
    assert 1.1 < two["flops_to_sgd"] < 1.4
    assert one["flops_to_sgd"] is None
    assert two["compile_to_sgd"] > rows["SGD", ""]["to_sgd"][0] > 0
    more = timed("msam", "--workers", "2")
    assert list(more) == [*names, ("msam", "")]
    assert more["sam", ""] == rows["sam", ""]
    assert more["msam", ""]["gradients"] == 1
    assert more["msam", ""]["compile_to_sgd"] is None  # beside others: not timed
    assert cost.cost_report.markdown(json.loads(out.read_text())) in (
        capsys.readouterr().out
    )


def test_targets_are_judged_by_two_decimals(benchmark):
    report = benchmark("cost_report")
    row = lambda name, form, ideal, compiled, **more: {
        "method": name,
        "form": form,
        "gradients": 2,
        "forwards": 0,
        "to_sgd": [1.0, 2 * ideal, 3.0],
        "to_ideal": [0.9, ideal, 1.2],
        "compile_to_sgd": compiled,
        **more,
    }
    rows = [
        row("SGD", "", 1.5, None),
        row("sam", "", 1.054, 2.1, to_opaque=[0.9, 1.01, 1.1]),
        row("sam_5", "dispatched", 1.056, 3.21),
        row("sam_5", "conditional", 4.0, 2.11),
        row("vsam", "dispatched", 0.75, None),
        row("msam", "", 1.55, None),
    ]
    model = {"settings": {"parameters": 1_000_000}, "rows": rows}
    results = {"settings": {"backend": "cpu"}, "models": {"CNN": model}}
    lines = [line.split(" | ")[1:3] for line in report.targets(results).splitlines()]
    assert lines[2:] == [
        ["1.05", "2 of 4"],  # the cliff is not among them
        ["1.05", "1 of 2"],
        ["1.00", "0 of 1"],
        ["2.10", "1 of 2"],
        ["3.20", "0 of 1"],
        ["0.71", "yes"],  # 1.5 / 2.108
        ["1.02", "0 of 1"],  # 3.1 / 3
    ]
