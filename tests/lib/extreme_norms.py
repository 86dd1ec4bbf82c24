"""Norms of gradients that no rule may stumble over, and the rules that look at them."""

import itertools

import numpy as np

from optax_sam import when

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
