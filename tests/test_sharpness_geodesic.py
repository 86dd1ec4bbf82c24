"""Geodesic sharpness: its geometry against textbook formulas, and its invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from optax_sam import sharpness
from optax_sam.sharpness import quotient
from optax_sam.sharpness.gl_pairs import named_leaves
from optax_sam.sharpness.located import locate
from optax_sam.sharpness.quotient import Frame, geometry

METRICS = pytest.mark.parametrize("metric", ["mix", "inv"])
N, M, RANK = 5, 4, 3

# One program each instead of one for every operation.
frame_at = jax.jit(quotient.frame_at, static_argnums=(2, 3))
horizontal = jax.jit(quotient.horizontal)
moved = jax.jit(quotient.moved, static_argnums=3)


def pair(seed, n=N, m=M, h=RANK):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, h)), rng.normal(size=(m, h))


def act(G, H, A):
    """The same product from other factors."""
    return G @ np.linalg.inv(A), H @ A.T


def gram_weights(G, H, metric, eps=0.0):
    """The matrices of the inner product ``tr(X eta_G' zeta_G) + tr(Y ...)``."""
    regular = lambda P: P + eps * jnp.trace(P) / len(P) * jnp.eye(len(P))
    P, Q = regular(G.T @ G), regular(H.T @ H)
    return (Q, P) if metric == "mix" else (jnp.linalg.inv(P), jnp.linalg.inv(Q))


def inner(weights, eta, zeta):
    X, Y = weights
    return jnp.trace(X @ eta[0].T @ zeta[0]) + jnp.trace(Y @ eta[1].T @ zeta[1])


@functools.partial(jax.jit, static_argnums=2)
def velocity(frame, u, metric):
    """The tangent vector of flat coordinates: the derivative of the geodesic."""
    change = lambda t: moved(frame, t * u[0], t * u[1], metric)
    return jax.jvp(change, (0.0,), (1.0,))[1]


@functools.partial(jax.jit, static_argnums=2)
def acceleration(frame, u, metric):
    rate = lambda t: jax.jvp(
        lambda t: moved(frame, t * u[0], t * u[1], metric), (t,), (1.0,)
    )[1]
    return jax.jvp(rate, (0.0,), (1.0,))[1]


def draw(seed):
    """Coordinates, or a tangent vector."""
    return tuple(map(jnp.asarray, pair(100 + seed)))


@METRICS
def test_coordinates_are_flat(x64, metric):
    """Their dot product is the metric, at any representative."""
    G, H = act(*pair(0), np.random.default_rng(1).normal(size=(RANK, RANK)))
    frame = frame_at(G, H, metric, 0.0)
    u, v = draw(0), draw(1)
    xi, zeta = (velocity(frame, x, metric) for x in (u, v))
    dot = jnp.vdot(u[0], v[0]) + jnp.vdot(u[1], v[1])
    np.testing.assert_allclose(
        inner(gram_weights(G, H, metric), xi, zeta), dot, rtol=1e-11
    )


@METRICS
def test_projection_is_orthogonal_to_the_orbit(x64, metric):
    G, H = act(*pair(0), np.random.default_rng(1).normal(size=(RANK, RANK)))
    frame, u = frame_at(G, H, metric, 0.0), draw(0)
    before = velocity(frame, u, metric)
    xi = velocity(frame, horizontal(frame, *u), metric)
    weights = gram_weights(G, H, metric)
    for Omega in np.random.default_rng(2).normal(size=(3, RANK, RANK)):
        vertical = (-G @ Omega, H @ Omega.T)
        size = jnp.sqrt(inner(weights, vertical, vertical))
        assert abs(inner(weights, vertical, before)) > 0.01 * size
        assert abs(inner(weights, vertical, xi)) < 1e-12 * size
    # What the projection takes away is vertical: it does not move the product.
    lost = [x - y for x, y in zip(before, xi, strict=True)]
    assert max(float(abs(x).max()) for x in lost) > 0.1
    np.testing.assert_allclose(lost[0] @ H.T + G @ lost[1].T, 0, atol=1e-12)


def textbook_projection(G, H, xi, metric):
    """By the equations of the paper, in the weights themselves."""
    P, Q = G.T @ G, H.T @ H
    if metric == "inv":
        B = P @ H.T @ xi[1] - xi[0].T @ G @ Q
        L = scipy.linalg.solve_sylvester(P @ Q, P @ Q, B).T
    else:
        inverse = np.linalg.inv
        L = (xi[1].T @ H @ inverse(Q) - inverse(P) @ G.T @ xi[0]) / 2
    return xi[0] + G @ L, xi[1] - H @ L.T


def textbook_christoffel(G, H, xi, metric):
    P, Q = G.T @ G, H.T @ H
    iP, iQ = np.linalg.inv(P), np.linalg.inv(Q)
    a, b = xi
    if metric == "inv":
        one = lambda X, iX, x: -x @ iX @ (x.T @ X + X.T @ x) + X @ iX @ x.T @ x
        return one(G, iP, a), one(H, iQ, b)
    one = lambda X, Y, iY, x, y: (x @ (y.T @ Y + Y.T @ y) - X @ y.T @ y) @ iY
    return one(G, H, iQ, a, b), one(H, G, iP, b, a)


@METRICS
def test_textbook_formulas(x64, metric):
    """The same projection and Christoffel terms without the balanced frame."""
    G, H = act(*pair(0), np.random.default_rng(1).normal(size=(RANK, RANK)))
    frame, u = frame_at(G, H, metric, 0.0), draw(0)
    xi = [np.asarray(x) for x in velocity(frame, u, metric)]
    expected = textbook_projection(G, H, xi, metric)
    actual = velocity(frame, horizontal(frame, *u), metric)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)
    expected = textbook_christoffel(G, H, xi, metric)
    for x, y in zip(acceleration(frame, u, metric), expected, strict=True):
        np.testing.assert_allclose(x, -y, rtol=1e-9, atol=1e-9)


