"""The page on devices runs, and its programs agree where it says so."""

import harness
import jax
import pytest


@pytest.mark.slow
def test_the_page_runs():
    names = {}
    exec("\n".join(harness.code("devices.md")), names)
    batch = names["x"], names["y"]
    one_device = names["params"], names["tx"].init(names["params"])
    step = jax.jit(names["train_step"])
    for _ in range(3):
        one_device = step(*one_device, *batch)
    of_one_perturbation = (
        names["trained"],
        (names["typed"], names["explicit_state"]),
        names["a_trained"],
        names["w_trained"],
        jax.tree.map(lambda x: x[0], names["p_trained"]),
    )
    for trained in of_one_perturbation:
        # Absolute: the normal that is kept is a difference of nearly equal gradients.
        found, wanted = jax.device_get((trained, one_device))
        harness.assert_close(tuple(found), wanted, 0, atol=1e-5)
    for name in ("step", "explicit_step", "m_sharp", "averaged", "whole"):
        assert names[name]._cache_size() == 1, name
    loss = lambda params: names["loss_fn"](params, *batch)
    assert loss(names["m_trained"][0]) < loss(names["params"])
