"""VaSSO: the ascent along an average of the gradients."""

import harness
import methods_lib as lib
import numpy as np
from reference import vasso
from trajectories import Fresh, every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import when

SIZE, THETA = rising(0.2), rising(0.4)


def averaging(k=1, theta=THETA):
    """VaSSO whose hyperparameters change, on every k-th step."""

    def make():
        method = vasso.VaSSO(None)

        def direction(t, w, grad):
            method.rho, method.theta = SIZE(t), theta(t)
            return method.direction(w, grad)

        return every(k, direction)

    return Fresh(make)


CASES = {
    "vasso": (optax_sam.vasso(SIZE, theta=THETA), averaging()),
    "default theta": (optax_sam.vasso(SIZE), averaging(theta=lambda t: 0.9)),
    "every 3": (
        optax_sam.vasso(SIZE, theta=THETA, when=when.every_k(3)),
        averaging(3),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def direction(h):
    method = vasso.VaSSO(h["rho"], h["theta"])
    return lambda t, w, grad: method.direction(w, grad)


test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    2,
    "vasso",
    member=lambda name, h: optax_sam.vasso(h["rho"], theta=h["theta"]),
    direction=direction,
)


def test_of_new_gradients_alone_it_is_sam(x64):
    member = optax_sam.vasso(lib.RHO, theta=1.0)
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-5)
    lib.assert_apart(
        lib.trained(optax_sam.vasso(lib.RHO, theta=0.5)), lib.trained_by("sam")
    )


def test_devices_keep_one_average(x64):
    member = optax_sam.vasso(lib.RHO, theta=0.5, axis_name="shards")
    first, second, e, average = lib.averaged_on_devices(member)
    m = (first.mean(axis=0) + second) / 2
    wanted = lib.RHO * m / np.linalg.norm(m, axis=1, keepdims=True)
    np.testing.assert_allclose(e, wanted, rtol=1e-6)
    np.testing.assert_allclose(average, np.broadcast_to(m.mean(0), (4, 5)), rtol=1e-12)
