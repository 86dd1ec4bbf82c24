"""R-SAM: an ascent from weights that noise has smoothed."""

import functools

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import pytest
import recorded
import scipy.stats
import side_by_side
import trajectories as beside
from reference import random_sam
from side_by_side import generator

import optax_sam
from optax_sam import ascent
from optax_sam.keys import normal_like


def normals(key, w):
    """Standard normals like the parameters, one tree per step."""
    drawn = (normal_like(generator(key, t), w) for t in range(beside.STEPS))
    return [jax.tree.map(np.asarray, z) for z in drawn]


SIZE = beside.rising(0.1)
# The settings, and rho, sigma and the weight of the gradient for the transcription.
CASES = {
    "numbers": ({"rho": 0.3, "sigma": 0.1}, lambda t: 0.3, lambda t: 0.1, 2.0),
    "schedules": (
        {
            "rho": SIZE,
            "sigma": optax.cosine_decay_schedule(0.02, beside.STEPS, alpha=5.0),
            "gradient_weight": 0.5,
        },
        SIZE,
        lambda t: random_sam.sigma(t, beside.STEPS, 0.02),
        0.5,
    ),
}


@beside.double
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@beside.each_way(CASES)
def test_ten_steps_meet_the_reference(name, compiled, given):
    settings, rho, sigma, weight = CASES[name]
    step, seeds = beside.steps_and_seeds(
        side_by_side.optimizer(optax_sam.random_sam(**settings)), compiled and not given
    )
    for seed in seeds:
        w, batches = side_by_side.problem(seed, beside.STEPS)
        # Given noise is of another key than the one in the state.
        noise = normals(seed + 7 if given else seed, w)
        extras = [{"noise": z} for z in noise] if given else None
        tx = side_by_side.optimizer(optax_sam.random_sam(**settings, key=seed))
        trajectory, _ = side_by_side.package(step, w, tx.init(w), batches, extras)

        def direction(t, w, grad, noise=noise):
            delta = random_sam.noise(w, noise[t], sigma(t))
            return random_sam.random_sam(w, grad, delta, rho(t), weight)

        side_by_side.assert_equal(
            trajectory, side_by_side.reference(direction, w, batches)
        )


# The recorded runs, of noise that was recorded too.


arrays = functools.cache(recorded.arrays)


def tree(name, kind, t):
    run = arrays(name)
    key = f"{kind}/step{t + 1:03}/"
    return {leaf: run[key + leaf] for leaf in recorded.initial(name)}


@beside.runs(3, "random_sam")
def test_the_reference_is_as_recorded(name):
    h, run = beside.hyperparameters(name), arrays(name)

    def direction(t, w, batch):
        delta = tree(name, "delta", t)
        return random_sam.random_sam(
            w, batch.grad, delta, beside.radius(h, t), h["lam"]
        )

    trajectory, batches = beside.assert_descends_as_recorded(name, direction)
    beside.assert_near([batch.norms_taken[0] for batch in batches], run["g1_norm"])
    t = np.arange(len(batches))
    sigma = random_sam.sigma(t + 1, h["T"], h["sigma0"], h["inc"])
    beside.assert_near(sigma, run["sigma"], 1e-16)
    for t, w in enumerate(trajectory[:2]):
        delta = random_sam.noise(w, tree(name, "normal", t), sigma[t])
        assert recorded.deviation(delta, tree(name, "delta", t)) < 1e-15


@beside.runs_of_package(3, "random_sam")
def test_it_is_as_recorded(name, x64):
    h, run = beside.hyperparameters(name), recorded.arrays(name)
    grow = optax.cosine_decay_schedule(h["sigma0"], h["T"], alpha=h["inc"])
    sigma = lambda count: grow(count + 1)  # theirs starts at 1
    steps = np.arange(len(run["sigma"]))
    np.testing.assert_allclose(sigma(steps), run["sigma"], rtol=1e-12)

    def standard_normals(given, w):
        """The recorded noise, without its size at the weights of the step."""
        delta, sigma = given
        sizes = lambda w: (
            jnp.linalg.norm(w, axis=0) if w.ndim > 1 else jnp.linalg.norm(w) + 1e-16
        )
        noise = {leaf: delta[leaf] / (sigma * sizes(w[leaf])) for leaf in delta}
        return {"noise": noise}

    rho = beside.schedule(name, "rho_used")
    member = optax_sam.random_sam(rho, sigma=sigma, gradient_weight=h["lam"])
    tx = optax.chain(member, beside.base_optimizer(name))
    given = beside.stacked([tree(name, "delta", t) for t in steps]), run["sigma"]
    states = beside.assert_met(name, tx, given=given, extra=standard_normals)
    norms = optax_sam.metrics(states)["gradient_norm"][1:]
    np.testing.assert_allclose(norms, run["g1_norm"], rtol=1e-10)


# What it must equal.


