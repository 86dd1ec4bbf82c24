"""What ascents, rules and blends keep to: dtypes, transformations, metrics, length."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from harness import each_part
from registry import BY_NAME, OTHERS, each, relative_norm, unit_norm

import optax_sam

STEPS = 20
FORMS = (None, True, False)


def traced(tx, g, g_s, params, state=None):
    """Kinds of what each form emits and keeps, and the points that it hands over."""
    state = jax.eval_shape(tx.init, params) if state is None else state
    points, found = [], []
    for ascend in FORMS:
        grad_fn = lambda p: points.append(p) or g_s
        update = functools.partial(tx.update, grad_fn=grad_fn, ascend=ascend)
        d, after = jax.eval_shape(update, g, state, params)
        found.append((harness.kinds(d), harness.kinds(after)))
    return harness.kinds(state), found, points


@each_part(more=OTHERS)
def test_dtypes_stay(method, x64):
    for dtype in ("float64", "bfloat16", "mix"):
        params = harness.tree(dtype="float32" if dtype == "mix" else dtype)
        if dtype == "mix":
            params = {**params, "gain": params["gain"].astype("float16")}
        tx = method.build()
        state, found, points = traced(tx, params, params, params)
        assert found == [(harness.kinds(params), state)] * 3
        # Half precision is perturbed, and caches are kept, in single precision.
        widened = jax.tree.map(lambda x: jnp.promote_types(x.dtype, "float32"), params)
        for point in points:
            assert jax.tree.map(lambda x: x.dtype, point) == widened
        if dtype == "bfloat16" and method not in OTHERS:
            kept = {x.dtype for x in jax.tree.leaves(jax.eval_shape(tx.init, params))}
            assert "bfloat16" not in kept

    # Gradients of other floats are cast.
    params = harness.tree(dtype="float32")
    for first, second in (("bfloat16", "float64"), ("float64", "float16")):
        if method in OTHERS:
            break
        g, g_s = harness.tree(1, dtype=first), harness.tree(1, dtype=second)
        state, found, _ = traced(method.build(), g, g_s, params)
        assert found == [(harness.kinds(g), state)] * 3


@each_part()
def test_metrics_are_those_of_the_last_ascended_step(method):
    tx, update = harness.compiled_update(method)
    params, g, g_s = harness.tree(), harness.tree(1), harness.tree(2)
    _, state, _ = update(g, g_s, tx.init(params), params, ascend=True)
    first = g if method.uses_incoming else g_s
    second = method.second(g, g_s)
    for _ in range(2):
        metrics = optax_sam.metrics(state)
        for name, tree in (("gradient_norm", first), ("ascended_norm", second)):
            np.testing.assert_allclose(metrics[name], optax.tree.norm(tree), rtol=1e-5)
        assert metrics["survival"] == 1
        _, state, _ = update(g_s, g, state, params, ascend=False)
    assert optax_sam.metrics(state)["ascent_rate"] == pytest.approx(1 / 3)


# Transformations.


@each_part(lambda m: m.skips, quick="vsam")
def test_scan_skips_and_agrees_with_a_loop(method):
    problem, executed = problems.mlp(), harness.Counter()
    tx, loop = harness.compiled(method)
    step = harness.make_step(tx, problem.loss_fn, method.extra_args, executed)

    def epoch(params, state, batches):
        body = lambda carry, batch: (step(*carry, batch), None)
        return jax.lax.scan(body, (params, state), batches)[0]

    start = problem.params()
    params, state = harness.run(loop, start, tx.init(start), problem, STEPS)
    scanned, after = jax.jit(epoch, donate_argnums=(0, 1))(
        start, tx.init(start), problem.batches(STEPS)
    )
    assert executed.read() == method.calls * harness.ascents(state)
    harness.assert_close(scanned, params, 1e-5)
    harness.assert_close(after, state, 1e-4)


def over_seeds(method):
    """A step of two trainings, and what it starts from."""
    problem = problems.mlp()
    tx = method.optimizer()
    step = harness.make_step(tx, problem.loss_fn, method.extra_args)
    many = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), problem.params())
    return jax.vmap(step, in_axes=(0, 0, None)), many, jax.vmap(tx.init)


@each_part(more=OTHERS)
def test_vmap_traces(method):
    together, many, init = over_seeds(method)
    state = jax.eval_shape(init, many)
    after = jax.eval_shape(together, many, state, problems.mlp().batch(0))
    assert harness.kinds(after) == harness.kinds((many, state))


# One for each kind of state: compiled in float64, this is the dearest test of all.
@each(
    *(BY_NAME[name] for name in ("sam", "vsam", "esam", "ae_sam", "random_sam")),
    *OTHERS,
    slow=lambda m: True,
)
def test_vmap_over_seeds(method, x64):
    together, many, init = over_seeds(method)
    together, steps = jax.jit(together), 10
    starts = [jax.tree.map(lambda x, s=seed: x[s], many) for seed in range(2)]
    state = init(many)
    for t in range(steps):
        many, state = together(many, state, problems.mlp().batch(t))
    tx, step = harness.compiled(method)
    for seed, start in enumerate(starts):
        alone = harness.run(step, start, tx.init(start), problems.mlp(), steps)
        one = jax.tree.map(lambda x, s=seed: x[s], (many, state))
        harness.assert_close(one, alone, 1e-10)


# Perturbation.


@each_part()
def test_perturbation_has_length_rho(method, x64):
    """Also of a schedule, which is read at the step, and uphill."""
    params, g = harness.tree(), harness.tree(1)
    schedule = lambda count: 0.02 * (count + 1.0)
    constant = method.settings[method.radius]
    for rho in (constant, schedule):
        tx = method.build(**method.of_radius(rho))
        state = tx.init(params)
        for t, ascend in enumerate((True, False, True) if callable(rho) else (True,)):
            points = []
            grad_fn = lambda p: points.append(p) or g  # noqa: B023
            _, state = tx.update(g, state, params, grad_fn=grad_fn, ascend=ascend)
            assert len(points) == method.calls * ascend
            for point in points[-1:]:
                offset = jax.tree.map(jnp.subtract, point, params)
                length = method.norm(offset, params, g)
                wanted = rho(t) if callable(rho) else rho
                np.testing.assert_allclose(length, wanted, rtol=1e-9)
                # An offset that loses against the gradient would be as long.
                assert optax.tree.vdot(offset, g) > 0


@each_part(lambda m: not m.skips, quick="sam random_sam")
def test_survival_of_the_perturbation(method):
    """A bf16 weight of size one does not move by 1e-4, unless it is perturbed wider."""
    g = {"kernel": jax.random.normal(jax.random.key(0), (100, 100))}
    for dtype, ascent_dtype, low, high in (
        ("float32", None, 0.99, 1.01),
        ("bfloat16", None, 0.95, 1.05),
        ("bfloat16", "bfloat16", 0.0, 0.05),
        ("bfloat16", "float32", 0.95, 1.05),
        ("float32", "bfloat16", 0.0, 0.05),
    ):
        # ASAM's ellipsoid is as wide as a weight; Look-LayerSAM's ball, as the layer.
        rho = 0.0002 if method.norm in (relative_norm, unit_norm) else 0.02
        tx = method.build(ascent_dtype=ascent_dtype, **method.of_radius(rho))
        params = {"kernel": jnp.ones((100, 100), dtype)}
        grads = {"kernel": g["kernel"].astype(dtype)}

        @jax.jit
        def update(state, params=params, grads=grads, tx=tx):
            points = []
            grad_fn = lambda p: points.append(p["kernel"]) or grads
            _, state = tx.update(grads, state, params, grad_fn=grad_fn, ascend=True)
            return state, points

        state, points = update(tx.init(params))
        assert {x.dtype.name for x in points} == {ascent_dtype or "float32"}
        survival = float(optax_sam.metrics(state)["survival"])
        assert low <= survival <= high, (dtype, ascent_dtype, survival)
        # What arrived, against what was meant: the metric must not flatter itself.
        achieved = np.asarray(points[-1], np.float64) - 1
        moved = method.norm({"kernel": jnp.asarray(achieved)}, params, grads) / rho
        assert (moved > 0.9) == (survival > 0.9)
