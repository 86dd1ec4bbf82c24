"""Directions, lines and surfaces: what they show is the loss, where they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness

ALPHAS = np.array([-1.0, -0.25, 0.0, 0.5])
BETAS = np.array([0.0, 0.3, 2.0])


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    first = {"kernel": draw(3, 4), "bias": draw(4)}
    params = {"a": first, "b": {"kernel": draw(4, 2), "bias": draw(2)}}

    def loss_fn(p, batch):
        x, y = batch
        x = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
        return jnp.mean((x @ p["b"]["kernel"] + p["b"]["bias"] - y) ** 2)

    return loss_fn, params, (draw(3, 5, 3), draw(3, 5, 2))


def pair(params, **options):
    make = sharpness.filter_normalized_direction
    return make(1, params, **options), make(2, params, **options)


def mean_loss(loss_fn, params, batches, weights=None):
    losses = [loss_fn(params, batch) for batch in zip(*batches, strict=True)]
    return np.average(np.array(losses), weights=weights)


@pytest.mark.parametrize("weights", [None, np.arange(3.0), np.arange(15).reshape(3, 5)])
def test_it_is_the_loss_there(x64, weights):
    """The mean over batches, which count by their examples."""
    args = loss_fn, params, batches = problem(jnp.float64)
    d, e = pair(params, ignore_1d=False)
    shares = weights.sum(1) if np.ndim(weights) == 2 else weights
    line, surface, ends = jax.jit(
        lambda: (
            sharpness.loss_line(*args, d, ALPHAS, weights=weights),
            sharpness.loss_surface(*args, (d, e), ALPHAS, BETAS, weights=weights),
            sharpness.interpolate_loss(*args, e, ALPHAS, weights=weights),
        )
    )()

    def at(a, b, start=1.0):
        w = jax.tree.map(lambda w, d, e: start * w + a * d + b * e, params, d, e)
        return mean_loss(loss_fn, w, batches, shares)

    check = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-14)
    check(line, [at(a, 0.0) for a in ALPHAS])
    check(surface, [[at(a, b) for b in BETAS] for a in ALPHAS])
    check(ends, [at(0.0, a, 1 - a) for a in ALPHAS])


def test_leaves_left_out_stay():
    args = loss_fn, params, batches = problem()
    d, _ = pair(params)
    mask = {"a": True, "b": False}
    wild = d | {"b": jax.tree.map(lambda x: x + jnp.nan, d["b"])}
    still = d | {"b": jax.tree.map(jnp.zeros_like, d["b"])}
    expected = sharpness.loss_line(*args, still, ALPHAS)
    found = sharpness.loss_line(*args, wild, ALPHAS, mask=mask)
    np.testing.assert_allclose(found, expected, rtol=3e-7)  # another program
    between = sharpness.interpolate_loss(*args, wild, [1.0], mask=mask)
    end = mean_loss(loss_fn, d | {"b": params["b"]}, batches)
    assert between[0] == pytest.approx(end)


def lengths(tree, axes):
    return np.sqrt(np.sum(np.square(np.asarray(tree, np.float64)), axes))


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, (0, 1, 2)),
        ({"filter_axis": 0}, (1, 2, 3)),
        ({"filter_axis": (0, -1)}, (1, 2)),
        ({"norm": "layer"}, (0, 1, 2, 3)),
    ],
)
def test_filters_are_as_long_as_the_weights(options, axes):
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4, 5))
    w = jnp.asarray(kernel, jnp.float32)
    d = sharpness.filter_normalized_direction(1, w, **options)
    np.testing.assert_allclose(lengths(d, axes), lengths(w, axes), rtol=1e-5)
    # Of others not: it is these filters that were normalized.
    narrower = axes[:-1]
    assert abs(lengths(d, narrower) / lengths(w, narrower) - 1).max() > 0.05


def test_without_a_norm_the_draws_are_standard_normal():
    w = {"kernel": jnp.zeros((100, 100)), "bias": jnp.ones(100)}
    d = sharpness.filter_normalized_direction(3, w, norm=None)
    assert float(d["kernel"].std()) == pytest.approx(1, abs=0.03)
    assert float(d["kernel"].mean()) == pytest.approx(0, abs=0.03)
    assert not d["bias"].any()


def test_vectors_are_one_filter_where_they_move():
    w = {"bias": jnp.arange(5.0), "scalar": jnp.array(-2.0)}
    assert not any(x.any() for x in jax.tree.leaves(pair(w)))
    d, _ = pair(w, ignore_1d=False)
    assert lengths(d["bias"], None) == pytest.approx(30**0.5, rel=1e-6)
    # A vector's entries are no filters each: those would only change signs.
    assert abs(abs(d["bias"]) - w["bias"]).max() > 0.1
    assert abs(d["scalar"]) == 2


@pytest.mark.parametrize("norm", ["filter", "layer"])
def test_zero_filters_stay(norm):
    w = {"some": jnp.ones((4, 3)).at[:, 1].set(0), "all": jnp.zeros((4, 3))}
    d = sharpness.filter_normalized_direction(0, w, norm=norm)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(d))
    assert not d["all"].any()
    assert norm == "layer" or not d["some"][:, 1].any()


def test_leaves_and_keys_have_their_own_draws():
    w = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3)), "c": jnp.ones((3, 3))}
    make = sharpness.filter_normalized_direction
    d, e = pair(w)
    assert len({np.asarray(x).tobytes() for x in jax.tree.leaves((d, e))}) == 6
    key = jax.random.key(1)
    some = make(1, w, mask={"a": False, "b": True, "c": True})
    assert not some["a"].any()
    others = make(key, w), make(jax.random.key_data(key), w), some | {"a": d["a"]}
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, d)
