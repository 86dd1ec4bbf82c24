"""The record of deviations: that it is whole, and that tests are held to it."""

import json

import conformance
import numpy as np
import pytest
import recorded
from site_pages import PAGES

from optax_sam.method import METHODS

KNOWN = json.loads(conformance.RECORD.read_text())


def test_every_method_and_every_recorded_run_has_a_row():
    assert METHODS.keys() <= KNOWN.keys()
    sources = {run["source"] for run in recorded.RUNS.values() if "source" in run}
    assert sources <= {source for entry in KNOWN.values() for source in entry}
    for method, entry in KNOWN.items():
        assert f"| `{method}` |" in PAGES["docs/reference/conformance.md"]
        for found in entry.values():
            assert 0 <= found["deviation"] < 1e-9, method


def test_what_grows_or_is_not_recorded_fails(monkeypatch):
    monkeypatch.delenv("CONFORMANCE", raising=False)
    wanted = {"w": np.array([1.0, 3.0])}
    apart = lambda size: {"w": wanted["w"] + [0.0, 3 * size]}
    allowed = max(conformance.FLOOR, 10 * KNOWN["sam"][conformance.PAPER]["deviation"])
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/methods/test_sam.py::test")
    conformance.hold(conformance.PAPER, apart(0.9 * allowed), wanted)
    with pytest.raises(AssertionError, match="paper"):
        conformance.hold(conformance.PAPER, apart(1.1 * allowed), wanted)
    with pytest.raises(AssertionError, match="make conformance records sam"):
        conformance.hold("nobody/nothing", wanted, wanted)


def test_recorded_are_the_largest(monkeypatch, tmp_path):
    lines = tmp_path / "lines"
    monkeypatch.setenv("CONFORMANCE", str(lines))
    for test, step, w in (("a", 5, 1.0), ("b", 9, 1.5), ("b", 2, 1.25)):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/test_new.py::test[{test}]")
        conformance.hold("there", {"w": w}, {"w": 1.0}, step)
    merged = conformance.merged(lines.read_text().splitlines())
    assert merged == {"new": {"there": {"deviation": 0.5, "steps": 9, "cases": 2}}}
