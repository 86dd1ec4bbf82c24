"""Which entries of which leaves are a pair of factors, and how they are moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_sam import sharpness
from optax_sam.sharpness.gl_pairs import named_leaves
from optax_sam.sharpness.located import locate
from optax_sam.sharpness.quotient import geometry

LORA = sharpness.gl_pair("A", sharpness.GLBlock("B", rank_axis=0))


def lora(draw):
    """``x @ A @ B``."""
    params, M = {"A": draw(5, 2), "B": draw(2, 4)}, 100 * draw(2, 2)
    acted = {"A": params["A"] @ np.linalg.inv(M), "B": M @ params["B"]}
    return params, acted, LORA, [params["A"] @ params["B"]]


def grouped(draw):
    """Four query heads on two key heads; a bias of the queries alone."""
    q = {"kernel": draw(6, 4, 3), "bias": draw(4, 3)}
    params = {"query": q, "key": {"kernel": draw(6, 2, 3)}}
    acted, expected = jax.tree.map(np.array, params), []
    for j in range(2):
        M, mine = draw(3, 3), slice(2 * j, 2 * j + 2)
        acted["key"]["kernel"][:, j] @= M.T
        for x in acted["query"].values():
            x[..., mine, :] @= np.linalg.inv(M)
        rows = [*np.moveaxis(q["kernel"][:, mine], 1, 0), q["bias"][mine]]
        expected.append(np.concatenate(rows) @ params["key"]["kernel"][:, j].T)
    (pair, *_) = sharpness.attention_gl_pairs(params, "", vo=False)
    return params, acted, pair, expected


def fused(draw):
    """Kernels ``(d, k * heads)`` and ``(heads * k, f)``, read with their heads."""
    params = {"v": draw(5, 6), "o": draw(6, 4)}
    pair = sharpness.gl_pair(
        sharpness.GLBlock("v", rank_axis=1, head_axis=2, shape=(5, 3, 2)),
        sharpness.GLBlock("o", rank_axis=1, head_axis=0, shape=(2, 3, -1)),
    )
    acted, products = jax.tree.map(np.array, params), []
    for j in range(2):
        v, o, M = np.s_[:, j::2], np.s_[3 * j : 3 * j + 3], draw(3, 3)
        acted["v"][v] @= np.linalg.inv(M)
        acted["o"][o] = M @ params["o"][o]
        products.append(params["v"][v] @ params["o"][o])
    return params, acted, pair, products


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("metric", ["mix", "inv"])
@pytest.mark.parametrize("layer", [lora, grouped, fused])
def test_points_of_the_same_coordinates_share_their_products(x64, layer, metric, eps):
    """Which are read right, and written back where they were."""
    rng = np.random.default_rng(0)
    params, acted, pair, expected = layer(lambda *shape: rng.normal(size=shape))
    params, acted = (jax.tree.map(jnp.asarray, x) for x in (params, acted))
    (located,) = locate([pair], params, params)

    def products(leaves):
        return jnp.einsum("pnh,pmh->pnm", *located.read(leaves))

    names = named_leaves(params)
    read = products(names)
    np.testing.assert_allclose(read, np.stack(expected), rtol=1e-12)
    for name, x in located.write(*located.read(names), names).items():
        np.testing.assert_array_equal(x, names[name])

    u = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params
    )

    @jax.jit
    def end(w, u):
        space = geometry(w, [located], metric, eps)
        return products(named_leaves(space.point(space.project(u))))

    ends = [end(w, u) for w in (params, acted)]
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-9)
    assert abs(ends[0] - read).max() > 0.1


def test_a_leaf_called_value():
    """In a dict it is a name; in an NNX variable it is that of its array."""
    params = {"attention": {"query": jnp.ones(1), "value": jnp.ones(1)}}
    assert list(named_leaves(params)) == ["attention/query", "attention/value"]
    state = nnx.state(nnx.LoRA(4, 2, 5, rngs=nnx.Rngs(0)))
    assert set(named_leaves(state)) == {"lora_a", "lora_b"}
