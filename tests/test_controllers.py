"""Rules that look at gradients, fed with extreme norms: finite, and within quota."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import when
from optax_sam.when import Step

# Nothing, what is no normal float32, what squares to none, what just squares to one,
# what squares beyond all of them, and what is no number.
NORMS = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1.8e19, 1e20, 1e38, np.inf, np.nan]
STEPS, WINDOW, SHARE, WARM_UP, RANDOM = 400, 16, 0.75, 11, 100


def sequences():
    """Norms of both gradients over all steps: (sequences, steps, 2)."""
    rng = np.random.default_rng(0)
    pairs = np.array([*itertools.product(NORMS, repeat=2)])
    constant = np.repeat(pairs[:, None], STEPS, axis=1)
    # The first of a pair on even steps, the other on odd ones, for both gradients.
    alternating = np.repeat(constant[:, :1], STEPS, axis=1)
    alternating[:, ::2], alternating[:, 1::2] = pairs[:, None, :1], pairs[:, None, 1:]
    ramps = np.geomspace(1e-38, 1e38, STEPS)
    ramps = np.stack(np.broadcast_arrays([ramps, ramps[::-1]], 1.0), axis=-1)
    ramps = np.concatenate([ramps, ramps[..., ::-1]])
    random = rng.choice(NORMS, size=(RANDOM, STEPS, 2))
    return np.concatenate([constant, alternating, ramps, random]).astype(np.float32)


SEQUENCES = sequences()
VSAM = {"window": WINDOW, "num_slices": 2, "max_rate": SHARE, "warmup_steps": WARM_UP}
RULES = {
    "variance_controlled": when.variance_controlled(**VSAM, sensitivity=0.5),
    "without catch-up": when.variance_controlled(**VSAM, force_quota=False),
    "norm_above_trend": when.norm_above_trend(),
    "lagged": when.norm_above_trend(lag=1),
    "after": when.after(WARM_UP, when.norm_above_trend()),
}


def fed(rule):
    """Decisions and states of all sequences, time behind the sequence."""

    def turn(state, given):
        count, norms = given
        # One gradient of one entry has the norm that is wanted.
        g, g_s = norms[:1], norms[1:]
        step = Step(count, lambda tree: tree)
        decision, state = rule.now(state, g, step)
        # More than the engine asks for: it lets nothing be observed that is not finite.
        seen = rule.observe(state, g, g_s, step)
        observed = jax.tree.map(lambda x, y: jnp.where(decision, x, y), seen, state)
        return rule.advance(observed, decision), (decision, observed)

    counts = jnp.arange(STEPS)
    run = lambda norms: jax.lax.scan(turn, rule.init(None), (counts, norms))[1]
    return jax.device_get(jax.jit(jax.vmap(run))(SEQUENCES))


@pytest.mark.parametrize("name", RULES)
def test_extreme_norms(name):
    decisions, states = fed(RULES[name])
    assert decisions.dtype == bool
    for leaf in jax.tree.leaves(states):
        assert np.isfinite(leaf).all()
    if name == "after":
        assert not decisions[:, :WARM_UP].any()
    if not hasattr(states, "rate"):
        trend = getattr(states, "trend", getattr(states, "rule", states))
        assert (trend.variance >= 0).all()
        # Not where there is no number, but somewhere.
        lag = name == "lagged"
        squares = np.square(SEQUENCES[:, : STEPS - lag, 0], dtype=np.float64)
        counted = squares < np.finfo(np.float32).max  # NaN is not
        assert not decisions[:, lag:][~counted].any()
        assert 0.2 < decisions[:, lag:][counted].mean() < 0.8
        return
    assert decisions[:, :WARM_UP].all()
    largest = int(WINDOW * SHARE)
    assert ((states.rate >= 1) & (states.rate <= largest)).all()
    # The clock starts inside a window whose quota is spent.
    first = WARM_UP + WINDOW - 1
    assert not decisions[:, WARM_UP:first].any()
    whole = (STEPS - first) // WINDOW * WINDOW
    windows = lambda x: x[:, first : first + whole].reshape(len(x), -1, WINDOW)
    used = windows(decisions).sum(axis=-1)
    quota = np.floor(windows(states.rate)[..., 0])
    catches_up = states.catch_up.all()
    assert (used == quota).all() if catches_up else (used <= quota).all()
    # Both ends are reached, so that they are what held.
    assert not catches_up or {1, largest} <= set(np.unique(quota))


def test_the_share_at_the_start():
    """Each full window after the warm-up takes its part, from the first one on."""
    rule = when.variance_controlled(
        10, 5, sensitivity=0.0, warmup_steps=3, initial_rate=0.3
    )
    state, decisions = rule.init(None), []
    for _ in range(3 + 9 + 40):
        decisions.append(bool(state.ascends))
        state = rule.advance(state, jnp.asarray(decisions[-1]))
    assert all(decisions[:3])
    # The authors' clock starts inside a window, one sample of whose quota is spent.
    assert sum(decisions[3:12]) == 2
    assert np.reshape(decisions[12:], (4, 10)).sum(axis=1).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("share", [0.0, -0.1, 0.9, 1.1, "0.3", True])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match="initial_rate must be"):
        when.variance_controlled(10, 5, initial_rate=share)
