"""Directions, lines and surfaces: what they show is the loss, where they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness

ALPHAS = np.array([-1.0, -0.25, 0.0, 0.5])
BETAS = np.array([0.0, 0.3, 2.0])


def problem(dtype=jnp.float32, batches=8, act=jax.nn.tanh):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    first = {"kernel": draw(3, 4), "bias": draw(4)}
    params = {"a": first, "b": {"kernel": draw(4, 2), "bias": draw(2)}}

    def loss_fn(p, batch):
        x, y = batch
        x = act(x @ p["a"]["kernel"] + p["a"]["bias"])
        return jnp.mean((x @ p["b"]["kernel"] + p["b"]["bias"] - y) ** 2)

    return loss_fn, params, (draw(batches, 5, 3), draw(batches, 5, 2))


def pair(params, **options):
    make = sharpness.filter_normalized_direction
    return make(1, params, **options), make(2, params, **options)


def points(dtype=jnp.float32, **options):
    """All three, of one problem."""
    loss_fn, params, batches = problem(dtype)
    d, e = pair(params, ignore_1d=False)
    args = loss_fn, params, batches
    return (
        sharpness.loss_line(*args, d, ALPHAS, **options),
        sharpness.loss_surface(*args, (d, e), ALPHAS, BETAS, **options),
        sharpness.interpolate_loss(*args, e, ALPHAS, **options),
    )


def mean_loss(loss_fn, params, batches, weights=None):
    losses = [loss_fn(params, batch) for batch in zip(*batches, strict=True)]
    return np.average(np.array(losses), weights=weights)


def by_hand(dtype=jnp.float32, weights=None):
    loss_fn, params, batches = problem(dtype)
    d, e = pair(params, ignore_1d=False)

    def at(a, b, start=1.0):
        w = jax.tree.map(lambda w, d, e: start * w + a * d + b * e, params, d, e)
        return mean_loss(loss_fn, w, batches, weights)

    line = [at(a, 0.0) for a in ALPHAS]
    surface = [[at(a, b) for b in BETAS] for a in ALPHAS]
    return line, surface, [at(0.0, a, 1 - a) for a in ALPHAS]


@functools.cache
def expected():
    return by_hand()


def check(found, expected, tolerance=2e-6):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance)


def test_it_is_the_loss_there():
    found = jax.jit(points)()
    assert [x.shape for x in found] == [(4,), (4, 3), (4,)]
    check(found, expected())


def test_in_double_precision(x64):
    check(points(jnp.float64), by_hand(jnp.float64), 1e-14)


@pytest.mark.parametrize("weights", [np.arange(8.0), np.arange(40.0).reshape(8, 5)])
def test_batches_count_by_their_examples(weights):
    shares = weights if weights.ndim == 1 else weights.sum(1)
    check(points(weights=weights), by_hand(weights=shares))


def test_the_centre_and_the_ends_are_exact():
    loss_fn, params, batches = problem(batches=1)
    d, e = pair(params)
    loss = loss_fn(params, jax.tree.map(lambda x: x[0], batches))
    other = loss_fn(e, jax.tree.map(lambda x: x[0], batches))
    args = loss_fn, params, batches
    assert float(sharpness.loss_line(*args, d, [0.0])[0]) == float(loss)
    assert float(sharpness.loss_surface(*args, (d, e), [0.0])[0, 0]) == float(loss)
    ends = sharpness.interpolate_loss(*args, e, [0.0, 1.0])
    assert ends.tolist() == [float(loss), float(other)]


def test_the_second_difference_is_the_curvature(x64):
    loss_fn, params, batches = problem(jnp.float64)
    d, _ = pair(params)
    step = 1e-3
    losses = sharpness.loss_line(loss_fn, params, batches, d, [-step, 0.0, step])
    found = (losses[0] - 2 * losses[1] + losses[2]) / step**2
    Hd = sharpness.hvp(loss_fn, params, batches, d)
    curvature = sum(map(jnp.vdot, jax.tree.leaves(d), jax.tree.leaves(Hd)))
    assert found == pytest.approx(float(curvature), rel=1e-5)


@pytest.mark.parametrize("explicit", [True, False])
def test_on_several_devices(explicit):
    loss_fn, params, batches = problem(batches=16)
    d, e = pair(params)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    weights = jnp.arange(1.0, 17.0)

    def all_of(batches, weights, axis_name=None):
        args, options = (loss_fn, params, batches), dict(weights=weights)
        options["axis_name"] = axis_name
        return (
            sharpness.loss_line(*args, d, ALPHAS, **options),
            sharpness.loss_surface(*args, (d, e), ALPHAS, BETAS, **options),
            sharpness.interpolate_loss(*args, e, ALPHAS, **options),
        )

    here = all_of(batches, weights)
    if explicit:
        # That the results are the same everywhere, JAX itself checks.
        mapped = jax.shard_map(
            functools.partial(all_of, axis_name="data"),
            mesh=mesh,
            in_specs=(P("data"), P("data")),
            out_specs=P(),
        )
        check(jax.jit(mapped)(batches, weights), here)
    else:
        placed = jax.device_put((batches, weights), NamedSharding(mesh, P("data")))
        check(jax.jit(all_of)(*placed), here)


def test_leaves_left_out_stay():
    loss_fn, params, batches = problem()
    d, _ = pair(params)
    mask = {"a": True, "b": False}
    wild = d | {"b": jax.tree.map(lambda x: x + jnp.nan, d["b"])}
    still = d | {"b": jax.tree.map(jnp.zeros_like, d["b"])}
    args = loss_fn, params, batches
    expected = sharpness.loss_line(*args, still, ALPHAS)
    found = sharpness.loss_line(*args, wild, ALPHAS, mask=mask)
    np.testing.assert_array_equal(found, expected)
    between = sharpness.interpolate_loss(*args, wild, [1.0], mask=mask)
    assert between[0] == pytest.approx(
        mean_loss(loss_fn, d | {"b": params["b"]}, batches)
    )


def test_an_integer_leaf_may_be_left_out():
    loss_fn = lambda p, batch: jnp.mean(batch) + p["w"] ** 2 * p["n"]
    params = {"w": jnp.array(2.0), "n": 3}
    mask = {"w": True, "n": False}
    d = sharpness.filter_normalized_direction(0, params, ignore_1d=False, mask=mask)
    assert abs(d["w"]) == 2
    assert d["n"] == 0
    found = sharpness.loss_line(
        loss_fn, params, jnp.zeros((1, 1)), d, [-1, 1], mask=mask
    )
    assert sorted(found.tolist()) == [0, 48]


def test_half_precision_weights_move_by_small_steps():
    loss_fn, params, batches = problem(jnp.bfloat16)
    d, _ = pair(params)
    assert {x.dtype for x in jax.tree.leaves(d)} == {jnp.dtype("float32")}
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batches))
    found = sharpness.loss_line(loss_fn, params, batches, d, [0.0, 1e-4])
    expected = sharpness.loss_line(loss_fn, *widened, d, [0.0, 1e-4])
    assert found[0] != found[1]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def lengths(tree, axes):
    return np.sqrt(np.sum(np.square(np.asarray(tree, np.float64)), axes))


KERNEL = np.random.default_rng(0).normal(size=(3, 2, 4, 5))


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
    w = jnp.asarray(KERNEL, jnp.float32)
    d = jax.jit(
        lambda key, w: sharpness.filter_normalized_direction(key, w, **options)
    )(jax.random.key(1), w)
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
    if norm == "filter":
        assert not d["some"][:, 1].any()


def test_leaves_and_keys_have_their_own_draws():
    w = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3)), "c": jnp.ones((3, 3))}
    d, e = pair(w)
    draws = [np.asarray(x).tobytes() for x in jax.tree.leaves((d, e))]
    assert len(set(draws)) == 6
    typed = sharpness.filter_normalized_direction(jax.random.key(1), w)
    raw = sharpness.filter_normalized_direction(
        jax.random.key_data(jax.random.key(1)), w
    )
    some = sharpness.filter_normalized_direction(
        1, w, mask={"a": False, "b": True, "c": True}
    )
    assert not some["a"].any()
    for other in (typed, raw, some | {"a": d["a"]}):
        jax.tree.map(np.testing.assert_array_equal, other, d)


def test_rescaled_networks_look_alike():
    loss_fn, params, batches = problem(act=jax.nn.relu)
    scale = lambda tree, c: jax.tree.map(lambda x: c * x, tree)
    last = {"kernel": params["b"]["kernel"] / 16, "bias": params["b"]["bias"]}
    rescaled = {"a": scale(params["a"], 16.0), "b": last}
    line = lambda p, **options: sharpness.loss_line(
        loss_fn, p, batches, pair(p, **options)[0], ALPHAS
    )
    np.testing.assert_allclose(line(params), line(rescaled), rtol=1e-5)
    plain = line(params, norm=None), line(rescaled, norm=None)
    assert abs(plain[0] / plain[1] - 1).max() > 0.5


def refused(call, *words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    message = " ".join(str(caught.value).split())
    assert [word for word in words if word not in message] == []


def test_bad_input_is_refused():
    loss_fn, params, batches = problem()
    d, e = pair(params)
    args = loss_fn, params, batches
    line, make = sharpness.loss_line, sharpness.filter_normalized_direction
    refused(lambda: line(*args, d["a"], ALPHAS), "direction must be a tree like params")
    wrong = d | {"b": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(2)}}
    refused(lambda: line(*args, wrong, ALPHAS), "(2, 4)", "['b']['kernel']", "(4, 2)")
    refused(lambda: line(*args, d, 0.5), "alphas", "linspace", "shape ()")
    refused(lambda: line(*args, d, []), "alphas", "shape (0,)")
    refused(
        lambda: sharpness.loss_surface(*args, d, ALPHAS), "pair of trees", "dict of 2"
    )
    refused(
        lambda: sharpness.loss_surface(*args, (d, e), ALPHAS, BETAS[None]),
        "betas",
        "(1, 3)",
    )
    refused(
        lambda: sharpness.interpolate_loss(*args, e["a"], ALPHAS),
        "other must be a tree like params",
    )
    refused(lambda: line(*args, d, ALPHAS, mask=False), "mask selects nothing")
    refused(lambda: make(0, params, norm="kernel"), '"filter", "layer" or None')
    refused(lambda: make(0, params, filter_axis=3), "['kernel']", "2 axes", "=3")
    refused(lambda: make(0, {"n": jnp.arange(3)}), "['n']", "int32", "mask=")
    refused(lambda: make(0.5, params), "key must be an int")
