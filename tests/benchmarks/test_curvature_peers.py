"""Curvature beside PyHessian and curvlinops: what is ours of it, without PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks.lib import study
from benchmarks.studies import curvature_peers as peers
from optax_sam import sharpness

COMMITTED = study.read(study.RESULTS / peers.NAME)["rows"]
EXACT = "product", "ggn", "fisher", "empirical", "layer_norm"


@pytest.fixture
def whole(x64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.random((40, 64))), jnp.asarray(rng.integers(0, 10, 40))


def test_products_with_layer_normalization_are_right(whole):
    """Finite differences of the gradient say so, which need no second derivative."""
    params = peers.trained(whole, layer_norm=True)
    assert len(params) == 6
    w, unravel = ravel_pytree(params)
    v = jnp.asarray(np.random.default_rng(1).normal(size=w.size))
    gradient = jax.grad(lambda w: peers.loss_fn(unravel(w), whole))
    step = 1e-5
    expected = (gradient(w + step * v) - gradient(w - step * v)) / (2 * step)
    found = sharpness.hvp(peers.loss_fn, params, [whole], unravel(v))
    error = jnp.linalg.norm(ravel_pytree(found)[0] - expected)
    assert error < 1e-7 * jnp.linalg.norm(expected)


@pytest.mark.slow
def test_our_rows_are_those_of_the_table(x64):
    whole = peers.data()
    params = peers.trained(whole, layer_norm=False)
    dense = peers.Dense(params, whole)
    v = np.random.default_rng(1).normal(size=len(dense.H))
    found = peers.of_optax_sam(params, peers.batches_of(whole), v, 0)
    errors = {row: dense.error(row, np.asarray(x), v) for row, x, _ in found}
    for row, error in errors.items():
        assert error < max(3 * COMMITTED[row]["optax_sam"]["error"], 1e-12), row


def test_what_the_page_says_of_the_committed_results():
    error = lambda row, peer: COMMITTED[row][peer]["error"]
    assert max(error(row, "optax_sam") for row in EXACT) < 1e-12
    assert error("layer_norm", "curvlinops") > 1e-3
    assert error("layer_norm", "PyHessian") < 1e-12
    assert "PyHessian" not in COMMITTED["density"]
    assert error("largest", "optax_sam") < error("largest", "PyHessian")
