"""The program of the page on Flax runs."""

import harness
import jax
import numpy as np
import pytest

import optax_sam

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings(  # Flax's `replicate` with the oldest JAX
    "ignore:jax.device_put_replicated is deprecated:DeprecationWarning"
)
def test_flax():
    names = {}
    exec("\n".join(harness.code("flax.md")), names)
    assert names["state"].step == 7
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
