"""The programs of the pages on frameworks and Flax run, and are SAM by hand."""

import importlib.util
import os
from pathlib import Path

import harness
import jax
import numpy as np
import optax
import printed
import pytest

import optax_sam

pytestmark = pytest.mark.slow
PAGE = "frameworks.md"


def run(function):
    """The names of the first block and of the one with the function."""
    return harness.defined(PAGE, function, **harness.defined(PAGE, "cross_entropy"))


def test_equinox():
    names = run("eqx_step")
    assert names["eqx_loss_value"] < 1
    assert optax_sam.metrics(names["eqx_opt_state"])["ascents"] == 20


@pytest.mark.filterwarnings(  # the newest Haiku with the oldest JAX
    "ignore:jax.core.(take|set)_current_trace is deprecated:DeprecationWarning"
)
def test_haiku():
    names = run("hk_step")
    assert names["hk_loss_value"] < 1
    assert optax_sam.metrics(names["hk_opt_state"])["ascents"] == 20
    x, y, key = names["x"], names["y"], jax.random.key(3)
    params, state = names["model"].init(jax.random.key(1), x, is_training=True)
    found = names["hk_step"](params, state, names["tx"].init(params), key, x, y)
    by_hand = harness.sam_by_hand(names["hk_loss"], 0.05, 0.1)
    carry = params, optax.tree.zeros_like(params), state
    (wanted, _, after), _ = by_hand(carry, key, x, y)
    # Absolute: the bias before BatchNorm is trained by rounding alone.
    harness.assert_close(found[:2], (wanted, after), 1e-5, atol=1e-7)
    # Statistics of one pass, not of two.
    (counter,) = {int(v["counter"]) for v in found[1].values()}
    assert counter == 1 + int(state["batch_norm/~/mean_ema"]["counter"])


KERAS = """
import harness, jax, numpy as np, optax
given = harness.defined("frameworks.md", "cross_entropy")
names = harness.defined("frameworks.md", "keras_step", **given)
x, y = names["x"], names["y"]
held = jax.tree.map(np.asarray, (names["trainable"], names["non_trainable"]))
found = names["keras_step"](*held, names["tx"].init(held[0]), x, y)
by_hand = harness.sam_by_hand(names["keras_loss"], 0.05, 0.1)
carry = held[0], optax.tree.zeros_like(held[0]), held[1]
(wanted, _, after), _ = by_hand(carry, x, y)
harness.assert_close(list(found[:2]), [wanted, after], 1e-4, atol=1e-6)
by_values, _ = names["keras_model"].stateless_call(*held, x)
harness.assert_close(names["keras_model"](x), by_values, 1e-5, atol=1e-6)
ascents = names["optax_sam"].metrics(names["keras_opt_state"])["ascents"]
print("ascents", ascents, "loss", float(names["keras_loss_value"]))
"""


def test_keras(tmp_path):
    """In a process of its own: Keras reads its backend when it is imported."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("could not import 'keras'")
    (tmp_path / "keras_step.py").write_text(KERAS)
    folders = printed.ROOT, Path(harness.__file__).parent
    env = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    env |= {"KERAS_BACKEND": "jax", "KERAS_HOME": str(tmp_path)}
    output = printed.script(tmp_path, tmp_path / "keras_step.py", **env)
    _, ascents, _, loss = output.split()
    assert ascents == "20"
    assert float(loss) < 1


def test_flax():
    names = {}
    exec("\n".join(harness.code("flax.md")), names)
    assert names["state"].step == 7
    # Read from the file.
    assert optax_sam.metrics(names["optimizer"].opt_state)["ascents"] == 3
    assert names["module"].dropout.rngs.count[...] == 3
    assert harness.is_finite((names["logits"], names["averaged"], names["loss"]))
    scaled = names["scaled_state"]
    for x in jax.tree.leaves(scaled):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    # The scale fell until both gradients were finite.
    dynamic = scaled.dynamic_scale
    scale, finite = dynamic.scale[0], dynamic.fin_steps[0]
    assert 2.0**8 < scale < 2.0**24
    assert optax_sam.metrics(jax.tree.map(lambda x: x[0], scaled))["ascents"] == finite
    assert 3 < finite < 20
    assert names["logged"]["loss"][0] < np.log(10)
    assert np.all(scaled.step == 20)
