"""Rank correlations: hand-checked values, ties, grids, and an honest interval."""

import itertools

import numpy as np
import pytest

from optax_sam import sharpness

TAU = sharpness.kendall_tau


def by_pairs(s, t):
    """From the definitions, pair by pair."""
    pairs = list(itertools.combinations(range(len(s)), 2))
    total = sum(np.sign(s[i] - s[j]) * np.sign(t[i] - t[j]) for i, j in pairs)
    untied = [sum(x[i] != x[j] for i, j in pairs) for x in (s, t)]
    return total / len(pairs), total / np.sqrt(np.prod(untied))


def test_against_the_definitions_and_scipy():
    stats = pytest.importorskip("scipy.stats")
    drawn = [np.random.default_rng(seed).integers(0, 6, (2, 25)) for seed in range(5)]
    for s, t in [np.array([(1, 2, 2, 3), (1, 2, 3, 3)]), *drawn]:
        a, b = (TAU(s, t, variant=x) for x in "ab")
        assert (a, b) == pytest.approx(by_pairs(s, t), abs=1e-14)
        assert b == pytest.approx(stats.kendalltau(s, t).statistic, abs=1e-14)
        assert isinstance(a, float)
        assert [TAU(t, s), TAU(s, -t)] == [a, -a]


@pytest.mark.parametrize("variant", ["a", "b"])
def test_what_is_constant_orders_nothing(variant):
    assert TAU([1, 1, 1], [1, 2, 3], variant=variant) == 0
    assert TAU([1, 1, 1], [2, 2, 2], variant=variant) == 0
    interval = sharpness.kendall_interval([1, 1, 1], [1, 2, 3], variant=variant)
    assert interval == (0, 0, 0, 0)


def test_axes_of_different_lengths():
    s, t = np.random.default_rng(0).normal(size=(2, 2, 3, 4))
    Psi, psi = sharpness.granulated_kendall(s, t, (2, 3, 4))
    assert Psi == pytest.approx(np.mean(psi))
    assert psi.shape == (3,)
    flat = sharpness.granulated_kendall(s.ravel(), t.ravel(), (2, 3, 4))
    np.testing.assert_array_equal(flat.psi, psi)
    for axis, shape in enumerate([(3, 4), (2, 4), (2, 3)]):
        lines = [np.moveaxis(x, axis, 0) for x in (s, t)]
        taus = [TAU(*(x[:, i, j] for x in lines)) for i, j in np.ndindex(shape)]
        assert psi[axis] == pytest.approx(np.mean(taus))


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
    of = sharpness.kendall_interval
    few, many = (of(s[:n], t[:n]) for n in (20, 200))
    assert few.low < few.tau < few.high
    width = lambda x: x.high - x.low
    assert 2 < width(few) / width(many) < 7  # about the root of 10
    assert width(many) == pytest.approx(2 * 1.96 * many.stderr, rel=0.1)
    assert of(s[:20], t[:20]) == few != of(s[:20], t[:20], seed=1)
    mirrored = of(-s[:20], t[:20])
    assert (mirrored.low, mirrored.high) == pytest.approx((-few.high, -few.low))
    narrow = of(s[:20], t[:20], confidence=0.5)
    assert few.low < narrow.low < narrow.high < few.high
