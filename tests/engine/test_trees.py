"""Any tree of parameters: nested, empty in parts, of mixed precision, or complex."""

import functools
import re
from typing import Any, NamedTuple

import harness
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from registry import BY_NAME, METHODS, OTHERS

import optax_sam

# Trees tried in the three searches below.
ABSTRACT, NUMERIC, COMPLEX = 120, 200, 50


class Pair(NamedTuple):
    first: Any
    second: Any


# Few shapes, so that what JAX compiles for one example serves the others.
SHAPES = [(), (2,), (3, 2), (0,)]
DTYPES = ["float32", "bfloat16", "float16"]
leaves = st.builds(jax.ShapeDtypeStruct, *map(st.sampled_from, (SHAPES, DTYPES)))


def inside(parts):
    """Everything that JAX takes for a tree, with nothing in it too."""
    return (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abcd"), parts, max_size=4)
        | st.builds(Pair, parts, parts)
    )


# Not ``None`` as a whole: parameters like that are missing.
trees = leaves | inside(st.recursive(leaves | st.none(), inside, max_leaves=8))
trees_with_leaves = trees.filter(jax.tree.leaves)


def names_of(methods):
    return st.sampled_from([method.name for method in methods])


def numbers(tree, seed):
    """Normal numbers, none of them near zero."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.asarray(x + np.sign(x), leaf.dtype)

    return jax.tree.map(draw, tree)


def assert_kinds_stay(tx, tree, grad_fn):
    state = jax.eval_shape(tx.init, tree)
    for ascend in (None, True, False):
        update = functools.partial(tx.update, grad_fn=grad_fn, ascend=ascend)
        d, after = jax.eval_shape(update, tree, state, tree)
        assert harness.kinds(d) == harness.kinds(tree)
        assert harness.kinds(after) == harness.kinds(state)


@pytest.mark.slow
@hypothesis.settings(max_examples=ABSTRACT)
@hypothesis.given(names_of(METHODS + OTHERS), trees)
def test_structure_and_dtypes_stay(name, tree):
    assert_kinds_stay(BY_NAME[name].build(), tree, lambda p: p)


KERNEL, BIAS = np.linspace(-1, 1, 6).reshape(3, 2), np.array([0.5, -0.5])
CONTAINERS = {
    "named tuple": Pair(KERNEL, [(BIAS,)]),
    "with none": {"kernel": KERNEL, "bias": (BIAS, None), "rest": {}},
    "one array": KERNEL,
    "scalars": {"a": np.array(2.0), "b": np.array(-1.0)},
    "zero-size leaf": {"kernel": KERNEL, "empty": np.zeros((0, 3))},
    "only zero-size": {"empty": np.zeros((0,))},
    "empty": {},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container):
    """The structure goes through under a mask; nothing to perturb is no failure."""
    params = jax.tree.map(jnp.float32, CONTAINERS[container])
    grad_fn = jax.grad(lambda p: sum((jnp.sum(x**3) for x in jax.tree.leaves(p)), 0.0))
    mask = lambda p: jax.tree.map(lambda x: x.ndim != 1, p)
    for name in ("sam", "vsam", "esam", "msam", "sampa", "mesa"):
        method = BY_NAME[name]
        tx = method.build(**({"mask": mask} if "mask" in method.static else {}))
        assert_kinds_stay(tx, params, grad_fn)
    if "empty" in container or "zero" in container:
        for name in ("asam", "vsam"):
            tx = BY_NAME[name].build()
            update = functools.partial(tx.update, grad_fn=lambda p: p, ascend=True)
            d, state = update(params, tx.init(params), params)
            assert harness.is_finite((d, state))
            assert optax_sam.metrics(state)["survival"] == pytest.approx(1)
            assert optax_sam.metrics(state)["rejected_ascents"] == 0


@pytest.mark.parametrize("name", ["vsam", "asam"])
def test_python_and_numpy_numbers_as_parameters(name):
    tx = BY_NAME[name].build()
    params = {"w": 1.0, "b": np.ones(2, np.float32)}
    grad_fn = jax.grad(lambda p: p["w"] ** 2 + jnp.sum(p["b"] ** 3))
    grads = jax.tree.map(np.asarray, grad_fn(params))
    d, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    assert d["w"] > 2
    assert np.all(d["b"] >= 3)
    assert optax_sam.metrics(state)["ascents"] == 1


@pytest.mark.slow
@hypothesis.settings(max_examples=NUMERIC)
@hypothesis.given(names_of(METHODS), trees_with_leaves, st.data())
def test_one_ball_around_all_that_is_not_masked(name, tree, data):
    method, params, g = BY_NAME[name], numbers(tree, 0), numbers(tree, 1)
    number = len(jax.tree.leaves(tree))
    chosen = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    if number and not any(chosen):  # which is refused
        chosen[0] = True
    mask = jax.tree.unflatten(jax.tree.structure(tree), chosen)
    tx, points = method.build(mask=mask), []
    grad_fn = lambda p: points.append(p) or g
    d, state = tx.update(g, tx.init(params), params, grad_fn=grad_fn, ascend=True)
    assert harness.kinds(d) == harness.kinds(g)
    assert harness.is_finite((d, state))
    assert optax_sam.metrics(state)["rejected_ascents"] == 0

    wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    offset = jax.tree.map(jnp.subtract, points[-1], wide(params))
    moved = [bool(jnp.any(x != 0)) for x in jax.tree.leaves(offset)]
    to_move = [
        c and x.size > 0 for c, x in zip(chosen, jax.tree.leaves(g), strict=True)
    ]
    assert moved == to_move
    if any(to_move):
        of_ball = lambda tree: [
            x for x, m in zip(jax.tree.leaves(wide(tree)), to_move, strict=True) if m
        ]
        length = method.norm(*map(of_ball, (offset, params, g)))
        np.testing.assert_allclose(length, method.settings[method.radius], rtol=1e-4)


# Complex numbers.

PASSING = ("saf", "mesa")  # what they are given, they do not look at


@hypothesis.settings(max_examples=COMPLEX)
@hypothesis.given(
    names_of(m for m in METHODS + OTHERS if m.name not in PASSING),
    trees_with_leaves,
    st.data(),
)
def test_a_complex_leaf_is_refused_with_advice(name, tree, data):
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    place = data.draw(st.integers(0, len(leaves) - 1))
    leaves[place] = jax.ShapeDtypeStruct(leaves[place].shape, "complex64")
    tree = jax.tree.unflatten(structure, leaves)
    tx = BY_NAME[name].build()
    state = jax.eval_shape(tx.init, tree)
    where = re.escape(jax.tree_util.keystr(paths[place][0]) or "the root")
    advice = f"at {where} has dtype complex64.*as a real and an imaginary leaf"
    with pytest.raises(ValueError, match=advice):
        jax.eval_shape(
            functools.partial(tx.update, grad_fn=lambda p: p), tree, state, tree
        )


def test_a_real_and_an_imaginary_leaf_are_a_complex_one():
    """JAX's gradient at a complex number is the conjugate of the way up."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(
        rng.normal(size=shape) + 1j * rng.normal(size=shape), jnp.complex64
    )
    a, b, z = normal(4, 3), normal(4), normal(3)
    loss_fn = lambda z: jnp.sum(jnp.abs(a @ z - b) ** 2) + jnp.sum(jnp.abs(z) ** 4)
    of_parts = lambda parts: loss_fn(parts["real"] + 1j * parts["imaginary"])
    up = jax.jit(lambda z: jnp.conj(jax.grad(loss_fn)(z)))

    tx = optax.chain(optax_sam.sam(0.3), optax.sgd(0.01))
    parts = {"real": z.real, "imaginary": z.imag}
    state, grad_fn = tx.init(parts), jax.jit(jax.grad(of_parts))
    for _ in range(5):
        updates, state = tx.update(grad_fn(parts), state, parts, grad_fn=grad_fn)
        parts = optax.apply_updates(parts, updates)
        g = up(z)
        z = z - 0.01 * up(z + 0.3 * g / jnp.linalg.norm(g))
    harness.assert_close(parts, {"real": z.real, "imaginary": z.imag}, 1e-5)


def test_complex_numbers_pass_saf_and_are_averaged_by_mesa():
    z, u = jnp.array([1 + 2j, -3j]), jnp.array([2 - 1j, 1 + 1j])
    saf = BY_NAME["saf"].build()
    harness.assert_equal(saf.update(u, saf.init(z), z)[0], u)
    mesa = optax_sam.mesa(decay=0.9)
    _, state = mesa.update(u, mesa.init(z), z)
    harness.assert_close(optax_sam.mesa_params(state), z + 0.1 * u, 1e-6)
