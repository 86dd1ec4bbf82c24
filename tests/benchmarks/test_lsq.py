"""Quantization-aware training: the quantizer, the network, the study and the layers."""

from __future__ import annotations

import importlib
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import printed
import pytest
import recorded

CASES = recorded.RUNS["lsq"]["cases"]

# The quick ones are of all ranges and both kinds of steps, from 2 to 8 bits.
SOME = [pytest.param(i, marks=[pytest.mark.slow] * (i % 5 > 0)) for i in range(24)]


@pytest.fixture(scope="module")
def layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(printed.ROOT / "examples")
        return importlib.import_module("lsq_layers")


@pytest.fixture
def study(benchmark):
    return benchmark("lsq")


def with_grads(layers, x, s, upstream, *settings):
    out, vjp = jax.vjp(lambda x, s: layers.quantize(x, s, *settings), x, s)
    return out, *vjp(jnp.asarray(upstream, out.dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("i", SOME)
def test_reproduces_the_recorded_quantizer(layers, i):
    arrays = recorded.arrays("lsq")
    assert len(SOME) == len(CASES)
    names = "x", "s", "upstream", "out", "grad_x", "grad_s", "s_init"
    x, s, upstream, *expected, s_init = (arrays[f"case{i}/{name}"] for name in names)
    q_n, q_p = CASES[i]["Q_N"], CASES[i]["Q_P"]
    settings = q_n, q_p, (x.size * q_p) ** -0.5
    computed = jax.jit(lambda *xs: with_grads(layers, *xs, *settings))(x, s, upstream)
    for found, wanted in zip(computed, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)

    axis = (1, 2) if CASES[i]["per_channel"] else None
    computed = layers.initial_step(jnp.asarray(x), q_p, axis)
    np.testing.assert_allclose(computed, s_init, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_step_that_is_not_positive_gives_finite_values(layers, step):
    x, upstream = jnp.array([-1.0, 0.0, 1.0]), jnp.ones(3)
    results = with_grads(layers, x, jnp.float32(step), upstream, 8, 7, 0.03)
    assert all(jnp.isfinite(result).all() for result in results)


@pytest.fixture(scope="module")
def networks(layers):
    """Full-precision parameters, and those with steps from a first batch."""
    images = jax.random.uniform(jax.random.key(0), (32, 64))
    plain = layers.Network(None).init(jax.random.key(1), images)
    _, quantized = layers.Network(4).apply(
        plain, images, mutable="params", rngs=jax.random.key(2)
    )
    return images, plain["params"], quantized["params"]


def test_steps_start_from_the_given_weights_and_a_first_batch(layers, networks):
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


def test_a_layer_computes_with_integers(layers, networks):
    _, _, quantized = networks
    params = quantized["QuantizedDense_1"]
    inputs = 3 * jax.random.uniform(jax.random.key(3), (5, 64))
    weights = np.round(np.clip(params["kernel"] / params["weight_step"], -8, 7))
    levels = np.round(np.clip(inputs / params["input_step"], 0, 15))
    expected = (levels @ weights) * params["input_step"] * params["weight_step"]
    out = layers.QuantizedDense(64, 4).apply({"params": params}, inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_gradient_of_steps_is_scaled_by_counts(layers, networks):
    _, _, quantized = networks
    params = quantized["QuantizedDense_1"]
    layer = layers.QuantizedDense(64, 4)

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


@pytest.mark.parametrize("method", ["LSQ + SAM", "LSQ + vSAM"])
def test_the_ascent_leaves_the_steps_where_they_are(study, networks, method):
    _, _, params = networks
    tx = study.METHODS[method].member
    # The gradient of half the squared norm is the parameters: what comes back is w + e.
    update = jax.jit(lambda w: tx.update(w, tx.init(w), w, grad_fn=lambda w: w)[0])
    for name, moved in update(params).items():
        layer = params[name]
        assert not np.array_equal(moved["kernel"], layer["kernel"])
        for step in ("weight_step", "input_step"):
            assert moved[step] == layer[step]


@pytest.mark.slow
def test_the_study_trains_and_prints(study, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new/lsq.json"
    command = ["lsq.py", "--quick", "--bits", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    results = json.loads(out.read_text())
    rows = {name.removeprefix("4 bits, "): x for name, x in results["rows"].items()}
    methods = ["FP + SGD", "FP + SAM", "LSQ + SGD", "LSQ + SAM", "LSQ + vSAM"]
    assert list(rows) == methods
    gradients = {name: row["gradients_per_step"][0] for name, row in rows.items()}
    assert gradients["FP + SGD"] == gradients["LSQ + SGD"] == 1
    assert gradients["FP + SAM"] == gradients["LSQ + SAM"] == 2
    assert 1 < gradients["LSQ + vSAM"] < 2
    for name, row in rows.items():
        assert 50 < row["accuracy"][0] <= 100
        steps = [row[kind][0] for kind in study.STEPS if kind in row]
        assert len(steps) == 2 * name.startswith("LSQ")
        assert all(0.5 < step < 2 for step in steps)
    (table,) = study.markdown(results).values()
    assert table in capsys.readouterr().out


def test_rows_are_added_and_not_mixed_with_what_was_made_otherwise(
    study, monkeypatch, tmp_path
):
    out, trained = tmp_path / "lsq.json", []

    def train(bits, *_):
        trained.append(bits)
        return {f"{bits} bits, LSQ + SGD": {"bits": bits}}

    monkeypatch.setattr(study, "train", train)
    for bits in ([4], [4, 2]):
        study.run(bits, True, out)
    assert trained == [4, 2]  # what is there is not trained again
    rows = json.loads(out.read_text())["rows"]
    assert rows == {f"{n} bits, LSQ + SGD": {"bits": n} for n in (4, 2)}
    with pytest.raises(SystemExit, match="other settings or versions"):
        study.run([4, 2], False, out)


def test_the_table_has_differences_and_what_was_published(study):
    row = lambda *accuracy: {
        "settings": "",
        "accuracy": accuracy,
        "gradients_per_step": [1.5] * 2,
        "weight_step": [0.9, 0.8],
        "input_step": [1.0, 1.0],
    }
    named = {"LSQ + SGD": row(90.0, 92.0), "LSQ + SAM": row(91.0, 92.0)}
    results = {"rows": {f"{b} bits, {k}": r for k, r in named.items() for b in (4, 2)}}
    tables = study.markdown(results)
    assert list(tables) == ["4 bits", "2 bits"]
    four, two = map(printed.markdown_table, tables.values())
    assert four["LSQ + SAM"]["minus LSQ + SGD"] == "+0.5 ± 0.7"
    assert four["LSQ + SAM"]["ahead of it on"] == "1 of 2"
    assert four["LSQ + SGD"]["test accuracy (%), 2 seeds"] == "91.0 ± 1.4"
    assert four["LSQ + SGD"]["ResNet-18 (%)"] == "88.47"
    assert four["LSQ + SAM"]["MobileNets (%)"] == "83.83"
    assert four["full precision (paper)"]["ResNet-18 (%)"] == "88.72"
    assert "ResNet-18 (%)" not in two["LSQ + SAM"]


@pytest.mark.slow
def test_the_example_prints_a_table(tmp_path):
    script = "examples/lsq_digits.py", "--quick"
    output = printed.script(tmp_path, *script, COLUMNS="80")
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    table = printed.boxed_table(output)
    assert list(table) == ["SGD", "vSAM"]
    assert all(50 < float(accuracy) <= 100 for accuracy, _ in table.values())
    assert float(table["SGD"][1]) == 1 < float(table["vSAM"][1]) < 2
    assert "of 1 seeds" in lines[-1]
