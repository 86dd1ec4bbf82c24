"""Rank correlations: hand-checked values, ties, grids, and an honest interval."""

import itertools

import numpy as np
import pytest

from optax_sam import sharpness

NO_TIES = (1, 2, 3, 4), (1, 3, 2, 4)
TIES = (1, 2, 2, 3), (1, 2, 3, 3)


@pytest.mark.parametrize(
    ("pair", "variant", "tau"),
    [
        (NO_TIES, "a", 2 / 3),
        (NO_TIES, "b", 2 / 3),
        (TIES, "a", 2 / 3),
        (TIES, "b", 0.8),
    ],
)
def test_hand_checked_values(pair, variant, tau):
    found = sharpness.kendall_tau(*pair, variant=variant)
    assert isinstance(found, float)
    assert found == pytest.approx(tau, abs=1e-15)
    assert sharpness.kendall_tau(*pair[::-1], variant=variant) == found
    reversed_ = sharpness.kendall_tau(pair[0], -np.array(pair[1]), variant=variant)
    assert reversed_ == -found


def by_pairs(s, t):
    """From the definitions, pair by pair."""
    pairs = list(itertools.combinations(range(len(s)), 2))
    product = [np.sign(s[i] - s[j]) * np.sign(t[i] - t[j]) for i, j in pairs]
    N, tied_s = len(pairs), sum(s[i] == s[j] for i, j in pairs)
    tied_t = sum(t[i] == t[j] for i, j in pairs)
    total = sum(product)
    return total / N, total / np.sqrt((N - tied_s) * (N - tied_t))


@pytest.mark.parametrize("seed", range(5))
def test_against_the_definitions_and_scipy(seed):
    s, t = np.random.default_rng(seed).integers(0, 6, (2, 25))
    a, b = (sharpness.kendall_tau(s, t, variant=x) for x in "ab")
    assert (a, b) == pytest.approx(by_pairs(s, t), abs=1e-14)
    stats = pytest.importorskip("scipy.stats")
    assert b == pytest.approx(stats.kendalltau(s, t).statistic, abs=1e-14)


def test_orders_alone_count():
    s, t = np.random.default_rng(0).normal(size=(2, 20))
    tau = sharpness.kendall_tau(s, t)
    assert sharpness.kendall_tau(np.exp(s), 3 * t**3 - 5) == tau
    assert sharpness.kendall_tau(s, s) == sharpness.kendall_tau(s, s, variant="b") == 1


@pytest.mark.parametrize("variant", ["a", "b"])
def test_what_is_constant_orders_nothing(variant):
    assert sharpness.kendall_tau([1, 1, 1], [1, 2, 3], variant=variant) == 0
    assert sharpness.kendall_tau([1, 1, 1], [2, 2, 2], variant=variant) == 0
    interval = sharpness.kendall_interval([1, 1, 1], [1, 2, 3], variant=variant)
    assert interval == (0, 0, 0, 0)


def test_a_grid_checked_by_hand():
    mu, gap = [[1, 3], [2, 4]], [[1, 2], [4, 3]]
    Psi, psi = sharpness.granulated_kendall(mu, gap, (2, 2))
    assert psi.tolist() == [1, 0]
    assert Psi == 0.5
    assert sharpness.kendall_tau(mu, gap) == pytest.approx(1 / 3)
    flat = sharpness.granulated_kendall([1, 3, 2, 4], [1, 2, 4, 3], (2, 2))
    assert flat.psi.tolist() == [1, 0]


def test_a_dominating_hyperparameter_is_seen():
    # The measure follows the first axis, and turns the order along the second.
    depth, width = np.meshgrid(np.arange(4), np.arange(3), indexing="ij")
    measure, gap = 100 * depth - width, 100 * depth + width
    assert sharpness.kendall_tau(measure, gap) > 0.6
    result = sharpness.granulated_kendall(measure, gap, (4, 3))
    assert result.psi.tolist() == [1, -1]
    assert result.Psi == 0


