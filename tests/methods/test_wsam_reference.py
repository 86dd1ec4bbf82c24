"""WSAM beside its transcription, and both beside the recorded runs."""

import trajectories as beside
import wrapping
from reference import wsam

import optax_sam
from optax_sam import when

SIZE, GAMMA, LIMIT = map(beside.rising, (0.2, 0.4, 0.7))


def case(optimizer, lr, limit=None, k=1):
    build = lambda inner: optax_sam.wsam(
        inner,
        learning_rate=lr,
        rho=SIZE,
        gamma=GAMMA,
        max_norm=limit,
        when=when.every_k(k),
    )
    # Without an ascent the sharpness has no weight.
    gamma = lambda t: 0.0 if t % k else GAMMA(t)
    transcription = lambda *given: wsam.decoupled(*given, SIZE, gamma, lr, limit)
    return build, transcription, optimizer


CASES = {
    "wsam": case(wrapping.sgd, wrapping.LR),
    "clipped": case(wrapping.sgd, wrapping.LR, LIMIT),
    "clipped, every 2": case(wrapping.sgd, wrapping.LR, LIMIT, 2),
    "a learning rate of its own": case(wrapping.sgd, beside.rising(0.25)),
    "adamw": case(wrapping.adamw, wrapping.ADAM_LR),
    "adamw, clipped": case(wrapping.adamw, wrapping.ADAM_LR, LIMIT),
}
test_ten_steps_meet_the_reference, test_cases_differ = wrapping.ten_steps(CASES)


@beside.runs(3, "wsam_decoupled")
def test_the_reference_is_as_recorded(name):
    h = beside.hyperparameters(name)
    arguments = {"gamma": h["gamma"], "lr": h["lr"], "max_norm": h.get("max_norm")}
    wrapping.assert_reference_meets_the_recorded_run(name, wsam.decoupled, **arguments)


@beside.runs_of_package(3, "wsam_decoupled")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    numbers = {"learning_rate": h["lr"], "rho": h["rho"], "gamma": h["gamma"]}
    limit = h.get("max_norm")
    beside.assert_met(
        name, optax_sam.wsam(beside.base_optimizer(name), max_norm=limit, **numbers)
    )
