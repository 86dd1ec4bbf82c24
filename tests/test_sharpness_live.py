"""Live metrics: of one SAM step, as scalars for loggers, and measured now and then."""

import functools
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import sharpness

RHO = 0.1


def quadratic(dtype):
    """``w'Hw/2 - b'w`` of a tree, ``H`` indefinite with largest eigenvalue 5."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    H = Q * np.array([5, 3, 2, 1, 0.5, 0.1, -0.5, -1]) @ Q.T
    b, w = rng.normal(size=8), rng.normal(size=8)
    tree = lambda x: {"a": jnp.asarray(x[:6], dtype).reshape(2, 3), "b": [x[6:]]}
    flat = lambda w: jnp.concatenate([w["a"].ravel(), w["b"][0]])
    loss = lambda w: flat(w) @ jnp.asarray(H, dtype) @ flat(w) / 2 - flat(w) @ b
    cast = lambda x: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree(x))
    return loss, cast, H, H @ w - b, w


def metrics_of(loss, w, e, **more):
    value_and_grad = jax.value_and_grad(loss)
    value, g = value_and_grad(w)
    value_e, g_s = value_and_grad(optax.tree.add(w, e))
    return sharpness.sam_metrics(value, value_e, g, g_s, e, **more)


@pytest.mark.parametrize(
    ("double", "tolerance"), [(True, 1e-12), (False, 2e-4)], ids=["f64", "f32"]
)
def test_identities_on_a_quadratic(double, tolerance):
    with harness.x64() if double else harness.contextlib.nullcontext():
        loss, tree, H, g, w = quadratic(jnp.float64 if double else jnp.float32)
        g_norm = np.linalg.norm(g)
        e = RHO * g / g_norm
        of = jax.jit(lambda w, e: metrics_of(loss, w, e))
        found = {name: float(x) for name, x in of(tree(w), tree(e)).items()}
        rayleigh = g @ H @ g / g_norm**2
        g_s = g + H @ e
        expected = {
            "sharpness_gap": RHO * g_norm + RHO**2 / 2 * rayleigh,
            "grad_norm": g_norm,
            "perturbed_grad_norm": np.linalg.norm(g_s),
            "grad_norm_ratio": np.linalg.norm(g_s) / g_norm,
            "cosine": g @ g_s / g_norm / np.linalg.norm(g_s),
            "psf_norm": RHO * np.linalg.norm(H @ g) / g_norm,
            "rho": RHO,
            "perturbation_norm": RHO,
            "rayleigh_quotient": rayleigh,
        }
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=tolerance)
        # The difference of losses has lost digits: some of 1e-7 over rho^2.
        assert found["rayleigh_from_loss"] == pytest.approx(
            rayleigh, rel=1e-10 if double else 2e-2
        )
        assert found["loss_perturbed"] - found["loss"] == found["sharpness_gap"]
        assert rayleigh < 5
        # Along any other offset it is that one's curvature.
        e = np.random.default_rng(1).normal(size=8) / 10
        found = of(tree(w), tree(e))
        for name in ("rayleigh_quotient", "rayleigh_from_loss"):
            assert float(found[name]) == pytest.approx(
                e @ H @ e / (e @ e), rel=1e-10 if double else 2e-3
            )


@functools.cache
def sam_step():
    """A train step of the documentation that hands out what its gradients saw."""
    loss_fn, tree, *_, w = quadratic(jnp.float32)
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(0.05))

    @jax.jit
    def step(w, state):
        seen = []

        def grad_fn(point):
            loss, g = jax.value_and_grad(loss_fn)(point)
            seen.append((loss, g, optax.tree.sub(point, w)))
            return g

        g = grad_fn(w)
        updates, state = tx.update(g, state, w, grad_fn=grad_fn)
        (loss, g, _), (loss_perturbed, g_s, e) = seen
        logged = sharpness.sam_metrics(
            loss, loss_perturbed, g, g_s, e, params=w, updates=updates,
            learning_rate=0.05,
        )  # fmt: skip
        return optax.apply_updates(w, updates), state, logged

    return step, tree(w), tx.init(tree(w))


def test_a_step_logs_what_the_optimizer_state_knows_and_more():
    step, w, state = sam_step()
    for _ in range(3):
        before = w
        w, state, logged = step(w, state)
    known = optax_sam.metrics(state)
    for ours, theirs in (
        ("grad_norm", "gradient_norm"),
        ("perturbed_grad_norm", "ascended_norm"),
    ):
        np.testing.assert_allclose(logged[ours], known[theirs], rtol=1e-6)
    np.testing.assert_allclose(logged["perturbation_norm"], RHO, rtol=1e-5)
    assert logged["moved_fraction"] == 1
    change = optax.tree.norm(optax.tree.sub(w, before))
    np.testing.assert_allclose(logged["update_norm"], change, rtol=1e-4)
    np.testing.assert_allclose(logged["param_norm"], optax.tree.norm(before), rtol=1e-6)
    np.testing.assert_allclose(logged["stability_edge"], 40)
    np.testing.assert_allclose(
        logged["stability_edge_sam"],
        sharpness.sam_stability_edge(logged["grad_norm"], logged["rho"], 0.05),
    )
    assert all(x.shape == () and x.dtype == jnp.float32 for x in logged.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [True, False])
def test_nothing_divides_by_zero(dtype, jit):
    zero = {"w": jnp.zeros(3, dtype)}
    of = functools.partial(
        sharpness.sam_metrics, 1.0, 1.0, params=zero, updates=zero, learning_rate=0.1
    )
    found = (jax.jit(of) if jit else of)(zero, zero, zero)
    expected = dict.fromkeys(found, 0.0)
    expected |= {"loss": 1, "loss_perturbed": 1, "learning_rate": 0.1}
    expected |= {"stability_edge": 20}  # without an offset both edges are the same
    expected |= {"stability_edge_sam": 20}
    assert {k: float(x) for k, x in found.items()} == pytest.approx(expected)


def test_one_zero_gradient_of_two():
    one, zero = {"w": jnp.ones(4)}, {"w": jnp.zeros(4)}
    found = sharpness.sam_metrics(0.0, 1.0, zero, one, one)
    assert found["cosine"] == found["grad_norm_ratio"] == 0
    assert found["rayleigh_quotient"] == 1
    found = sharpness.sam_metrics(0.0, 1.0, one, zero, one)
    assert found["cosine"] == found["grad_norm_ratio"] == 0


def test_what_is_not_finite_shows():
    bad, one = {"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.ones(2)}
    found = sharpness.sam_metrics(0.0, 1.0, bad, one, one)
    for name in ("grad_norm", "cosine", "grad_norm_ratio", "rayleigh_quotient"):
        assert jnp.isnan(found[name]), name


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_inert_perturbation_shows(jit, dtype):
    # A step of 1e-4 is lost next to 1, and kept next to 1e-3.
    w = {"lost": jnp.ones(6, dtype), "kept": jnp.full(2, 1e-3, dtype)}
    e = jax.tree.map(lambda x: jnp.full(x.shape, 1e-4, jnp.float32), w)
    g = jax.tree.map(jnp.ones_like, w)
    # Of a loss with the Hessian 3 I, at the point that is reached.
    g_s = {"lost": g["lost"], "kept": g["kept"].astype(jnp.float32) + 3e-4}
    of = lambda w: sharpness.sam_metrics(1.0, 1.1, g, g_s, e, params=w)
    of = jax.jit(of) if jit else of
    found = of(w)
    assert found["moved_fraction"] == 0.25
    np.testing.assert_allclose(found["rho"], 1e-4 * 8**0.5, rtol=1e-5)
    np.testing.assert_allclose(found["perturbation_norm"], 1e-4 * 2**0.5, rtol=0.05)
    np.testing.assert_allclose(found["rayleigh_quotient"], 3, rtol=0.05)
    inert = of(jax.tree.map(jnp.ones_like, w))
    assert inert["moved_fraction"] == inert["perturbation_norm"] == 0
    assert inert["rayleigh_quotient"] == inert["rayleigh_from_loss"] == 0
    alive = of(optax.tree.cast(w, jnp.float32))
    assert alive["moved_fraction"] == 1
    np.testing.assert_allclose(alive["perturbation_norm"], alive["rho"], rtol=1e-3)


def test_norms_of_half_precision_do_not_overflow():
    g = {"w": jnp.full(10_000, 1000, jnp.float16)}
    found = sharpness.sam_metrics(1.0, 2.0, g, g, g)
    np.testing.assert_allclose(found["grad_norm"], 1e5, rtol=1e-6)
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)


def test_sharded_gradients_give_the_same():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    g, g_s, e, w = (jnp.asarray(rng.normal(size=(16, 3)), jnp.float32) for _ in "1234")
    of = jax.jit(lambda *t: sharpness.sam_metrics(1.0, 2.0, *t[:3], params=t[3]))
    whole = of(g, g_s, e, w)
    parts = jax.device_put((g, g_s, e, w), NamedSharding(mesh, P("d")))
    harness.assert_close(dict(of(*parts)), dict(whole), 1e-5)
    # Under shard_map each device has its own.
    own = jax.shard_map(
        lambda *t: jax.tree.map(lambda x: x[None], of(*t)),
        mesh=mesh, in_specs=P("d"), out_specs=P("d"),
    )  # fmt: skip
    third = of(*(x[4:6] for x in (g, g_s, e, w)))
    mine = jax.tree.map(lambda x: x[2], jax.jit(own)(g, g_s, e, w))
    harness.assert_close(mine, third, 1e-5)


def test_sam_metrics_advises():
    w, v = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    of = sharpness.sam_metrics
    with pytest.raises(ValueError, match="perturbation must be a tree like grads"):
        of(1.0, 1.0, w, w, jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"grads_perturbed has shape \(3,\) at \['w'\]"
    ):
        of(1.0, 1.0, w, v, w)
    with pytest.raises(ValueError, match=r"params has shape \(3,\)"):
        of(1.0, 1.0, w, w, w, params=v)
    with pytest.raises(ValueError, match=r"updates must be a tree"):
        of(1.0, 1.0, w, w, w, updates=[v])
    with pytest.raises(ValueError, match="loss_perturbed must be a scalar"):
        of(1.0, jnp.ones(4), w, w, w)
    with pytest.raises(ValueError, match="learning_rate must be a number in"):
        of(1.0, 1.0, w, w, w, learning_rate=-1.0)


def largest_root(g, rho, eta):
    """The largest ``lambda`` with ``eta lambda + eta rho lambda^2 / g <= 2``."""
    low, high = 0.0, 3 / eta
    for _ in range(200):
        middle = (low + high) / 2
        stable = eta * middle + eta * rho * middle**2 / g <= 2
        low, high = (middle, high) if stable else (low, middle)
    return low


def test_the_edge_is_the_largest_stable_curvature(x64):
    g, rho, eta = np.meshgrid([1e-6, 0.01, 1, 50], [1e-9, 0.01, 0.5], [1e-3, 0.1, 1])
    found = sharpness.sam_stability_edge(g, rho, eta)
    expected = np.vectorize(largest_root)(g, rho, eta)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.all(found < 2 / eta)


def test_the_edge_at_its_ends():
    edge = jax.jit(sharpness.sam_stability_edge)
    assert edge(1.0, 0.0, 0.5) == edge(0.0, 0.0, 0.5) == 4
    assert edge(0.0, 0.1, 0.5) == 0
    assert edge(1.0, 0.1, 0.0) == edge(0.0, 0.1, 0.0) == jnp.inf
    # The form in the paper would have lost all digits here.
    np.testing.assert_allclose(edge(1.0, 1e-9, 0.5), 4, rtol=1e-6)
    np.testing.assert_allclose(edge(1.0, 0.05, 0.1), 12.360680, rtol=1e-6)
    for bad in ((-1.0, 0.1, 0.1), (1.0, -0.1, 0.1), (1.0, 0.1, -0.1)):
        with pytest.raises(ValueError, match="must be a number in"):
            sharpness.sam_stability_edge(*bad)


class Pair(NamedTuple):
    """A result with all kinds of fields."""

    value: Any
    vectors: Any
    flag: Any = True
    missing: Any = None


def test_scalars_of_all_kinds():
    result = {
        "top": Pair(
            value=jnp.array([3.0, 2.0]),
            # A field goes as a whole, its small leaves too.
            vectors={"kernel": jnp.ones((2, 99)), "bias": jnp.ones((2, 1))},
            flag=jnp.array([True, False]),
        ),
        "layers": {"dense": Pair(jnp.float32(1.5), jnp.ones((2, 2), jnp.bfloat16))},
        "nested": {"deep": {"er": Pair(6, jnp.ones(99))}},
        "list": [Pair(1, np.float64(2.5), False), Pair(2, jnp.ones(99))],
        "grid": jnp.ones(33),
        "small": np.arange(2),
        "half": jnp.ones((), jnp.bfloat16),
        "name": "a string",
        "key": jax.random.key(0),
        "function": len,
        "none": None,
        "tree": {"a": {"b": 4}, "c": (5.0,)},
    }
    found = sharpness.to_scalars(result, "x/")
    assert found == {
        "x/top/value/0": 3,
        "x/top/value/1": 2,
        "x/top/flag/0": 1,
        "x/top/flag/1": 0,
        "x/layers/dense/value": 1.5,
        "x/layers/dense/vectors/0/0": 1,
        "x/layers/dense/vectors/0/1": 1,
        "x/layers/dense/vectors/1/0": 1,
        "x/layers/dense/vectors/1/1": 1,
        "x/layers/dense/flag": 1,
        "x/list/0/value": 1,
        "x/list/0/vectors": 2.5,
        "x/list/0/flag": 0,
        "x/list/1/value": 2,
        "x/list/1/flag": 1,
        "x/nested/deep/er/value": 6,
        "x/nested/deep/er/flag": 1,
        "x/small/0": 0,
        "x/small/1": 1,
        "x/half": 1,
        "x/tree/a/b": 4,
        "x/tree/c/0": 5,
    }
    assert all(type(x) is float for x in found.values())
    # In the order of the result.
    assert [name.split("/")[1] for name in found][:3] == ["top"] * 3


def test_scalars_of_a_number_and_of_trees_like_the_parameters():
    assert sharpness.to_scalars(jnp.float32(2)) == {"sharpness": 2}
    assert sharpness.to_scalars(7, "loss") == {"loss": 7}
    assert sharpness.to_scalars(jnp.array([1, 2]), "a/") == {"a/0": 1, "a/1": 2}
    assert sharpness.to_scalars(jnp.ones(33)) == {}
    assert len(sharpness.to_scalars(jnp.ones(33), max_size=33)) == 33
    like_params = {"params": {"kernel": jnp.ones((9, 9)), "bias": jnp.ones(9)}}
    assert sharpness.to_scalars(like_params) == {}
    estimate = sharpness.Estimate(like_params, like_params)
    assert sharpness.to_scalars({"diagonal": estimate}) == {}
    nan = sharpness.to_scalars({"x": jnp.nan, "y": -jnp.inf})
    assert np.isnan(nan["sharpness/x"])
    assert nan["sharpness/y"] == -np.inf
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(sharpness.to_scalars)(1.0)
    with pytest.raises(ValueError, match="max_size"):
        sharpness.to_scalars(1.0, max_size=0)


SIZE = 150


@functools.cache
def valley():
    """A loss whose Hessian moves with ``w``, with a dense spectrum from 0 to 3."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    H = jnp.asarray(Q * np.linspace(0, 3, SIZE) @ Q.T, jnp.float32)
    traces = []

    def loss_fn(w, batch):
        traces.append(1)
        flat = jnp.concatenate([w["a"].ravel(), w["b"]])
        return jnp.mean(batch) * (flat @ H @ flat / 2 + jnp.sum(flat**4) / 12)

    w = jnp.asarray(rng.normal(size=SIZE) / 5, jnp.float32)
    tree = lambda w: {"a": w[:100].reshape(10, 10), "b": w[100:]}
    exact = lambda w: np.linalg.eigvalsh(np.asarray(H) + np.diag(w**2))
    return loss_fn, jnp.ones((2, 4)), tree, w, exact, traces


