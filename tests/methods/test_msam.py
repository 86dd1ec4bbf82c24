"""MSAM: recorded runs, what must hold in each step, and what it is combined with."""

import functools

import conformance
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
from methods_lib import later
from reference import base, msam

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def steps(tx, count):
    """Yields the parameters and the state before each step, and after the last."""
    problem = problems.mlp()
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    state = tx.init(params)
    yield params, state
    for t in range(count):
        params, state = step(params, state, problem.batch(t))
        yield params, state


# The recorded runs.

RUNS = recorded.runs("msam")


def check(name, trajectory, held=lambda *_: None):
    """``trajectory``: live and unperturbed parameters, first and after each step."""
    wanted = recorded.saved(name)
    assert len(trajectory) == recorded.RUNS[name]["steps"] + 1
    assert len(wanted) >= 3
    for t, trees in wanted.items():
        found = {
            f"{kind}/{leaf}": x
            for kind, tree in zip(
                ("perturbed", "unperturbed"), trajectory[t], strict=True
            )
            for leaf, x in tree.items()
        }
        assert recorded.deviation(found, trees) < recorded.atol(name, t), t
        held(recorded.RUNS[name]["source"], found, trees, t)
    norms = [base.norm(jax.tree.map(np.asarray, live)) for live, _ in trajectory[1:]]
    atol = recorded.atol(name, max(wanted))
    saved = recorded.arrays(name)["param_norm"]
    np.testing.assert_allclose(norms, saved, rtol=0, atol=atol)


@pytest.mark.parametrize("name", RUNS)
def test_transcription_is_as_recorded(name):
    assert len(RUNS) == 10
    h = dict(recorded.RUNS[name]["hyperparameters"])
    loss = {"mlp": base.mlp, "quad": base.quad}[recorded.RUNS[name]["problem"]]
    grad = lambda t, w: loss(w, *recorded.data(name, t))[1]
    numbers = {k: h[k] for k in ("lr", "rho", "weight_decay")}
    if "betas" in h:
        b1, b2 = h["betas"]
        run = functools.partial(msam.adamw, b1=b1, b2=b2, eps=h["eps"])
    else:
        run = functools.partial(msam.sgd, momentum=h["momentum"])
    start, steps = recorded.initial(name), recorded.RUNS[name]["steps"]
    check(name, run(start, steps, grad, **numbers))


def recorded_optimizer(name):
    h = recorded.RUNS[name]["hyperparameters"]
    lr, decay, rho = h["lr"], h["weight_decay"], h["rho"]
    if "betas" in h:
        adam = optax.adam(lr, *h["betas"], eps=h["eps"])
        after = optax_sam.decay_after(lr * decay)
        return optax_sam.msam(optax.chain(adam, after), rho=rho)
    sgd = optax_sam.msam(optax.sgd(lr, momentum=h["momentum"]), rho=rho)
    return optax.chain(optax.add_decayed_weights(decay), sgd) if decay else sgd


@pytest.mark.parametrize(
    "name", [x if x in ("msam_sgd_low", "msam_adamw") else later(x) for x in RUNS]
)
def test_package_is_as_recorded(name, x64):
    tx = recorded_optimizer(name)
    loss_fn = recorded.LOSSES[recorded.RUNS[name]["problem"]]
    step = jax.jit(harness.make_step(tx, lambda w, batch: loss_fn(w, *batch)))
    params = jax.tree.map(jnp.asarray, recorded.initial(name))
    state = tx.init(params)
    trajectory = [(params, params)]
    for t in range(recorded.RUNS[name]["steps"]):
        params, state = step(params, state, recorded.data(name, t))
        trajectory.append((params, optax_sam.msam_eval_params(state, params)))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(trajectory[-1]))
    check(name, trajectory, conformance.hold)


# What must hold.


def jump(t):
    """Off, then on, then larger, then off again."""
    return jnp.array([0.0, 0.0, 3.0, 3.0, 0.5, 0.0, 0.3, 0.3])[t % 8]


