"""The recipes of docs/frameworks.md: they run, and are SAM by hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import harness
import jax
import optax
import pytest

import optax_sam

PAGE = "frameworks.md"
ROOT = Path(__file__).parents[1]


def run(marker):
    """The names of the first block and the one of a framework."""
    blocks = harness.code(PAGE)
    (own,) = [block for block in blocks if marker in block]
    names = {}
    exec(blocks[0], names)
    exec(own, names)
    return names


def by_hand(loss, params, state, *args):
    """Parameters and the model's state after one step, from the start."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (_, after), g = value_and_grad(params, state, *args)
    norm = optax.tree.norm(g)
    perturbed = jax.tree.map(lambda w, g: w + 0.05 * g / norm, params, g)
    _, g_s = value_and_grad(perturbed, state, *args)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, g_s), after


def test_equinox():
    pytest.importorskip("equinox")
    names = run("import equinox")
    assert names["eqx_loss_value"] < 1
    assert optax_sam.metrics(names["eqx_opt_state"])["ascents"] == 20


def test_haiku():
    pytest.importorskip("haiku")
    names = run("import haiku")
    assert names["hk_loss_value"] < 1
    assert optax_sam.metrics(names["hk_opt_state"])["ascents"] == 20
    x, y, key = names["x"], names["y"], jax.random.key(3)
    params, state = names["model"].init(jax.random.key(1), x, is_training=True)
    found = names["hk_step"](params, state, names["tx"].init(params), key, x, y)
    wanted = by_hand(names["hk_loss"], params, state, key, x, y)
    # Absolute: the bias before BatchNorm is trained by rounding alone.
    harness.assert_close(found[:2], wanted, 1e-5, atol=1e-7)
    # Statistics of one pass, not of two.
    (counter,) = {int(v["counter"]) for v in found[1].values()}
    assert counter == 1 + int(state["batch_norm/~/mean_ema"]["counter"])


KERAS = """
import sys
import numpy as np, jax
sys.path.append("tests")
import test_frameworks
names = test_frameworks.run("import keras")
x, y = names["x"], names["y"]
copied = lambda trees: jax.tree.map(np.asarray, trees)
held = copied((names["trainable"], names["non_trainable"]))
opt_state = names["tx"].init(held[0])
found = names["keras_step"](*held, opt_state, x, y)
wanted = test_frameworks.by_hand(names["keras_loss"], *held, x, y)
for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
evaluated = names["keras_model"](x)
by_values, _ = names["keras_model"].stateless_call(*held, x)
np.testing.assert_allclose(evaluated, by_values, rtol=1e-5, atol=1e-6)
ascents = names["optax_sam"].metrics(names["keras_opt_state"])["ascents"]
print("ascents", ascents, "loss", float(names["keras_loss_value"]))
"""


@pytest.mark.slow
def test_keras(tmp_path):
    """In a process of its own: Keras reads its backend when it is imported."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("could not import 'keras'")
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"KERAS_BACKEND": "jax", "KERAS_HOME": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", KERAS],
        cwd=ROOT,
        env=env | {"PYTHONPATH": paths},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    _, ascents, _, loss = printed.stdout.split()
    assert ascents == "20"
    assert float(loss) < 1
