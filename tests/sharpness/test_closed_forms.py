"""Linear models, whose curvature is known on any data, with all kinds of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_sam import sharpness

DTYPES = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)]
)
cross_entropy = lambda z, b: optax.softmax_cross_entropy_with_integer_labels(
    z, b[1]
).mean()


def data(dtype):
    """Thirty examples with five features and three classes, and weights of a model."""
    rng = np.random.default_rng(8)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    return draw(30, 5), rng.integers(3, size=30), jnp.asarray(draw(5, 3)), draw(30, 3)


def batched(kind, *arrays):
    """Stacked, a list of unequal batches, a generator of single examples."""
    if kind == "stacked":
        return tuple(x.reshape(3, 10, *x.shape[1:]) for x in arrays)
    ends = [0, 1, 7, 30] if kind == "unequal" else range(31)
    parts = [
        tuple(x[i:j] for x in arrays) for i, j in zip(ends, ends[1:], strict=False)
    ]
    return parts if kind == "unequal" else iter(parts)


def dense(operator):
    rows = [
        operator.times(v) for v in jnp.eye(operator.size, dtype=operator.like.dtype)
    ]
    return np.asarray(jnp.stack(rows))


@DTYPES
@pytest.mark.parametrize("kind", ["stacked", "unequal", "single"])
def test_linear_models(kind, dtype, x64):
    X, labels, W, Y = data(dtype)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == "float32" else 1e-13}
    close = lambda a, b: np.testing.assert_allclose(a, b, **tolerance)
    model = lambda w, b: b[0] @ w

    squares = lambda w, b: jnp.mean(jnp.sum((model(w, b) - b[1]) ** 2, -1))
    H = np.kron(2 * X.T @ X / 30, np.eye(3))
    top = sharpness.hessian_eigenvalues(squares, W, batched(kind, X, Y), 0, k=5)
    close(top.eigenvalues[0], np.linalg.eigvalsh(H)[-1])
    close(
        sharpness.hessian_trace(squares, W, batched(kind, X, Y), 0).estimate,
        np.trace(H),
    )

    # For a softmax of linear outputs, Hessian, Gauss-Newton and Fisher are one matrix.
    p = np.asarray(jax.nn.softmax(X @ W))
    of_one = lambda x, p: np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    H = np.mean([of_one(*pair) for pair in zip(X, p, strict=True)], 0)
    of_model = lambda w, b: cross_entropy(model(w, b), b)
    made = lambda: batched(kind, X, labels)
    close(dense(sharpness.hessian(of_model, W, made())), H)
    close(dense(sharpness.ggn(model, cross_entropy, W, made())), H)
    close(dense(sharpness.fisher(model, W, made())), H)
    diagonal = sharpness.hessian_diagonal(of_model, W, made(), 0).estimate
    close(diagonal.ravel(), np.diag(H))
    # The empirical one has the labels of the data.
    losses = lambda w, b: optax.softmax_cross_entropy_with_integer_labels(
        model(w, b), b[1]
    )
    g = np.einsum("ni,nc->nic", X, p - np.eye(3)[labels]).reshape(30, -1)
    close(dense(sharpness.empirical_fisher(losses, W, made())), g.T @ g / 30)


@DTYPES
def test_blocks_masks_and_weights(dtype, x64):
    """A matrix, a vector and a number that do not see each other."""
    X, labels, W, Y = data(dtype)
    params = {"W": W, "v": jnp.ones(5, dtype), "c": jnp.asarray(0.3, dtype)}

    def loss(p, b):
        x, labels, y = b
        squares = jnp.mean((x @ p["v"] - y[:, 0]) ** 2)
        return cross_entropy(x @ p["W"], (x, labels)) + squares + 3 * p["c"] ** 2

    batches = batched("stacked", X, labels, Y)
    run = lambda f, **options: f(loss, params, batches, 0, **options)
    squares = np.linalg.eigvalsh(2 * X.T @ X / 30)
    p = np.asarray(jax.nn.softmax(X @ W))
    trace = np.mean(np.sum(X**2, 1) * (1 - np.sum(p**2, 1)))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance)
    only = lambda name: {key: key == name for key in params}
    for name, expected in (("W", trace), ("v", squares.sum()), ("c", 6.0)):
        close(run(sharpness.hessian_trace, mask=only(name)).estimate, expected)
    whole = run(sharpness.hessian_eigenvalues, k=3, num_matvecs=21)
    expected = np.sort([*squares, 6.0])[::-1][:3]
    close(whole.eigenvalues, expected)
    one = run(sharpness.hessian_eigenvalues, mask=only("c"))
    close(one.eigenvalues, [6.0])
    assert one.converged.all()
    assert not one.eigenvectors["W"].any()
    # The examples that count: none of the first batch, those of the last one twice.
    counted = np.concatenate([X[10:20], X[20:], X[20:]])
    found = run(sharpness.hessian_trace, mask=only("v"), weights=jnp.array([0, 1, 2]))
    close(found.estimate, 2 * (counted**2).sum() / 30)


@pytest.mark.parametrize("kind", ["stacked", "list", "function"])
@pytest.mark.parametrize("shape", [(4, 10), (4, 2, 5)], ids=["examples", "tokens"])
def test_weights_of_examples_leave_out_padding(kind, shape, x64):
    """Padding within a batch, a batch of padding, and examples that count twice."""
    X, labels, W, _ = data("float64")
    real = np.concatenate([np.ones(18), 2 * np.ones(3), np.zeros(19)])
    rest = lambda x: np.concatenate([x, x[:10] + 1])  # the padding is not zero
    stacked = [x.reshape(*shape, *x.shape[1:]) for x in (rest(X), rest(labels) % 3)]
    weights, batches = real.reshape(shape), tuple(stacked)
    if kind != "stacked":
        batches = [tuple(x[i] for x in (*stacked, weights)) for i in range(4)]
        weights = list(weights) if kind == "list" else lambda batch: batch[2]
    model = lambda w, b: b[0] @ w
    losses = lambda w, b: optax.softmax_cross_entropy_with_integer_labels(
        model(w, b), b[1]
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    p = np.asarray(jax.nn.softmax(X @ W))
    of_one = lambda x, p: np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    F = list(map(of_one, X, p))
    found = sharpness.fisher(model, W, batches, weights=weights)
    close(dense(found), np.average(F, 0, real[:30]))
    g = np.einsum("ni,nc->nic", X, p - np.eye(3)[labels]).reshape(30, -1)
    E = np.einsum("ni,nj->nij", g, g)
    found = sharpness.empirical_fisher(losses, W, batches, weights=weights)
    close(dense(found), np.average(E, 0, real[:30]))


def test_weights_of_batches_do_not_say_which_examples_count():
    X, labels, W, _ = data("float32")
    for batches in (batched("stacked", X, labels), batched("unequal", X, labels)):
        F = sharpness.fisher(lambda w, b: b[0] @ w, W, batches, weights=[10, 10, 4])
        with pytest.raises(ValueError, match=r"each example, \(B, m\), 0 for padding"):
            F.matvec(W)


@pytest.mark.parametrize("measure", ["trace", "diagonal", "frobenius_norm"])
@pytest.mark.parametrize("slope", [0.0, 2.0])
def test_one_parameter_and_no_curvature(measure, slope):
    loss = lambda w, batch: slope * w**2 + jnp.mean(batch) * w
    arguments = loss, jnp.asarray(3.0), jnp.ones((1, 1)), 0
    result = getattr(sharpness, f"hessian_{measure}")(*arguments)
    assert (result.estimate, result.stderr) == (2 * slope, 0)
    top = sharpness.hessian_eigenvalues(*arguments)
    assert top.eigenvalues[0] == 2 * slope
    assert top.converged[0]
    assert sharpness.spectral_sum(jnp.abs, *arguments).estimate == 2 * slope
    entropy = sharpness.renyi_entropy(*arguments)
    np.testing.assert_allclose(entropy.value, 0, atol=1e-6)
    assert entropy.is_zero == (slope == 0)
