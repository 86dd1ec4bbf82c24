"""Hessian, Gauss-Newton and Fisher matrices; memory where there are many classes."""

import functools

import curvature
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_sam import sharpness

cross_entropy = lambda z, b: optax.softmax_cross_entropy_with_integer_labels(
    z, b[1]
).mean()
squares = lambda z, b: 0.5 * jnp.mean(jnp.sum((z - b[1]) ** 2, -1))


def transformer(p, batch):
    x = p["embedding"][batch[0]]
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = y * p["scale"]
    scores = jnp.einsum("btd,de,bse->bts", y, p["qk"], y)
    x = x + jax.nn.softmax(scores) @ y @ p["vo"]
    return x @ p["out"]


def regression(p, batch):
    return jax.nn.gelu(batch[0] @ p["in"]) @ p["out"]


def problem(name):
    """The model, its loss, parameters, and three batches of four examples."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    if name == "transformer":
        p = {"embedding": draw(5, 3), "scale": draw(3)}
        p |= {x: draw(3, 3) for x in ("qk", "vo", "out")}
        tokens, labels = (rng.integers(high, size=(3, 4, 3)) for high in (5, 3))
        return transformer, cross_entropy, p, (tokens, labels)
    p = {"in": draw(3, 4), "out": draw(4, 2)}
    return regression, squares, p, (draw(3, 4, 3), draw(3, 4, 2))


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def dense(operator):
    """The matrix of an operator, row by row."""
    unravel = jax.flatten_util.ravel_pytree(operator.like)[1]
    row = lambda v: flat(operator.matvec(unravel(v)))
    return jax.lax.map(row, jnp.eye(operator.size))


@functools.cache
def matrices(name):
    """The operators' matrices, and those made of Jacobians."""
    model, loss, params, batches = problem(name)
    w, unravel = jax.flatten_util.ravel_pytree(params)

    def expected(batch):
        z = model(params, batch)
        outputs = lambda w: model(unravel(w), batch).ravel()
        J = jax.jacobian(outputs)(w)
        H = jax.hessian(lambda z_: loss(z_.reshape(z.shape), batch))(z.ravel())
        of_example = lambda w: per_example(model(unravel(w), batch), batch)
        g = jax.jacobian(of_example)(w)
        whole = jax.hessian(lambda w: loss(model(unravel(w), batch), batch))(w)
        return whole, J.T @ H @ J, g.T @ g / len(g)

    def per_example(z, batch):
        losses = jax.vmap(lambda z, x, y: loss(z[None], (x[None], y[None])))
        return losses(z, *batch)

    of_model = lambda p, batch: loss(model(p, batch), batch)
    losses = lambda p, batch: per_example(model(p, batch), batch)
    made = lambda b: (
        dense(sharpness.hessian(of_model, params, b)),
        dense(sharpness.ggn(model, loss, params, b)),
        dense(sharpness.empirical_fisher(losses, params, b)),
        dense(sharpness.fisher(model, params, b)),
    )
    wanted = jax.jit(
        lambda b: jax.tree.map(lambda x: x.mean(0), jax.lax.map(expected, b))
    )
    return jax.jit(made)(batches), wanted(batches)


@pytest.mark.parametrize("name", ["transformer", "regression"])
def test_matrices_are_the_dense_ones(name, x64):
    (hessian, ggn, empirical, fisher), wanted = matrices(name)
    for found, matrix in zip((hessian, ggn, empirical), wanted, strict=True):
        scale = abs(matrix).max()
        np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-10 * scale)
    if name != "regression":
        np.testing.assert_allclose(fisher, ggn, rtol=0, atol=1e-12 * scale)
    assert np.linalg.eigvalsh(hessian)[0] < -1e-3  # so it matters which one it is
    for positive in (ggn, empirical, fisher):
        eigenvalues = np.linalg.eigvalsh(positive)
        assert eigenvalues[0] > -1e-13 * eigenvalues[-1]


def test_estimators_take_any_of_them(x64):
    model, loss, params, batches = problem("regression")
    block = matrices("regression")[0][1][:12, :12]
    of_model = lambda p, batch: loss(model(p, batch), batch)
    mask, few = {"in": True, "out": False}, dict(num_lanczos=4, num_probes=2)

    @jax.jit
    def run(batches):
        G = sharpness.ggn(model, loss, params, batches, mask=mask)
        H = sharpness.hessian(of_model, params, batches, mask=mask)
        return (
            sharpness.trace(G, 0).estimate,
            sharpness.diagonal(G, 0).estimate,
            sharpness.eigenvalues(G, 0, num_matvecs=12),
            sharpness.spectral_density(H, 0, **few),
            # By one name for operators and losses, with the options of both.
            sharpness.spectral_density(
                of_model, params, batches, key=0, mask=mask, **few
            ),
        )

    trace, diagonal, top, of_operator, of_loss = run(batches)
    np.testing.assert_allclose(trace, np.trace(block))
    np.testing.assert_allclose(diagonal["in"].ravel(), np.diag(block))
    np.testing.assert_allclose(top.eigenvalues[0], np.linalg.eigvalsh(block)[-1])
    assert not top.eigenvectors["out"].any()
    assert not diagonal["out"].any()
    np.testing.assert_allclose(of_operator.nodes, of_loss.nodes, rtol=1e-8)
    with pytest.raises(ValueError, match="loss_fn, params and batches in place"):
        sharpness.renyi_entropy(curvature.matrix(block), 0, layerwise=True)


