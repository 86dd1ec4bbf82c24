"""vSAM: SAM sampled by the variation of its gradient, and reused in between."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
import side_by_side
from methods_lib import RHO, assert_apart, on_a_quadratic, trained
from reference import base, vsam
from side_by_side import draws, only
from trajectories import (
    assert_descends_as_recorded,
    assert_met,
    assert_near,
    base_optimizer,
    descend,
    double,
    each_way,
    hyperparameters,
    runs,
)

import optax_sam

CASES = {
    "plain": {},
    "no forced quota": {"force_quota": False},
    "without reuse": {"reuse_decay": 0.0},
    "one reuse": {"max_reuse": 1},
    "unlimited reuse": {"max_reuse": None, "reuse_decay": 0.95},
    "last layer": {"norm_mask": only("layer1/kernel", "layer1/bias")},
    "warm-up of two windows": {"warmup_steps": None},
    "rings not full": {"warmup_steps": 4},
    "no warm-up": {"warmup_steps": 0},
    "insensitive": {"sensitivity": 0.0},
    "rho = 0": {"rho": 0.0},
    "a third at the start": {"initial_rate": 0.34},
    "as many as allowed at the start": {"initial_rate": 0.7, "sensitivity": 0.0},
    "less than one at the start": {"initial_rate": 0.01, "warmup_steps": 2},
}
STEPS = 60


def transcription(**arguments):
    """reference.vsam for the package's arguments."""
    window, warmup = arguments["window"], arguments["warmup_steps"]
    limit, watched = arguments["max_reuse"], arguments["norm_mask"]
    return vsam.VSAM(
        arguments["rho"],
        arguments["reuse_decay"],
        max_reuse=np.inf if limit is None else limit,
        tail=[leaf for leaf in watched if watched[leaf]] if watched else None,
        K=window,
        m=arguments["num_slices"],
        a=arguments["sensitivity"],
        max_rate=arguments["max_rate"],
        warmup=2 * window if warmup is None else warmup,
        force_quota=arguments["force_quota"],
        initial_rate=arguments.get("initial_rate"),
    )


class Logged:
    """The transcription's direction, with its decisions and its rates."""

    def __init__(self, method, u):
        self.method, self.u, self.sampled, self.s = method, u, [], []

    def __call__(self, t, w, grad):
        control = self.method.controller
        before = control.samples
        d = self.method.direction(w, grad, self.u[t])
        self.sampled.append(control.samples > before)
        self.s.append(control.s)
        return d

    def assert_decided(self, states):
        decisions = optax_sam.ascends_next(states)[:-1]
        np.testing.assert_array_equal(decisions, self.sampled)
        assert_near(optax.tree.get(states, "rate")[:-1], self.s)


@double
@each_way(CASES)
def test_the_steps_and_decisions_are_those_of_the_reference(name, compiled):
    arguments = {
        "rho": 0.2,
        "window": 6,
        "num_slices": 2,
        "sensitivity": 0.7,
        "max_rate": 0.7,
        "warmup_steps": 13,
        "reuse_decay": 0.8,
        "max_reuse": 3,
        "norm_mask": None,
        "force_quota": True,
    } | CASES[name]
    # The key is part of the state alone.
    optimizer = lambda **key: side_by_side.optimizer(optax_sam.vsam(**arguments, **key))
    step = side_by_side.compiled(optimizer())
    for seed in range(3 if compiled else 1):
        w, batches = side_by_side.problem(seed, STEPS)
        state = optimizer(key=seed).init(w)
        trajectory, states = side_by_side.package(step, w, state, batches)
        expected = Logged(transcription(**arguments), draws(seed, STEPS))
        wanted = side_by_side.reference(expected, w, batches)
        expected.assert_decided(states)
        side_by_side.assert_equal(trajectory, wanted)


# The recorded runs.


@runs(4, "vsam")
def test_the_reference_decides_and_descends_as_recorded(name):
    run, method = recorded.arrays(name), recorded.transcribed_vsam(name)
    control, log = method.controller, []

    def direction(t, w, batch):
        before = control.samples
        d = method.direction(w, batch.grad, 1.0 - run["uniform"][t])
        sampled = control.samples > before
        r, v = control.r[-1], control.v[-1]
        log.append((sampled, control.samples, control.used, control.s, r, v))
        return d

    assert_descends_as_recorded(name, direction)
    sampled, samples, used, s, ratio, var = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(sampled, run["sampled"])
    np.testing.assert_array_equal(samples, run["n_samples"])
    np.testing.assert_array_equal(used, run["used_in_window"])
    for found, array in ((s, "s"), (ratio, "ratio"), (var, "var")):
        assert_near(found, run[array])


@runs(4, "vsam")
def test_the_controller_of_the_reference_decides_as_recorded(name):
    h, run = hyperparameters(name), recorded.arrays(name)
    numbers = {"K": h["K"], "m": h["m"], "a": h["a"], "max_rate": h["max_rate"]}
    series = run["g_norm"], run["psf_norm"], 1.0 - run["uniform"]
    sampled, s = vsam.simulate(*series, **numbers, warmup=h["warmup_steps"])
    np.testing.assert_array_equal(sampled, run["sampled"])
    assert_near(s, run["s"])


def slow_but(soon):
    """Parametrizes by a key and a recorded run, all but one of which CI runs."""
    marks = lambda name: () if name == soon else pytest.mark.slow
    named = enumerate(recorded.runs("vsam"))
    params = [pytest.param(i, name, marks=marks(name)) for i, name in named]
    return pytest.mark.parametrize(("key", "name"), params)


