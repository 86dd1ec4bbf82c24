"""The study of cheap ascents runs, and so do the steps of its page."""

import json

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import printed
import pytest

import optax_sam

RESULTS = printed.ROOT / "benchmarks/results/cheap_ascent.json"


@pytest.fixture
def study(benchmark):
    return benchmark("cheap_ascent")


def test_every_radius_lies_within_its_grid(study):
    for rows in json.loads(RESULTS.read_text())["rows"].values():
        rows = [row for row in rows if not row["whole_difference"]]
        assert [row["rule"] for row in rows if "*" in study.radius(row)] == []


def test_a_radius_at_the_end_of_its_grid_is_flagged(study):
    row = {"rho": 0.4, "tuning": {"0.4": [90.0], "0.63": [80.0]}}
    assert study.radius(row) == "0.4*"
    row["tuning"]["0.25"] = [70.0]
    assert study.radius(row) == "0.4"


def test_differences_are_paired_and_one_run_has_no_error(study):
    row, other = {"accuracy": [91.0, 93.0]}, {"accuracy": [90.0, 92.0]}
    assert study.difference(row, other) == (1, 0)
    assert study.mean_and_error([91.0, 93.0]) == pytest.approx((92, 1))
    mean, error = study.mean_and_error([91.0])
    assert mean == 91
    assert np.isnan(error)
    row, other = {"accuracy": [91.0]}, {"accuracy": [90.5]}
    assert study.signed(*study.difference(row, other)) == "+0.50"
    assert study.with_error(row["accuracy"]) == "91.00"


@pytest.mark.slow
def test_quick_trains_tunes_and_draws(study, tmp_path):
    # Fashion-MNIST is not at hand: random images in its place.
    rng = np.random.default_rng(0)
    labels = np.arange(4100, dtype=np.uint8) % 10
    images = rng.integers(0, 256, (4100, 28, 28), np.uint8)
    named = {"train_x": images, "train_y": labels, "test_x": images, "test_y": labels}
    np.savez(tmp_path / "data.npz", **named)
    arguments = ["--quick", "--sets", "digits", "fashion", "--data", "data.npz"]
    arguments += ["--out", "new/study.json", "--figure", "new/study.png"]
    output = printed.script(tmp_path, "benchmarks/studies/cheap_ascent.py", *arguments)
    results = json.loads((tmp_path / "new/study.json").read_text())
    assert list(results["rows"]) == ["digits", "fashion"]
    assert all(table in output for table in study.markdown(results).values())
    printed.assert_is_picture(tmp_path / "new/study.png")
    for rows, steps in zip(results["rows"].values(), (44, 62), strict=True):
        costs = {study.variant(row): row["gradients_per_step"] for row in rows}
        cost = lambda *variant, costs=costs: costs[study.Variant(*variant)]
        assert cost("SGD") == cost("MSAM") == 1
        assert cost("SAM") == 2
        assert cost("SAM", 4) == 1.25
        ascents = -(-steps // 5) / steps
        assert cost("SAM-5", 4) == pytest.approx(1 + ascents / 4, abs=1e-3)
        # It warms up in 60 steps, and the control takes the whole batch's gradient too.
        assert cost("vSAM", 4) == pytest.approx(1.25, abs=0.01)
        assert cost("vSAM", 4, True) == pytest.approx(2.25, abs=0.05)


def test_the_steps_of_the_page_run():
    blocks = harness.code("cheap_ascents.md")
    batch = jnp.arange(8.0), jnp.ones(8)
    seen = []

    def loss_fn(w, x, y):
        seen.append(len(x))
        return jnp.mean((w - x * y) ** 2)

    for code in blocks:
        names = {"jax": jax, "optax": optax, "optax_sam": optax_sam, "loss_fn": loss_fn}
        exec(code, names)
        params = jnp.zeros(())
        opt_state = names["tx"].init(params)
        for _ in range(20):
            params, opt_state = names["train_step"](params, opt_state, batch)
        assert abs(params) > 1
    # Compiled once with a quarter and all of it, and for dispatch with all of it alone.
    assert seen == [2, 8, 2, 8, 8]