def probe_of(**options):
    loss_fn, batches, *_ = valley()
    return sharpness.Probe(loss_fn, batches, 0, **options)


def eigen(num_matvecs, k=1):
    return functools.partial(
        sharpness.hessian_eigenvalues, num_matvecs=num_matvecs, k=k
    )


def test_a_warm_start_needs_fewer_products():
    *_, tree, w, exact, _ = valley()
    probe = probe_of(every=5, measures={"few": eigen(12), "many": eigen(24)})
    state = probe.init(tree(w))
    residuals = []
    for t in range(8):  # the parameters drift by a thousandth between two measurements
        scalars, state = probe(5 * t, tree((1 + t / 1000) * w), state)
        residuals.append(
            [scalars[f"sharpness/{x}/residuals/0"] for x in ("few", "many")]
        )
    (cold, cold_twice), *_, (warm, _) = residuals
    # Half of the products, and a smaller residual than a cold start's.
    assert warm < 0.5 * cold_twice < cold
    top = exact(1.007 * np.asarray(w))[-1]
    assert scalars["sharpness/few/eigenvalues/0"] == pytest.approx(top, rel=1e-3)
    # Without its memory it is as it was at first.
    forgot, _ = probe(35, tree(1.007 * w), probe.init(tree(w)))
    assert forgot["sharpness/few/residuals/0"] > 2 * warm


