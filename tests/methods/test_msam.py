"""MSAM: recorded runs, what must hold in each step, and what it is combined with."""

import functools

import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import problems
import pytest
import recorded
from flax import nnx
from reference import base, msam

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {
    "sgd": SGD,
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.003),
}
# The rest of what Optax has with a momentum of gradients.
RELATIVES = {
    "adabelief": optax.adabelief(0.01),
    "adamax": optax.adamax(0.01),
    "adan": optax.adan(0.01),
    "amsgrad": optax.amsgrad(0.01),
    "ema": optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "lamb": optax.lamb(0.01),
    "nadamw": optax.nadamw(0.01),
    "novograd": optax.novograd(0.01),
    "radam": optax.radam(0.01),
    "yogi": optax.yogi(0.01),
}
every_optimizer = pytest.mark.parametrize(
    "inner", OPTIMIZERS.values(), ids=list(OPTIMIZERS)
)


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def msam_state(opt_state):
    is_state = lambda x: isinstance(x, optax_sam.MSAMState)
    leaves = jax.tree.leaves(opt_state, is_leaf=is_state)
    (found,) = [x for x in leaves if is_state(x)]
    return found


def steps(tx, count, problem=None):
    """Yields the parameters and the state before each step, and after the last."""
    problem = problem or problems.mlp()
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    state = tx.init(params)
    yield params, state
    for t in range(count):
        params, state = step(params, state, problem.batch(t))
        yield params, state


def trained(tx, count=12):
    *_, last = steps(tx, count)
    return last


# The recorded runs.

RUNS = recorded.runs("msam")


def saved(name):
    """Step -> the perturbed and the unperturbed parameters after it."""
    trees = recorded.saved(name)
    part = lambda tree, kind: {
        leaf.removeprefix(f"{kind}/"): value
        for leaf, value in tree.items()
        if leaf.startswith(f"{kind}/")
    }
    kinds = ("perturbed", "unperturbed")
    return {t: [part(tree, kind) for kind in kinds] for t, tree in trees.items()}


def check(name, trajectory):
    """``trajectory``: live and unperturbed parameters, first and after each step."""
    wanted = saved(name)
    assert len(trajectory) == recorded.RUNS[name]["steps"] + 1
    assert len(wanted) >= 3
    for t, trees in wanted.items():
        for tree, kind in zip(trajectory[t], trees, strict=True):
            assert recorded.deviation(tree, kind) < recorded.atol(name, t), t
    norms = [base.norm(jax.tree.map(np.asarray, live)) for live, _ in trajectory[1:]]
    np.testing.assert_allclose(
        norms,
        recorded.arrays(name)["param_norm"],
        rtol=0,
        atol=recorded.atol(name, max(wanted)),
    )


def test_the_recorded_runs_are_all_there():
    assert len(RUNS) == 10


@pytest.mark.parametrize("name", RUNS)
def test_transcription_is_as_recorded(name):
    h = recorded.RUNS[name]["hyperparameters"]
    loss = {"mlp": base.mlp, "quad": base.quad}[recorded.RUNS[name]["problem"]]
    grad = lambda t, w: loss(w, *recorded.data(name, t))[1]
    start, common = recorded.initial(name), {"lr": h["lr"], "rho": h["rho"]}
    common["weight_decay"] = h["weight_decay"]
    if "betas" in h:
        b1, b2 = h["betas"]
        run = functools.partial(msam.adamw, b1=b1, b2=b2, eps=h["eps"])
    else:
        run = functools.partial(msam.sgd, momentum=h["momentum"])
    check(name, run(start, recorded.RUNS[name]["steps"], grad, **common))


def recorded_optimizer(name):
    h = recorded.RUNS[name]["hyperparameters"]
    lr, decay, rho = h["lr"], h["weight_decay"], h["rho"]
    if "betas" in h:
        adam = optax.adam(lr, *h["betas"], eps=h["eps"])
        after = optax_sam.decay_after(lr * decay)
        return optax_sam.msam(optax.chain(adam, after), rho=rho)
    sgd = optax_sam.msam(optax.sgd(lr, momentum=h["momentum"]), rho=rho)
    return optax.chain(optax.add_decayed_weights(decay), sgd) if decay else sgd


@pytest.mark.parametrize("name", RUNS)
def test_package_is_as_recorded(name, x64):
    tx = recorded_optimizer(name)
    loss = recorded.LOSSES[recorded.RUNS[name]["problem"]]

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, recorded.initial(name))
    state = tx.init(params)
    trajectory = [(params, params)]
    for t in range(recorded.RUNS[name]["steps"]):
        params, state = step(params, state, recorded.data(name, t))
        trajectory.append((params, optax_sam.msam_eval_params(state, params)))
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(trajectory[-1]))
    check(name, trajectory)


