"""What all measures share: counted costs, memory, devices, weights, widened weights."""

import functools
import gc
import itertools
import weakref

import curvature
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness

RHO = 0.1
bind = functools.partial


def geodesic(loss_fn, w, batches, **options):
    pair = sharpness.gl_pair("first", sharpness.GLBlock("second", rank_axis=0))
    pairs = [pair] if isinstance(w, dict) else []
    return sharpness.geodesic_sharpness(
        loss_fn, w, batches, RHO, pairs, num_steps=7, **options
    )


def case(name, values, gradients, **options):
    return bind(getattr(sharpness, name), **options), values, gradients


def line(loss_fn, w, batches, key, **options):
    return sharpness.loss_line(loss_fn, w, batches, w, jnp.ones(3), **options)


def ends(loss_fn, w, batches, key, **options):
    return sharpness.interpolate_loss(loss_fn, w, batches, w, jnp.ones(2), **options)


HUTCHINSON = {"num_matvecs": 5, "method": "hutchinson"}
DENSITY = {"num_lanczos": 6, "num_probes": 2}
RENYI = {"num_eigs": 4, "num_top_matvecs": 8, **DENSITY}
# Each with the values and the gradients of a batch that its documentation says; of a
# Hessian-vector product, one of each; of an ascent, 21 values with gradients for each
# start, and the value at w.
MEASURES = {
    "eigenvalues": case("hessian_eigenvalues", 7, 7, num_matvecs=7, k=2),
    "trace": case("hessian_trace", 8, 8, num_matvecs=8),
    "trace hutchinson": case("hessian_trace", 5, 5, **HUTCHINSON),
    "diagonal": case("hessian_diagonal", 8, 8, num_matvecs=8),
    "diagonal hutchinson": case("hessian_diagonal", 5, 5, **HUTCHINSON),
    "norm": case("hessian_frobenius_norm", 5, 5, num_matvecs=5),
    "density": case("spectral_density", 12, 12, **DENSITY),
    "renyi": case("renyi_sharpness", 20, 20, **RENYI),
    "sum": (bind(sharpness.spectral_sum, jnp.square, **RENYI), 20, 20),
    "worst": case("worst_case_sharpness", 22, 21, rho=RHO),
    "restarts": case("worst_case_sharpness", 64, 63, rho=RHO, num_restarts=3),
    "box": case("worst_case_sharpness", 22, 21, rho=0.01, norm="linf", adaptive=True),
    "geodesic": (geodesic, 9, 8),
    "keskar": case("keskar_sharpness", 22, 21, eps=0.01),
    "subspace": case("keskar_sharpness", 22, 21, eps=0.01, subspace_dim=3),
    "average": case("average_sharpness", 41, 0, rho=RHO),
    "noise": case("pac_bayes_flatness", 151, 0),
    "sam": (lambda *a, key, **o: sharpness.sam_sharpness(*a, RHO, **o), 2, 1),
    "line": (line, 3, 0),
    "ends": (ends, 2, 0),
}


def loss_fn(params, batch):
    """Cross-entropy of a small tanh network."""
    logits = jnp.tanh(batch[0] @ params["first"] + params["bias"]) @ params["second"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1], 1).mean()


