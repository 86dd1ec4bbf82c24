"""The transcriptions in reference/ where nothing was recorded: closed forms."""

import numpy as np
import pytest
from reference import ae_sam, base, esam, looksam, random_sam, sam


def assert_near(actual, expected, tolerance=0.0):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def trajectory(direction, steps=30):
    """SGD on a quadratic, with direction(t, w, grad)."""
    r = np.random.RandomState(3)
    A, b = np.diag(np.logspace(-2, 0.5, 6)), r.randn(6)
    grad = lambda w: base.quad(w, A, b)[1]
    step = lambda t, w: direction(t, w, grad)
    path = base.descend({"w": r.randn(6)}, steps, step, lr=0.1, momentum=0.9)
    return np.array([w["w"] for w in path])


def test_layerwise_ascent_moves_each_leaf_by_a_share_of_its_norm():
    r = np.random.RandomState(0)
    w = {"a": r.randn(3, 2), "b": np.zeros(2), "c": r.randn(4)}
    g = {"a": r.randn(3, 2), "b": r.randn(2), "c": np.zeros(4)}
    e = looksam.layerwise(w, g, 0.1)
    assert_near(base.norm(e, ["a"]), 0.1 * base.norm(w, ["a"]), 1e-15)
    assert_near(e["b"], 0.1 * g["b"], 0.0)
    assert_near(e["c"], 0.0, 0.0)


def test_selections_differ_by_the_example_at_the_threshold():
    rise = np.array([0.1, 0.5, 0.3, 0.4, 0.3, 0.2])
    strict, exact = esam.strictly_above(rise, 0.5), esam.largest(rise, 0.5)
    np.testing.assert_array_equal(np.flatnonzero(strict), [1, 3])
    np.testing.assert_array_equal(np.flatnonzero(exact), [1, 2, 3])


def test_noise_of_an_output_unit_follows_its_norm():
    r = np.random.RandomState(4)
    w = {"kernel": r.randn(3, 4, 5), "bias": np.zeros(5)}
    w["kernel"][..., 2] = 0.0
    normal = {leaf: np.ones_like(w[leaf]) for leaf in w}
    delta = random_sam.noise(w, normal, 0.1)
    norms = np.linalg.norm(w["kernel"].reshape(12, 5), axis=0)
    assert_near(delta["kernel"], np.broadcast_to(0.1 * norms, (3, 4, 5)), 1e-15)
    assert_near(delta["bias"], 1e-17)


def test_noise_alone_may_set_the_direction_of_the_ascent():
    w, delta = {"w": np.zeros(4)}, {"w": np.array([0.0, 3.0, 0.0, -4.0])}
    e = random_sam.perturbation(w, lambda w: w, delta, rho=0.5, lam=0.0)
    assert_near(e["w"], [0.0, 0.3, 0.0, -0.4], 1e-12)


# The share of ascending steps for independent Gaussian x, delta = 0.9.
@pytest.mark.parametrize(
    ("first", "last", "share"),
    [
        (-1, -1, 0.84),
        (0, 0, 0.50),
        (1, 1, 0.16),
        (2, 2, 0.01),
        (1, -1, 0.50),
        (2, 0, 0.196),
    ],
)
def test_ae_sam_ascends_as_often_as_the_threshold_says(first, last, share):
    steps = 40_000
    x = 10.0 + np.random.RandomState(0).randn(steps)
    c = ae_sam.threshold(np.arange(steps), steps, last, first)
    assert_near(np.mean(ae_sam.simulate(x, c)), share, 0.01)


def test_threshold_goes_from_lambda2_to_lambda1_and_stays():
    c = ae_sam.threshold(np.array([0, 10, 40, 60]), 40, lambda1=-1.0, lambda2=3.0)
    assert_near(c, [3.0, 2.0, -1.0, -1.0])


def test_ae_sam_statistics_are_weighted_sums():
    x = np.random.RandomState(1).rand(30)
    statistics, means = ae_sam.Statistics(delta=0.8), []
    for x_t in x:
        statistics.observe(x_t)
        means.append(statistics.mu)
    weights = 0.2 * 0.8 ** np.arange(30)[::-1]
    assert_near(statistics.mu, weights @ x + 0.8**30 * x[0], 1e-14)
    assert_near(statistics.var, weights @ (x - means) ** 2, 1e-14)


def test_lagged_ae_sam_decides_on_the_step_before():
    r = np.random.RandomState(2)
    x, c = r.rand(200), r.randn(200)
    lagged = ae_sam.simulate(x, c, lag=1)
    assert lagged[0]
    np.testing.assert_array_equal(lagged[1:], ae_sam.simulate(x[:-1], c[1:]))


@pytest.mark.parametrize("lag", [0, 1])
def test_ae_sam_below_every_threshold_is_sam(lag):
    method = ae_sam.AESAM(rho=0.3, lag=lag)
    always = trajectory(lambda t, w, grad: method.direction(w, grad, -1e9))
    expected = trajectory(lambda t, w, grad: sam.sam(w, grad, 0.3))
    assert_near(always, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_ae_looksam_above_every_threshold_is_looksam_with_one_sam_step(alpha):
    method = ae_sam.AESAM(rho=0.3, alpha=alpha)
    once = looksam.LookSAM(rho=0.3, alpha=alpha, k=1000)
    never = trajectory(lambda t, w, grad: method.direction(w, grad, 1e9))
    assert_near(never, trajectory(once.direction))