def optimizer(name, key=0):
    h = hyperparameters(name)
    tail = recorded.TENSORS[-h["last_layer"] :]
    member = optax_sam.vsam(
        h["rho"],
        window=h["K"],
        num_slices=h["m"],
        sensitivity=h["a"],
        max_rate=h["max_rate"],
        warmup_steps=h["warmup_steps"],
        reuse_decay=h["beta"],
        norm_mask={leaf: leaf in tail for leaf in recorded.TENSORS},
        key=key,
    )
    return optax.chain(member, base_optimizer(name))


@slow_but("vsam_tail2")
def test_the_recorded_decisions_lead_along_the_recorded_runs(key, name, x64):
    run = recorded.arrays(name)
    states = assert_met(name, optimizer(name, key), ascend=run["sampled"])
    assert_near(optax.tree.get(states, "rate")[:-1], run["s"])
    samples = optax_sam.metrics(states)["ascents"][1:]
    np.testing.assert_array_equal(samples, run["n_samples"])
    latest = {"psf_norms": "psf_norm", "ratios": "ratio", "variances": "var"}
    for field, array in latest.items():
        ring = optax.tree.get(states, field)[1:]
        assert_near(ring[:, -1], run[array])
    used = optax.tree.get(states, "used")[:-1]
    warm = hyperparameters(name)["warmup_steps"]
    before = run["used_in_window"] - run["sampled"]
    np.testing.assert_array_equal(used[warm:], before[warm:])


@slow_but("vsam_fast")
def test_it_decides_by_itself_as_the_reference(key, name, x64):
    h = hyperparameters(name)
    trajectory, states = descend(name, optimizer(name, key))
    expected = Logged(recorded.transcribed_vsam(name), draws(key, h["steps"]))

    def direction(t, w):
        return expected(t, w, lambda p: base.mlp(p, *recorded.data(name, t))[1])

    wanted = base.descend(
        recorded.initial(name),
        h["steps"],
        direction,
        lr=h["lr"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
    )
    expected.assert_decided(states)
    for t, w in enumerate(wanted):
        found = jax.tree.map(lambda x: x[t], trajectory)  # noqa: B023
        assert recorded.deviation(found, w) < 1e-10, t


# What it must equal.

WINDOW = {"window": 4, "num_slices": 2, "warmup_steps": 7}


def test_without_reuse_no_tree_is_stored(x64):
    """vSAM-A equals decay 0 and reuse 0 that do store one."""
    without = optax_sam.vsam(RHO, reuse_decay=0.0, **WINDOW)
    assert harness.member_state(without.init(harness.tree())).blend == ()
    wanted = trained(without)
    for changes in ({"reuse_decay": jnp.asarray(0.0)}, {"max_reuse": 0}):
        member = optax_sam.vsam(RHO, **changes, **WINDOW)
        harness.assert_close(trained(member), wanted, 1e-12)
    assert_apart(wanted, trained(optax_sam.vsam(RHO, **WINDOW)))


def test_without_sensitivity_it_samples_once_per_window():
    tx = optax_sam.vsam(RHO, sensitivity=0.0, **WINDOW)
    params, g = harness.tree(), harness.tree(1)

    def step(state, scale):
        g_s = optax.tree.scale(scale, harness.tree(2))
        after = tx.update(g, state, params, grad_fn=lambda p: g_s)[1]
        return after, state.when.ascends

    scales = 1.0 + jnp.arange(7 + 3 + 40) % 3
    decisions = jax.lax.scan(step, tx.init(params), scales)[1].tolist()
    assert decisions[:10] == 7 * [True] + 3 * [False]
    assert [sum(decisions[i : i + 4]) for i in range(10, 50, 4)] == 10 * [1]


@pytest.mark.parametrize(("decay", "max_reuse"), [(0.8, 3), (0.5, None), (1.0, 2)])
def test_the_difference_is_reused(decay, max_reuse, x64):
    """``g + beta^j PSF`` on the j-th step after, up to the last reuse."""
    rule = optax_sam.blend.reuse_difference(decay, max_reuse)
    tx = optax_sam.sharpness_aware(optax_sam.ascent.l2(RHO), blend=rule)
    params, g_s = harness.tree(), harness.tree(2)
    update = lambda g, state, ascend: tx.update(
        g, state, params, grad_fn=lambda p: g_s, ascend=ascend
    )
    state = tx.init(params)
    # The second time the memory is not empty, and its age not zero.
    for sampled in (harness.tree(1), harness.tree(3)):
        d, state = update(sampled, state, ascend=True)
        harness.assert_equal(d, g_s)
        psf = jax.tree.map(jnp.subtract, g_s, sampled)
        for j in range(1, 7):
            g = harness.tree(10 + j)
            d, state = update(g, state, ascend=False)
            weight = decay**j if max_reuse is None or j <= max_reuse else 0.0
            wanted = jax.tree.map(lambda x, y, w=weight: x + w * y, g, psf)
            harness.assert_close(d, wanted, 1e-12)


def test_on_a_quadratic_what_is_stored_is_known(x64):
    """The PSF, its norm and its ratio to the gradient's."""
    _, g, _, _, state = on_a_quadratic(optax_sam.vsam(RHO, **WINDOW))
    psf = RHO * problems.hessian() @ g / np.linalg.norm(g)
    stored = np.concatenate(jax.tree.leaves(state.blend.psf))
    np.testing.assert_allclose(stored, psf, rtol=1e-9, atol=1e-12)
    size = np.linalg.norm(psf)
    np.testing.assert_allclose(optax_sam.metrics(state)["psf_norm"], size, rtol=1e-9)
    ratio = size / np.linalg.norm(g)
    np.testing.assert_allclose(state.when.ratios[-1], ratio, rtol=1e-9)
