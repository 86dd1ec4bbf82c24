"""GAM: flatness of first order, from four gradients."""

import functools
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from methods_lib import (
    RHO,
    answering,
    assert_apart,
    flat,
    pair,
    points_of,
    trained,
    trained_by,
)
from reference import gam
from trajectories import (
    biases,
    every,
    mask_of_biases,
    recorded_runs,
    rising,
    ten_steps,
)

import optax_sam
from optax_sam import when

SCHEDULES = GRAD_RHO, NORM_RHO, ALPHA, BETA, GAMMA = tuple(
    map(rising, (0.1, 0.2, 0.4, 0.4, 0.5))
)


def member(**changes):
    settings = {"norm_rho": NORM_RHO, "beta0": BETA, "beta1": ALPHA, "gamma": GAMMA}
    return optax_sam.gam(GRAD_RHO, **settings | changes)


def direction(h_minus="paper", masked=False):
    def emitted(t, w, grad):
        numbers = (x(t) for x in (NORM_RHO, GRAD_RHO, ALPHA, BETA, GAMMA))
        leaves = biases(w) if masked else None
        return gam.gam(w, grad, *numbers, h_minus=h_minus, leaves=leaves)

    return emitted


CASES = {
    "gam": (member(), direction()),
    "as in the code": (member(h_minus="code"), direction("code")),
    "every 2": (
        member(when=when.every_k(2, phase=1)),
        every(2, direction(), phase=1),
    ),
    "masked": (member(mask=mask_of_biases), direction(masked=True)),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


def recorded_member(name, h):
    return optax_sam.gam(
        h["grad_rho"],
        norm_rho=h["grad_norm_rho"],
        beta0=h["grad_beta_0"],
        beta1=h["grad_beta_1"],
        gamma=h["grad_gamma"],
        h_minus="code",
    )


def recorded_direction(h):
    numbers = ("grad_norm_rho", "grad_rho", "grad_beta_1", "grad_beta_0", "grad_gamma")
    numbers = [h[name] for name in numbers]
    return lambda t, w, grad: gam.gam(w, grad, *numbers, h_minus="code")


test_the_reference_meets_the_recorded_runs, test_the_recorded_runs_are_met = (
    recorded_runs(2, "gam", member=recorded_member, direction=recorded_direction)
)


def gam_by_hand(w, g_0, gradients, rho, rho_h, beta, alpha, gamma, h_minus="paper"):
    """Points and result; ``w`` and all gradients flat."""
    unit = lambda x: x / np.linalg.norm(x)
    g_1, g_2, g_3 = gradients
    w_2 = w + rho_h * unit(g_1 - g_0)
    points = [w + rho * unit(g_0), w_2, w_2 + rho * unit(g_2)]
    h_plus = alpha * g_1 + (1 - alpha) * g_3
    h_less = (beta if h_minus == "paper" else 1) * g_0 + (1 - beta) * g_2
    normal = h_less - (h_less @ h_plus) / (h_plus @ h_plus) * h_plus
    return points, h_plus - gamma * normal, h_plus


@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_by_hand(h_minus, x64):
    """Four gradients, three points; and ``<d, h_plus> = ||h_plus||^2``."""
    w, *gradients = (harness.tree(seed) for seed in range(5))
    numbers = 0.1, 0.4, 0.3, 0.8, 0.7
    rho, rho_h, beta, alpha, gamma = numbers
    member = optax_sam.gam(
        *(rho,),
        norm_rho=rho_h,
        beta0=lambda t: beta / (t + 1),
        beta1=lambda t: alpha / (t + 1),
        gamma=lambda t: gamma / (t + 1),
        h_minus=h_minus,
    )
    for t in range(2):  # schedules at the step, not at the number of gradients
        state = member.init(w)._replace(count=jnp.asarray(t))
        grad_fn, points = answering(*gradients[1:])
        d, _ = member.update(gradients[0], state, w, grad_fn=grad_fn)
        wanted = [beta / (t + 1), alpha / (t + 1), gamma / (t + 1)]
        g_0, *others = map(flat, gradients)
        by_hand = gam_by_hand(flat(w), g_0, others, rho, rho_h, *wanted, h_minus)
        for found, point in zip(points, by_hand[0], strict=True):
            np.testing.assert_allclose(flat(found), point, rtol=1e-10)
        np.testing.assert_allclose(flat(d), by_hand[1], rtol=1e-10)
        h_plus = by_hand[2]
        np.testing.assert_allclose(flat(d) @ h_plus, h_plus @ h_plus, rtol=1e-10)


def test_gam_without_the_norm_is_sam(x64):
    member = optax_sam.gam(RHO, gamma=0.0, beta1=1.0)
    harness.assert_close(trained(member), trained_by("sam"), 1e-12)
    # The other share is that of a gradient elsewhere.
    assert_apart(trained(optax_sam.gam(RHO, gamma=0.0)), trained_by("sam"))


def test_gam_without_the_step_along_the_difference_is_gsam(x64):
    gsam = trained(optax_sam.gsam(RHO, alpha=0.4))
    for beta1, beta0 in ((0.0, 0.5), (0.6, 1.0)):
        member = optax_sam.gam(RHO, norm_rho=0.0, gamma=0.4, beta0=beta0, beta1=beta1)
        harness.assert_close(trained(member), gsam, 1e-11)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_does_not_follow_rounding(h_minus, precision):
    """With no radius the difference is rounding, however large the other radius.

    In ``grad_fn`` the gradient has rounding of its own, as another program gives.
    """
    with jax.enable_x64(precision == "float64"):
        w, g = harness.tree(), harness.tree(1)
        member = optax_sam.gam(0.0, norm_rho=100.0, gamma=0.5, h_minus=h_minus)
        eps, points = float(jnp.finfo(precision).eps), []

        def grad_fn(p):
            points.append(p)
            noise = 1 + 4 * eps * np.sign(harness.tree(len(points))["gain"])
            return jax.tree.map(lambda x: (x * noise).astype(x.dtype), g)

        d, _ = member.update(g, member.init(w), w, grad_fn=grad_fn)
        assert len(points) == 3
        for point in points:
            harness.assert_equal(point, w)
        harness.assert_close(d, g, 100 * eps)


def test_gam_of_zero_gradients(x64):
    """A zero gradient has no direction to be normal to: it is emitted."""
    g, _ = pair()
    zero = harness.like(g, 0.0)
    member = optax_sam.gam(RHO, gamma=0.5)
    grad_fn, _ = answering(zero, g, zero)
    d, state = member.update(g, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal(d, zero)
    grad_fn, points = answering(zero, zero, zero)
    d, state = member.update(zero, member.init(g), g, grad_fn=grad_fn)
    harness.assert_equal((d, points), (zero, 3 * [g]))
    assert int(state.num_rejected) == 0


def test_the_mask_of_gam_holds_at_all_its_points(x64):
    w, *gradients = (harness.tree(seed) for seed in range(5))
    for mask in (
        {"layer": {"kernel": True, "bias": False}, "gain": False},
        lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    ):
        member = optax_sam.gam(RHO, norm_rho=0.3, gamma=0.5, mask=mask)
        points = points_of(member, w, *gradients)
        kernel = lambda tree: flat(tree["layer"]["kernel"])
        wanted = gam_by_hand(
            *(kernel(w), kernel(gradients[0]), list(map(kernel, gradients[1:]))),
            *(RHO, 0.3, 0.5, 0.6, 0.5),
        )[0]
        for found, point in zip(points, wanted, strict=True):
            np.testing.assert_allclose(kernel(found), point, rtol=1e-10)
            harness.assert_equal(found["layer"]["bias"], w["layer"]["bias"])
            harness.assert_equal(found["gain"], w["gain"])


@pytest.mark.parametrize(
    ("kept", "asked", "handed"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", None, "float32"),
    ],
)
def test_the_points_of_gam_have_the_dtype_that_was_asked_for(kept, asked, handed):
    w, *gradients = (harness.tree(seed, dtype=kept) for seed in range(5))
    member = optax_sam.gam(RHO, ascent_dtype=asked)
    grad_fn, points = answering(*gradients[1:])
    state = member.init(w)
    d, after = member.update(gradients[0], state, w, grad_fn=grad_fn)
    assert harness.kinds(d) == harness.kinds(w)
    assert harness.kinds(after) == harness.kinds(state)
    assert len(points) == 3
    for x in jax.tree.leaves(points):
        assert x.dtype == jnp.dtype(handed)


def test_gam_refuses_gradients_that_are_summed_already():
    """At every one of its points, as ``jax.grad`` returns them under shard_map."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    member = optax_sam.gam(RHO, axis_name="d")

    def step(params, x, summed_from):
        local = jax.lax.pcast(params, "d", to="varying")
        g = jax.grad(lambda p: jnp.sum(p * x[0]))
        calls = iter(range(9))

        def grad_fn(p):
            grads = g(p)
            return jax.lax.psum(grads, "d") if next(calls) >= summed_from else grads

        first = local if summed_from else params
        return member.update(g(first), member.init(params), local, grad_fn=grad_fn)[0]

    def run(summed_from):
        step_ = functools.partial(step, summed_from=summed_from)
        mapped = jax.shard_map(step_, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
        return jax.eval_shape(mapped, jnp.ones(3), jnp.ones((8, 3)))

    assert run(9).shape == (3,)
    for summed_from in range(3):
        with pytest.raises(ValueError, match=re.escape("gam: axis_name='d' asks for")):
            run(summed_from)


def test_gam_says_what_its_gradients_lack():
    w, g = harness.tree(), harness.tree(1)
    less = {"gain": g["gain"]}
    member = optax_sam.gam(RHO)
    for answers in ((less,), (g, less), (g, g, less), ((1.0, g),)):
        grad_fn, _ = answering(*answers)
        with pytest.raises(ValueError, match="gam: what grad_fn returned.*structure"):
            member.update(g, member.init(w), w, grad_fn=grad_fn)
    update = functools.partial(member.update, g, member.init(w))
    with pytest.raises(ValueError, match="gam needs the parameters"):
        update(grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="gam needs grad_fn"):
        update(w)
    with pytest.raises(ValueError, match="grad_fn must be a function; got 3"):
        update(w, grad_fn=3)