@functools.cache
def problem(dtype="float32"):
    """Its weights, and eight batches of eight examples."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"first": draw(6, 4), "bias": draw(4), "second": draw(4, 5)}
    return params, (draw(8, 8, 6), jnp.asarray(rng.integers(0, 5, size=(8, 8, 1))))


def counted_loss():
    """A quadratic that counts its values and, apart, its gradients."""
    values, gradients = harness.Counter(), harness.Counter()
    value = lambda w, batch: jnp.sum((w - batch) ** 2)
    loss = jax.custom_vjp(values(value))
    forward = lambda w, batch: (values(value)(w, batch), (w, batch))
    slope = gradients(lambda w, batch: 2 * jnp.sum(w - batch, 0))
    loss.defvjp(forward, lambda at, ct: (ct * slope(*at), jnp.zeros_like(at[1])))
    return loss, values, gradients


@pytest.mark.parametrize("name", MEASURES)
def test_values_and_gradients_are_as_many_as_documented(name):
    loss, values, gradients = counted_loss()
    measure, *expected = MEASURES[name]
    run = jax.jit(lambda w: measure(loss, w, jnp.ones((2, 3, 24)), key=0))
    jax.block_until_ready(run(jnp.ones(24) / 2))
    assert [values.read(), gradients.read()] == [2 * x for x in expected]


@pytest.mark.parametrize(
    ("name", "copies"),
    [("eigenvalues", 1), ("trace", 2), ("trace hutchinson", 1), ("renyi", 2)],
)
def test_programs_hold_the_loss_once_for_each_loop(name, copies):
    """So that they compile about as long as a product, whatever the model."""
    params, batches = problem()
    run = lambda w, b: MEASURES[name][0](loss_fn, w, b, key=0)
    text = jax.jit(run).lower(params, batches).as_text()
    assert text.count("stablehlo.tanh") == copies


@pytest.mark.parametrize("mode", ["fwd_rev", "rev_rev"])
def test_a_product_costs_at_most_three_gradients(mode):
    # Wide enough that the model, not the loss, is what is counted.
    w = {"first": jnp.ones((64, 512)), "bias": jnp.ones(512)}
    w["second"] = jnp.ones((512, 10))
    one = jnp.ones((1, 128, 64)), jnp.zeros((1, 128, 1), int)

    def flops(f):
        return jax.jit(f).lower(w).compile().cost_analysis()["flops"]

    gradient = flops(jax.grad(lambda w: loss_fn(w, jax.tree.map(lambda x: x[0], one))))
    product = flops(lambda w: sharpness.hvp(loss_fn, w, one, w, mode=mode))
    assert 1 < product / gradient <= 3


def temporary(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("function", "repeated", "options"),
    [
        ("trace hutchinson", "num_matvecs", {}),
        ("worst", "num_restarts", {"num_steps": 3}),
        pytest.param("diagonal hutchinson", "num_matvecs", {}, marks=pytest.mark.slow),
        pytest.param("norm", "num_matvecs", {}, marks=pytest.mark.slow),
        pytest.param("density", "num_probes", {"num_grid": 4}, marks=pytest.mark.slow),
        pytest.param("renyi", "num_probes", {}, marks=pytest.mark.slow),
        pytest.param("average", "num_samples", {}, marks=pytest.mark.slow),
        pytest.param("noise", "num_samples", {"num_steps": 3}, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_repetitions(function, repeated, options):
    relu = lambda w, batch: jnp.mean(jnp.maximum(batch @ w, 0) ** 2)
    measure = MEASURES[function][0]
    size = lambda number: temporary(
        lambda w, b: measure(relu, w, b, key=0, **{repeated: number}, **options),
        jnp.ones(50_000),
        jnp.ones((1, 1, 50_000)),
    )
    few, many = size(2), size(40)
    assert few > 50_000
    assert many - few < 8 * 50_000  # and not 38 more vectors


def test_defaults_fit_ten_million_parameters():
    """As compiled, which is known before anything runs."""
    shape = lambda *x: jax.ShapeDtypeStruct(x, "float32")
    mlp = lambda w, x: jnp.mean(jnp.tanh(x @ w["in"]) @ w["out"])
    w = {"in": shape(1000, 5000), "out": shape(5000, 1000)}
    of = bind(sharpness.memory, loss_fn=mlp, params=w, batches=shape(1, 8, 1000))
    for name in ("trace", "diagonal", "frobenius_norm", "eigenvalues"):
        measure = getattr(sharpness, f"hessian_{name}")
        assert of(measure, key=0).parameter_vectors < 12
    assert of(sharpness.spectral_density, key=0).parameter_vectors < 12
    top = of(sharpness.hessian_eigenvalues, key=0, num_vectors=20)
    assert 20 < top.parameter_vectors < 25
    with pytest.raises(ValueError, match="give one batch"):
        sharpness.memory(sharpness.hessian_trace, mlp, w, [shape(8, 1000)], 0)


def test_xtrace_keeps_vectors_and_not_activations():
    w = {"first": jnp.ones((64, 6)), "bias": jnp.ones(6), "second": jnp.ones((6, 10))}
    large = jnp.ones((1, 4096, 64)), jnp.zeros((1, 4096, 1), int)  # 100 kB of hidden
    size = lambda n: temporary(
        lambda w: sharpness.hessian_trace(loss_fn, w, large, 0, num_matvecs=n), w
    )
    parameters = sum(x.nbytes for x in jax.tree.leaves(w))
    assert size(80) - size(8) <= 6 * 36 * parameters  # 36 probes more


@functools.cache
def alone(name):
    weights = jnp.arange(8.0)
    measure = MEASURES[name][0]
    return jax.jit(lambda w, b: measure(loss_fn, w, b, key=0, weights=weights))(
        *problem()
    )


# One whose mean is a scan, two that have a result for each batch, and a map.
QUICK = {
    *(("trace hutchinson", how) for how in ("mapped", "unchecked")),
    *(("average", how) for how in ("mapped", "placed")),
    *((name, "mapped") for name in ("sam", "line")),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(MEASURES, ("mapped", "placed", "unchecked"))
    ],
)
def test_eight_devices_find_what_one_does(name, how):
    """A batch on each, by hand, or the examples of all batches placed by JAX."""
    expected, measure = alone(name), MEASURES[name][0]
    weights, (params, batches) = jnp.arange(8.0), problem()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    if how == "placed":
        run = lambda w, b, weights: measure(loss_fn, w, b, key=0, weights=weights)
        batches = jax.device_put(batches, NamedSharding(mesh, P(None, "d")))
    else:
        # JAX checks that what is P() is the same on all devices.
        out = jax.tree.map(lambda _: P(), expected)
        if hasattr(out, "per_batch"):
            out = out._replace(per_batch=P("d"))
        run = jax.shard_map(
            lambda w, b, weights: measure(
                loss_fn, w, b, key=0, weights=weights, axis_name="d"
            ),
            mesh=mesh,
            in_specs=(P(), P("d"), P("d")),
            out_specs=out,
            check_vma=how == "mapped",
        )
    found = jax.jit(run)(params, batches, weights)
    if name == "eigenvalues":  # whose vectors have no sign, and residuals are rounding
        expected, found = expected.eigenvalues, found.eigenvalues
    # A late gain or an error of an error is only as large as rounding at times.
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * abs(b).max() + 1e-6)


def split(batches):
    return [jax.tree.map(lambda x: x[i], batches) for i in range(8)]  # noqa: B023


class Loader:
    """Gives its batches as often as it is asked for them."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


