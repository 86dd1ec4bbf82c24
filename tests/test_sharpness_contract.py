"""What all curvature measures share: their inputs, many devices, counted costs."""

import functools

import curvature
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness

LOSS = curvature.loss_fn
SMALL = {
    "num_eigs": 4,
    "num_top_matvecs": 8,
    "num_lanczos": 6,
    "num_probes": 2,
}
# Each with the Hessian-vector products that its documentation says.
MEASURES = {
    "hessian_eigenvalues": ({"num_matvecs": 7, "k": 2}, 7),
    "hessian_trace": ({"num_matvecs": 8}, 8),
    "hessian_trace hutchinson": ({"num_matvecs": 5, "method": "hutchinson"}, 5),
    "hessian_diagonal": ({"num_matvecs": 8}, 8),
    "hessian_diagonal hutchinson": ({"num_matvecs": 5, "method": "hutchinson"}, 5),
    "hessian_frobenius_norm": ({"num_matvecs": 5}, 5),
    "spectral_density": ({"num_lanczos": 6, "num_probes": 2}, 12),
    "renyi_sharpness": (SMALL, 8 + 6 * 2),
}


def measure(name, loss_fn=LOSS, **more):
    options, _ = MEASURES[name]
    function = getattr(sharpness, name.split()[0])
    return lambda *args: function(loss_fn, *args, **options, **more)


@functools.cache
def problem(dtype="float32"):
    """A small network and 8 batches of 4 digits."""
    x, y = curvature.digits(dtype)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 6)).astype(dtype) / 8,
        "b1": jnp.zeros(6, dtype),
        "w2": jax.random.normal(keys[1], (6, 10)).astype(dtype) / 2,
        "b2": jnp.zeros(10, dtype),
    }
    batches = sharpness.stack_batches((x[:32], y[:32]), 4)
    return params, jax.tree.map(jnp.asarray, batches)


@functools.cache
def reference(name):
    return jax.jit(measure(name))(*problem(), 0)


def assert_close(actual, expected, rtol=2e-4, atol=0.0):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * abs(b).max() + atol)


def without_signs(result):
    """Eigenvectors have no sign."""
    if isinstance(result, sharpness.EigenResult):
        return result._replace(eigenvectors=None, residuals=None, converged=None)
    return result


@pytest.mark.parametrize("name", MEASURES)
def test_products_are_as_many_as_documented(name):
    counter = harness.Counter()
    params, batches = problem()
    options, number = MEASURES[name]
    run = jax.jit(measure(name, counter(LOSS)))
    jax.block_until_ready(run(params, batches, 0))
    assert counter.read() == 8 * number


@pytest.mark.parametrize("mode", ["fwd_rev", "rev_rev"])
def test_a_product_costs_at_most_three_gradients(mode):
    params, batches = problem()
    one = jax.tree.map(lambda x: x[:1], batches)

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    # Wide enough that the model, not the loss, is what is counted.
    key = jax.random.key(0)
    params = {**params, "w1": jax.random.normal(key, (64, 512)), "b1": jnp.ones(512)}
    params["w2"] = jax.random.normal(key, (512, 10))
    one = (jnp.ones((1, 128, 64)), jnp.zeros((1, 128), int))
    gradient = flops(
        lambda p, b: jax.grad(LOSS)(p, jax.tree.map(lambda x: x[0], b)), params, one
    )
    product = flops(
        lambda p, b, v: sharpness.hvp(LOSS, p, b, v, mode=mode), params, one, params
    )
    assert 1 < product / gradient <= 3


def temporary_bytes(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "few", "many"),
    [
        ("hessian_trace", {"num_matvecs": 4}, {"num_matvecs": 64}),
        ("hessian_diagonal", {"num_matvecs": 4}, {"num_matvecs": 64}),
        ("hessian_frobenius_norm", {"num_matvecs": 4}, {"num_matvecs": 64}),
        ("spectral_density", {"num_probes": 2}, {"num_probes": 32}),
        ("renyi_entropy", {"num_probes": 2}, {"num_probes": 32}),
    ],
)
def test_memory_does_not_grow_with_probes(name, few, many):
    params, batches = problem()
    more = {"num_grid": 4} if name == "spectral_density" else {}
    if name in ("hessian_trace", "hessian_diagonal"):
        more["method"] = "hutchinson"
    elif name != "hessian_frobenius_norm":
        more["num_lanczos"] = 10
    function = getattr(sharpness, name)
    size = lambda options: temporary_bytes(
        lambda p, b: function(LOSS, p, b, 0, **options, **more), params, batches
    )
    # A gradient of this network has 1,840 bytes; a basis of ten, ten times that.
    assert size(many) <= 1.1 * size(few) + 16 * 1024


