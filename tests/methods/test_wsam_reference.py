"""WSAM beside its transcription, and that beside the recorded runs and known cases."""

import numpy as np
import pytest
from reference import base, sam, wsam
from side_by_side import problem
from trajectories import (
    STEPS,
    assert_met,
    assert_near,
    base_optimizer,
    double,
    each_way,
    hyperparameters,
    rising,
    runs,
    runs_of_package,
)
from wrapping import (
    ADAM_LR,
    LR,
    U,
    W,
    adamw,
    assert_reference_meets_the_recorded_run,
    assert_same_path,
    assert_steps_are_those_of_the_reference,
    difference,
    gradient,
    path,
    sgd,
)

import optax_sam
from optax_sam import when

SIZE, GAMMA, LIMIT = map(rising, (0.2, 0.4, 0.7))
# The optimizer, the learning rate, the limit of norms, and how often to ascend.
CASES = {
    "wsam": (sgd, LR, None, 1),
    "clipped": (sgd, LR, LIMIT, 1),
    "clipped, every 2": (sgd, LR, LIMIT, 2),
    "a learning rate of its own": (sgd, rising(0.25), None, 1),
    "adamw": (adamw, ADAM_LR, None, 1),
    "adamw, clipped": (adamw, ADAM_LR, LIMIT, 1),
}


def transcription(lr, limit, k):
    """Without an ascent the sharpness has no weight."""
    gamma = lambda t: 0.0 if t % k else GAMMA(t)
    return lambda *problem: wsam.decoupled(*problem, SIZE, gamma, lr, limit)


@double
@each_way(CASES)
def test_ten_steps_are_those_of_the_reference(name, compiled):
    optimizer, lr, limit, k = CASES[name]
    build = lambda inner: optax_sam.wsam(
        inner,
        learning_rate=lr,
        rho=SIZE,
        gamma=GAMMA,
        max_norm=limit,
        when=when.every_k(k),
    )
    assert_steps_are_those_of_the_reference(
        build, transcription(lr, limit, k), optimizer, compiled
    )


def test_the_cases_differ():
    ends = [path(lambda t, w, grad: grad(w))[-1]]
    for optimizer, *settings in CASES.values():
        trajectory = transcription(*settings)(W, 12, gradient, optimizer()[1])
        ends.append(trajectory[-1])
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert difference(a, b) > 1e-4


@pytest.mark.parametrize("name", ["clipped", "adamw, clipped"])
def test_the_limit_is_reached_at_times(name, monkeypatch):
    clip, reached = wsam.clipped, []

    def counted(x, limit):
        short = clip(x, limit)
        reached.append(base.norm(short) < base.norm(x))
        return short

    monkeypatch.setattr(wsam, "clipped", counted)
    optimizer, *settings = CASES[name]
    w, batches = problem(0, STEPS)
    grad = lambda t, p: base.mlp(p, *batches[t])[1]
    transcription(*settings)(w, STEPS, grad, optimizer()[1])
    assert 0.05 < np.mean(reached) < 0.95


@runs(3, "wsam_decoupled")
def test_the_reference_meets_the_recorded_runs(name):
    h = hyperparameters(name)
    arguments = {"gamma": h["gamma"], "lr": h["lr"], "max_norm": h.get("max_norm")}
    assert_reference_meets_the_recorded_run(name, wsam.decoupled, **arguments)


@runs_of_package(3, "wsam_decoupled")
def test_the_recorded_runs_are_met(name, x64):
    h = hyperparameters(name)
    tx = optax_sam.wsam(
        base_optimizer(name),
        learning_rate=h["lr"],
        rho=h["rho"],
        gamma=h["gamma"],
        max_norm=h.get("max_norm"),
    )
    assert_met(name, tx)


# The transcription in known cases.


g = lambda w: gradient(0, w)


def decoupled(U, gamma, **settings):
    return wsam.decoupled(W, 12, gradient, U, 0.3, gamma, 0.1, **settings)


def test_wsam_without_weight_is_the_base_optimizer():
    plain = path(lambda t, w, grad: grad(w))
    assert_same_path(decoupled(U, 0.0), plain)
    assert difference(wsam.coupled(W, g, 0.3, 0.0), g(W)) == 0.0


def test_wsam_of_equal_weights_is_sam():
    assert difference(wsam.coupled(W, g, 0.3, 0.5), sam.sam(W, g, 0.3)) == 0.0
    settings = {"momentum": 0.0, "weight_decay": 0.01}
    as_sam = path(lambda t, w, grad: sam.sam(w, grad, 0.3), **settings)
    assert_same_path(decoupled(base.sgd(0.1, 0.0, 0.01), 0.5), as_sam)


@pytest.mark.parametrize("gamma", [0.2, 0.8])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_coupled_and_decoupled_wsam_coincide_without_momentum(gamma, limit):
    direction = lambda t, w, grad: wsam.coupled(w, grad, 0.3, gamma, limit)
    coupled = path(direction, momentum=0.0)
    plain = base.sgd(0.1, 0.0, 0.01)
    assert_same_path(decoupled(plain, gamma, max_norm=limit), coupled)
    with_momentum = decoupled(U, gamma, max_norm=limit)
    assert difference(with_momentum[-1], path(direction)[-1]) > 0.01


def test_wsam_clips_each_gradient_after_the_ascent():
    limit = 0.5 * base.norm(g(W))
    a, a_s = wsam.gradients(W, g, 0.3, limit)
    b, b_s = wsam.gradients(W, g, 0.3)
    for short, long in ((a, b), (a_s, b_s)):
        assert_near(base.norm(short), limit, 1e-6)
        assert difference(base.unit(short), base.unit(long)) < 1e-11
    assert difference(wsam.gradients(W, g, 0.3, 1e3)[1], b_s) == 0.0


def test_the_wrapped_sgd_is_that_of_descend():
    w, v, expected = W, None, path(lambda t, w, grad: grad(w))
    for t, wanted in enumerate(expected[1:]):
        w, v = U(t, w, gradient(t, w), v)
        assert difference(w, wanted) < 1e-14


def test_the_first_step_of_adamw_is_a_step_of_the_sign():
    d = g(W)
    w, _ = base.adamw(0.1, eps=0.0, weight_decay=0.5)(0, W, d)
    for leaf in W:
        expected = W[leaf] - 0.1 * (np.sign(d[leaf]) + 0.5 * W[leaf])
        assert_near(w[leaf], expected, 1e-13)