@pytest.mark.parametrize(
    "inner", [SGD, optax.adamw(0.01, weight_decay=0.1)], ids=["sgd", "adamw"]
)
def test_the_unperturbed_weights_take_the_steps_of_the_inner_optimizer(inner, x64):
    """With gradients at ``w - rho v / ||v||``; without a radius, it is that one."""
    problem = problems.mlp()
    plain = jax.jit(optax.with_extra_args_support(inner).update)
    gradient = jax.jit(jax.grad(problem.loss_fn))
    w = problem.params()
    plain_state, point = inner.init(w), w
    trajectory = steps(optax_sam.msam(inner, rho=jump), 12)
    params, state = next(trajectory)
    harness.assert_equal(params, w)
    harness.assert_equal(optax_sam.msam_eval_params(state, params), w)
    for t, (params, state) in enumerate(trajectory):
        u, plain_state = plain(gradient(point, problem.batch(t)), plain_state, w)
        w = optax.apply_updates(w, u)
        (v,) = [
            tree
            for field in ("trace", "mu")
            for _, tree in optax.tree.get_all_with_path(plain_state, field)
        ]
        scale = float(jump(t)) / (optax.tree.norm(v) + 1e-12)
        point = jax.tree.map(lambda x, y, c=scale: x - c * y, w, v)
        found = params, optax_sam.msam_eval_params(state, params)
        harness.assert_close(found, (point, w), 1e-11)
        np.testing.assert_allclose(state.scale, scale, rtol=1e-11)
        assert distance(params, w) == pytest.approx(float(jump(t)), abs=1e-9)
        assert state.metrics() == {"perturbation_scale": state.scale}
    harness.assert_close(state.inner, plain_state, 1e-11)


def test_no_momentum_no_perturbation():
    """A zero gradient at the start leaves everything in place, and no NaN."""
    tx = optax_sam.msam(SGD)
    for params in (harness.tree(), {}):
        zero = harness.like(params, 0.0)
        updates, state = tx.update(zero, tx.init(params), params)
        harness.assert_equal(updates, zero)
        harness.assert_equal(optax_sam.msam_eval_params(state, params), params)
        assert state.scale == 0


