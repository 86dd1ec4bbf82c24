"""Costs in gradients are those of ``optax_sam.summary``, and those of the results."""

from __future__ import annotations

import pytest

from benchmarks.lib import costs, study
from benchmarks.steps import cost_methods


def test_those_of_the_steps_that_were_timed():
    """A method that skips needs them at times, as was counted then."""
    models = study.read(study.RESULTS / "step_cost_cpu.json")["models"].values()
    rows = [row for model in models for row in model["rows"]]
    alike = {row["method"]: row for row in rows if row["form"] in ("", "ascended")}
    assert len(alike) > 25
    for name, row in alike.items():
        found = cost_methods.cost(name)
        assert (found.gradients, found.forwards) == (row["gradients"], row["forwards"])


def test_means_over_steps():
    assert costs.Cost(2.0, 1.0, 1).mean(0.25) == pytest.approx(1 + 0.25 * 4 / 3)
    assert costs.Cost(2.0).mean(0.25) == 2
    assert costs.kept(0.5, 64) == 31 / 64