# What must hold.


@every_optimizer
def test_without_radius_it_is_the_inner_optimizer(inner, x64):
    params, state = trained(optax_sam.msam(inner, rho=0.0))
    plain, plain_state = trained(optax.with_extra_args_support(inner))
    harness.assert_close(params, plain, 1e-12)
    harness.assert_close(state.inner, plain_state, 1e-12)
    harness.assert_equal(optax_sam.msam_eval_params(state, params), params)


def jump(t):
    """Off, then on, then larger, then off again."""
    return jnp.array([0.0, 0.0, 3.0, 3.0, 0.5, 0.0, 0.3, 0.3])[t % 8]


@every_optimizer
@pytest.mark.parametrize("rho", [0.7, jump], ids=["constant", "schedule"])
def test_recursion_of_the_unperturbed(inner, rho, x64):
    """w takes the inner optimizer's steps, with gradients at w - rho v / ||v||."""
    problem = problems.mlp()
    plain = jax.jit(optax.with_extra_args_support(inner).update)
    w = problem.params()
    plain_state, point = inner.init(w), w
    radius = lambda t: float(rho(t) if callable(rho) else rho)
    trajectory = steps(optax_sam.msam(inner, rho=rho), 12)
    params, state = next(trajectory)
    harness.assert_equal(params, w)
    harness.assert_equal(optax_sam.msam_eval_params(state, params), w)
    for t, (params, state) in enumerate(trajectory):
        grads = jax.grad(problem.loss_fn)(point, problem.batch(t))
        u, plain_state = plain(grads, plain_state, w)
        w = optax.apply_updates(w, u)
        (v,) = [
            tree
            for field in ("trace", "mu")
            for _, tree in optax.tree.get_all_with_path(plain_state, field)
        ]
        scale = radius(t) / (optax.tree.norm(v) + 1e-12)
        point = jax.tree.map(lambda x, y, c=scale: x - c * y, w, v)
        harness.assert_close(params, point, 1e-11)
        harness.assert_close(optax_sam.msam_eval_params(state, params), w, 1e-11)
        np.testing.assert_allclose(state.scale, scale, rtol=1e-11)
        assert distance(params, w) == pytest.approx(radius(t), abs=1e-9)
        assert state.metrics() == {"perturbation_scale": state.scale}