@METRICS
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_acceleration_is_that_of_a_geodesic(x64, metric, eps):
    """From the Euler-Lagrange equations, differentiated by JAX.

    With ``eps`` at a balanced point, where it is what is added to the Gram matrices.
    """
    G, H = pair(0)
    if eps:
        U, S, Vt = np.linalg.svd(G @ H.T)
        G, H = (X[:, :RANK] * np.sqrt(S[:RANK]) for X in (U, Vt.T))
    constant = eps * np.trace(G.T @ G) / RANK * np.eye(RANK)
    frame, u = frame_at(G, H, metric, eps), draw(0)
    xi = velocity(frame, u, metric)
    x = tuple(map(jnp.asarray, (G, H)))

    def energy(x, v):
        P, Q = (X.T @ X + constant for X in x)
        weights = (Q, P) if metric == "mix" else tuple(map(jnp.linalg.inv, (P, Q)))
        return inner(weights, v, v) / 2

    # d/dt dE/dv = dE/dx, and E is quadratic in v: d2E/dv2 a = dE/dx - d2E/dv dx v.
    force = jax.grad(energy)(x, xi)
    drift = jax.jvp(lambda x: jax.grad(energy, 1)(x, xi), (x,), (xi,))[1]
    a = acceleration(frame, u, metric)
    mass = jax.jvp(lambda v: jax.grad(energy, 1)(x, v), (xi,), (a,))[1]
    for m, f, d in zip(mass, force, drift, strict=True):
        np.testing.assert_allclose(m, f - d, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        2 * energy(x, xi), jnp.vdot(u[0], u[0]) + jnp.vdot(u[1], u[1]), rtol=1e-11
    )


@METRICS
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_frame_does_not_depend_on_the_representative(x64, metric, scale):
    """Nor does, for the same coordinates, the product at the perturbed point."""
    G, H = pair(0)
    A = scale * np.random.default_rng(3).normal(size=(RANK, RANK))
    there, u = act(G, H, A), draw(0)
    here, other = (frame_at(*x, metric, 0.1) for x in ((G, H), there))
    for name in set(Frame._fields) - {"back_G", "back_H"}:
        x, y = (getattr(frame, name) for frame in (here, other))
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11, err_msg=name)
    u = horizontal(here, *u)
    products = []
    for frame, (X, Y) in ((here, (G, H)), (other, there)):
        change = moved(frame, *u, metric)
        products.append((X + change[0]) @ (Y + change[1]).T)
    np.testing.assert_allclose(*products, rtol=1e-9, atol=1e-10)
    assert abs(products[0] - G @ H.T).max() > 0.1


