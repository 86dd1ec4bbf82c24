"""F-SAM: the ascent along what is new in the gradient."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import optax
import pytest
from reference import friendly_sam
from trajectories import Fresh, every, recorded_runs, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE, SIGMA, DECAY = map(rising, (0.2, 0.5, 0.4))


def friendly(k=1, sigma=SIGMA, decay=DECAY):
    """F-SAM whose hyperparameters change, on every k-th step."""

    def make():
        method = friendly_sam.FriendlySAM()

        def direction(t, w, grad):
            method.rho, method.sigma, method.lam = SIZE(t), sigma(t), decay(t)
            return method.direction(w, grad)

        return every(k, direction)

    return Fresh(make)


CASES = {
    "friendly_sam": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=DECAY),
        friendly(),
    ),
    "sigma = 1": (
        optax_sam.friendly_sam(SIZE, sigma=1.0, decay=DECAY),
        friendly(sigma=lambda t: 1.0),
    ),
    "without memory": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=0.0),
        friendly(decay=lambda t: 0.0),
    ),
    "every 3": (
        optax_sam.friendly_sam(SIZE, sigma=SIGMA, decay=DECAY, when=when.every_k(3)),
        friendly(3),
    ),
}
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def direction(h):
    method = friendly_sam.FriendlySAM(h["rho"], h["sigma"], h["lmbda"])
    return lambda t, w, grad: method.direction(w, grad)


test_the_reference_is_as_recorded, test_it_is_as_recorded = recorded_runs(
    3,
    "fsam",
    member=lambda name, h: optax_sam.friendly_sam(
        h["rho"], sigma=h["sigma"], decay=h["lmbda"]
    ),
    direction=direction,
)


def followed(rule, gradients, params=None):
    """Offsets of a rule on a series of gradients, and its states."""
    state = rule.init(gradients[0])
    for t, g in enumerate(gradients):
        e, state = rule.update(g, state, params, count=t)
        yield e, state


def test_friendly_sam_that_takes_nothing_out_is_sam(x64):
    member = optax_sam.friendly_sam(lib.RHO, sigma=0.0)
    harness.assert_close(lib.trained(member), lib.trained_by("sam"), 1e-12)
    lib.assert_apart(
        lib.trained(optax_sam.friendly_sam(lib.RHO)), lib.trained_by("sam")
    )


def test_both_orders_of_friendly_sam_have_one_direction(x64):
    """With ``sigma = 1`` the paper's, with the average of this step taken out."""
    gradients = [harness.tree(seed) for seed in range(4)]
    for t, (e, state) in enumerate(followed(ascent.friendly(lib.RHO), gradients)):
        if t:
            a = lib.flat(gradients[t]) - lib.flat(state.average)
            wanted = lib.RHO * a / np.linalg.norm(a)
            np.testing.assert_allclose(lib.flat(e), wanted, rtol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.6, 0.999])
def test_a_constant_gradient_leaves_no_direction(decay, precision):
    """Whatever its value, compiled or not: rounding does not add up to one."""
    with jax.enable_x64(precision == "float64"):
        rule = ascent.friendly(lib.RHO, 1.0, decay)
        g = jnp.asarray(np.random.default_rng(0).normal(size=(200, 3)), precision)

        def run(g, steps):
            step = lambda state, _: rule.update(g, state, g)[::-1]
            return jax.lax.scan(step, rule.init(g), length=steps)[1]

        e = np.asarray(jax.jit(jax.vmap(run, (0, None)), static_argnums=1)(g, 400))
        np.testing.assert_allclose(np.linalg.norm(e[:, 0], axis=-1), lib.RHO, rtol=1e-5)
        np.testing.assert_array_equal(e[:, 1:], 0)
        lengths = [float(optax.tree.norm(e)) for e, _ in followed(rule, 20 * [g])]
        assert lengths == [pytest.approx(lib.RHO, rel=1e-5)] + 19 * [0.0]


def test_devices_have_one_average_and_noises_of_their_own(x64):
    """The average of the mean gradient; and each ascends against it by itself."""
    member = optax_sam.friendly_sam(lib.RHO, sigma=1.0, decay=0.6, axis_name="shards")
    first, second, e, average = lib.averaged_on_devices(member)
    m = first.mean(axis=0)
    a = second - m
    wanted = lib.RHO * a / np.linalg.norm(a, axis=1, keepdims=True)
    np.testing.assert_allclose(e, wanted, rtol=1e-9)
    m = 0.6 * m + 0.4 * second.mean(axis=0)
    np.testing.assert_allclose(average, np.broadcast_to(m, (4, 5)), rtol=1e-12)