@pytest.mark.parametrize("inner", RELATIVES.values(), ids=list(RELATIVES))
def test_perturbation_of_other_optimizers(inner, x64):
    """It has the length rho and lies where the gradients have gone down."""
    tx = optax_sam.msam(inner, rho=0.5)
    params, g = harness.tree(), harness.tree(1)
    updates, state = tx.update(g, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    w = optax_sam.msam_eval_params(state, moved)
    offset = jax.tree.map(jnp.subtract, moved, w)
    assert float(optax.tree.norm(offset)) == pytest.approx(0.5, abs=1e-9)
    assert float(optax.tree.vdot(offset, g)) < -0.1
    plain = optax.with_extra_args_support(inner)
    u, _ = plain.update(g, plain.init(params), params)
    harness.assert_close(w, optax.apply_updates(params, u), 1e-12)


def test_no_momentum_no_perturbation():
    """A zero gradient at the start leaves everything in place, and no NaN."""
    tx = optax_sam.msam(SGD)
    params = harness.tree()
    updates, state = tx.update(harness.like(params, 0.0), tx.init(params), params)
    harness.assert_equal(updates, harness.like(params, 0.0))
    assert state.scale == 0


def test_a_resting_optimizer_keeps_the_perturbation():
    """With the learning rate zero the momentum moves, and the perturbation with it."""
    still = optax_sam.msam(optax.sgd(0.0, momentum=0.9), rho=0.5)
    for t, (params, state) in enumerate(steps(still, 3)):
        start = problems.mlp().params()
        harness.assert_close(optax_sam.msam_eval_params(state, params), start, 1e-6)
        assert distance(params, start) == pytest.approx(0.5 if t else 0.0, abs=1e-6)


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
def test_a_gradient_that_is_not_finite(value):
    """It passes, for a guard to see; the scale stays a number."""
    tx = optax_sam.msam(SGD, rho=0.5)
    *_, (params, state) = steps(tx, 2)
    g = jax.tree.map(jnp.ones_like, params)
    g["layer0"]["kernel"] = g["layer0"]["kernel"].at[0, 0].set(value)
    updates, state = jax.jit(tx.update)(g, state, params)
    assert harness.is_finite(updates) == np.isfinite(value)
    assert state.scale == 0  # the norm overflows, or is none


# Types, compilation, files.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_optimizer
def test_types_stay(inner, dtype):
    tx = optax_sam.msam(inner, rho=optax.constant_schedule(0.5))
    params = jax.tree.map(lambda x: x.astype(dtype), harness.tree())
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert harness.kinds(updates) == harness.kinds(params)
    assert harness.kinds(after) == harness.kinds(state)
    w = optax_sam.msam_eval_params(after, params)
    assert harness.kinds(w) == harness.kinds(params)


def test_types_stay_with_a_decay_inside():
    """The unperturbed weights would make its momentum one of float32."""
    inner = optax.chain(optax.add_decayed_weights(0.1), SGD)
    params = jax.tree.map(lambda x: x.astype("bfloat16"), harness.tree())
    tx = optax_sam.msam(inner, rho=0.5)
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    assert harness.kinds(after) == harness.kinds(state)


def test_numbers_as_parameters():
    tx = optax_sam.msam(SGD, rho=1.0)
    params = {"w": 1.0, "b": np.ones(2, np.float32)}
    updates, state = tx.update(params, tx.init(params), params)
    w = optax_sam.msam_eval_params(state, optax.apply_updates(params, updates))
    harness.assert_close(w, {"w": jnp.float32(0.9), "b": jnp.full(2, 0.9)}, 1e-6)


def test_empty_parameters():
    tx = optax_sam.msam(SGD)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == optax_sam.msam_eval_params(state, {}) == {}
    assert state.scale == 0


def test_loop_scan_and_donation_agree():
    problem = problems.mlp()
    tx = optax_sam.msam(SGD, rho=0.5)
    step = harness.make_step(tx, problem.loss_fn)
    desired = trained(tx)
    body = lambda carry, batch: (step(*carry, batch), None)
    start = problem.params()
    scanned, _ = jax.jit(lambda *c: jax.lax.scan(body, c, problem.batches(12)))(
        start, tx.init(start)
    )
    harness.assert_close(scanned, desired, 1e-5)
    assert harness.kinds(scanned) == harness.kinds((start, tx.init(start)))
    donated = problem.params()
    donating = jax.jit(step, donate_argnums=(0, 1))
    harness.assert_close(
        harness.run(donating, donated, tx.init(donated), problem, 12), desired, 1e-5
    )


def through_msgpack(carry, path, target):
    del path
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(carry))


def through_orbax(carry, path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "carry", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "carry", target)


@pytest.mark.parametrize("through", [through_msgpack, through_orbax])
def test_resume_from_a_file(through, tmp_path):
    problem = problems.mlp()
    tx = optax_sam.msam(optax.adam(0.01), rho=0.5)
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    half = harness.run(step, params, tx.init(params), problem, 6)
    whole = harness.run(step, *half, problem, 6, first=6)
    restored = through(half, tmp_path, (problem.params(), tx.init(params)))
    harness.assert_equal(restored, half)
    w = optax_sam.msam_eval_params(half[1], half[0])
    harness.assert_equal(optax_sam.msam_eval_params(*restored[::-1]), w)
    harness.assert_equal(harness.run(step, *restored, problem, 6, first=6), whole)


# In company.


def test_before_it_in_a_chain(x64):
    """Clipping and coupled decay see the gradient at, and the, perturbed weights."""
    problem = problems.mlp()
    tx = optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.add_decayed_weights(0.1),
        optax_sam.msam(SGD, rho=0.5),
    )
    grad = jax.jit(jax.grad(problem.loss_fn))

    def clipped(t, flat):
        layer = lambda i: {k: flat[f"{i}/{k}"] for k in ("kernel", "bias")}
        g = grad({f"layer{i}": layer(i) for i in range(2)}, problem.batch(t))
        return base.clip(flatten(g), 0.3)

    def flatten(tree):
        return {
            f"{i}/{k}": np.asarray(x)
            for i in range(2)
            for k, x in tree[f"layer{i}"].items()
        }

    wanted = msam.sgd(
        *(flatten(problem.start), 12, clipped, 0.5),
        **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    )
    for (params, state), (live, w) in zip(steps(tx, 12), wanted, strict=True):
        assert recorded.deviation(flatten(params), live) < 1e-12
        unperturbed = optax_sam.msam_eval_params(state, params)
        assert recorded.deviation(flatten(unperturbed), w) < 1e-12