@METRICS
def test_product_of_lower_rank(x64, metric):
    """Only its own rank counts: the same as from factors with fewer columns."""
    G, H = pair(0)
    H[:, 2] = H[:, 0] - 2 * H[:, 1]
    U, S, Vt = np.linalg.svd(G @ H.T)
    assert S[2] < 1e-12
    small = [X[:, :2] * np.sqrt(S[:2]) for X in (U, Vt.T)]
    whole, part = (frame_at(*x, metric, 0.0) for x in ((G, H), small))
    np.testing.assert_array_equal(whole.alive, [True, True, False])
    u = horizontal(whole, *draw(0))
    np.testing.assert_array_equal(u[0][:, 2], 0)
    assert all(np.isfinite(x).all() for x in whole)
    v = [x[:, :2] for x in u]
    for x, y in zip(horizontal(part, *v), v, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    change, smaller = moved(whole, *u, metric), moved(part, *v, metric)
    expected = (small[0] + smaller[0]) @ (small[1] + smaller[1]).T
    np.testing.assert_allclose(
        (G + change[0]) @ (H + change[1]).T, expected, rtol=1e-9, atol=1e-10
    )


@METRICS
@pytest.mark.parametrize("zero", ["G", "H", "both"])
def test_zero_factors(metric, zero):
    """As LoRA begins: the pair stays where it is, and nothing is NaN."""
    G, H = (np.float32(x) for x in pair(0))
    G, H = G * (zero == "H"), H * (zero == "G")
    frame = frame_at(G, H, metric, 0.0)
    u = horizontal(frame, *(jnp.float32(x) for x in draw(0)))
    for x in (*u, *moved(frame, *u, metric)):
        np.testing.assert_array_equal(x, 0)
    assert not frame.alive.any()


# A product of two numbers, G H x = 3 x, with values worked out by hand.

TOY = {
    ("inv", 2.9): 0.2984063795,
    ("inv", 3.0): 0.2073376838,
    ("mix", 2.9): 0.0482654167,
    ("mix", 3.0): 0.0199889559,
}


def toy_loss(params, batch):
    return jnp.mean((params["G"] @ params["H"].T * batch["x"] - batch["y"]) ** 2)


PAIR_OF_TOY = (sharpness.gl_pair("G", "H"),)


@functools.cache
def toy_sharpness(metric):
    pairs = PAIR_OF_TOY if metric != "adaptive" else []
    measure = lambda params, batch: sharpness.geodesic_sharpness(
        toy_loss,
        params,
        batch,
        0.1,
        pairs,
        0,
        metric="inv" if metric == "adaptive" else metric,
        num_restarts=4,  # the sign of the start is that of the end
    )
    return jax.jit(measure)


def toy(G, H, y):
    params = {"G": jnp.full((1, 1), G), "H": jnp.full((1, 1), H)}
    return params, {"x": jnp.ones((1, 1)), "y": jnp.full((1, 1), y)}


ORBIT = [(2.0, 1.5), (20.0, 0.15), (0.2, 15.0), (-2.0, -1.5)]


@pytest.mark.parametrize(("metric", "y"), TOY)
def test_toy(x64, metric, y):
    for G, H in ORBIT:
        result = toy_sharpness(metric)(*toy(G, H, y))
        np.testing.assert_allclose(result.value, TOY[metric, y], rtol=2e-9)


@pytest.mark.parametrize(("y", "expected"), [(2.9, 0.2808057358), (3.0, 0.1929529221)])
def test_toy_on_a_straight_line(x64, y, expected):
    """Balanced or not, a product of two numbers has one adaptive sharpness."""
    for G, H in ORBIT:
        result = toy_sharpness("adaptive")(*toy(G, H, y))
        np.testing.assert_allclose(result.value, expected, rtol=2e-9)


def test_toy_trace_moves(x64):
    """What a plain measure does where the geodesic ones stay."""
    for (G, H), expected in zip(ORBIT, (12.5, 800.045, 450.08), strict=False):
        hessian = jax.hessian(toy_loss)(*toy(G, H, 3.0))
        trace = hessian["G"]["G"] + hessian["H"]["H"]
        np.testing.assert_allclose(trace.item(), expected, rtol=1e-12)


# A transformer on digits, whose rows are tokens: one layer, two heads, all biases.

HEADS, WIDTH = 2, 8
RHO = 0.3


@METRICS
def test_diagonal_network(x64, metric):
    # beta = u * v with X'X = I: every coordinate is a pair of one row and one column.
    # Two of them, so the maximum is over one angle: t_i = +-rho / sqrt 2 (cos, sin).
    p, target, rho = np.array([3.0, -0.5]), np.array([2.8, -0.6]), 0.1
    u = np.array([1.5, 0.2])
    params = {"u": jnp.array(u), "v": jnp.array(p / u)}
    loss = lambda w, _: jnp.sum((w["u"] * w["v"] - target) ** 2) / 2
    block = lambda name: sharpness.GLBlock(name, 2, 1, (1, 2, 1))
    result = sharpness.geodesic_sharpness(
        loss, params, jnp.zeros((1, 1)), rho,
        [sharpness.gl_pair(block("u"), block("v"))], 0,
        metric=metric, num_steps=100, num_restarts=4,
    )  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 200_001)
    t = rho / np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)])
    if metric == "mix":
        factor = 1 + t / p[:, None] - (t / p[:, None]) ** 2 / 2
    else:
        factor = 1 + t + t**2 / 2
    losses = ((p[:, None] * factor**2 - target[:, None]) ** 2).sum(0) / 2
    exact = losses.max() - ((p - target) ** 2).sum() / 2
    np.testing.assert_allclose(result.value, exact, rtol=1e-6)
    assert result.value <= exact * (1 + 1e-9)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x)
        return nn.Dense(10, name="head")(jnp.tanh(x).mean(-2))