def test_the_norm_is_that_of_all_leaves_in_float32():
    """Squares of these overflow float16, whose largest number is 65504."""
    tx = optax_sam.msam(SGD, rho=1.0)
    params = jax.tree.map(lambda x: x.astype("float16"), harness.tree())
    g = harness.like(params, 3e4)
    _, state = tx.update(g, tx.init(params), params)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert state.scale.dtype == jnp.float32
    np.testing.assert_allclose(state.scale, 1 / (3e4 * np.sqrt(count)), rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_passes_for_a_guard_to_see(value):
    """The scale stays a number, zero: the norm overflows, or is none."""
    tx = optax_sam.msam(SGD, rho=0.5)
    *_, (params, state) = steps(tx, 2)
    g = jax.tree.map(jnp.ones_like, params)
    g["layer0"]["kernel"] = g["layer0"]["kernel"].at[0, 0].set(value)
    updates, state = jax.jit(tx.update)(g, state, params)
    assert harness.is_finite(updates) == np.isfinite(value)
    assert state.scale == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_stay_with_a_schedule_and_a_decay_inside(dtype):
    """The unperturbed weights would make its momentum one of float32."""
    inner = optax.chain(optax.add_decayed_weights(0.1), SGD)
    tx = optax_sam.msam(inner, rho=optax.constant_schedule(0.5))
    params = harness.tree(dtype=dtype)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    w = optax_sam.msam_eval_params(after, params)
    assert harness.kinds((updates, after, w)) == harness.kinds((params, state, params))


# In company.


def test_the_inner_optimizer_gets_the_unperturbed(x64):
    seen = []

    def spy(updates, state, params=None):
        seen.append(params)
        return updates, state

    inner = optax.chain(optax.GradientTransformation(optax.init_empty_state, spy), SGD)
    tx = optax_sam.msam(inner, rho=0.5)
    params = harness.tree()
    state = tx.init(params)
    for t in range(3):
        w = optax_sam.msam_eval_params(state, params)
        updates, state = tx.update(harness.tree(t), state, params)
        harness.assert_equal(seen.pop(), w)
        assert (distance(w, params) > 0.1) == (t > 0)
        params = optax.apply_updates(params, updates)


def test_a_rho_put_into_the_state_counts_and_the_old_one_is_removed():
    assert optax_sam.static_args(optax_sam.msam) == ("inner",)
    assert optax_sam.static_args(optax_sam.decay_after) == ("mask",)
    factory = optax.inject_hyperparams(optax_sam.msam, static_args="inner")
    sgd = optax.inject_hyperparams(optax.sgd)
    tx = factory(inner=sgd(learning_rate=0.0, momentum=0.9), rho=0.5)
    start = params = harness.tree()
    state, update = tx.init(params), jax.jit(tx.update)
    for rho in (0.5, 3.0, 0.0, 0.25):
        state.hyperparams["rho"] = jnp.asarray(rho)
        updates, state = update(harness.tree(1), state, params)
        params = optax.apply_updates(params, updates)
        assert distance(params, start) == pytest.approx(rho, abs=1e-5)
        harness.assert_close(optax_sam.msam_eval_params(state, params), start, 1e-5)


def test_leaves_whose_gradients_are_zeroed_before_it_stay():
    """As the errors advise."""
    frozen = {"layer0": True, "layer1": False}
    zeroed = optax.masked(optax.set_to_zero(), frozen)
    tx = optax.chain(zeroed, optax_sam.msam(SGD, rho=0.5))
    *_, (params, state) = steps(tx, 3)
    harness.assert_equal(params["layer0"], problems.mlp().params()["layer0"])
    w = optax_sam.msam_eval_params(state, params)
    assert distance(params["layer1"], w["layer1"]) == pytest.approx(0.5, abs=1e-5)


# Decay after the step.


def test_decay_after_a_step_has_a_schedule_and_a_mask():
    mask = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    after = optax_sam.decay_after(lambda t: 0.1 * (t + 1), mask=mask)
    tx = optax.chain(optax.sgd(0.5), after)
    params = harness.tree()
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        g = harness.tree(t + 1)
        updates, state = update(g, state, params)
        stepped = jax.tree.map(lambda w, g: w - 0.5 * g, params, g)
        shrunk = lambda x, t=t: x * (1 - 0.1 * (t + 1)) if x.ndim > 1 else x
        params = optax.apply_updates(params, updates)
        harness.assert_close(params, jax.tree.map(shrunk, stepped), 1e-6)


def test_decay_after_keeps_types_and_refuses():
    tx = optax_sam.decay_after(optax.constant_schedule(0.1))
    params = harness.tree(dtype="bfloat16")
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params, value=1.0)
    assert harness.kinds((updates, after)) == harness.kinds((params, state))
    wanted = jax.tree.map(lambda x: x - 0.2 * x, params)
    harness.assert_close(updates, wanted, 1e-2)
    with pytest.raises(ValueError, match="rate must be a number"):
        optax_sam.decay_after(1.5)
    with pytest.raises(ValueError, match="decay_after needs the parameters"):
        tx.update(params, state)


# Errors.


def test_refused_arguments_and_calls():
    with pytest.raises(ValueError, match=r"rho must be a number .* got -1\.0"):
        optax_sam.msam(SGD, rho=-1.0)
    with pytest.raises(ValueError, match="msam wraps an optimizer"):
        optax_sam.msam(0.05)
    tx, params = optax_sam.msam(SGD), harness.tree()
    state, less = tx.init(params), {"gain": params["gain"]}
    around = optax.masked(tx, {"layer": True, "gain": False})
    advice = "msam is inside optax.masked or optax.partition.*set_to_zero"
    read = optax_sam.msam_eval_params
    for message, function, *args in (
        ("msam needs the parameters: tx.update", tx.update, params, state),
        (r"msam: the gradient at w.*missing", tx.update, less, state, params),
        (advice, around.init, params),
        (advice, around.update, params, optax.MaskedState(state), params),
        ("found 0; pass the opt_state", read, params, state),
        ("found 2", read, (state, state), params),
        ("differ from the momentum in the state", read, state, less),
    ):
        with pytest.raises(ValueError, match=message):
            function(*args)