def test_extra_args_reach_the_inner_optimizer():
    """The loss, for the plateau; and what nobody knows does no harm."""
    plateau = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=2, accumulation_size=1
    )
    tx = optax_sam.msam(optax.chain(SGD, plateau), rho=0.5)
    params = harness.tree()
    state = tx.init(params)
    update = jax.jit(
        lambda s, value: tx.update(
            params, s, params, value=value, grad_fn=None, ascend=True, unknown=1
        )
    )
    for _ in range(5):
        _, state = update(state, 1.0)
    assert optax.tree.get(state, "scale", filtering=is_in_plateau) < 1


def is_in_plateau(path, _):
    return "ReduceLROnPlateauState" in str(path)


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


def test_inject_hyperparams():
    """A rho that is put into the state counts, and the old one is what is removed."""
    assert optax_sam.static_args(optax_sam.msam) == ("inner",)
    assert optax_sam.static_args(optax_sam.decay_after) == ("mask",)
    factory = optax.inject_hyperparams(optax_sam.msam, static_args="inner")
    tx = factory(inner=optax.sgd(0.0, momentum=0.9), rho=0.5)
    start = params = harness.tree()
    state = tx.init(params)
    for rho in (0.5, 3.0, 0.0, 0.25):
        state.hyperparams["rho"] = jnp.asarray(rho)
        updates, state = jax.jit(tx.update)(harness.tree(1), state, params)
        params = optax.apply_updates(params, updates)
        assert distance(params, start) == pytest.approx(rho, abs=1e-5)
        harness.assert_close(optax_sam.msam_eval_params(state, params), start, 1e-5)


def test_injected_inner_optimizer():
    sgd = optax.inject_hyperparams(optax.sgd)
    tx = optax_sam.msam(sgd(learning_rate=0.1, momentum=0.9), rho=0.5)
    plain = trained(optax_sam.msam(SGD, rho=0.5))[0]
    harness.assert_close(trained(tx)[0], plain, 1e-5)


def test_apply_if_finite():
    """A step of NaN leaves the parameters, the momentum and the scale."""
    problem = problems.mlp()
    tx = optax.apply_if_finite(optax_sam.msam(SGD, rho=0.5), max_consecutive_errors=5)
    step = jax.jit(harness.make_step(tx, problem.loss_fn))
    params = problem.params()
    params, state = harness.run(step, params, tx.init(params), problem, 3)
    x, y = problem.batch(0)
    poisoned = step(params, state, (x.at[0, 0].set(jnp.nan), y))
    harness.assert_equal(poisoned[0], params)
    assert poisoned[1].total_notfinite == 1
    harness.assert_equal(poisoned[1].inner_state, state.inner_state)
    params, state = harness.run(step, *poisoned, problem, 9, first=3)
    plain, plain_state = trained(optax_sam.msam(SGD, rho=0.5))
    harness.assert_close(params, plain, 1e-5)
    w = optax_sam.msam_eval_params(state, params)
    harness.assert_close(w, optax_sam.msam_eval_params(plain_state, plain), 1e-5)


def test_multi_steps():
    """Around it: the perturbation moves with the updates, not with micro-steps."""
    tx = optax.MultiSteps(optax_sam.msam(SGD, rho=0.5), every_k_schedule=2)
    previous = None
    for t, (params, state) in enumerate(steps(tx, 6)):
        if t % 2:
            harness.assert_equal(params, previous)
        previous = params
        w = optax_sam.msam_eval_params(state, params)
        assert distance(params, w) == pytest.approx(0.5 if t >= 2 else 0, abs=1e-6)


def test_frozen_leaves_stay():
    """As the errors advise: their gradients are zeroed before it."""
    frozen = {"layer0": True, "layer1": False}
    tx = optax.chain(
        optax.masked(optax.set_to_zero(), frozen), optax_sam.msam(SGD, rho=0.5)
    )
    params, state = trained(tx)
    start = problems.mlp().params()
    harness.assert_equal(params["layer0"], start["layer0"])
    w = optax_sam.msam_eval_params(state, params)
    assert distance(params["layer1"], w["layer1"]) == pytest.approx(0.5, abs=1e-5)