def test_xtrace_keeps_vectors_and_not_activations():
    params, _ = problem()
    large = (jnp.ones((1, 4096, 64)), jnp.zeros((1, 4096), int))  # 100 kB of hidden
    size = lambda n: temporary_bytes(
        lambda p, b: sharpness.hessian_trace(LOSS, p, b, 0, num_matvecs=n),
        params,
        large,
    )
    parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    assert size(80) - size(8) <= 6 * 36 * parameters  # 36 probes more


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [(name, True) for name in MEASURES]
    + [("hessian_eigenvalues", False), ("hessian_trace", False)],
)
@pytest.mark.slow
def test_batches_on_eight_devices(name, check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.jit(
        jax.shard_map(
            lambda p, b: measure(name, axis_name="data")(p, b, 0),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),  # JAX checks that all devices have the same
            check_vma=check_vma,
        )
    )
    result = run(*problem())
    # A residual or an error of an error is only as large as rounding at times.
    assert_close(without_signs(result), without_signs(reference(name)), atol=1e-6)


@pytest.mark.parametrize("name", ["hessian_eigenvalues", "hessian_trace"])
def test_sharded_parameters_and_examples(name):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batches = problem()
    params = {
        **params,
        "w1": jax.device_put(params["w1"], NamedSharding(mesh, P("x"))),
    }
    batches = jax.tree.map(
        lambda x: jax.device_put(
            x.reshape(4, 8, *x.shape[2:]), NamedSharding(mesh, P(None, "x"))
        ),
        batches,
    )
    result = jax.jit(measure(name))(params, batches, 0)
    assert_close(without_signs(result), without_signs(reference(name)))


def test_weights_count_examples(x64):
    # Two batches of four, the second with a padded example that the loss ignores.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=7)
    pad = lambda a: np.concatenate([a, a[:1] * 0 + 99]).reshape(2, 4, *a.shape[1:])
    keep = np.array([[1, 1, 1, 1], [1, 1, 1, 0.0]])

    def loss(w, batch):
        x, y, keep = batch
        return jnp.sum(keep * (x @ w - y) ** 2) / keep.sum() / 2

    v = jnp.arange(1.0, 4)
    expected = x.T @ x @ v / 7
    for weights in (keep, keep.sum(1), 10 * keep.sum(1)):
        product = sharpness.hvp(
            loss, jnp.ones(3), (pad(x), pad(y), keep), v, weights=weights
        )
        np.testing.assert_allclose(product, expected, rtol=1e-12)
    alike = sharpness.hvp(loss, jnp.ones(3), (pad(x), pad(y), keep), v)
    assert not np.allclose(alike, expected)


def test_weights_over_devices(x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batches = problem("float64")
    weights = jnp.arange(8.0)
    v = jax.tree.map(jnp.ones_like, params)
    expected = sharpness.hvp(LOSS, params, batches, v, weights=weights)
    product = jax.jit(
        jax.shard_map(
            lambda p, b, w: sharpness.hvp(LOSS, p, b, v, weights=w, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P(),
        )
    )(params, batches, weights)
    assert_close(product, expected, 1e-12)


def test_half_precision_is_widened():
    params, batches = problem()
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    back = jax.tree.map(lambda x: x.astype("float32"), half)
    batches = (batches[0].astype("bfloat16"), batches[1])
    trace = jax.jit(measure("hessian_trace"))
    assert trace(half, batches, 0).estimate.dtype == "float32"
    assert_close(trace(half, batches, 0), trace(back, batches, 0), 1e-6)


def test_a_model_without_forward_derivatives():
    # As a kernel whose backward pass is another kernel.
    square, cube = jax.custom_vjp(lambda x: x**2), jax.custom_vjp(lambda x: x**3)
    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square(x) * g,))
    loss = lambda w, batch: jnp.mean(cube(w * batch))
    args = (loss, jnp.array([2.0]), jnp.ones((1, 4)), jnp.array([1.0]))
    with pytest.raises(TypeError, match="custom_vjp"):
        sharpness.hvp(*args)
    np.testing.assert_allclose(sharpness.hvp(*args, mode="rev_rev"), [12])


