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


def test_along_eigenvectors_it_is_the_parabola_to_second_order(x64):
    args = loss_fn, params, batches = problem(jnp.float64)
    top = sharpness.hessian_eigenvalues(*args, 0, k=2, num_matvecs=26)
    steps = 1e-2 * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    found = jax.jit(lambda top: sharpness.loss_along_eigenvectors(*args, top, steps))(
        top
    )
    for i in range(2):
        line = sharpness.loss_line(*args, top.vector(i), steps)
        np.testing.assert_allclose(found.losses[i], line, rtol=1e-14)
    np.testing.assert_array_equal(found.eigenvalues, top.eigenvalues)
    beyond = np.abs(found.losses - found.parabolas)
    assert (beyond[:, 2] < 1e-14).all()
    # Of third order in the step, while the second order is a hundred times that.
    np.testing.assert_allclose(beyond[:, [0, 4]] / beyond[:, [1, 3]], 8, rtol=0.1)
    second = 0.5 * np.outer(found.eigenvalues, steps**2)
    assert (beyond <= 0.05 * second).all()


def walk(number=12):
    """A path that is known: in the plane of two directions, and a little beside it."""
    params, rng = problem(jnp.float64)[1], np.random.default_rng(3)
    d, e, f = (
        sharpness.filter_normalized_direction(key, params, ignore_1d=False)
        for key in range(3)
    )
    c = rng.normal(size=(number, 2)) * [3, 1]
    add = lambda x, y: jax.tree.map(lambda w, d, e: w + x * d + y * e, params, d, e)
    return params, (d, e), f, c, [add(x, y) for x, y in c]


def test_a_path_in_the_plane_is_where_it_was_put(x64):
    params, pair, aside, c, path = walk()
    found = sharpness.project_path(path, params, pair)
    np.testing.assert_allclose(found.coordinates, c, rtol=1e-10, atol=1e-12)
    assert found.share.sum() == pytest.approx(1)
    # A constant aside is out of the plane of each point, and no variance.
    shift = lambda w: jax.tree.map(jnp.add, w, aside)
    moved = sharpness.project_path([*map(shift, path)], shift(params), pair)
    np.testing.assert_allclose(moved.coordinates, c, atol=1e-10)
    # Two paths by name share the plane.
    both = sharpness.project_path({"a": path[:5], "b": path[5:]}, params, pair)
    np.testing.assert_array_equal(both.coordinates["b"], found.coordinates[5:])
    np.testing.assert_array_equal(both.share, found.share)
    # On the surface of these directions the loss there is that of the checkpoint.
    loss_fn, _, batches = problem(jnp.float64)
    for (x, y), w in zip(found.coordinates[:2], path, strict=False):
        at = sharpness.loss_surface(loss_fn, params, batches, pair, [x], [y])[0, 0]
        assert at == pytest.approx(mean_loss(loss_fn, w, batches), rel=1e-10)


def test_principal_components_of_a_path(x64):
    params, _, aside, c, path = walk()
    noise = np.random.default_rng(1).normal(size=len(c))
    beside = lambda w, x: jax.tree.map(lambda w, f: w + 0.3 * x * f, w, aside)
    path = [*map(beside, path, noise)]
    flat = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])
    X = np.stack([*map(flat, path)])
    _, singular, V = np.linalg.svd(X - X.mean(0), full_matrices=False)
    found = sharpness.project_path(path, path[-1])
    share = singular**2 / np.sum(singular**2)
    np.testing.assert_allclose(found.share, share[:2], rtol=1e-8)
    assert 0.5 < found.share.sum() < 0.999
    for i, d in enumerate(map(flat, found.directions)):
        sign = np.sign(d @ V[i])
        np.testing.assert_allclose(d, sign * V[i], atol=1e-7)
        np.testing.assert_allclose(found.coordinates[:, i], (X - X[-1]) @ d, atol=1e-7)
        assert (X[-1] - X[0]) @ d >= 0
    masked = sharpness.project_path(path, path[-1], mask={"a": True, "b": False})
    assert not np.any(masked.directions[0]["b"]["kernel"])
    assert np.any(masked.directions[0]["a"]["kernel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, pair: dict(path=path[:1]), "several checkpoints; got 1"),
        (lambda path, pair: dict(path=path[:1] * 3), "all the same"),
        (lambda path, pair: dict(path=path[:2]), "straight line.*interpolate_loss"),
        (lambda path, pair: dict(directions=pair[:1] * 2), "neither zero nor parallel"),
        (lambda path, pair: dict(directions=pair[:1]), "pair of pytrees"),
        (
            lambda path, pair: dict(path=[*path, jnp.ones(2)]),
            r"path\[12\] must be a pytree",
        ),
    ],
)
def test_paths_without_a_plane(change, message, x64):
    params, pair, _, _, path = walk()
    with pytest.raises(ValueError, match=message):
        sharpness.project_path(**dict(path=path, params=params) | change(path, pair))


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
