"""SAMPa beside its transcription, and that beside the recorded runs and known cases."""

from reference import base, sampa
from trajectories import (
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
    SGD,
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

SIZE, SHARE, PREDICT_LR = map(rising, (0.2, 0.4, 0.15))
# The optimizer, what is predicted with, and the share of the prediction.
CASES = {
    "sampa": (sgd, "optimizer", SHARE),
    "without a share of the prediction": (sgd, "optimizer", 0.0),
    "adamw": (adamw, "optimizer", SHARE),
    "along the gradient": (sgd, "gradient", SHARE),
    "along the gradient, adamw": (adamw, "gradient", SHARE),
}


def transcription(predict, share):
    settings = {"predict": predict}
    settings["lr"] = PREDICT_LR if predict == "gradient" else None
    return lambda *problem: sampa.sampa(*problem, SIZE, share, **settings)


@double
@each_way(CASES)
def test_ten_steps_are_those_of_the_reference(name, compiled):
    optimizer, predict, share = CASES[name]
    build = lambda inner: optax_sam.sampa(
        inner,
        rho=SIZE,
        interpolation=share,
        predict=predict,
        learning_rate=PREDICT_LR if predict == "gradient" else None,
    )
    assert_steps_are_those_of_the_reference(
        build, transcription(predict, share), optimizer, compiled
    )


def test_the_cases_differ():
    ends = [path(lambda t, w, grad: grad(w))[-1]]
    for optimizer, *settings in CASES.values():
        trajectory = transcription(*settings)(W, 12, gradient, optimizer()[1])
        ends.append(trajectory[-1])
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert difference(a, b) > 1e-4


@runs(3, "sampa")
def test_the_reference_meets_the_recorded_runs(name):
    share = hyperparameters(name)["og"]
    assert_reference_meets_the_recorded_run(name, sampa.sampa, lam=share)


@runs_of_package(3, "sampa")
def test_the_recorded_runs_are_met(name, x64):
    h = hyperparameters(name)
    inner = base_optimizer(name)
    assert_met(name, optax_sam.sampa(inner, rho=h["rho"], interpolation=h["og"]))


# The transcription in known cases.


def sampa_points(steps, **settings):
    """The batches and points of the gradients, and the trajectory."""
    asked = []

    def grad(b, w):
        asked.append((b, w))
        return gradient(b, w)

    arguments = {"U": U, "rho": 0.3, "lam": 0.2} | settings
    return asked, sampa.sampa(W, steps, grad, **arguments)


def test_the_first_step_of_sampa_is_one_of_the_base_optimizer():
    asked, trajectory = sampa_points(1)
    assert [b for b, _ in asked] == [0, 0]
    assert all(difference(point, W) == 0.0 for _, point in asked)
    assert difference(trajectory[1], U(0, W, gradient(0, W))[0]) < 1e-15


def test_sampa_without_radius_and_share_has_delayed_batches():
    _, trajectory = sampa_points(12, rho=0.0, lam=0.0)
    delayed = lambda t, w: gradient(max(t - 1, 0), w)
    assert_same_path(trajectory, base.descend(W, 12, delayed, **SGD))


def test_sampa_predicts_the_step_that_it_would_take():
    """With lam = 1 the emitted gradient is g_y, so y is what a look-ahead reaches."""
    asked, trajectory = sampa_points(3, lam=1.0)
    (_, x), (_, y) = asked[4:]
    g_y = gradient(1, asked[3][1])
    assert_near(difference(x, trajectory[2]), 0.3, 1e-11)
    # The step from w_1 along g_y, and then once more the same g_y with the momentum.
    v = base.add(base.add(g_y, trajectory[1], 0.01), gradient(0, W), 0.9)
    v = base.add(v, base.scaled(W, 0.9 * 0.01))
    v = base.add(base.add(g_y, trajectory[2], 0.01), v, 0.9)
    assert difference(y, base.add(trajectory[2], v, -0.1)) < 1e-14


def test_the_prediction_of_the_paper_is_a_step_along_the_gradient():
    asked, trajectory = sampa_points(2, predict="gradient", lr=0.4)
    expected = base.add(trajectory[1], gradient(0, W), -0.4)
    assert difference(asked[3][1], expected) < 1e-15
    asked, trajectory = sampa_points(2, predict="gradient", lr=0.0)
    assert difference(asked[3][1], trajectory[1]) == 0.0
