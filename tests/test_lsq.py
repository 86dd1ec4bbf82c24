"""The example of quantization-aware training: its quantizer, its network, its table."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for package in ("flax", "rich", "sklearn"):
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[1] / "examples" / "lsq_digits.py"
DATA = Path(__file__).parent / "data" / "parity"
CASES = json.loads((DATA / "runs.json").read_text())["lsq"]["cases"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lsq_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Flax looks its modules' annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(DATA / "lsq.npz"))


def transcribed(x, s, upstream, q_n, q_p, gamma):
    """LSQ in numpy: the output, and the gradients for ``x`` and ``s``."""
    level = x / s
    rounded = np.round(np.clip(level, -q_n, q_p))
    inside = (level >= -q_n) & (level <= q_p)
    slope = np.where(inside, rounded - level, rounded)
    axes = tuple(i for i in range(x.ndim) if s.ndim == 0 or s.shape[i] == 1)
    grad_s = gamma * (upstream * slope).sum(axes, keepdims=s.ndim > 0)
    return rounded * s, upstream * inside, grad_s


def with_grads(example, x, s, upstream, *settings):
    out, vjp = jax.vjp(lambda x, s: example.quantize(x, s, *settings), x, s)
    return out, *vjp(jnp.asarray(upstream, out.dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("i", range(len(CASES)))
def test_reproduces_the_recorded_quantizer(example, recorded, i):
    names = "x", "s", "upstream", "out", "grad_x", "grad_s", "s_init"
    x, s, upstream, *expected, s_init = (recorded[f"case{i}/{name}"] for name in names)
    q_n, q_p = CASES[i]["Q_N"], CASES[i]["Q_P"]
    settings = q_n, q_p, (x.size * q_p) ** -0.5
    computed = with_grads(example, x, s, upstream, *settings)
    numpy_computed = transcribed(x, s, upstream, *settings)
    for a, b, c in zip(computed, numpy_computed, expected, strict=True):
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-12)
        np.testing.assert_allclose(b, c, rtol=0, atol=1e-12)

    axis = (1, 2) if CASES[i]["per_channel"] else None
    computed = example.initial_step(jnp.asarray(x), q_p, axis)
    np.testing.assert_allclose(computed, s_init, rtol=0, atol=1e-12)


def slopes(example, x, s, gamma, q_n=8, q_p=7):
    """d v_hat / d s, value by value."""
    grad = jax.grad(lambda s, x: example.quantize(x, s, q_n, q_p, gamma))
    return jax.vmap(grad, (None, 0))(s, x)


@pytest.mark.usefixtures("x64")
def test_a_step_feels_the_rounding_error_inside_and_the_bound_outside(example):
    gamma = 0.03
    inside = jnp.linspace(-7.99, 6.99, 301) * 0.25
    assert jnp.abs(slopes(example, inside, 0.25, gamma)).max() <= gamma / 2
    below, above = jnp.array([-2.1, -50.0]), jnp.array([1.8, 50.0])
    np.testing.assert_array_equal(slopes(example, below, 0.25, gamma), -8 * gamma)
    np.testing.assert_array_equal(slopes(example, above, 0.25, gamma), 7 * gamma)


def test_values_on_the_grid_stay_and_leave_the_step_alone(example):
    grid = jnp.arange(-8, 8) * 0.25
    np.testing.assert_array_equal(example.quantize(grid, 0.25, 8, 7, 0.03), grid)
    np.testing.assert_array_equal(slopes(example, grid, 0.25, 0.03), 0)


def test_scales_with_its_values_and_step(example):
    x = jax.random.normal(jax.random.key(0), (100,))
    quantized = example.quantize(x, 0.3, 8, 7, 0.03)
    scaled = example.quantize(4 * x, 4 * 0.3, 8, 7, 0.03)
    np.testing.assert_array_equal(scaled, 4 * quantized)


def test_the_scale_of_the_gradient_does_not_touch_the_value(example):
    # Ties would fall to either side if the step were off by one bit.
    x, step = jnp.arange(-7.5, 7) * 0.1, jnp.float32(0.1)
    quantized = [example.quantize(x, step, 8, 7, scale) for scale in (1, 0.123, 1e-3)]
    for other in quantized[1:]:
        np.testing.assert_array_equal(quantized[0], other)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_step_that_is_not_positive_gives_finite_values(example, step):
    x, upstream = jnp.array([-1.0, 0.0, 1.0]), jnp.ones(3)
    results = with_grads(example, x, jnp.float32(step), upstream, 8, 7, 0.03)
    assert all(jnp.isfinite(result).all() for result in results)


@pytest.fixture(scope="module")
def networks(example):
    """Full-precision parameters, and those with steps from a first batch."""
    images = jax.random.uniform(jax.random.key(0), (32, 64))
    plain = example.Network(None).init(jax.random.key(1), images)
    _, quantized = example.Network(4).apply(
        plain, images, mutable="params", rngs=jax.random.key(2)
    )
    return images, plain["params"], quantized["params"]


def test_steps_start_from_the_given_weights_and_a_first_batch(example, networks):
    images, plain, quantized = networks
    first, last = quantized["QuantizedDense_0"], quantized["QuantizedDense_3"]
    middle = quantized["QuantizedDense_1"]
    for name, layer in plain.items():
        np.testing.assert_array_equal(layer["kernel"], quantized[name]["kernel"])
    for layer, q_p in ((first, 127), (middle, 7), (last, 127)):
        expected = 2 * jnp.abs(layer["kernel"]).mean() / math.sqrt(q_p)
        assert layer["weight_step"] == pytest.approx(float(expected), rel=1e-6)
    expected = 2 * images.mean() / math.sqrt(255)
    assert first["input_step"] == pytest.approx(float(expected), rel=1e-6)


def test_a_layer_computes_with_integers(example, networks):
    _, _, quantized = networks
    params = quantized["QuantizedDense_1"]
    inputs = 3 * jax.random.uniform(jax.random.key(3), (5, 64))
    weights = np.round(np.clip(params["kernel"] / params["weight_step"], -8, 7))
    levels = np.round(np.clip(inputs / params["input_step"], 0, 15))
    expected = (levels @ weights) * params["input_step"] * params["weight_step"]
    out = example.QuantizedDense(64, 4).apply({"params": params}, inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_gradient_of_steps_is_scaled_by_counts(example, networks):
    _, _, quantized = networks
    params = quantized["QuantizedDense_1"]
    layer = example.QuantizedDense(64, 4)

    def slope(batch_size):
        inputs = jnp.full((batch_size, 64), 100.0)  # all above the upper bound
        out = lambda step: layer.apply({"params": params | step}, inputs).mean(0).sum()
        return jax.grad(out)({"input_step": params["input_step"]})["input_step"]

    # 15 for each input, times what the next layer weighs it with, over sqrt(64 * 15).
    step = params["weight_step"]
    weights = jnp.round(jnp.clip(params["kernel"] / step, -8, 7)) * step
    expected = float(15 * weights.sum() / math.sqrt(64 * 15))
    assert slope(1) == pytest.approx(expected, rel=1e-4)
    assert slope(8) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["SAM", "VSAM"])
def test_the_ascent_leaves_the_steps_where_they_are(example, networks, method):
    _, _, params = networks
    tx = getattr(example, method)
    # The gradient of half the squared norm is the parameters: what comes back is w + e.
    update = jax.jit(lambda w: tx.update(w, tx.init(w), w, grad_fn=lambda w: w)[0])
    for name, moved in update(params).items():
        layer = params[name]
        assert not np.array_equal(moved["kernel"], layer["kernel"])
        for step in ("weight_step", "input_step"):
            assert moved[step] == layer[step]


def test_prints_a_table(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "--quick"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    methods = ["FP + SGD", "FP + SAM", "LSQ + SGD", "LSQ + SAM", "LSQ + vSAM"]
    assert list(table) == methods
    gradients = {name: float(cells[2]) for name, cells in table.items()}
    assert gradients["FP + SGD"] == gradients["LSQ + SGD"] == 1
    assert gradients["FP + SAM"] == gradients["LSQ + SAM"] == 2
    assert 1 < gradients["LSQ + vSAM"] < 2
    for name, (percent, difference, _, *steps) in table.items():
        assert 50 < float(percent) <= 100
        reference = float(table["LSQ + SGD"][0])
        assert float(difference) == pytest.approx(float(percent) - reference, abs=0.11)
        if name.startswith("FP"):
            assert steps == ["-", "-"]
        else:
            assert all(0.5 < float(step) < 2 for step in steps)


def test_refuses_empty_runs():
    run = subprocess.run(
        [sys.executable, SCRIPT, "--epochs", "0"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 2
    assert "at least 1" in run.stderr