def test_axes_of_different_lengths():
    s, t = np.random.default_rng(0).normal(size=(2, 2, 3, 4))
    _, psi = sharpness.granulated_kendall(s, t, (2, 3, 4))
    tau = sharpness.kendall_tau
    for axis, shape in enumerate([(3, 4), (2, 4), (2, 3)]):
        lines = [np.moveaxis(x, axis, 0) for x in (s, t)]
        taus = [tau(*(x[:, i, j] for x in lines)) for i, j in np.ndindex(shape)]
        assert psi[axis] == pytest.approx(np.mean(taus))
    assert psi.shape == (3,)


def test_the_interval_misses_no_correlation_as_often_as_it_says():
    rng, ends = np.random.default_rng(0), []
    for _ in range(400):
        _, *found = sharpness.kendall_interval(
            *rng.normal(size=(2, 30)), confidence=0.9, num_resamples=200
        )
        ends.append(found[:2])
    low, high = np.array(ends).T
    # One in twenty on each side: 20 of 400, with a standard deviation of 4.4.
    assert 8 < (low > 0).sum() < 32
    assert 8 < (high < 0).sum() < 32


@pytest.mark.parametrize("variant", ["a", "b"])
def test_a_model_drawn_twice_is_no_tie(variant):
    s = np.arange(10.0)
    tau, low, high, stderr = sharpness.kendall_interval(s, s, variant=variant)
    assert (tau, low, high) == pytest.approx((1, 1, 1), abs=1e-12)
    assert stderr < 1e-12


def test_the_interval_narrows_and_repeats():
    rng = np.random.default_rng(0)
    s = rng.normal(size=200)
    t = s + rng.normal(size=200)
    few, many = (sharpness.kendall_interval(s[:n], t[:n]) for n in (20, 200))
    assert few.low < few.tau < few.high
    width = lambda x: x.high - x.low
    assert 2 < width(few) / width(many) < 7  # about the root of 10
    assert width(many) == pytest.approx(2 * 1.96 * many.stderr, rel=0.1)
    assert sharpness.kendall_interval(s[:20], t[:20]) == few
    assert sharpness.kendall_interval(s[:20], t[:20], seed=1) != few
    mirrored = sharpness.kendall_interval(-s[:20], t[:20])
    assert (mirrored.low, mirrored.high) == pytest.approx((-few.high, -few.low))
    narrow = sharpness.kendall_interval(s[:20], t[:20], confidence=0.5)
    assert few.low < narrow.low < narrow.high < few.high


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sharpness.kendall_tau([1, 2], [1, 2, 3]), "(2,) and (3,)"),
        (lambda: sharpness.kendall_tau([1], [2]), "at least 2"),
        (
            lambda: sharpness.kendall_tau([1, np.nan], [1, 2]),
            "s is nan at .1.*rank",
        ),
        (lambda: sharpness.kendall_tau([1, 2], [np.inf, 2]), "t is inf at .0"),
        (lambda: sharpness.kendall_tau([1, 2], [1, 2], variant="c"), 'or "b"'),
        (lambda: sharpness.kendall_interval([1, 2], [1, 2], variant="c"), 'or "b"'),
        (
            lambda: sharpness.kendall_interval([1, 2], [1, 2], confidence=1),
            "confidence",
        ),
        (
            lambda: sharpness.kendall_interval([1, 2], [1, 2], num_resamples=0),
            "num_resamples",
        ),
        (
            lambda: sharpness.granulated_kendall([1, 2, 3], [1, 2, 3], (2, 2)),
            "3 models do not fill.*2, 2",
        ),
        (
            lambda: sharpness.granulated_kendall([1, 2], [1, 2], (2, 1)),
            "at least 2.*fixed",
        ),
        (lambda: sharpness.granulated_kendall([1, 2], [1, 2], ()), "grid_shape"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        call()
