"""Results as scalars for loggers, and measures that are taken now and then."""

import functools
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness


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
        "list": [Pair(1, np.float64(2.5), False), jnp.ones(99)],
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
    vectors = {f"x/layers/dense/vectors/{i}/{j}": 1 for i in (0, 1) for j in (0, 1)}
    assert found == vectors | {
        "x/top/value/0": 3,
        "x/top/value/1": 2,
        "x/top/flag/0": 1,
        "x/top/flag/1": 0,
        "x/layers/dense/value": 1.5,
        "x/layers/dense/flag": 1,
        "x/list/0/value": 1,
        "x/list/0/vectors": 2.5,
        "x/list/0/flag": 0,
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
    like_params = {"params": {"kernel": jnp.ones((9, 9)), "bias": jnp.ones(9)}}
    estimate = sharpness.Estimate(like_params, like_params)
    for arguments, expected in (
        ((jnp.float32(2),), {"sharpness": 2}),
        ((7, "loss"), {"loss": 7}),
        ((like_params,), {}),
        (({"diagonal": estimate},), {}),
        (({"x": -jnp.inf},), {"sharpness/x": -np.inf}),
    ):
        assert sharpness.to_scalars(*arguments) == expected
    assert len(sharpness.to_scalars(jnp.ones(33), max_size=33)) == 33
    assert np.isnan(sharpness.to_scalars({"x": jnp.nan})["sharpness/x"])


SIZE = 60


@functools.cache
def valley():
    """A loss whose Hessian moves with ``w``, with a dense spectrum from 0 to 3."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    H = jnp.asarray(Q * np.linspace(0, 3, SIZE) @ Q.T, jnp.float32)

    def loss_fn(w, batch):
        flat = jnp.concatenate([w["a"].ravel(), w["b"]])
        return jnp.mean(batch) * (flat @ H @ flat / 2 + jnp.sum(flat**4) / 12)

    w = jnp.asarray(rng.normal(size=SIZE) / 5, jnp.float32)
    tree = lambda w: {"a": w[:40].reshape(5, 8), "b": w[40:]}
    exact = lambda w: np.linalg.eigvalsh(np.asarray(H) + np.diag(w**2))
    return loss_fn, jnp.ones((2, 4)), tree, w, exact


def probe_of(**options):
    loss_fn, batches, *_ = valley()
    return sharpness.Probe(loss_fn, batches, 0, **options)


def eigen(num_matvecs):
    return functools.partial(sharpness.hessian_eigenvalues, num_matvecs=num_matvecs)


def test_a_warm_start_needs_fewer_products():
    *_, tree, w, exact = valley()
    probe = probe_of(every=5, measures={"few": eigen(6), "many": eigen(12)})
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
    *_, tree, w, _ = valley()
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
    _, w, scalars, state = mixed()
    logged = {name.split("/")[1]: name for name in scalars}
    assert [*logged] == ["lambda_max", "loss", "other", "trace"]
    assert logged["other"] == "probe/other/normal"
    loss_fn, batches, *_ = valley()
    assert scalars["probe/loss"] == pytest.approx(float(loss_fn(w, batches[0])))
    assert scalars["probe/lambda_max/num_matvecs"] == 8
    assert list(state.starts) == ["lambda_max"]
    assert jax.tree.structure(state.starts["lambda_max"]) == jax.tree.structure(w)


def test_a_probe_compiles_once_and_sees_the_current_parameters(caplog):
    probe, w, at_6, state = mixed()
    assert probe(7, w, state) == probe(8, w, state) == ({}, state)
    probe(6, w, state)  # conftest.py may have emptied JAX's caches since then
    twice = jax.tree.map(lambda x: 2 * x, w)
    with jax.log_compiles():
        at_9, state = probe(9, w, state)
        at_12, _ = probe(jnp.int32(12), twice, state)
        assert "Finished tracing" in caplog.text
        assert "Finished XLA compilation of jit(<lambda>)" not in caplog.text
    assert at_9["probe/loss"] == at_6["probe/loss"] != at_12["probe/loss"]
    assert at_9["probe/trace/estimate"] != at_6["probe/trace/estimate"]  # other probes


@pytest.mark.parametrize("as_list", [False, True])
def test_a_probe_sees_what_the_loss_closes_over(as_list):
    class Model:
        variance = jnp.array(1.0)

        def loss(self, w, batch):
            return jnp.mean((batch @ w) ** 2) / self.variance

    model, w = Model(), jnp.ones(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    probe = sharpness.Probe(model.loss, [x] if as_list else x[None], every=1)
    state = probe.init(w)
    for step, variance in enumerate((1.0, 0.1)):
        model.variance = jnp.array(variance)
        scalars, state = probe(step, w, state)
        top = np.linalg.eigvalsh(2 * x.T @ x / 5 / variance)[-1]
        found = scalars["sharpness/lambda_max/eigenvalues/0"]
        assert found == pytest.approx(top, rel=1e-4)


def test_a_probe_gives_weights_to_the_batches_of_a_list():
    x = np.array([[[1.0]], [[2.0]]], "float32")
    of = functools.partial(sharpness.hvp, v=jnp.ones(1), weights=[3, 1])
    loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
    probe = sharpness.Probe(loss, [*x], every=1, measures={"hvp": of})
    scalars, _ = probe(0, jnp.ones(1), probe.init(jnp.ones(1)))
    assert scalars["sharpness/hvp/0"] == 2 * (3 * 1 + 1 * 4) / 4


def test_a_probe_keeps_what_a_partial_has_fixed():
    def measure(loss_fn, params, batches, key=0, init=None):
        return {"key": key, "init": init}

    fixed = functools.partial(measure, key=7, init=3)
    probe = probe_of(every=1, measures={"fixed": fixed})
    scalars, _ = probe(0, jnp.ones(1), probe.init(jnp.ones(1)))
    assert scalars == {"sharpness/fixed/key": 7, "sharpness/fixed/init": 3}


def test_a_restored_probe_goes_on_to_the_bit():
    probe, w, _, state = mixed()
    saved = jax.tree.map(np.array, state)  # as a checkpoint holds it
    first, _ = probe(9, w, state)
    probe(12, w, state)
    assert probe(9, w, saved)[0] == first


def test_a_probe_recovers_from_parameters_that_were_not_finite():
    probe, w, _, state = mixed()
    bad, after = probe(9, jax.tree.map(lambda x: jnp.nan * x, w), state)
    assert np.isnan(bad["probe/lambda_max/eigenvalues/0"])
    harness.assert_equal(after, state)