def test_the_next_start_is_the_sum_of_the_vectors_that_there_were():
    class Found(NamedTuple):
        eigenvalues: Any
        eigenvectors: Any
        start: Any

    def measure(loss_fn, params, batches, init):
        values = jnp.where(params["a"] > 0, jnp.array([2.0, jnp.nan, 1.0]), jnp.nan)
        vectors = {"a": jnp.array([1.0, jnp.nan, 20.0])}
        return Found(values, vectors, init["a"])

    probe = probe_of(every=1, measures={"x": measure})
    half = jnp.bfloat16(1)  # the start is in float32 all the same
    state = probe.init({"a": half})
    starts = []
    for sign in (1, -1, 1):
        scalars, state = probe(0, {"a": sign * half}, state)
        starts.append(scalars["sharpness/x/start"])
    assert starts == [0, 21, 21]
    assert state.starts["x"]["a"].dtype == jnp.float32


@functools.cache
def mixed():
    """A probe with measures of several kinds, and what it gave at step 6."""
    *_, tree, w, _, _ = valley()
    several = {
        "lambda_max": eigen(8),
        "trace": functools.partial(
            sharpness.hessian_trace, num_matvecs=4, method="hutchinson"
        ),
        "loss": lambda loss_fn, params, batches: loss_fn(params, batches[0]),
        "other": lambda loss_fn, params, batches, key: {
            "normal": jax.random.normal(key), "large": jnp.ones(50), "text": "a",
        },
    }  # fmt: skip
    probe = probe_of(every=3, measures=several, prefix="probe/")
    state = probe.init(tree(w))
    return probe, tree(w), *probe(6, tree(w), state)