def cross_entropy(logits, labels):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -jnp.mean(chosen)


def loss_fn(params, batch):
    x, labels = batch
    return cross_entropy(Classifier().apply({"params": params}, x), labels)


@functools.cache
def digits(number, m):
    images, labels = load_digits(return_X_y=True)
    x = np.float32(images[: number * m].reshape(number, m, 8, 8) / 16)
    return x, labels[: number * m].reshape(number, m)


@functools.cache
def trained():
    """Numbers in numpy, single precision: a few steps from random weights."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Classifier().init, jax.random.key(0), jnp.zeros((1, 8, 8)))[
        "params"
    ]
    draw = lambda x: rng.normal(size=x.shape) * 0.4
    params = jax.tree.map(lambda x: jnp.float32(draw(x)), shapes)
    batch = tuple(x[0] for x in digits(1, 64))
    step = jax.jit(
        lambda w: jax.tree.map(lambda x, g: x - 0.5 * g, w, jax.grad(loss_fn)(w, batch))
    )
    before = loss_fn(params, batch)
    for _ in range(20):
        params = step(params)
    assert loss_fn(params, batch) < before - 0.2
    return jax.tree.map(np.asarray, params)


def attention_acted_on(params, matrices):
    """The same network: (G A^-1, H A') for each head of both products."""
    layer = jax.tree.map(np.array, params["attention"])
    for j in range(HEADS):
        for A, left, right in zip(
            matrices[j], ("query", "value"), ("key", "out"), strict=True
        ):
            layer[left]["kernel"][:, j] = layer[left]["kernel"][:, j] @ np.linalg.inv(A)
            layer[left]["bias"][j] = layer[left]["bias"][j] @ np.linalg.inv(A)
            if right == "out":
                layer[right]["kernel"][j] = A @ layer[right]["kernel"][j]
            else:
                layer[right]["kernel"][:, j] = layer[right]["kernel"][:, j] @ A.T
                layer[right]["bias"][j] = layer[right]["bias"][j] @ A.T
    return {**params, "attention": layer}


def representatives(dtype, scales=(0.01, 1.0, 100.0)):
    """The weights, and others of the same function, of this precision."""
    params = jax.tree.map(np.float64, trained())
    rng = np.random.default_rng(5)
    size = WIDTH // HEADS
    all_params = [params]
    for scale in scales:
        matrices = scale * rng.normal(size=(HEADS, 2, size, size))
        all_params.append(attention_acted_on(params, matrices))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), all_params)