def test_warm_starts():
    params, batches = problem()
    run = lambda **options: jax.jit(
        lambda p, b, init: sharpness.hessian_eigenvalues(
            LOSS, p, b, 0, init=init, **options
        )
    )
    long = run(num_matvecs=20)(params, batches, None)
    top = jax.tree.map(lambda x: x[0], long.eigenvectors)
    warm = run(num_matvecs=4)(params, batches, top)
    cold = run(num_matvecs=4)(params, batches, None)
    assert warm.residuals[0] < 0.1 * cold.residuals[0]
    # A start of zero is a cold one.
    zero = run(num_matvecs=4)(params, batches, jax.tree.map(jnp.zeros_like, top))
    np.testing.assert_allclose(zero.eigenvalues, cold.eigenvalues, rtol=1e-3)


@pytest.mark.parametrize("key", [3, jax.random.key(3), jax.random.PRNGKey(3)])
def test_keys(key):
    H = curvature.matrix(curvature.rotated(np.arange(40.0), "float32"))
    expected = sharpness.trace_of(H, 3, num_matvecs=8).estimate
    assert sharpness.trace_of(H, key, num_matvecs=8).estimate == expected
    assert sharpness.trace_of(H, 4, num_matvecs=8).estimate != expected


W = jnp.ones(3)
DATA = jnp.ones((2, 4, 3))
QUADRATIC = lambda w, x: jnp.mean((x @ w) ** 2)
NONE = lambda params: jax.tree.map(lambda _: False, params)
BAD = [
    # (arguments, options, what the message says)
    ((lambda w, x: (x @ w) ** 2, W, DATA), {}, r"scalar.*shape \(4,\).*losses.mean"),
    ((lambda w, x: (QUADRATIC(w, x), 0), W, DATA), {}, r"scalar.*\[0\]"),
    ((None, W, DATA), {}, "loss_fn"),
    ((QUADRATIC, W, jnp.ones((0, 4, 3))), {}, "empty"),
    ((QUADRATIC, W, jnp.ones((2, 0, 3))), {}, "empty"),
    ((QUADRATIC, W, {}), {}, "stack_batches"),
    ((QUADRATIC, W, (DATA, jnp.ones(3))), {}, r"\(2,\), \(3,\)"),
    ((QUADRATIC, W, jnp.ones(())), {}, "stack_batches"),
    ((QUADRATIC, {"w": W, "step": jnp.array(3)}, DATA), {}, r"'step'.*int32.*mask="),
    ((QUADRATIC, W * 1j, DATA), {}, "complex64"),
    ((QUADRATIC, W, DATA), {"mask": False}, "selects nothing"),
    ((QUADRATIC, {}, DATA), {}, "params is empty"),
    ((QUADRATIC, W, DATA), {"weights": jnp.ones(3)}, r"\(2,\).*got \(3,\)"),
    ((QUADRATIC, W, DATA), {"weights": jnp.zeros(2)}, "not all zero"),
    ((QUADRATIC, W, DATA), {"weights": jnp.array([1.0, -1])}, ">= 0"),
    ((QUADRATIC, W, DATA), {"mask": [True]}, "mask"),
]