def test_a_probe_logs_measures_of_all_kinds():
    probe, w, scalars, state = mixed()
    assert list(scalars) == [
        "probe/lambda_max/converged/0",
        "probe/lambda_max/eigenvalues/0",
        "probe/lambda_max/num_matvecs",
        "probe/lambda_max/residuals/0",
        "probe/loss",
        "probe/other/normal",
        "probe/trace/estimate",
        "probe/trace/stderr",
    ]
    assert all(type(x) is float for x in scalars.values())
    loss_fn, batches, *_ = valley()
    assert scalars["probe/loss"] == pytest.approx(float(loss_fn(w, batches[0])))
    assert scalars["probe/lambda_max/num_matvecs"] == 8
    assert list(state.starts) == ["lambda_max"]
    assert jax.tree.structure(state.starts["lambda_max"]) == jax.tree.structure(w)


def test_a_probe_compiles_once_and_sees_the_current_parameters():
    probe, w, at_6, state = mixed()
    *_, traces = valley()
    assert probe(7, w, state) == ({}, state)
    assert probe(8, w, state) == ({}, state)
    traced = len(traces)
    at_9, state = probe(9, w, state)
    doubled = jax.tree.map(lambda x: 2 * x, w)
    at_12, _ = probe(jnp.int32(12), doubled, state)
    assert len(traces) == traced
    assert at_9["probe/loss"] == at_6["probe/loss"] != at_12["probe/loss"]
    assert at_9["probe/trace/estimate"] != at_6["probe/trace/estimate"]  # other probes


