"""SAMPa: two gradients that need not wait for each other, and their memory."""

import functools

import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.02, weight_decay=0.1)
STEPS = 10
PROBLEM = problems.mlp()
LARGE = functools.partial(problems.mlp, (32, 288, 320, 10), 128)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def make_step(tx, loss_fn, incoming=lambda params, batch: zeros(params)):
    """The step of a loop that keeps the previous batch."""

    def step(params, state, batch, previous):
        gradient_on = lambda batch: lambda p: jax.grad(loss_fn)(p, batch)
        updates, state = tx.update(
            incoming(params, batch),
            state,
            params,
            grad_fn=gradient_on(batch),
            previous_grad_fn=gradient_on(previous),
        )
        return optax.apply_updates(params, updates), state

    return step


def batch_at(t):
    return PROBLEM.batch(max(t, 0))


def run(tx, steps=STEPS, first=0, start=None, step=None, batch=batch_at):
    step = step or jax.jit(make_step(tx, PROBLEM.loss_fn))
    carry = start or (PROBLEM.params(), tx.init(PROBLEM.params()))
    for t in range(first, first + steps):
        carry = step(*carry, batch(t), batch(max(t - 1, 0)))
    return carry


def by_hand(inner, steps=STEPS, *, rho=0.1, lam=0.2, lr=None, batch=batch_at):
    """The algorithm written out; with ``lr`` as the paper has ``y``.

    A ``p`` that is not finite gives way, a step along a ``g_y`` that is not is left
    out.
    """
    grad = jax.jit(jax.grad(PROBLEM.loss_fn))
    inner_update = jax.jit(optax.with_extra_args_support(inner).update)
    w = PROBLEM.params()
    state, g_y = inner.init(w), zeros(w)
    for t in range(steps):
        at = lambda x, t=t: x(t) if callable(x) else x
        n = float(optax.tree.norm(g_y))
        e = optax.tree.scale(at(rho) / n if n else 0.0, g_y)
        if t == 0:
            y = w
        elif lr is not None:
            y = jax.tree.map(lambda x, g: x - at(lr) * g, w, g_y)  # noqa: B023
        else:
            y = optax.tree.add(w, inner_update(g_y, state, w)[0])
        p = grad(optax.tree.add(w, e), batch(max(t - 1, 0)))
        new = grad(y, batch(t))
        if not harness.is_finite(new):
            continue
        g_y = new
        mix = lambda x, y: (1 - at(lam)) * x + at(lam) * y  # noqa: B023
        d = jax.tree.map(mix, p, g_y) if harness.is_finite(p) else g_y
        u, state = inner_update(d, state, w)
        w = optax.apply_updates(w, u)
    return w, state, g_y


def uneven(*values):
    return lambda t: jnp.asarray(values)[t % len(values)]


# The algorithm.


@pytest.mark.parametrize(
    ("inner", "numbers"),
    [
        (ADAMW, {"rho": 0.3, "lam": 0.2}),
        # Each number changes on each step: one read a step off shows.
        (SGD, {"rho": uneven(0.1, 0.5, 0.0), "lam": uneven(0.2, 0.9, 0.0, 1.0)}),
        *(
            pytest.param(inner, {"rho": 0.3, "lam": lam}, marks=pytest.mark.slow)
            for inner, lam in ((ADAMW, 0.0), (ADAMW, 1.0), (SGD, 0.0), (SGD, 1.0))
        ),
    ],
    ids=["adamw", "uneven", "adamw 0", "adamw 1", "sgd 0", "sgd 1"],
)
@pytest.mark.parametrize("lr", [None, uneven(0.1, 0.7)], ids=["optimizer", "gradient"])
def test_it_is_the_algorithm_by_hand(inner, numbers, lr, x64):
    """``y`` is the optimizer's own next iterate, or the paper's along the gradient."""
    rho, lam = numbers.values()
    settings = {} if lr is None else {"learning_rate": lr, "predict": "gradient"}
    tx = optax_sam.sampa(inner, rho=rho, interpolation=lam, **settings)
    params, state = run(tx)
    wanted = by_hand(inner, lr=lr, **numbers)
    harness.assert_close((params, state.inner, state.gradient), wanted, 1e-9)
    assert (int(state.count), int(state.num_rejected)) == (STEPS, 0)


def lowered(step, problem, tx):
    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    args = params, jax.eval_shape(tx.init, params), batch, batch
    return jax.jit(step).lower(*args).compile()


def flops(program):
    return program.cost_analysis()["flops"]


def test_the_incoming_gradient_is_not_used(x64):
    """Neither its values nor, in the compiled program, its computation."""
    tx, problem = optax_sam.sampa(SGD), LARGE()
    nan = lambda params, batch: jax.tree.map(lambda x: x * jnp.nan, params)
    poisoned = jax.jit(make_step(tx, PROBLEM.loss_fn, nan))
    harness.assert_equal(run(tx, 3, step=poisoned), run(tx, 3))
    gradient = jax.grad(problem.loss_fn)
    given = flops(lowered(make_step(tx, problem.loss_fn, gradient), problem, tx))
    # What two gradients cost is in the test of two devices.
    assert given == flops(lowered(make_step(tx, problem.loss_fn), problem, tx))