def pairs_of(params):
    pairs = sharpness.attention_gl_pairs(params, "attention")
    assert pairs == sharpness.attention_gl_pairs(params, ("attention",))
    assert len(pairs) == 2
    return pairs


@functools.cache
def measure(metric, start="zero", loss_fn=loss_fn):
    """A compiled measure of weights and batches; ``plain`` has no pairs."""
    key = None if start == "zero" else 3

    def geodesic(params, batches):
        pairs = [] if metric == "plain" else pairs_of(params)
        name = "mix" if metric == "plain" else metric
        return sharpness.geodesic_sharpness(
            loss_fn, params, batches, RHO, pairs, key, metric=name
        )

    return jax.jit(geodesic)


def in_dtype(batches, dtype):
    return jnp.asarray(batches[0], dtype), jnp.asarray(batches[1])


@pytest.mark.parametrize(
    ("metric", "start"), [("mix", "zero"), ("inv", "zero"), ("inv", "random")]
)
def test_invariance(x64, metric, start):
    batches = in_dtype(digits(2, 16), jnp.float64)
    results = [
        measure(metric, start)(params, batches)
        for params in representatives(jnp.float64)
    ]
    first = results[0]
    assert first.value > 0.1
    assert first.per_batch.shape == (2,)
    for other in results[1:]:
        np.testing.assert_allclose(other.per_batch, first.per_batch, rtol=1e-10)


@METRICS
def test_invariance_in_single_precision(metric):
    batches = in_dtype(digits(2, 16), jnp.float32)
    results = [
        measure(metric)(params, batches) for params in representatives(jnp.float32)
    ]
    first = results[0]
    assert first.value.dtype == jnp.float32
    for other in results[1:]:
        np.testing.assert_allclose(other.value, first.value, rtol=1e-5)


@functools.cache
def adaptive():
    return jax.jit(
        lambda params, batches: sharpness.worst_case_sharpness(
            loss_fn, params, batches, RHO, adaptive=True, random_init=False
        )
    )


def test_adaptive_sharpness_moves():
    batches = in_dtype(digits(2, 16), jnp.float32)
    values = [adaptive()(w, batches).value for w in representatives(jnp.float32)]
    assert min(values[1:]) > 1.2 * values[0]


def test_without_pairs_it_is_adaptive():
    """To the bit: the same program."""
    params, batches = representatives(jnp.float32)[0], in_dtype(digits(2, 16), "f")
    expected = adaptive()(params, batches)
    actual = measure("plain")(params, batches)
    np.testing.assert_array_equal(actual.per_batch, expected.per_batch)
    np.testing.assert_array_equal(actual.late_gain, expected.late_gain)


