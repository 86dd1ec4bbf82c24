"""vSAM: SAM sampled by the variation of its gradient, and reused in between."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import side_by_side
import trajectories as beside
from methods_lib import RHO, assert_apart, later, trained
from reference import vsam
from side_by_side import draws, only

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
PROGRAMS = {}


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


@beside.double
@beside.each_way(CASES)
def test_the_steps_and_decisions_meet_the_reference(name, compiled):
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
    # So is the first rate.
    of_rule = {k: v for k, v in arguments.items() if k != "initial_rate"}
    step = PROGRAMS.setdefault(repr(of_rule), side_by_side.compiled(optimizer()))
    for seed in range(3 if compiled else 1):
        w, batches = side_by_side.problem(seed, STEPS)
        method, u, log = transcription(**arguments), draws(seed, STEPS), []

        def direction(t, w, grad, method=method, u=u, log=log):
            d = method.direction(w, grad, u[t])
            log.append((method.controller.samples, method.controller.s))
            return d

        state = optimizer(key=seed).init(w)
        trajectory, states = side_by_side.package(step, w, state, batches)
        wanted = side_by_side.reference(direction, w, batches)
        samples, s = np.transpose(log)
        decisions = optax_sam.ascends_next(states)[:-1]
        np.testing.assert_array_equal(decisions, np.diff(samples, prepend=0))
        beside.assert_near(optax.tree.get(states, "rate")[:-1], s)
        side_by_side.assert_equal(trajectory, wanted)


# The recorded runs.


@beside.runs(4, "vsam")
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

    beside.assert_descends_as_recorded(name, direction)
    sampled, samples, used, s, ratio, var = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(sampled, run["sampled"])
    np.testing.assert_array_equal(samples, run["n_samples"])
    np.testing.assert_array_equal(used, run["used_in_window"])
    for found, array in ((s, "s"), (ratio, "ratio"), (var, "var")):
        beside.assert_near(found, run[array])


each_run = pytest.mark.parametrize(
    "name", [x if x == "vsam_tail2" else later(x) for x in recorded.runs("vsam")]
)


def optimizer(name):
    h = beside.hyperparameters(name)
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
    )
    return optax.chain(member, beside.base_optimizer(name))


@each_run
def test_the_recorded_decisions_lead_along_the_recorded_runs(name, x64):
    run = recorded.arrays(name)
    states = beside.assert_met(name, optimizer(name), ascend=run["sampled"])
    beside.assert_near(optax.tree.get(states, "rate")[:-1], run["s"])
    samples = optax_sam.metrics(states)["ascents"][1:]
    np.testing.assert_array_equal(samples, run["n_samples"])
    latest = {"psf_norms": "psf_norm", "ratios": "ratio", "variances": "var"}
    for field, array in latest.items():
        ring = optax.tree.get(states, field)[1:]
        beside.assert_near(ring[:, -1], run[array])
    used = optax.tree.get(states, "used")[:-1]
    warm = beside.hyperparameters(name)["warmup_steps"]
    before = run["used_in_window"] - run["sampled"]
    np.testing.assert_array_equal(used[warm:], before[warm:])


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
