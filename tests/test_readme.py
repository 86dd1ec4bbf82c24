"""The README's example runs as printed, and the tables are those of the results."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    rate, loss = capsys.readouterr().out.split()
    assert 0 < float(rate) <= 1
    assert float(loss) < 0.5


def test_the_table_of_step_forms_is_that_of_the_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    import step_forms

    results = json.loads((ROOT / "benchmarks/results/step_forms_cpu.json").read_text())
    table = step_forms.markdown(results["rows"])
    assert table in (ROOT / "benchmarks/README.md").read_text()