def test_a_restored_probe_goes_on_to_the_bit():
    probe, w, _, state = mixed()
    saved = jax.tree.map(np.array, state)  # as a checkpoint holds it
    first, _ = probe(9, w, state)
    probe(12, w, state)
    again, _ = probe(9, w, saved)
    assert first == again


def test_a_probe_recovers_from_parameters_that_were_not_finite():
    probe, w, _, state = mixed()
    bad, after = probe(9, jax.tree.map(lambda x: jnp.nan * x, w), state)
    assert np.isnan(bad["probe/lambda_max/eigenvalues/0"])
    harness.assert_equal(after, state)


def test_a_probe_on_sharded_batches():
    _, w, scalars, _ = mixed()
    loss_fn, batches, *_ = valley()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.device_put(batches, NamedSharding(mesh, P(None, "d")))
    sharded = sharpness.Probe(loss_fn, parts, 0, every=3, measures={"top": eigen(8)})
    params = jax.device_put(w, NamedSharding(mesh, P()))
    found, _ = sharded(6, params, sharded.init(params))
    name = "lambda_max/eigenvalues/0"
    assert found["sharpness/top/eigenvalues/0"] == pytest.approx(
        scalars[f"probe/{name}"], rel=1e-5
    )


def test_the_default_is_the_largest_eigenvalue():
    loss = lambda w, batch: jnp.mean(batch @ w**4)
    w = jnp.array([1.0, 0.5])
    probe = sharpness.Probe(loss, jnp.eye(2)[None], every=2)
    scalars, _ = probe(0, w, probe.init(w))
    assert scalars["sharpness/lambda_max/eigenvalues/0"] == pytest.approx(6)
    assert scalars["sharpness/lambda_max/converged/0"] == 1


def test_probe_advises():
    loss_fn, batches, tree, w, *_ = valley()
    make = functools.partial(sharpness.Probe, loss_fn, batches)
    for every in (0, 2.5):
        with pytest.raises(ValueError, match="every must be an integer >= 1"):
            make(every=every)
    with pytest.raises(ValueError, match="key must be"):
        make("a", every=1)
    for measures in ({}, [len], {"a": 3}):
        with pytest.raises(ValueError, match="measures must be a dict of functions"):
            make(every=1, measures=measures)
    probe = make(every=1, measures={"x": lambda f, w, b, init: jnp.ones(())})
    with pytest.raises(ValueError, match="'x' takes init, so it must return"):
        probe(0, tree(w), probe.init(tree(w)))
    empty = sharpness.Probe(loss_fn, jnp.ones((0, 4)), every=1)
    with pytest.raises(ValueError, match="batches are empty"):
        empty(0, tree(w), empty.init(tree(w)))
