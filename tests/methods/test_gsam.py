"""GSAM: the perturbed loss and its gap to the clean one together."""

import harness
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import pytest
import recorded
import trajectories as beside
from reference import gsam

import optax_sam
from optax_sam import ascent, blend, when

LR = optax.cosine_decay_schedule(0.3, beside.STEPS, alpha=0.1)
TIED = lambda t: gsam.tied_radius(float(LR(t)), 0.3, 0.03, 0.4, 0.05)
SIZE, ALPHA = beside.rising(0.2), lambda t: 0.9 - 0.05 * t
ONE = lambda t, w, grad: gsam.gsam(w, grad, 0.3, 0.4)


def of(rule, alpha=0.4, minimize="perturbed"):
    return optax_sam.sharpness_aware(rule, blend=blend.surrogate_gap(alpha, minimize))


CASES = {
    "gsam": (optax_sam.gsam(0.3, alpha=0.4), ONE),
    "alpha = 1": (
        optax_sam.gsam(0.3, alpha=1.0),
        lambda t, w, grad: gsam.gsam(w, grad, 0.3, 1.0),
    ),
    "every 3": (optax_sam.gsam(0.3, when=when.every_k(3)), beside.every(3, ONE)),
    "schedules": (
        optax_sam.gsam(SIZE, alpha=ALPHA),
        lambda t, w, grad: gsam.gsam(w, grad, SIZE(t), ALPHA(t)),
    ),
    "radius tied to the learning rate": (
        optax_sam.gsam(optax_sam.rho_from_lr(LR, 0.05, 0.4)),
        lambda t, w, grad: gsam.gsam(w, grad, TIED(t), 0.4),
    ),
    "clean": (
        of(ascent.l2(0.3), 0.7, "clean"),
        lambda t, w, grad: gsam.gsam(w, grad, 0.3, 0.7, minimize="clean"),
    ),
    "weight-scaled": (
        of(ascent.weight_scaled(0.5)),
        lambda t, w, grad: gsam.gsam(w, grad, 0.5, 0.4, ascend=gsam.weight_scaled),
    ),
    "adaptive": (
        of(ascent.adaptive(2.0, eta=0.0, adapt=True)),
        lambda t, w, grad: gsam.gsam(w, grad, 2.0, 0.4, ascend=gsam.adaptive),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = beside.ten_steps(CASES)


def member(name, h):
    """The named method where it is one, its radius tied to the learning rate."""
    rho = beside.schedule(name, "rho_used")
    if h.get("adaptive_perturbation"):
        return of(ascent.weight_scaled(rho), h["alpha"])
    if h.get("adaptive"):
        return of(ascent.adaptive(rho, eta=0.0, adapt=True), h["alpha"])
    if not h.get("minimize_fp", True):
        return of(ascent.l2(rho), h["alpha"], "clean")
    if "rho_max" in h:
        steps = recorded.RUNS[name]["steps"]
        low, high = h["lr_min"], h.get("lr_max", h.get("lr"))
        decay = {
            "linear": optax.linear_schedule(high, low, steps),
            "cosine": optax.cosine_decay_schedule(high, steps, low / high),
        }[h.get("schedule", h.get("lr_schedule"))]
        # Optax computes in float32 where it is given an int32.
        lr, used = lambda count: decay(jnp.asarray(count, float)), recorded.arrays(name)
        np.testing.assert_allclose(lr(np.arange(steps)), used["lr_used"], rtol=1e-12)
        rho = optax_sam.rho_from_lr(lr, h["rho_min"], h["rho_max"])
    return optax_sam.gsam(rho, alpha=h["alpha"])


def direction(h):
    ascend = gsam.adaptive if h.get("adaptive") else gsam.ascend
    ascend = gsam.weight_scaled if h.get("adaptive_perturbation") else ascend
    minimize = "perturbed" if h.get("minimize_fp", True) else "clean"
    return lambda t, w, grad: gsam.gsam(
        w, grad, beside.radius(h, t), h["alpha"], minimize, ascend
    )


test_the_reference_is_as_recorded, test_it_is_as_recorded = beside.recorded_runs(
    8, "gsam", member=member, direction=direction
)


def clean(alpha):
    return of(ascent.l2(lib.RHO), alpha, "clean")


def test_without_a_gap_it_is_sam_or_the_base_optimizer(x64):
    for build, name in (
        (lambda alpha: optax_sam.gsam(lib.RHO, alpha=alpha), "sam"),
        (clean, "sgd"),
    ):
        harness.assert_close(lib.trained(build(0.0)), lib.trained_by(name), 1e-12)
        lib.assert_apart(lib.trained(build(0.5)), lib.trained_by(name))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_main_gradient_is_left_alone(dtype, scale, x64):
    """What is subtracted is normal to it, and its own part stays what it was."""
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    g, g_s = lib.pair(scale, dtype)
    for member, main, other, sign in (
        (optax_sam.gsam(lib.RHO), g_s, g, -1),
        (clean(0.4), g, g_s, 1),
    ):
        d, _ = lib.emitted(member, g, g_s)
        a, b, d = map(lib.flattened, (main, other, d))
        normal = sign * (d - a) / 0.4
        sizes = np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(normal) > 0.1 * np.linalg.norm(b)
        assert abs(normal @ a) < 10 * tolerance * sizes
        np.testing.assert_allclose(d @ a, a @ a, rtol=10 * tolerance)
        wanted = b - (a @ b) / (a @ a) * a
        close = 10 * tolerance * np.linalg.norm(b)
        np.testing.assert_allclose(normal, wanted, rtol=0, atol=close)


def test_a_zero_gradient_is_emitted():
    """It has no direction to be normal to."""
    g, g_s = lib.pair()
    zero = harness.like(g, 0.0)
    for member, first, second in (
        (optax_sam.gsam(lib.RHO), g, zero),
        (clean(0.4), zero, g_s),
    ):
        harness.assert_equal(lib.emitted(member, first, second)[0], zero)
