"""The README's example runs as printed, and the tables are those of the results."""

import json
from pathlib import Path

import harness

ROOT = Path(__file__).parent.parent


def test_the_example_runs(capsys):
    (code,) = harness.code("../README.md")
    exec(compile(code, "README.md", "exec"), {})
    rate, loss = capsys.readouterr().out.split()
    assert 0 < float(rate) <= 1
    assert float(loss) < 0.5


def test_the_table_of_step_forms_is_that_of_the_results(benchmark):
    step_forms = benchmark("step_forms")
    results = json.loads((ROOT / "benchmarks/results/step_forms_cpu.json").read_text())
    table = step_forms.markdown(results["rows"])
    assert table in (ROOT / "benchmarks/README.md").read_text()
