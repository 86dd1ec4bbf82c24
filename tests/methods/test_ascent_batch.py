"""A part of the batch for the ascent: which examples, and where they stay."""

import functools
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import ascent_batch


def test_every_divisor_th_example():
    """Rounded up, so that at least one is left."""
    for size in (1, 7, 8, 12):
        for divisor in (1, 2, 3, 4, 7, 8, 100, np.int64(3)):
            part = ascent_batch(jnp.arange(size), divisor)
            np.testing.assert_array_equal(part, np.arange(size)[::divisor])


def test_trees_of_all_kinds_of_arrays():
    image = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    batch = {
        "image": image,
        "pair": (jnp.arange(6), np.arange(6) > 2),
        "half": jnp.arange(6, dtype="bfloat16"),
        "keys": jax.random.split(jax.random.key(0), 6),
        "none": None,
    }
    part = ascent_batch(batch)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(part))
    numbers = lambda tree: tree | {"keys": jax.random.key_data(tree["keys"])}
    wanted = jax.tree.map(lambda x: x[::4], numbers(batch))
    harness.assert_equal(numbers(part), wanted)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(part) == dtypes(batch)
    assert ascent_batch({}) == {}
    np.testing.assert_array_equal(jax.jit(ascent_batch)(image), image[::4])


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, r"\['x'\]: 4, \['y'\]: 3"),
        ({"x": np.ones(4), "key": np.float32(1)}, r"\['key'\]: a scalar, \['x'\]: 4"),
        (1.0, "the root: a scalar"),
        ([1.0, 2.0], r"\[0\]: a scalar, \[1\]: a scalar"),
    ],
    ids=str,
)
def test_refused_batches(batch, found):
    with pytest.raises(ValueError, match=f"one entry per example.*{found}.*alone"):
        ascent_batch(batch)


def test_refused_divisors():
    batch = jnp.arange(4)
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="divisor must be an integer >= 1"):
            ascent_batch(batch, wrong)
    with pytest.raises(ValueError, match="divisor sets a shape or a loop"):
        jax.jit(ascent_batch)(batch, 2)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nothing_is_sent_between_devices(axes):
    """Each takes a part of its own share, and keeps it."""
    mesh, divisor = jax.make_mesh((8,), ("d",), axis_types=(axes,)), 4
    sharding = NamedSharding(mesh, P("d"))
    images = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    batch = jax.device_put({"x": images, "y": np.arange(64)}, sharding)
    part = jax.jit(functools.partial(ascent_batch, divisor=divisor))
    with jax.set_mesh(mesh):
        text = part.lower(batch).compile().as_text()
        found = part(batch)
    sent = r"all-gather|all-reduce|all-to-all|collective|reduce-scatter"
    assert not re.findall(sent, text)
    np.testing.assert_array_equal(found["x"], images[::divisor])
    np.testing.assert_array_equal(found["y"], np.arange(64)[::divisor])
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert {x.data.shape[0] for x in leaf.addressable_shards} == {8 // divisor}


def test_the_steps_of_the_page_run():
    blocks = harness.code("ascent_batch.md")
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


@pytest.mark.parametrize("run", ["dispatch", "jit", "dispatch of MultiSteps"])
def test_the_step_of_the_page_is_quarter_batch_sam(run):
    """By hand in NumPy, also if one program has to do for both kinds of step."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    loss_fn = lambda w, x, y: jnp.mean(jnp.sum(jnp.cos(x * w), -1) + y * (x @ w) ** 2)
    names = {"jax": jax, "optax": optax, "optax_sam": optax_sam, "loss_fn": loss_fn}
    code = harness.code("ascent_batch.md")[1]
    code = code.replace("every_k(5)", "every_k(2)").replace(
        "momentum=0.9", "momentum=0"
    )
    program, _, last = code.rpartition("train_step = optax_sam.dispatch(train_step)")
    assert not last.strip()
    exec(program, names)
    if run == "dispatch of MultiSteps":
        names["tx"] = optax.MultiSteps(names["tx"], 1)
    compiled = jax.jit if run == "jit" else optax_sam.dispatch
    step = compiled(names["train_step"])
    w, g = np.ones(3), jax.grad(loss_fn)
    params, opt_state = jnp.ones(3), names["tx"].init(jnp.ones(3))
    for t in range(6):
        params, opt_state = step(params, opt_state, (x, np.ones(8, np.float32)))
        at = w
        if t % 2 == 0:
            e = np.asarray(g(w, x[::4], np.ones(2)))
            at = w + 0.1 * e / np.linalg.norm(e)
        w = w - 0.1 * np.asarray(g(at, x, np.ones(8)))
    np.testing.assert_allclose(params, w, rtol=1e-5)