@pytest.mark.parametrize("name", ["hessian_eigenvalues", "hessian_trace"])
@pytest.mark.parametrize(("args", "options", "message"), BAD)
def test_bad_input(name, args, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(sharpness, name)(*args, 0, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hessian_eigenvalues", {"k": 4}, "only 3 parameters"),
        ("hessian_eigenvalues", {"k": 3, "num_matvecs": 2}, "num_matvecs is 2"),
        ("hessian_eigenvalues", {"k": 0}, "k must be an integer >= 1"),
        ("hessian_eigenvalues", {"which": "max"}, '"LA", "SA" or "LM"'),
        ("hessian_trace", {"method": "magic"}, '"xtrace" or "hutchinson"'),
        ("hessian_trace", {"method": "hutchinson", "num_matvecs": 1}, ">= 2"),
        ("hessian_diagonal", {"method": "xtrace"}, '"xdiag" or "hutchinson"'),
        ("hessian_frobenius_norm", {"num_matvecs": 1}, ">= 2"),
        ("spectral_density", {"sigma": 0.0}, "sigma"),
        ("spectral_density", {"num_probes": 0}, "num_probes"),
        ("renyi_entropy", {"alpha": 0.0}, "alpha"),
        ("renyi_entropy", {"alpha": (1.5, -1)}, "alpha"),
        ("renyi_entropy", {"num_probes": 1}, "num_probes"),
        ("renyi_entropy", {"layerwise": True}, "two or more dimensions"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(sharpness, name)(QUADRATIC, W, DATA, 0, **options)


def test_bad_vectors():
    with pytest.raises(ValueError, match=r"shape \(4,\).*parameter \(3,\)"):
        sharpness.hvp(QUADRATIC, W, DATA, jnp.ones(4))
    with pytest.raises(ValueError, match="tree like params"):
        sharpness.hvp(QUADRATIC, W, DATA, {"w": W})
    with pytest.raises(ValueError, match=r"init has shape \(4,\)"):
        sharpness.hessian_eigenvalues(QUADRATIC, W, DATA, 0, init=jnp.ones(4))
    with pytest.raises(ValueError, match="fwd_rev"):
        sharpness.hvp(QUADRATIC, W, DATA, W, mode="fwd")


def test_integers_may_be_masked_out():
    params = {"w": W, "step": jnp.array(3)}
    mask = {"w": True, "step": False}
    loss = lambda p, x: QUADRATIC(p["w"], x) * p["step"]
    result = sharpness.hvp(loss, params, DATA, params, mask=mask)
    np.testing.assert_allclose(result["w"], 3 * 2 * 3 * jnp.ones(3))
    assert result["step"] == 0


def test_stack_batches():
    x, y = np.arange(12).reshape(6, 2), np.arange(6)
    batches = sharpness.stack_batches({"x": x, "y": y}, 3)
    np.testing.assert_array_equal(batches["x"][1], x[3:])
    np.testing.assert_array_equal(batches["y"], [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="Take 4 of them"):
        sharpness.stack_batches((x, y), 4)
    with pytest.raises(ValueError, match="do not fill"):
        sharpness.stack_batches((x, y), 8)
    with pytest.raises(ValueError, match="same number"):
        sharpness.stack_batches((x, y[:5]), 2)


def test_without_matfree(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "matfree", None)
    monkeypatch.delitem(sys.modules, "optax_sam.sharpness.krylov")
    with pytest.raises(ImportError, match=r"pip install 'optax_sam\[sharpness\]'"):
        importlib.import_module("optax_sam.sharpness.krylov")


@pytest.mark.slow
def test_descent_goes_to_the_edge_of_stability():
    # Cohen et al. 2021: under full-batch descent lambda_max rises to 2 / eta and stays.
    x, y = curvature.digits("float32")
    batch = (x[:500] - x[:500].mean(0), jax.nn.one_hot(y[:500], 10) - 0.1)
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 24)) / 8,
        "b1": jnp.zeros(24),
        "w2": jax.random.normal(keys[1], (24, 10)) / 10,
    }

    def loss(params, batch):
        out = jnp.tanh(batch[0] @ params["w1"] + params["b1"]) @ params["w2"]
        return jnp.mean(jnp.sum((out - batch[1]) ** 2, -1)) / 2

    eta = 0.6

    @jax.jit
    def descend(params, batch):
        grad = jax.grad(loss)
        step = lambda _, p: jax.tree.map(lambda w, g: w - eta * g, p, grad(p, batch))
        return jax.lax.fori_loop(0, 300, step, params)

    @jax.jit
    def top(params, batch):
        one = jax.tree.map(lambda x: x[None], batch)
        return sharpness.hessian_eigenvalues(loss, params, one, 0).eigenvalues[0]

    history = [float(top(params, batch))]
    for _ in range(5):
        params = descend(params, batch)
        history.append(float(top(params, batch)))
    assert history[0] < history[1] < history[2]
    assert history[0] < 0.5 * 2 / eta
    np.testing.assert_allclose(history[-2:], 2 / eta, rtol=0.06)