# Of a product, and of draws with a result for each batch.
STREAMED = {"trace hutchinson", "average"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x in STREAMED else pytest.mark.slow)
        for x in MEASURES
    ],
)
def test_a_list_of_batches_is_their_stack(name, x64):
    params, batches = problem("float64")
    measure, weights = MEASURES[name][0], jnp.arange(8.0)
    run = lambda w, b: measure(loss_fn, w, b, key=0, weights=weights)
    expected, found = jax.jit(run)(params, batches), run(params, split(batches))
    if name == "eigenvalues":
        expected, found = expected.eigenvalues, found.eigenvalues
    if hasattr(expected, "perturbation"):
        expected = expected._replace(perturbation=None)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8 * abs(b).max() + 1e-12)


def test_data_of_all_kinds_are_one(x64):
    params, batches = problem("float64")
    product = bind(sharpness.hvp, loss_fn, params, v=params)
    expected = product(batches)
    host = jax.tree.map(np.asarray, split(batches))
    operator = sharpness.hessian(loss_fn, params, iter(host))
    kinds = product(host), product(Loader(host)), product(lambda: iter(host))
    # An iterator is used up by one pass, and the operator kept what it gave.
    for found in (*kinds, operator.matvec(params), operator.matvec(params)):
        jax.tree.map(bind(np.testing.assert_allclose, rtol=1e-10), found, expected)
    # Inside jit a list is stacked.
    jitted = jax.jit(lambda b: product(b))(host)
    jax.tree.map(bind(np.testing.assert_allclose, rtol=1e-10), jitted, expected)
    # A shorter batch counts for what it is, and so do weights.
    whole = jax.tree.map(lambda x: x.reshape(64, *x.shape[2:]), batches)
    uneven = [jax.tree.map(lambda x: x[i : i + 24], whole) for i in (0, 24, 48)]  # noqa: B023
    found = product(uneven)
    jax.tree.map(bind(np.testing.assert_allclose, rtol=1e-10), found, expected)
    per_batch = sharpness.sam_sharpness(loss_fn, params, uneven, RHO)
    mean = (per_batch.per_batch * np.array([24, 24, 16])).sum() / 64
    np.testing.assert_allclose(per_batch.value, mean)
    found = product(uneven, weights=lambda batch: 1.0 * (len(batch[1]) < 24))
    last = product([uneven[2]])
    jax.tree.map(bind(np.testing.assert_allclose, rtol=1e-10), found, last)