def test_many_classes_fit(x64):
    """Of 50,000 classes no product holds the logits of all tokens, not even once."""
    classes, width, examples, length = 50_000, 8, 8, 32
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"embedding": draw(16, width), "head": draw(width, classes)}
    features = lambda p, batch: jnp.tanh(p["embedding"][batch[0]])
    model = lambda p, batch: features(p, batch) @ p["head"]
    chunked = lambda p, batch: sharpness.chunked_cross_entropy(
        features(p, batch), p["head"], batch[1], num_chunks=7
    )
    tokens = rng.integers(16, size=(1, examples, length))
    one = tokens, rng.integers(classes, size=tokens.shape)
    many = jax.tree.map(lambda x: x.reshape(examples, 1, length), one)
    logits = 4 * examples * length * classes

    def memory(f, batches):
        compiled = jax.jit(f).lower(params, batches).compile()
        return compiled.memory_analysis().temp_size_in_bytes / logits

    direct = lambda p, batch: cross_entropy(model(p, batch), batch)
    assert memory(lambda p, b: sharpness.hvp(direct, p, b, p), one) > 2
    assert memory(lambda p, b: sharpness.hvp(chunked, p, b, p), one) < 0.7
    for product in (
        lambda p, b: sharpness.fisher(model, p, b).matvec(p),
        lambda p, b: sharpness.ggn(model, cross_entropy, p, b).matvec(p),
    ):
        assert memory(product, many) < 0.9

    # It is the same loss; the last chunk is a shorter one.
    small = {"embedding": params["embedding"], "head": params["head"][:, :5]}
    few = tokens, rng.integers(5, size=tokens.shape)
    v = jax.tree.map(jnp.cos, small)
    products = (sharpness.hvp(f, small, few, v) for f in (chunked, direct))
    for a, b in zip(*map(jax.tree.leaves, products), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max())


@pytest.mark.parametrize("label", [-1, -100, 5, 1000])
def test_padded_tokens_do_not_count(label, x64):
    rng = np.random.default_rng(0)
    h, W = rng.normal(size=(2, 6, 4)), jnp.asarray(rng.normal(size=(4, 5)))
    y = rng.integers(5, size=(2, 6))
    real = np.arange(12).reshape(2, 6) % 3 > 0
    padded = np.where(real, y, label)
    chunked = lambda W, b: sharpness.chunked_cross_entropy(
        *(b[0], W, b[1]), where=b[2], num_chunks=3
    )
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], (h, padded, real))
    H = sharpness.hessian(chunked, W, one)
    p = np.asarray(jax.nn.softmax(h[real] @ W))
    of_one = lambda h, p: np.kron(np.outer(h, h), np.diag(p) - np.outer(p, p))
    expected = np.mean(list(map(of_one, h[real], p)), 0)
    np.testing.assert_allclose(dense(H), expected, atol=1e-12)
    right = -np.log(p[np.arange(len(p)), y[real]]).mean()
    np.testing.assert_allclose(chunked(W, (h, padded, real)), right)
    # Without saying so, they are no class; and nothing at all counts as zero.
    assert np.isnan(sharpness.chunked_cross_entropy(h, W, padded))
    assert chunked(W, (h, padded, real & False)) == 0


OF_EXAMPLES = lambda z, b: optax.softmax_cross_entropy_with_integer_labels(z, b[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda f, *args: sharpness.ggn(f, OF_EXAMPLES, *args),
            r"scalar.*got shape \(4,\). Write losses.mean",
        ),
        (
            lambda f, *args: sharpness.fisher(lambda p, b: f(p, b)[:, 0], *args),
            r"\(m, classes\); got shape \(4,\).*jnp.stack\(\[jnp.zeros_like",
        ),
        (
            lambda f, *args: sharpness.fisher(
                lambda p, b: cross_entropy(f(p, b), b), *args
            ),
            r"\(m, classes\); got shape \(\)",
        ),
        (
            lambda f, *args: sharpness.empirical_fisher(
                lambda p, b: cross_entropy(f(p, b), b), *args
            ),
            r"each example, \(m,\).*Drop .mean",
        ),
    ],
)
def test_functions_that_return_something_else_are_refused(make, says):
    """A mean loss in place of those of examples would be another matrix, in silence."""
    batches = jnp.ones((2, 4, 3)), jnp.zeros((2, 4), int)
    operator = make(lambda w, b: b[0] @ w, jnp.ones((3, 2)), batches)
    with pytest.raises(ValueError, match=says):
        sharpness.trace(operator, 0)