class NNXClassifier(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(x)
        return self.head(jnp.tanh(x).mean(-2))


def test_nnx():
    """The same weights in NNX's state, acted on, too: the value of Linen."""
    graph, state, rest = nnx.split(NNXClassifier(), nnx.Param, ...)
    nnx_loss = lambda state, batch: cross_entropy(
        nnx.merge(graph, state, rest)(batch[0]), batch[1]
    )
    batches = in_dtype(digits(2, 16), jnp.float32)
    first, other = representatives(jnp.float32, scales=(1.0,))
    expected = measure("mix")(first, batches)
    run = measure("mix", loss_fn=nnx_loss)
    for params in (first, other):
        assert nnx.to_pure_dict(state).keys() == params.keys()
        nnx.replace_by_pure_dict(state, params)
        result = run(state, batches)
        np.testing.assert_allclose(result.per_batch, expected.per_batch, rtol=3e-5)


def test_perturbation_and_metric():
    """The offset reaches the value; the metric is taken where it leads."""
    params, batches = representatives(jnp.float32)[0], in_dtype(digits(1, 16), "f")
    result = jax.jit(
        lambda params: sharpness.geodesic_sharpness(
            loss_fn, params, batches, RHO, pairs_of(params), metric_fn=loss_fn
        )
    )(params)
    batch = jax.tree.map(lambda x: x[0], batches)
    worst = jax.tree.map(jnp.add, params, result.perturbation)
    rise = loss_fn(worst, batch) - loss_fn(params, batch)
    np.testing.assert_allclose(result.value, rise, rtol=1e-5)
    np.testing.assert_allclose(result.metric, result.value, rtol=1e-5)


def test_mask():
    """Pairs that the mask leaves out do not count; what it selects keeps its pairs."""
    params, batch = toy(2.0, 1.5, 2.9)
    params["bias"] = jnp.ones((1, 1))
    loss = lambda w, batch: toy_loss(w, batch | {"y": batch["y"] - w["bias"]})

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(chosen, pairs):
        mask = {name: name in chosen for name in params}
        return sharpness.geodesic_sharpness(
            loss, params, batch, RHO, pairs, 0, mask=mask, metric="inv"
        )

    without, alone = run("bias", PAIR_OF_TOY), run("GH", PAIR_OF_TOY)
    np.testing.assert_array_equal(without.value, run("bias", ()).value)
    assert without.value > 0.01
    assert without.perturbation["G"] == without.perturbation["H"] == 0
    assert alone.perturbation["bias"] == 0
    assert alone.value > run("GH", ()).value + 0.01


def test_devices():
    """A batch on each of eight devices, by hand and by JAX's own sharding."""
    G, H = map(jnp.float32, pair(0))
    params = {"G": G, "H": H, "b": jnp.ones(M)}
    batches = jnp.float32(np.random.default_rng(1).normal(size=(8, 3, N)))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w["G"] @ w["H"].T + w["b"]))
    run = lambda axis_name: (
        lambda params, batches: sharpness.geodesic_sharpness(
            loss, params, batches, RHO, PAIR_OF_TOY, 0, axis_name=axis_name
        )[:3]
    )
    expected = jax.jit(run(None))(params, batches)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        run("data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data"), P()),
    )
    spread = jax.device_put(batches, NamedSharding(mesh, P("data")))
    for actual in (jax.jit(mapped)(params, spread), jax.jit(run(None))(params, spread)):
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)
        # The last steps bring little, so that their part is mostly rounding.
        np.testing.assert_allclose(actual[2], expected[2], atol=1e-7)
    assert float(np.ptp(expected[1])) > 0.01


@METRICS
def test_traced_radius_eps_and_half_precision(metric):
    """``eps`` is a longer metric for ``mix`` and a shorter one for ``inv``."""
    params, batch = toy(2.0, 1.5, 2.9)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, rho, eps=0.0):
        return sharpness.geodesic_sharpness(
            toy_loss, params, batch, rho, PAIR_OF_TOY, metric=metric, eps=eps
        ).value

    half = run(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), 0.1)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, TOY[metric, 2.9], rtol=1e-4)
    ratio = 2.0 if metric == "inv" else 0.5
    np.testing.assert_allclose(
        run(params, 1e-3, 3.0), run(params, 1e-3 * ratio), rtol=5e-3
    )


# Other layers.


def products(located, leaves):
    G, H = located.read(leaves)
    return jnp.einsum("pnh,pmh->pnm", G, H)


def lora(rng):
    """``x @ A @ B``, with a third leaf in no pair."""
    params = {"A": rng.normal(size=(5, 2)), "B": rng.normal(size=(2, 4))}
    pair = sharpness.gl_pair("A", sharpness.GLBlock("B", rank_axis=0))
    M = rng.normal(size=(2, 2))
    acted = {"A": params["A"] @ np.linalg.inv(M), "B": M @ params["B"]}
    return params, acted, pair, [params["A"] @ params["B"]]


def grouped(rng):
    """Four query heads on two key heads; a bias of the queries alone."""
    draw = lambda *shape: rng.normal(size=shape)
    params = {
        "query": {"kernel": draw(6, 4, 3), "bias": draw(4, 3)},
        "key": {"kernel": draw(6, 2, 3)},
    }
    acted = jax.tree.map(np.array, params)
    expected = []
    for j in range(2):
        M = draw(3, 3)
        acted["key"]["kernel"][:, j] = params["key"]["kernel"][:, j] @ M.T
        for i in (2 * j, 2 * j + 1):
            for name in ("kernel", "bias"):
                x = params["query"][name][..., i, :]
                acted["query"][name][..., i, :] = x @ np.linalg.inv(M)
        q = params["query"]
        rows = [
            q["kernel"][:, 2 * j],
            q["kernel"][:, 2 * j + 1],
            q["bias"][2 * j : 2 * j + 2],
        ]
        expected.append((rows, params["key"]["kernel"][:, j]))
    (pair, *_) = sharpness.attention_gl_pairs(params, "", vo=False)
    return params, acted, pair, [np.concatenate(G) @ H.T for G, H in expected]