@pytest.mark.parametrize("as_jax", [False, True])
def test_a_loader_that_changes_is_refused_where_it_is_read_again(as_jax):
    """As one that shuffles and drops the rest, or one that augments."""
    rng = np.random.default_rng(0)
    X, w = rng.normal(size=(20, 3)).astype("float32"), jnp.ones(3)
    quadratic = lambda w, x: jnp.mean((x @ w) ** 2)
    seen = []

    def loader():
        seen.append(X[rng.permutation(20)[:16]])
        halves = seen[-1].reshape(2, 8, 3)
        yield from map(jnp.asarray, halves) if as_jax else halves

    for measure in (
        sharpness.hessian_trace,
        bind(sharpness.average_sharpness, rho=RHO),
        sharpness.keskar_sharpness,
    ):
        with pytest.raises(ValueError, match=r"shuffle=False.*batches=list\(loader\)"):
            measure(quadratic, w, loader, key=0)
    # One pass is a measure of the examples that it gave.
    found = sharpness.hvp(quadratic, w, loader, w)
    np.testing.assert_allclose(found, 2 * seen[-1].T @ seen[-1] @ w / 16, rtol=1e-5)
    kept = sharpness.hessian_trace(quadratic, w, list(loader()), 0)
    np.testing.assert_allclose(kept.estimate, 2 * (seen[-1] ** 2).sum() / 16, rtol=1e-5)


def test_a_stream_compiles_once_and_is_counted():
    params, batches = problem()
    with sharpness.progress(loss_fn) as counted:
        run = bind(sharpness.hessian_trace, counted, params, split(batches), 0)
        run(num_matvecs=4, method="hutchinson")
        assert counted.count == 4 * 8

    def traces(number, products):
        calls = []
        loss = lambda *args: calls.append(1) or loss_fn(*args)
        sharpness.hessian_trace(
            loss,
            params,
            split(batches)[:number],
            0,
            num_matvecs=products,
            method="hutchinson",
        )
        return len(calls)

    assert traces(8, 6) == traces(2, 2) > 0


class Model:
    """Its method is another object each time, and all of them are equal."""

    scale = 1.0

    def loss(self, params, batch):
        return self.scale * loss_fn(params, batch)


@pytest.mark.parametrize(
    "name",
    [
        "trace hutchinson",
        "keskar",
        pytest.param("average", marks=pytest.mark.slow),
        pytest.param("worst", marks=pytest.mark.slow),
        pytest.param("line", marks=pytest.mark.slow),
    ],
)
def test_a_list_sees_what_the_loss_closes_over_and_keeps_nothing(name):
    params, batches = problem()
    measure, two = MEASURES[name][0], split(batches)[:2]
    model = Model()
    measure(model.loss, params, two, key=0)
    model.scale = 3.0
    found = measure(model.loss, params, two, key=0)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *two)
    expected = jax.jit(
        lambda w, b: measure(lambda *args: 3 * loss_fn(*args), w, b, key=0)
    )(params, stacked)
    pair = (jax.tree.leaves(x)[0] for x in (found, expected))
    np.testing.assert_allclose(*pair, rtol=1e-4)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


