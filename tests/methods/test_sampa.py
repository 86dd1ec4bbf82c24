"""SAMPa: two gradients that need not wait for each other, and their memory."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import trajectories as beside
import wrapping
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import sampa

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
SIZE, SHARE, PREDICT_LR = map(beside.rising, (0.2, 0.4, 0.15))


def case(optimizer=wrapping.sgd, predict="optimizer", share=SHARE):
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
    "the prediction alone": case(share=1.0),
    "adamw": case(wrapping.adamw),
    "along the gradient": case(predict="gradient"),
    "along the gradient, adamw": case(wrapping.adamw, "gradient"),
}
test_ten_steps_meet_the_reference, test_cases_differ = wrapping.ten_steps(CASES)


@beside.runs(3, "sampa")
def test_the_reference_is_as_recorded(name):
    share = beside.hyperparameters(name)["og"]
    wrapping.assert_reference_meets_the_recorded_run(name, sampa.sampa, lam=share)


@beside.runs_of_package(3, "sampa")
def test_it_is_as_recorded(name, x64):
    h = beside.hyperparameters(name)
    inner = beside.base_optimizer(name)
    beside.assert_met(name, optax_sam.sampa(inner, rho=h["rho"], interpolation=h["og"]))


def updated(tx, w, g, p, state=None, incoming=0.0):
    """A step with these gradients of the batch, and of the batch before.

    Each may be a function of the point.
    """
    function = lambda x: x if callable(x) else lambda point: x
    return tx.update(
        harness.like(w, incoming),
        tx.init(w) if state is None else state,
        w,
        grad_fn=function(g),
        previous_grad_fn=function(p),
    )


def test_the_incoming_gradient_is_not_used():
    """What it costs is in the tests of the engine."""
    w, g, p = (harness.tree(seed) for seed in range(3))
    found = [updated(optax_sam.sampa(SGD), w, g, p, incoming=x) for x in (0.0, np.nan)]
    harness.assert_equal(*found)


# Both at once.


def step_of(tx, loss_fn):
    """The step of a loop that keeps the previous batch."""

    def step(params, state, batch, previous):
        gradient_on = lambda batch: lambda p: jax.grad(loss_fn)(p, batch)
        u, state = updated(tx, params, gradient_on(batch), gradient_on(previous), state)
        return optax.apply_updates(params, u), state

    return step


def paired_step_of(tx, loss_fn, place=lambda tree: tree):
    """Both gradients as one ``vmap``, as the documentation shows it."""

    def step(params, state, batch, previous):
        def paired_grad_fn(w_tilde, y):
            stack = lambda *trees: place(jax.tree.map(lambda *x: jnp.stack(x), *trees))
            batches = stack(previous, batch)
            both = jax.vmap(jax.grad(loss_fn))(stack(w_tilde, y), batches)
            return [jax.tree.map(lambda x, i=i: x[i], both) for i in range(2)]

        updates, state = tx.update(params, state, params, paired_grad_fn=paired_grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def test_two_devices_share_the_work(x64):
    """Half of the operations on each: one gradient; and the numbers of one device."""
    problem, tx = problems.mlp((32, 288, 320, 10), 128), optax_sam.sampa(SGD)
    mesh = jax.make_mesh(
        (2,), ("pair",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
    )
    sharding = NamedSharding(mesh, P("pair"))
    place = lambda tree: jax.lax.with_sharding_constraint(tree, sharding)
    params = problem.params()
    args = params, tx.init(params), problem.batch(0), problem.batch(1)
    spread = jax.device_put(args, NamedSharding(mesh, P()))
    lowered = lambda step, args: jax.jit(step).lower(*args).compile()
    alone = lowered(step_of(tx, problem.loss_fn), args)
    both = lowered(paired_step_of(tx, problem.loss_fn, place), spread)
    gradient = lowered(jax.grad(problem.loss_fn), args[::2])
    flops = lambda program: program.cost_analysis()["flops"]
    assert flops(both) / flops(alone) == pytest.approx(0.5, rel=0.02)
    # Beside one gradient, the optimizer's few operations per weight: a weight costs
    # its gradient 750 operations at this batch size.
    assert flops(both) / flops(gradient) == pytest.approx(1, rel=0.05)
    # Each device has one of the two: all products have one example of the pair.
    text = both.as_text()
    dots = [line for line in text.splitlines() if " dot(" in line or "gemm" in line]
    assert dots
    assert not any("f64[2," in line for line in dots)
    found, wanted = jax.device_get((both(*spread), alone(*args)))
    harness.assert_close(found, wanted, 1e-10)


# What is not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_perturbed_gradient_that_is_not_finite_gives_way(bad, x64):
    w = harness.tree()
    broken, g = harness.with_entry(harness.tree(1), bad), harness.tree(2)
    # With interpolation 1 the other one has no weight, and zero times NaN is NaN.
    for lam in (0.2, 1.0):
        u, state = updated(optax_sam.sampa(SGD, interpolation=lam), w, g, broken)
        harness.assert_equal(u, SGD.update(g, SGD.init(w), w)[0])
        harness.assert_equal(state.gradient, g)
        found = optax_sam.metrics(state)
        assert found.keys() == {"rejected_ascents", "gradient_norm", "ascended_norm"}
        assert (found["rejected_ascents"], found["ascended_norm"]) == (1, 0)
        np.testing.assert_allclose(found["gradient_norm"], optax.tree.norm(g))


@pytest.mark.parametrize("guarded", [False, True])
def test_a_gradient_that_is_not_finite_is_handed_on_and_not_kept(guarded):
    """A guard inside leaves its step out; without one it shows, also of no weight."""
    w, g = harness.tree(), harness.tree(2)
    inner = optax.apply_if_finite(SGD, max_consecutive_errors=2) if guarded else SGD
    tx = optax_sam.sampa(inner, interpolation=0.0)
    _, before = updated(tx, w, g, g)
    u, state = updated(tx, w, harness.with_entry(g, np.nan), g, before)
    harness.assert_equal(state.gradient, g)
    assert np.isnan(u["layer"]["kernel"][1, 1]) != guarded
    if guarded:
        assert state.inner.total_notfinite == 1
        harness.assert_equal(state.inner.inner_state, before.inner.inner_state)


# Types and numbers.


@pytest.mark.parametrize("predict", ["optimizer", "gradient"])
def test_in_half_precision_the_points_are_float32(predict):
    """An offset of this size would round away."""
    rho, adamw = optax.constant_schedule(1e-4), optax.adamw(0.02, weight_decay=0.1)
    tx = optax_sam.sampa(adamw, rho=rho, learning_rate=1e-4, predict=predict)
    w = harness.tree(dtype="bfloat16")
    state, points = tx.init(w), []
    look = lambda p: points.append(p) or harness.tree(3, dtype="bfloat16")
    for _ in range(2):
        u, after = updated(tx, w, look, look, state)
        assert harness.kinds((u, after)) == harness.kinds((w, state))
        state = after
    for x in jax.tree.leaves((points, state.gradient)):
        assert x.dtype == jnp.float32
    offset = lambda point: optax.tree.norm(
        jax.tree.map(lambda x, y: x - y.astype(x.dtype), point, w)
    )
    # float32 keeps seven digits of numbers up to 3, so three of this length.
    assert offset(points[2]) == pytest.approx(1e-4, rel=1e-2)
    assert offset(points[3]) > 1e-4


def test_gradients_that_float16_does_not_hold_are_not_finite():
    """Those at a float32 point, in float32, for parameters of float16."""
    tx, w = optax_sam.sampa(SGD), harness.tree(dtype="float16")
    g, large = harness.tree(1), harness.like(harness.tree(1), 1e6)
    u, state = updated(tx, w, g, large)
    harness.assert_equal(u, SGD.update(optax.tree.cast_like(g, w), SGD.init(w), w)[0])
    assert int(state.num_rejected) == 1
    u, state = updated(tx, w, large, g)
    assert not harness.is_finite(u)
    harness.assert_equal(state.gradient, harness.like(g, 0.0))


def test_numbers_put_into_the_state_count():
    static = optax_sam.static_args(optax_sam.sampa)
    assert {"inner", "predict"} <= set(static)
    assert not {"rho", "interpolation"} & set(static)
    factory = optax.inject_hyperparams(optax_sam.sampa, static_args=static)
    tx = factory(SGD, rho=0.5, interpolation=0.2)
    w, g, p = (harness.tree(seed) for seed in range(3))
    state, points = tx.init(w), []
    for rho, lam in ((0.5, 0.2), (0.25, 1.0), (0.0, 0.0)):
        state.hyperparams.update(rho=jnp.asarray(rho), interpolation=jnp.asarray(lam))
        before = state.inner_state.inner
        u, state = updated(tx, w, g, lambda x: points.append(x) or p, state)
        d = jax.tree.map(lambda x, y, a=lam: (1 - a) * x + a * y, p, g)
        harness.assert_close(u, SGD.update(d, before, w)[0], 1e-6)
    lengths = [float(optax.tree.norm(optax.tree.sub(x, w))) for x in points]
    np.testing.assert_allclose(lengths, [0.0, 0.25, 0.0], atol=1e-6)
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a number"),
        ({"predict": "paper"}, 'predict must be "optimizer" or "gradient"; got'),
        ({"predict": "gradient"}, "learning_rate=.*which is missing"),
        ({"inner": 0.1}, "sampa wraps an optimizer"),
    ],
    ids=str,
)
def test_refused_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        optax_sam.sampa(**{"inner": SGD, **changes})


def test_metrics_of_stacked_states_are_those_of_each():
    w, tx = jnp.arange(6.0).reshape(3, 2), optax_sam.sampa(SGD)
    update = lambda w: tx.update(
        w, tx.init(w), w, grad_fn=jnp.sin, previous_grad_fn=jnp.cos
    )
    _, state = jax.vmap(update)(w)
    for i, found in enumerate(optax_sam.metrics(state)["gradient_norm"]):
        wanted = optax_sam.metrics(update(w[i])[1])["gradient_norm"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_refused_calls():
    tx, w = optax_sam.sampa(SGD), harness.tree()
    update = functools.partial(tx.update, w, tx.init(w), w)
    ok, less = lambda p: p, lambda p: {"gain": p["gain"]}
    with pytest.raises(ValueError, match="sampa needs the parameters"):
        tx.update(w, tx.init(w), grad_fn=ok, previous_grad_fn=ok)
    with pytest.raises(ValueError, match="sampa is inside.*Put it outside"):
        optax.masked(tx, {"layer": True, "gain": False}).init(w)
    needs_previous = "needs previous_grad_fn.*first step.*prev"
    misfit = "sampa: what {} returned.*missing".format
    for message, calls in (
        (needs_previous, {"grad_fn": ok, "previous_grad_fn": None}),
        (misfit("grad_fn"), {"grad_fn": less, "previous_grad_fn": ok}),
        (misfit("previous_grad_fn"), {"grad_fn": ok, "previous_grad_fn": less}),
        (misfit("paired_grad_fn"), {"paired_grad_fn": lambda x, y: (x, less(y))}),
        ("two pytrees of .*got 3", {"paired_grad_fn": lambda x, y: (x, y, y)}),
    ):
        with pytest.raises(ValueError, match=message):
            update(**calls)
