"""Rules that look at gradients, fed with extreme norms: finite, and within quota."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extreme_norms import RULES, SEQUENCES, SHARE, STEPS, WARM_UP, WINDOW

from optax_sam.when import Step


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