# Both at once.


def paired_step(tx, loss_fn, place=lambda tree: tree):
    """Both gradients as one ``vmap``, as the documentation shows it."""

    def step(params, state, batch, previous):
        def paired_grad_fn(w_tilde, y):
            stack = lambda *trees: place(jax.tree.map(lambda *x: jnp.stack(x), *trees))
            batches = stack(previous, batch)
            both = jax.vmap(jax.grad(loss_fn))(stack(w_tilde, y), batches)
            return [jax.tree.map(lambda x, i=i: x[i], both) for i in range(2)]

        updates, state = tx.update(
            zeros(params), state, params, paired_grad_fn=paired_grad_fn
        )
        return optax.apply_updates(params, updates), state

    return step


def test_two_devices_share_the_work(x64):
    """Half of the operations on each: one gradient; and the numbers of one device."""
    problem, tx = LARGE(), optax_sam.sampa(SGD)
    mesh = jax.make_mesh(
        (2,), ("pair",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
    )
    sharding = NamedSharding(mesh, P("pair"))
    place = lambda tree: jax.lax.with_sharding_constraint(tree, sharding)
    params = problem.params()
    args = params, tx.init(params), problem.batch(0), problem.batch(1)
    alone = lowered(make_step(tx, problem.loss_fn), problem, tx)
    stacked = lowered(paired_step(tx, problem.loss_fn), problem, tx)
    gradient = jax.jit(jax.grad(problem.loss_fn)).lower(*args[::2]).compile()
    spread = jax.device_put(args, NamedSharding(mesh, P()))
    step = paired_step(tx, problem.loss_fn, place)
    both = jax.jit(step).lower(*spread).compile()
    assert flops(stacked) / flops(alone) == pytest.approx(1, rel=0.02)
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
        tx = optax_sam.sampa(SGD, interpolation=lam)
        u, state = tx.update(
            *(zeros(w), tx.init(w), w),
            grad_fn=lambda p: g,
            previous_grad_fn=lambda p: broken,
        )
        harness.assert_equal(u, SGD.update(g, SGD.init(w), w)[0])
        harness.assert_equal(state.gradient, g)
        found = optax_sam.metrics(state)
        assert found.keys() == {"rejected_ascents", "gradient_norm", "ascended_norm"}
        assert (found["rejected_ascents"], found["ascended_norm"]) == (1, 0)
        np.testing.assert_allclose(found["gradient_norm"], optax.tree.norm(g))


def with_a_bad_batch(t):
    """Step 4 has one of NaN."""
    x, y = batch_at(t)
    return (x.at[0, 0].set(jnp.nan), y) if t == 4 else (x, y)


def test_a_gradient_that_is_not_finite_is_handed_on_and_not_kept(x64):
    """A guard inside leaves its step out; the next one has a ``p`` of NaN."""
    guarded = optax.apply_if_finite(SGD, max_consecutive_errors=2)
    params, state = run(optax_sam.sampa(guarded, rho=0.3), batch=with_a_bad_batch)
    wanted = by_hand(SGD, rho=0.3, batch=with_a_bad_batch)
    found = params, state.inner.inner_state, state.gradient
    harness.assert_close(found, wanted, 1e-9)
    assert state.inner.total_notfinite == 1
    assert (int(state.count), int(state.num_rejected)) == (STEPS, 1)


def test_without_a_guard_it_shows():
    w, g = harness.tree(), harness.tree(2)
    tx = optax_sam.sampa(SGD, interpolation=0.0)  # also where its weight is zero
    state = tx.init(w)
    for answer in (g, harness.with_entry(g, np.nan)):
        u, state = tx.update(
            *(zeros(w), state, w),
            grad_fn=lambda p: answer,  # noqa: B023
            previous_grad_fn=lambda p: g,
        )
    assert np.isnan(u["layer"]["kernel"][1, 1])
    harness.assert_equal(state.gradient, g)


# Types, compilation, files.


@pytest.mark.parametrize("predict", ["optimizer", "gradient"])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_in_half_precision_the_points_are_float32(dtype, predict):
    """An offset of this size would round away."""
    rho = optax.constant_schedule(1e-4)
    tx = optax_sam.sampa(ADAMW, rho=rho, learning_rate=1e-4, predict=predict)
    w = harness.tree(dtype=dtype)
    state, points = tx.init(w), []
    look = lambda p: points.append(p) or harness.tree(3, dtype=dtype)
    for _ in range(2):
        u, after = tx.update(zeros(w), state, w, grad_fn=look, previous_grad_fn=look)
        assert harness.kinds(u) == harness.kinds(w)
        assert harness.kinds(after) == harness.kinds(state)
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
    update = functools.partial(tx.update, zeros(w), tx.init(w), w)
    u, state = update(grad_fn=lambda p: g, previous_grad_fn=lambda p: large)
    harness.assert_equal(u, SGD.update(optax.tree.cast_like(g, w), SGD.init(w), w)[0])
    assert int(state.num_rejected) == 1
    u, state = update(grad_fn=lambda p: large, previous_grad_fn=lambda p: g)
    assert not harness.is_finite(u)
    harness.assert_equal(state.gradient, harness.like(g, 0.0))


def test_a_scan_and_a_file_agree_with_a_loop_that_donates(x64):
    tx = optax_sam.sampa(SGD)
    step = make_step(tx, PROBLEM.loss_fn)
    compiled = jax.jit(step, donate_argnums=(0, 1))
    half = run(tx, 5, step=compiled)
    target = PROBLEM.params(), tx.init(PROBLEM.params())
    saved, kinds = flax.serialization.to_bytes(half), harness.kinds(half)
    whole = run(tx, 5, first=5, start=half, step=compiled)
    restored = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(target, saved))
    assert harness.kinds(restored) == kinds == harness.kinds(target)
    resumed = run(tx, 5, first=5, start=restored, step=compiled)
    harness.assert_equal(resumed, whole)

    batches = PROBLEM.batches(10)
    previous = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:-1]]), batches)
    body = lambda carry, pair: (step(*carry, *pair), None)
    scan = jax.jit(lambda c, x: jax.lax.scan(body, c, x))
    scanned, _ = scan(target, (batches, previous))
    harness.assert_close(scanned, whole, 1e-10)


