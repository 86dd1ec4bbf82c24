"""Costs in gradients are those of ``optax_sam.summary``, and those of the results."""

from __future__ import annotations

import pytest

from benchmarks.lib import costs, study
from benchmarks.steps import cost_methods
from benchmarks.studies import cheap_ascent, label_noise_methods


def test_those_of_the_steps_that_were_timed():
    """A method that skips needs them at times, as was counted then."""
    models = study.read(study.RESULTS / "step_cost_cpu.json")["models"].values()
    rows = [row for model in models for row in model["rows"]]
    alike = {row["method"]: row for row in rows if row["form"] in ("", "ascended")}
    assert len(alike) > 25
    for name, row in alike.items():
        found = cost_methods.cost(name)
        assert (found.gradients, found.forwards) == (row["gradients"], row["forwards"])


@pytest.mark.slow
def test_those_of_the_study_of_wrong_labels():
    """Those that skip ascended on some of 2,200 steps; others cost the same on all."""
    rows = study.read(study.RESULTS / "label_noise.json")["rows"]
    for name, method in label_noise_methods.all_methods(44, 1437).items():
        for gradients in rows[name]["gradients_per_step"]:
            if method.cost.skipped is None:
                assert method.cost.mean(1.0) == pytest.approx(gradients, abs=1e-4)
            else:
                assert (method.cost.skipped, method.cost.whole) == (1, 2)
                assert 1 < gradients < 2


def test_those_of_the_study_of_cheap_ascents():
    rows = study.read(study.RESULTS / "cheap_ascent.json")["rows"]
    for row in rows["digits"]:
        if row["rule"] in ("SAM-2", "vSAM-A"):
            continue  # as SAM-5 and vSAM
        rates = row["ascents_per_step"]
        found = cheap_ascent.gradients(cheap_ascent.variant(row), 64)
        mean = found.mean(sum(rates) / len(rates))
        assert mean == pytest.approx(row["gradients_per_step"], abs=2e-4)


def test_means_over_steps():
    assert costs.Cost(2.0, 1.0, 1).mean(0.25) == pytest.approx(1 + 0.25 * 4 / 3)
    assert costs.Cost(2.0).mean(0.25) == 2
    assert costs.kept(0.5, 64) == 31 / 64
