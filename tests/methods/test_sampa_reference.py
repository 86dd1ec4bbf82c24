"""SAMPa beside its transcription, and both beside the recorded runs."""

import trajectories as beside
from reference import sampa
from wrapping import adamw, assert_reference_meets_the_recorded_run, sgd, ten_steps

import optax_sam

SIZE, SHARE, PREDICT_LR = map(beside.rising, (0.2, 0.4, 0.15))


def case(optimizer=sgd, predict="optimizer", share=SHARE):
    lr = PREDICT_LR if predict == "gradient" else None
    build = lambda inner: optax_sam.sampa(
        inner, rho=SIZE, interpolation=share, predict=predict, learning_rate=lr
    )
    settings = {"predict": predict, "lr": lr}
    transcription = lambda *given: sampa.sampa(*given, SIZE, share, **settings)
    return build, transcription, optimizer


CASES = {
    "sampa": case(),
    "without a share of the prediction": case(share=0.0),
    "adamw": case(adamw),
    "along the gradient": case(predict="gradient"),
    "along the gradient, adamw": case(adamw, "gradient"),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


@beside.runs(3, "sampa")
def test_the_reference_is_as_recorded(name):
    share = beside.hyperparameters(name)["og"]
    assert_reference_meets_the_recorded_run(name, sampa.sampa, lam=share)


@beside.runs_of_package(3, "sampa")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    inner = beside.base_optimizer(name)
    beside.assert_met(name, optax_sam.sampa(inner, rho=h["rho"], interpolation=h["og"]))
