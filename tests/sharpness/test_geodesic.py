"""Geodesic sharpness: its geometry and its maxima; test_attention has invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness
from optax_sam.sharpness import quotient

METRICS = pytest.mark.parametrize("metric", ["mix", "inv"])
N, M, RANK = 5, 4, 3
RHO = 0.3

# One program each instead of one for every operation.
frame_at = jax.jit(quotient.frame_at, static_argnums=(2, 3))
horizontal = jax.jit(quotient.horizontal)
moved = jax.jit(quotient.moved, static_argnums=3)


def pair(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, RANK)), rng.normal(size=(M, RANK))


def dot(a, b):
    return sum(map(jnp.vdot, a, b))


@functools.partial(jax.jit, static_argnums=2)
def derivatives(frame, u, metric):
    """The velocity and the acceleration of the curve that moves by ``t u``."""
    at = lambda t: moved(frame, t * u[0], t * u[1], metric)
    velocity = lambda t: jax.jvp(at, (t,), (1.0,))[1]
    return jax.jvp(velocity, (0.0,), (1.0,))


@METRICS
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_coordinates_are_those_of_a_geodesic_on_the_quotient(x64, metric, eps):
    """Their dot product is the metric, horizontal ones leave the orbit at right angles,
    and the curve has the acceleration of the Euler-Lagrange equations.

    With ``eps`` at a balanced point, where it is what is added to the Gram matrices;
    without it at any.
    """
    G, H = pair(0)
    if eps:
        U, S, Vt = np.linalg.svd(G @ H.T)
        G, H = (X[:, :RANK] * np.sqrt(S[:RANK]) for X in (U, Vt.T))
    else:
        A = np.random.default_rng(1).normal(size=(RANK, RANK))
        G, H = G @ np.linalg.inv(A), H @ A.T
    x = G, H = tuple(map(jnp.asarray, (G, H)))
    constant = eps * jnp.trace(G.T @ G) / RANK * jnp.eye(RANK)

    def inner(x, eta, zeta):
        """The metric at ``x``: ``tr(X eta_G' zeta_G) + tr(Y eta_H' zeta_H)``."""
        P, Q = (X.T @ X + constant for X in x)
        weights = (Q, P) if metric == "mix" else map(jnp.linalg.inv, (P, Q))
        return sum(
            jnp.trace(W @ a.T @ b) for W, a, b in zip(weights, eta, zeta, strict=True)
        )

    frame = frame_at(G, H, metric, eps)
    u, v = (tuple(map(jnp.asarray, pair(seed))) for seed in (100, 101))
    (xi, a), (zeta, _) = (derivatives(frame, x, metric) for x in (u, v))
    np.testing.assert_allclose(inner(x, xi, zeta), dot(u, v), rtol=1e-11)

    # d/dt dE/dv = dE/dx, and E is quadratic in v: d2E/dv2 a = dE/dx - d2E/dv dx v.
    energy = lambda x, v: inner(x, v, v) / 2
    force = jax.grad(energy)(x, xi)
    drift = jax.jvp(lambda x: jax.grad(energy, 1)(x, xi), (x,), (xi,))[1]
    mass = jax.jvp(lambda v: jax.grad(energy, 1)(x, v), (xi,), (a,))[1]
    for m, f, d in zip(mass, force, drift, strict=True):
        np.testing.assert_allclose(m, f - d, rtol=1e-9, atol=1e-9)

    level, _ = derivatives(frame, horizontal(frame, *u), metric)
    for Omega in np.random.default_rng(2).normal(size=(3, RANK, RANK)):
        vertical = (-G @ Omega, H @ Omega.T)
        size = jnp.sqrt(inner(x, vertical, vertical))
        assert abs(inner(x, vertical, xi)) > 0.01 * size
        assert abs(inner(x, vertical, level)) < 1e-12 * size
    # What the projection takes away is vertical: it does not move the product.
    lost = [x - y for x, y in zip(xi, level, strict=True)]
    assert max(float(abs(x).max()) for x in lost) > 0.1
    np.testing.assert_allclose(lost[0] @ H.T + G @ lost[1].T, 0, atol=1e-12)


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
    u = horizontal(whole, *map(jnp.asarray, pair(100)))
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
@pytest.mark.parametrize("zero", ["A", "B", "AB"])
def test_a_factor_of_zeros_stays(metric, zero):
    """As LoRA begins: nothing is NaN, and the rest of the network is measured."""
    loss = lambda w, x: jnp.mean((x @ (w["W"] + w["A"] @ w["B"]) - 1) ** 2)
    params = {"W": jnp.ones((3, 3)), "A": jnp.ones((3, 2)), "B": jnp.ones((2, 3))}
    params |= {name: 0 * params[name] for name in zero}
    lora = sharpness.gl_pair("A", sharpness.GLBlock("B", rank_axis=0))
    batches = jnp.linspace(0, 1, 12).reshape(1, 4, 3)
    result = jax.jit(
        lambda params: sharpness.geodesic_sharpness(
            loss, params, batches, RHO, [lora], 0, metric=metric, num_steps=5
        )
    )(params)
    assert result.value > 0.1
    for name in "AB":
        np.testing.assert_array_equal(result.perturbation[name], 0)


# beta = u * v with X'X = I: every coordinate is a pair of one row and one column.

P, TARGET = np.array([3.0, -0.5]), np.array([2.8, -0.6])
BLOCKS = [sharpness.GLBlock(name, 2, 1, (1, 2, 1)) for name in "uv"]
PAIR = (sharpness.gl_pair(*BLOCKS),)
U = np.array([1.5, 0.2])
POINT = {"u": U, "v": P / U, "bias": np.ones(2)}


@functools.partial(jax.jit, static_argnames=("chosen", "pairs", "metric", "eps"))
def diagonal_network(rho, metric, chosen="uv", pairs=PAIR, eps=0.0):
    loss = lambda w, _: jnp.sum((w["u"] * w["v"] - TARGET * w["bias"]) ** 2) / 2
    return sharpness.geodesic_sharpness(
        loss, jax.tree.map(jnp.asarray, POINT), jnp.zeros((1, 1)), rho, pairs, 0,
        mask={name: name in chosen for name in POINT}, eps=eps,
        metric=metric, num_steps=100, num_restarts=4,
    )  # fmt: skip


@METRICS
def test_diagonal_network(x64, metric):
    # The maximum is over one angle: t_i = +-rho / sqrt 2 (cos, sin).
    rho, angle = 0.1, np.linspace(0, 2 * np.pi, 200_001)
    t = rho / np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)])
    if metric == "mix":
        factor = 1 + t / P[:, None] - (t / P[:, None]) ** 2 / 2
    else:
        factor = 1 + t + t**2 / 2
    losses = ((P[:, None] * factor**2 - TARGET[:, None]) ** 2).sum(0) / 2
    exact = losses.max() - ((P - TARGET) ** 2).sum() / 2
    result = diagonal_network(rho, metric)
    # Of what the mask selects: the bias is left out.
    assert not result.perturbation["bias"].any()
    np.testing.assert_allclose(result.value, exact, rtol=1e-6)
    assert result.value <= exact * (1 + 1e-9)


def test_eps_is_a_shorter_metric_for_inv(x64):
    # The Gram matrices of one number are four times as large, so its inverse a fourth.
    np.testing.assert_allclose(
        diagonal_network(1e-3, "inv", eps=3.0).value,
        diagonal_network(2e-3, "inv").value,
        rtol=5e-3,
    )


def test_pairs_that_the_mask_leaves_out_do_not_count(x64):
    without, no_pairs = (diagonal_network(RHO, "inv", "bias", x) for x in (PAIR, ()))
    np.testing.assert_array_equal(without.value, no_pairs.value)
    assert without.value > 0.01
    assert not without.perturbation["u"].any()


def test_without_pairs_it_is_adaptive_sharpness(x64):
    """To the bit: the same program."""
    loss = lambda w, _: jnp.sum((w["u"] * w["v"] - TARGET) ** 2)
    args = loss, {"u": jnp.array(U), "v": jnp.array(P / U)}, jnp.zeros((1, 1)), RHO
    actual = sharpness.geodesic_sharpness(*args, [])
    options = dict(adaptive=True, random_init=False)
    expected = sharpness.worst_case_sharpness(*args, **options)
    np.testing.assert_array_equal(actual.per_batch, expected.per_batch)
    np.testing.assert_array_equal(actual.late_gain, expected.late_gain)