MODES = {
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "nan": lambda: jax.debug_nans(True),
}


@pytest.mark.parametrize(
    ("name", "mode", "as_list"),
    [
        ("trace", "rank", False),
        ("density", "rank", False),
        ("renyi", "dtype", False),
        ("sam", "dtype", True),
        ("keskar", "nan", False),
        pytest.param("worst", "nan", False, marks=pytest.mark.slow),
        pytest.param("average", "dtype", True, marks=pytest.mark.slow),
    ],
)
def test_measures_pass_where_jax_is_strict(name, mode, as_list):
    x = jnp.sin(jnp.arange(192.0)).reshape(1, 8, 24)
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    run = lambda: MEASURES[name][0](loss, jnp.ones(24), [*x] if as_list else x, key=0)
    with MODES[mode]():
        found = run()
    for a, b in zip(*map(jax.tree.leaves, (found, run())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_one_draw_has_no_standard_error():
    with jax.debug_nans(True):
        result = sharpness.average_sharpness(
            lambda w, x: jnp.mean(x * w**2),
            jnp.ones(2),
            jnp.ones((1, 3, 2)),
            RHO,
            0,
            num_samples=1,
        )
    assert np.isnan(result.stderr)
    assert result.value > 0


@pytest.mark.parametrize("name", ["trace hutchinson", "worst", "line"])
def test_half_precision_is_widened(name):
    params, batches = problem()
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    back = jax.tree.map(lambda x: x.astype("float32"), half)
    batches = batches[0].astype("bfloat16"), batches[1]
    run = jax.jit(lambda w: MEASURES[name][0](loss_fn, w, batches, key=0)[0])
    assert run(half).dtype == "float32"
    np.testing.assert_allclose(run(half), run(back), rtol=1e-6)


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
    trace = sharpness.hessian_trace(*args[:3], 0, mode="rev_rev")
    np.testing.assert_allclose(trace.estimate, 12)


def test_keys_of_all_kinds_are_one():
    H = curvature.matrix(curvature.rotated(np.arange(40.0), "float32"))
    of = lambda key: float(sharpness.trace(H, key, num_matvecs=8).estimate)
    assert of(3) == of(jax.random.key(3)) == of(jax.random.PRNGKey(3)) != of(4)


def test_without_a_key_it_is_zero():
    loss = lambda w, batch: jnp.mean((batch @ jnp.tanh(w)) ** 2)
    arguments = loss, jnp.array([0.3, -0.2]), jnp.eye(2)[None]
    worst = bind(sharpness.worst_case_sharpness, *arguments, RHO, num_steps=1)
    assert worst().value == worst(0).value != worst(1).value
    keskar = bind(sharpness.keskar_sharpness, *arguments, subspace_dim=1)
    assert keskar().value == keskar(0).value


def test_integers_may_be_masked_out():
    params, mask = {"w": jnp.ones(3), "step": jnp.array(3)}, {"w": True, "step": False}
    loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2) * p["step"]
    batches = jnp.ones((2, 4, 3))
    result = sharpness.hvp(loss, params, batches, params, mask=mask)
    np.testing.assert_allclose(result["w"], 3 * 2 * 3 * jnp.ones(3))
    assert result["step"] == 0


def test_stack_batches():
    x, y = np.arange(12).reshape(6, 2), np.arange(6)
    batches = sharpness.stack_batches({"x": x, "y": y}, 3)
    np.testing.assert_array_equal(batches["x"][1], x[3:])
    np.testing.assert_array_equal(batches["y"], [[0, 1, 2], [3, 4, 5]])
    # No list, which would be one of two batches.
    loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    measure = lambda batches: sharpness.sam_sharpness(loss, jnp.ones(2), batches, RHO)
    pair = sharpness.stack_batches([x, y], 3)
    right = measure(sharpness.stack_batches((x, y), 3)).per_batch
    np.testing.assert_array_equal(measure(pair).per_batch, right)
