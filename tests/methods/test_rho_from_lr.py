"""The radius that follows the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam


def line(lr, low, high, rho_min, rho_max):
    share = (np.asarray(lr, np.float64) - low) / (high - low)
    return rho_min + (rho_max - rho_min) * np.clip(share, 0, 1)


def follow(schedule, counts, low, high, tolerance=1e-5, **ends):
    rho = optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6, **ends)
    lr = [float(schedule(t)) for t in counts]
    found = [float(rho(t)) for t in counts]
    np.testing.assert_allclose(found, line(lr, low, high, 0.05, 0.6), rtol=tolerance)
    return found


warm_up = lambda first: optax.warmup_cosine_decay_schedule(
    first, 0.4, 20, 200, end_value=0.04
)
DECAYS = {
    "cosine": optax.cosine_decay_schedule(0.4, 200, alpha=0.1),
    "linear": optax.linear_schedule(0.4, 0.04, 200),
    "warm-up from below the end": warm_up(0.001),
    "warm-up from above the end": warm_up(0.1),
    "steps": optax.piecewise_constant_schedule(0.4, {50: 0.5, 120: 0.2}),
}


@pytest.mark.parametrize("name", DECAYS)
def test_the_radius_follows_the_learning_rate(name):
    counts = [0, 3, 19, 20, 21, 50, 51, 110, 119, 121, 130, 199, 200, 5000]
    lengths = follow(DECAYS[name], counts, 0.04, 0.4)
    assert min(lengths) == pytest.approx(0.05, rel=1e-5)
    assert max(lengths) == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("power", [0.9, 2, 0.5])
def test_a_schedule_that_is_undefined_or_rises_after_its_end(power):
    """NaN there is no rate. A peak after all training runs is no peak of one."""
    lr = lambda t: 0.04 + 0.36 * (1 - t / 1000) ** power
    if power == 2:
        with pytest.raises(ValueError, match="still rises at step.*as lr_min and"):
            optax_sam.rho_from_lr(lr, 0.05, 0.6)(0)
        follow(lr, [0, 500, 1000], 0.04, 0.4, lr_min=0.04, lr_max=0.4)
    else:
        follow(lr, [0, 10, 500, 900, 1000], 0.04, 0.4, tolerance=1e-4)
        rho = optax_sam.rho_from_lr(lr, 0.05, 0.6)
        assert float(rho(jnp.int32(1001))) == pytest.approx(0.05)


@pytest.mark.parametrize("value", ["0.1", jnp.ones(2), -1.0, jnp.nan])
def test_a_schedule_of_no_rate_is_refused_before_it_is_searched(value):
    rho = optax_sam.rho_from_lr(lambda count: value, 0.05, 0.6)
    with pytest.raises(ValueError, match="lr_schedule must be"):
        rho(0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rate_from_inject_hyperparams_cannot_be_searched(compiled):
    factory = optax.inject_hyperparams(
        lambda lr: optax_sam.sam(optax_sam.rho_from_lr(lr, 0.05, 0.6))
    )
    w = jnp.ones(2)
    tx = factory(lr=DECAYS["linear"])
    update = jax.jit(tx.init) if compiled else tx.init
    with pytest.raises(ValueError, match="optax.inject_hyperparams.*lr_min"):
        update(w)


def test_what_does_not_change_is_constant():
    for lr in (0.1, np.float32(0.1), optax.constant_schedule(0.1)):
        rho = optax_sam.rho_from_lr(lr, rho_min=0.05, rho_max=0.6)
        assert [float(rho(t)) for t in (0, 1, 1000)] == 3 * [pytest.approx(0.6)]
    rho = optax_sam.rho_from_lr(DECAYS["cosine"], rho_min=0.2, rho_max=0.2)
    assert [float(rho(t)) for t in (0, 77, 500)] == 3 * [pytest.approx(0.2)]


def test_given_ends_of_the_learning_rate():
    """They are used as they are, and the radius is clipped beyond them."""
    schedule = optax.linear_schedule(0.4, 0.0, 100)
    for low, high in ((0.1, 0.3), (0.1, None), (None, 0.3), (0.0, 1.0)):
        ends = {"lr_min": low, "lr_max": high}
        low, high = 0.0 if low is None else low, 0.4 if high is None else high
        follow(schedule, range(0, 130, 7), low, high, **ends)


def test_the_radius_inside_jit_and_scan_first():
    """The search at the first use, while tracing, leaves no tracer behind."""
    schedule = DECAYS["warm-up from below the end"]
    counts = jnp.arange(0, 220, 11)
    runs = (
        lambda rho: jax.jit(jax.vmap(rho))(counts),
        lambda rho: jax.lax.scan(lambda c, t: (c, rho(t)), 0, counts)[1],
        lambda rho: jax.jit(jax.lax.map, static_argnums=0)(rho, counts),
    )
    for run in runs:
        rho = optax_sam.rho_from_lr(schedule, rho_min=0.05, rho_max=0.6)
        series = run(rho)
        # And afterwards, outside.
        np.testing.assert_allclose(series, [float(rho(t)) for t in counts], rtol=1e-5)
        assert float(rho(20)) == pytest.approx(0.6)


@pytest.mark.parametrize("peak_at", [10**5, 3 * 10**6])
def test_the_radius_of_a_very_long_run(peak_at):
    """The peak and the end lie far beyond the steps that are all looked at."""
    total = 10 * peak_at
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 0.4, peak_at, total, end_value=0.04
    )
    counts = [0, peak_at // 20, peak_at // 2, peak_at, 2 * peak_at, total // 2, total]
    follow(schedule, counts, 0.04, 0.4, tolerance=2e-3)