def test_random_sam_without_noise_is_sam(x64):
    for weight in (0.01, 2.0, 300.0):
        member = optax_sam.random_sam(lib.RHO, sigma=0.0, gradient_weight=weight)
        # A small weight leaves the guard beside the norm more of the length.
        harness.assert_close(lib.trained(member), lib.trained_by("sam"), 0, atol=1e-10)
    lib.assert_apart(
        lib.trained(optax_sam.random_sam(lib.RHO, sigma=0.1)), lib.trained_by("sam")
    )


def smoothing(key=0, count=0, params=None, noise=None, sigma=0.5):
    """What R-SAM's rule adds to the weights first."""
    params = harness.tree() if params is None else params
    rule = ascent.smoothed(lib.RHO, sigma, key=key)
    grad_fn, points = lib.answering(params)
    extra = {"grad_fn": grad_fn, "count": count, "noise": noise}
    rule.update(params, rule.init(params), params, **extra)
    return jax.tree.map(jnp.subtract, points[0], params)


def test_noise_follows_the_norms_of_output_units(x64):
    rng = np.random.default_rng(3)
    params = {
        "conv": jnp.asarray(rng.normal(size=(2, 3, 4))),
        "bias": jnp.asarray(rng.normal(size=4)),
        "gain": jnp.asarray(-1.5),
    }
    noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    delta = smoothing(params=params, noise=noise, sigma=0.2)
    units = np.linalg.norm(np.asarray(params["conv"]).reshape(6, 4), axis=0)
    wanted = {
        "conv": 0.2 * units * noise["conv"],
        "bias": 0.2 * np.linalg.norm(params["bias"]) * noise["bias"],
        "gain": 0.2 * 1.5 * noise["gain"],
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(delta[name], value, rtol=1e-9, atol=1e-12)


def test_zero_leaves_get_almost_no_noise(x64):
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}
    delta = smoothing(params=params, noise=harness.like(params, 2.0))
    np.testing.assert_array_equal(delta["kernel"], 0)
    np.testing.assert_allclose(delta["bias"], 1e-16, rtol=1e-9)  # 1e-16 * 0.5 * 2


def test_noise_is_a_function_of_the_key_and_the_step(x64):
    params = {name: jnp.ones((4, 4)) for name in ("a", "b")}
    draw = lambda key, count: smoothing(key, count, params, sigma=1.0)
    first = draw(0, 0)
    harness.assert_equal(draw(0, 0), first)
    harness.assert_equal(draw(jax.random.key(0, impl="threefry2x32"), 0), first)
    for other in (draw(0, 1), draw(1, 0), draw(1, 1)):
        assert np.min(np.abs(lib.flat(other) - lib.flat(first))) > 1e-6


def test_normals_are_normal():
    """Within four standard errors of a million draws; 65,536 values, up to 4.3."""
    params = {name: jnp.zeros((1024, 1024)) for name in ("a", "b")}
    draw = jax.jit(lambda key: normal_like(key, params))
    z, b = (np.ravel(x).astype(float) for x in draw(generator(3, 0)).values())
    values, counts = np.unique(z, return_counts=True)
    quantiles = scipy.stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16)
    np.testing.assert_allclose(values, quantiles, rtol=2e-3)
    se = 1 / np.sqrt(z.size)
    for power, (moment, deviation) in enumerate(((0, 1), (1, 1.5), (0, 4), (3, 10)), 1):
        assert abs(np.mean(z**power) - moment) < 4 * deviation * se
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    tail = 2 * scipy.stats.norm.sf(3)
    assert abs(np.mean(np.abs(z) > 3) - tail) < 4 * np.sqrt(tail) * se
    # Neighbours, rows, leaves, steps, keys and devices have nothing in common.
    others = [np.roll(z, lag) for lag in (1, 2, 3, 1024, 1025)] + [b]
    keys = generator(3, 1), generator(4, 0), jax.random.fold_in(generator(3, 0), 1)
    others += [np.ravel(draw(key)["a"]) for key in keys]
    for other in others:
        assert abs(np.mean(z * other)) < 4 * se
        assert abs(np.mean((z**2 - 1) * (other**2 - 1))) < 8 * se


def test_smoothed_under_the_engines_mask_is_refused():
    rule = ascent.smoothed(lib.RHO)
    member = optax_sam.sharpness_aware(rule, mask={"layer": True, "gain": False})
    g, g_s = lib.pair()
    with pytest.raises(ValueError, match=r"ascent\.smoothed\(\.\.\., mask=mask\)"):
        lib.emitted(member, g, g_s)


def test_what_is_no_noise_is_refused():
    params = harness.tree()
    less = {"layer": params["layer"]}
    other = {**params, "gain": jnp.zeros(1)}
    for wrong in (less, other, 1.0):
        with pytest.raises(
            ValueError, match="noise must be a pytree of standard normal"
        ):
            smoothing(noise=wrong)
