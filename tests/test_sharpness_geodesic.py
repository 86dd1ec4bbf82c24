"""Geodesic sharpness: its geometry against textbook formulas, and its invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from optax_sam.sharpness.quotient import Frame, christoffel, frame_at, horizontal, moved

METRICS = pytest.mark.parametrize("metric", ["mix", "inv"])
N, M, RANK = 5, 4, 3


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


def velocity(frame, u, metric):
    """The tangent vector of flat coordinates: the derivative of the geodesic."""
    change = lambda t: moved(frame, t * u[0], t * u[1], metric)
    return jax.jvp(change, (0.0,), (1.0,))[1]


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
    """By the equations of the specification, in the weights themselves."""
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
    for frame, (G, H) in ((here, (G, H)), (other, there)):
        change = moved(frame, *u, metric)
        products.append((G + change[0]) @ (H + change[1]).T)
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