def test_numbers_put_into_the_state_count():
    static = optax_sam.static_args(optax_sam.sampa)
    assert {"inner", "predict"} <= set(static)
    assert not {"rho", "interpolation"} & set(static)
    factory = optax.inject_hyperparams(optax_sam.sampa, static_args=static)
    tx = factory(SGD, rho=0.5, interpolation=0.2)
    w, points = harness.tree(), []
    g, p = harness.tree(1), harness.tree(2)
    state = tx.init(w)
    for rho, lam in ((0.5, 0.2), (0.25, 1.0), (0.0, 0.0)):
        state.hyperparams.update(rho=jnp.asarray(rho), interpolation=jnp.asarray(lam))
        before = state.inner_state.inner
        u, state = tx.update(
            *(zeros(w), state, w),
            grad_fn=lambda p: g,
            previous_grad_fn=lambda x: points.append(x) or p,
        )
        d = jax.tree.map(lambda x, y, a=lam: (1 - a) * x + a * y, p, g)
        harness.assert_close(u, SGD.update(d, before, w)[0], 1e-6)
    lengths = [float(optax.tree.norm(optax.tree.sub(x, w))) for x in points]
    np.testing.assert_allclose(lengths, [0.0, 0.25, 0.0], atol=1e-6)
    assert optax_sam.metrics(state)["rejected_ascents"] == 0


def test_extra_arguments_reach_the_optimizer_in_the_prediction_and_in_the_step():
    """The gradient's function too."""
    seen = []

    def spy(updates, state, params=None, **extra):
        seen.append(set(extra))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, spy)
    tx, w = optax_sam.sampa(inner), harness.tree()
    grad_fn = lambda p: p
    calls = {"grad_fn": grad_fn, "previous_grad_fn": grad_fn, "value": 1.0}
    tx.update(zeros(w), tx.init(w), w, **calls)
    assert seen == 2 * [{"grad_fn", "value"}]


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho": -0.1}, "rho must be a number"),
        ({"interpolation": 1.5}, "interpolation must be a number"),
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


def test_refused_calls():
    tx, w = optax_sam.sampa(SGD), harness.tree()
    update = functools.partial(tx.update, zeros(w), tx.init(w), w)
    ok, less = lambda p: p, lambda p: {"gain": p["gain"]}
    with pytest.raises(ValueError, match="sampa needs the parameters"):
        tx.update(zeros(w), tx.init(w), grad_fn=ok, previous_grad_fn=ok)
    with pytest.raises(ValueError, match="sampa stands inside.*Put it outside"):
        optax.masked(tx, {"layer": True, "gain": False}).init(w)
    needs_previous = "needs previous_grad_fn.*first step.*prev"
    misfit = "sampa: what {} returned.*missing".format
    for message, calls in (
        ("sampa needs grad_fn", {"previous_grad_fn": ok}),
        (needs_previous, {"grad_fn": ok, "previous_grad_fn": None}),
        (needs_previous, {"grad_fn": ok, "previous_grad_fn": 3.0}),
        (misfit("grad_fn"), {"grad_fn": less, "previous_grad_fn": ok}),
        (misfit("previous_grad_fn"), {"grad_fn": ok, "previous_grad_fn": less}),
        (misfit("paired_grad_fn"), {"paired_grad_fn": lambda x, y: (x, less(y))}),
        ("two trees of .*got 3", {"paired_grad_fn": lambda x, y: (x, y, y)}),
    ):
        with pytest.raises(ValueError, match=message):
            update(**calls)
