"""A part of the batch for the ascent: which examples, and where they stay."""

import functools
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import ascent_batch


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 7, 8, 100, np.int64(3)])
@pytest.mark.parametrize("size", [1, 7, 8, 12])
def test_every_divisor_th_example(size, divisor):
    """Rounded up, so that at least one is left."""
    part = ascent_batch(jnp.arange(size), divisor)
    np.testing.assert_array_equal(part, np.arange(size)[::divisor])
    assert part.shape == (-(-size // divisor),)


def test_trees_of_all_kinds_of_arrays():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(6, 2, 3)).astype(np.float32)
    batch = {
        "image": image,
        "pair": (jnp.arange(6), np.arange(6) > 2),
        "half": jnp.arange(6, dtype="bfloat16"),
        "keys": jax.random.split(jax.random.key(0), 6),
        "none": None,
    }
    part = ascent_batch(batch)
    assert jax.tree.structure(part) == jax.tree.structure(batch)
    np.testing.assert_array_equal(part["image"], image[[0, 4]])
    np.testing.assert_array_equal(part["pair"][0], [0, 4])
    np.testing.assert_array_equal(part["pair"][1], [False, True])
    np.testing.assert_array_equal(part["half"], jnp.array([0, 4], "bfloat16"))
    data = jax.random.key_data(batch["keys"])
    np.testing.assert_array_equal(jax.random.key_data(part["keys"]), data[::4])
    for leaf, like in zip(jax.tree.leaves(part), jax.tree.leaves(batch), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == like.dtype
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


def test_quarter_batch_sam(x64):
    """The direction from a part, the descent gradient from the whole; by hand."""
    problem = problems.mlp()
    params, batch = problem.params(), problem.batch(0)
    grad = jax.jit(jax.grad(problem.loss_fn))
    tx = optax_sam.sam(0.3)
    update = functools.partial(tx.update, grad_fn=lambda p: grad(p, batch))
    first = grad(params, ascent_batch(batch))
    d, _ = jax.jit(update)(first, tx.init(params), params)
    g = grad(params, jax.tree.map(lambda x: x[jnp.array([0, 4])], batch))
    e = optax.tree.scale(0.3 / optax.tree.norm(g), g)
    harness.assert_close_in_size(d, grad(optax.tree.add(params, e), batch), 1e-12)


def test_the_first_gradient_costs_its_part():
    """``1 + 1/4`` gradients where SAM takes 2."""
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    tx = optax_sam.sam(0.1)

    def step(params, state, batch):
        grad = jax.grad(problem.loss_fn)
        g = grad(params, ascent_batch(batch))
        return tx.update(g, state, params, grad_fn=lambda p: grad(p, batch))

    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    state = jax.eval_shape(tx.init, params)
    ratio = flops(step, params, state, batch) / flops(
        jax.grad(problem.loss_fn), params, batch
    )
    assert ratio == pytest.approx(1.25, rel=0.02)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_nothing_is_sent_between_devices(divisor, axes):
    """Each takes a part of its own share, and keeps it."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axes,))
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