def fused(rng):
    """Kernels ``(d, k * heads)`` and ``(heads * k, f)``, read with their heads."""
    params = {"v": rng.normal(size=(5, 6)), "o": rng.normal(size=(6, 4))}
    pair = sharpness.gl_pair(
        sharpness.GLBlock("v", rank_axis=1, head_axis=2, shape=(5, 3, 2)),
        sharpness.GLBlock("o", rank_axis=1, head_axis=0, shape=(2, 3, -1)),
    )
    acted = jax.tree.map(np.array, params)
    products = []
    for j in range(2):
        v, o = np.s_[:, j::2], np.s_[3 * j : 3 * j + 3]
        M = rng.normal(size=(3, 3))
        acted["v"][v] = params["v"][v] @ np.linalg.inv(M)
        acted["o"][o] = M @ params["o"][o]
        products.append(params["v"][v] @ params["o"][o])
    return params, acted, pair, products


@METRICS
@pytest.mark.parametrize("layer", [lora, grouped, fused])
def test_layers(x64, layer, metric):
    """The products are read right, and points of the same coordinates share them."""
    params, acted, pair, expected = layer(np.random.default_rng(0))
    params, acted = (jax.tree.map(jnp.asarray, x) for x in (params, acted))
    (located,) = locate([pair], params, params)
    names = named_leaves(params)
    read = products(located, names)
    assert read.shape[0] == len(expected)
    for x, y in zip(read, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    written = located.write(*located.read(names), names)
    for name, x in names.items():
        np.testing.assert_array_equal(written[name], x)

    u = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(float(x.size))).reshape(x.shape), params
    )

    @jax.jit
    def end(w, u):
        space = geometry(w, [located], metric, 0.0)
        return products(located, named_leaves(space.point(space.project(u))))

    ends = [end(w, u) for w in (params, acted)]
    np.testing.assert_allclose(*ends, rtol=1e-9, atol=1e-9)
    assert abs(ends[0] - read).max() > 0.1


def test_projector(x64):
    """Of all leaves together: symmetric, idempotent, and it keeps what is free."""
    params = dict(jax.tree.map(jnp.asarray, lora(np.random.default_rng(0))[0]))
    params["other"] = jnp.array([1.0, 0.0, -2.0])
    pair = sharpness.gl_pair("A", sharpness.GLBlock("B", rank_axis=0))
    space = geometry(params, locate([pair], params, params), "inv", 0.0)
    flat, unravel = ravel_pytree(params)
    project = lambda u: ravel_pytree(space.project(unravel(u)))[0]
    matrix = jax.jit(jax.vmap(project))(jnp.eye(flat.size))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-13)
    # Four moves along the orbit, and the weight that is zero.
    np.testing.assert_allclose(jnp.trace(matrix), flat.size - 4 - 1)


@METRICS
def test_lora_at_its_start(metric):
    """A factor of zeros is no NaN: the rest of the network is measured."""
    loss = lambda w, x: jnp.mean((x @ (w["W"] + w["A"] @ w["B"]) - 1) ** 2)
    params = {"W": jnp.ones((3, 3)), "A": jnp.ones((3, 2)), "B": jnp.zeros((2, 3))}
    pair = sharpness.gl_pair("A", sharpness.GLBlock("B", rank_axis=0))
    batches = jnp.linspace(0, 1, 12).reshape(1, 4, 3)
    result = jax.jit(
        lambda params: sharpness.geodesic_sharpness(
            loss, params, batches, RHO, [pair], 0, metric=metric, num_steps=5
        )
    )(params)
    assert result.value > 0.1
    for name in "AB":
        np.testing.assert_array_equal(result.perturbation[name], 0)


# What is refused.


def layer(heads=2, k=4, **more):
    kernel = {"kernel": jnp.ones((6, heads, k))}
    out = {"kernel": jnp.ones((heads, k, 6))}
    return {"query": kernel, "key": kernel, "value": kernel, "out": out} | more