def test_flax_nnx():
    """Parameters and momentum are variables of different kinds there."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax_sam.msam(SGD, rho=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    state = tx.init(params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    for _ in range(3):
        loss_fn = lambda model: jnp.mean(model(x) ** 2)
        optimizer.update(model, nnx.grad(loss_fn)(model))
        plain_loss = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
        updates, state = tx.update(jax.grad(plain_loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    live = nnx.state(model, nnx.Param)
    w = optax_sam.msam_eval_params(optimizer.opt_state, live)
    assert jax.tree.structure(w) == jax.tree.structure(live)
    wanted = optax_sam.msam_eval_params(state, params)
    for leaf in ("kernel", "bias"):
        harness.assert_close(w[leaf][...], wanted[leaf], 1e-5)


# Decay after the step.


def test_decay_after_schedule_and_mask():
    tx = optax.chain(
        optax.sgd(0.5),
        optax_sam.decay_after(
            lambda t: 0.1 * (t + 1),
            mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
        ),
    )
    params = harness.tree()
    state = tx.init(params)
    for t in range(3):
        g = harness.tree(t + 1)
        updates, state = jax.jit(tx.update)(g, state, params)
        stepped = jax.tree.map(lambda w, g: w - 0.5 * g, params, g)
        shrunk = lambda x, t=t: x * (1 - 0.1 * (t + 1)) if x.ndim > 1 else x
        params = optax.apply_updates(params, updates)
        harness.assert_close(params, jax.tree.map(shrunk, stepped), 1e-6)


def test_decay_after_types():
    tx = optax_sam.decay_after(optax.constant_schedule(0.1))
    params = jax.tree.map(lambda x: x.astype("bfloat16"), harness.tree())
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params, value=1.0)
    assert harness.kinds(updates) == harness.kinds(params)
    assert harness.kinds(after) == harness.kinds(state)
    wanted = jax.tree.map(lambda x: x - 0.2 * x, params)
    harness.assert_close(updates, wanted, 1e-2)


def test_decay_after_refuses():
    with pytest.raises(ValueError, match="rate must be a number"):
        optax_sam.decay_after(-0.1)
    with pytest.raises(ValueError, match="rate must be a number"):
        optax_sam.decay_after(1.5)
    tx = optax_sam.decay_after(0.1)
    with pytest.raises(ValueError, match="decay_after needs the parameters"):
        tx.update(harness.tree(), tx.init(harness.tree()))


# Errors.


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"rho must be a number .* got -1\.0"):
        optax_sam.msam(SGD, rho=-1.0)
    with pytest.raises(ValueError, match="msam wraps an optimizer"):
        optax_sam.msam(0.05)


def test_refused_calls():
    tx, params = optax_sam.msam(SGD), harness.tree()
    state = tx.init(params)
    with pytest.raises(ValueError, match="msam needs the parameters: tx.update"):
        tx.update(params, state)
    less = {"gain": params["gain"]}
    with pytest.raises(ValueError, match=r"msam: the incoming gradient.*missing"):
        tx.update(less, state, params)
    wrong = {**params, "gain": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"\['gain'\] has shape \(3,\)"):
        tx.update(wrong, state, params)


def test_masked_around_it_is_refused():
    params = harness.tree()
    around = optax.masked(optax_sam.msam(SGD), {"layer": True, "gain": False})
    advice = "msam stands inside optax.masked or optax.partition.*set_to_zero"
    with pytest.raises(ValueError, match=advice):
        around.init(params)
    state = optax.MaskedState(optax_sam.msam(SGD).init(params))
    with pytest.raises(ValueError, match=advice):
        around.update(params, state, params)


def test_eval_params_refuses():
    tx, params = optax_sam.msam(SGD), harness.tree()
    state = tx.init(params)
    with pytest.raises(ValueError, match="one state of msam, found 0"):
        optax_sam.msam_eval_params(SGD.init(params), params)
    with pytest.raises(ValueError, match="found 0; pass the opt_state"):
        optax_sam.msam_eval_params(params, state)
    with pytest.raises(ValueError, match="found 2"):
        optax_sam.msam_eval_params((state, state), params)
    with pytest.raises(ValueError, match="other shapes than the momentum"):
        optax_sam.msam_eval_params(state, {"gain": params["gain"]})


# Cost.


def test_cost_of_a_step():
    """Operations and bytes of the base optimizer."""
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def cost(tx):
        step = harness.make_step(tx, problem.loss_fn)
        state = jax.eval_shape(tx.init, params)
        lowered = jax.jit(step).lower(params, state, batch)
        return lowered.compile().cost_analysis()["flops"], size(state)

    flops, stored = cost(optax_sam.msam(SGD))
    base_flops, base_stored = cost(optax.with_extra_args_support(SGD))
    assert flops / base_flops == pytest.approx(1, abs=0.03)
    assert stored - base_stored == 8