@pytest.mark.parametrize(
    ("params", "path", "message"),
    [
        (
            {"a": {"b": layer()}},
            "b",
            "no parameter b/query/kernel.*there is one at 'a/b'",
        ),
        ({"dense": {"kernel": jnp.ones(2)}}, "", "there are dense/kernel"),
        (layer(query_ln={"scale": jnp.ones(4)}), "", r"query_ln/scale.*qk=False"),
        (
            layer() | {"value": {"kernel": jnp.ones((6, 8))}},
            "",
            r"\(d, heads, k\).*GLBlock",
        ),
    ],
)
def test_layers_that_are_none(params, path, message):
    with pytest.raises(ValueError, match=message):
        sharpness.attention_gl_pairs(params, path)


def test_normalized_queries():
    """Flax names their layers so; values and outputs are a pair still."""
    model = nn.MultiHeadDotProductAttention(HEADS, normalize_qk=True)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3, 6)))[
        "params"
    ]
    with pytest.raises(ValueError, match="normalizes its queries and keys"):
        sharpness.attention_gl_pairs(params, "")
    (pair,) = sharpness.attention_gl_pairs(params, "", qk=False)
    assert pair.G[0].path == "value/kernel"
    assert sharpness.attention_gl_pairs(params, "", qk=False, vo=False) == []


PARAMS = {"A": jnp.ones((5, 2)), "B": jnp.ones((4, 2)), "C": jnp.ones((2, 4))}
PAIR = sharpness.gl_pair("A", "B")


def run(params=PARAMS, pairs=(PAIR,), rho=0.1, **options):
    loss = lambda w, batch: jnp.mean((batch @ w["A"] @ w["B"].T) ** 2)
    batches = jnp.ones((1, 3, 5))
    return sharpness.geodesic_sharpness(loss, params, batches, rho, pairs, **options)


BLOCK = sharpness.GLBlock
NOT_PAIRS = [
    ("A", "b", "'b'.*there are A, B, C"),
    ("A", "C", r"h = 2, C \(2, 4\).*rank_axis=0"),
    ("A", "A", "A is in gl_pairs twice"),
    ("A", BLOCK("B", shape=(5, 1)), "cannot be read as"),
    (BLOCK("A", 2), "B", "two different axes"),
    (BLOCK("A", 1, -1), "B", "two different axes"),
    ("C", BLOCK("B", 0), "G has 2 rows and 4 columns"),
    (BLOCK("A", 1, 0), BLOCK("B", 1, 0), "multiples of the smallest"),
]


@pytest.mark.parametrize(("G", "H", "message"), NOT_PAIRS)
def test_leaves_that_are_no_pair(G, H, message):
    with pytest.raises(ValueError, match=message):
        run(pairs=[sharpness.gl_pair(G, H)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "rho must be a number in"),
        ({"metric": "max"}, 'metric must be "mix" or "inv"'),
        ({"eps": -1.0}, "eps must be a number in"),
        ({"num_restarts": 2}, "pass key=0"),
        ({"num_steps": 0}, "num_steps must be an integer"),
        ({"pairs": PAIR}, "gl_pairs must be a list"),
        ({"pairs": [("A", "B")]}, "gl_pairs must be a list"),
        ({"pairs": [PAIR, PAIR]}, "A is in gl_pairs twice"),
        ({"mask": {"A": True, "B": False, "C": True}}, "selects A but not B"),
        ({"params": PARAMS | {"A": jnp.ones((5, 2), int)}}, "dtype int32"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


@pytest.mark.parametrize("factor", [3, [], ["A", 3], None])
def test_factors_that_are_none(factor):
    with pytest.raises(ValueError, match="G must be the path of a leaf"):
        sharpness.gl_pair(factor, "B")


def test_a_leaf_called_value():
    """In a dict it is a name; in an NNX variable it is that of its array."""
    params = {"attention": {"query": jnp.ones(1), "value": jnp.ones(1)}}
    assert list(named_leaves(params)) == ["attention/query", "attention/value"]
    state = nnx.state(nnx.LoRA(4, 2, 5, rngs=nnx.Rngs(0)))
    assert set(named_leaves(state)) == {"lora_a", "lora_b"}
