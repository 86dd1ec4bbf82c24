"""The transcriptions in reference/ against the recorded trajectories."""

import numpy as np
import pytest
import recorded
from reference import asam, base, sam, vsam

PROBLEMS = {"mlp": base.mlp, "quad": base.quad}
TOLERANCE = 1e-10


def grad_fn(name, t, l2=0.0):
    loss = PROBLEMS[recorded.RUNS[name]["problem"]]
    batch = recorded.data(name, t)
    return lambda w: base.add(loss(w, *batch)[1], w, l2)


def direction(name):
    """The emitted gradient of a run as a function of (t, w)."""
    h = recorded.RUNS[name]["hyperparameters"]
    method = name.removeprefix("quad_").split("_wd")[0]

    def step(t, w):
        grad = grad_fn(name, t, h.get("l2_reg", 0.0))
        if method == "sgd":
            return grad(w)
        if method == "sam_davda54":
            return sam.sam(w, grad, h["rho"])
        if method == "sam_google":
            return base.clip(sam.sam(w, grad, h["rho"], 0.0), h["clip_global_norm"])
        if method == "asam_davda54":
            return asam.asam(w, grad, h["rho"], set(w), eta=0.0)
        adapted = {leaf for leaf in w if not leaf.endswith("bias")}
        return asam.asam(w, grad, h["rho"], adapted, h["eta"], eps=1e-16)

    return step


def descend(name, step, steps):
    h = recorded.RUNS[name]["hyperparameters"]
    return base.descend(
        recorded.initial(name),
        steps,
        step,
        lr=h["lr"],
        momentum=h["momentum"],
        weight_decay=h.get("weight_decay", 0.0),
        nesterov=h.get("nesterov", False),
    )


@pytest.mark.parametrize("batch", ["batch0", "all"])
def test_gradient_of_the_network(batch):
    examples = slice(0, 64) if batch == "batch0" else slice(None)
    x, y = recorded.PROBLEM["X"][examples], recorded.PROBLEM["y"][examples]
    loss, grads = base.mlp(recorded.initial("sgd"), x, y)
    np.testing.assert_allclose(
        loss, recorded.PROBLEM[f"check/{batch}/loss"], rtol=0, atol=1e-14
    )
    for leaf, g in grads.items():
        recorded_grad = recorded.PROBLEM[f"check/{batch}/grad/{leaf}"]
        np.testing.assert_allclose(g, recorded_grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", recorded.runs("sgd", "sam", "asam"))
def test_trajectory(name):
    steps = recorded.RUNS[name]["steps"]
    trajectory = descend(name, direction(name), steps)
    saved = recorded.saved(name)
    assert max(saved) == steps
    for t, w in saved.items():
        assert recorded.deviation(trajectory[t], w) < TOLERANCE, t
    norms = [base.norm(w) for w in trajectory[1:]]
    if "param_norm" in recorded.arrays(name):
        expected = recorded.arrays(name)["param_norm"]
        np.testing.assert_allclose(norms, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", recorded.runs("vsam"))
def test_vsam_decides_and_descends_as_recorded(name):
    run = recorded.arrays(name)
    method = recorded.transcribed_vsam(name)
    control, log = method.controller, []

    def step(t, w):
        before = control.samples
        d = method.direction(w, grad_fn(name, t), 1.0 - run["uniform"][t])
        sampled = control.samples > before
        r, v = control.r[-1], control.v[-1]
        log.append((sampled, control.samples, control.used, control.s, r, v))
        return d

    steps = len(run["sampled"])
    trajectory = descend(name, step, steps)
    sampled, samples, used, s, ratio, var = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(sampled, run["sampled"])
    np.testing.assert_array_equal(samples, run["n_samples"])
    np.testing.assert_array_equal(used, run["used_in_window"])
    np.testing.assert_allclose(s, run["s"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ratio, run["ratio"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(var, run["var"], rtol=0, atol=TOLERANCE)
    norms = [base.norm(w) for w in trajectory[1:]]
    np.testing.assert_allclose(norms, run["param_norm"], rtol=0, atol=TOLERANCE)
    for t, w in recorded.saved(name).items():
        assert recorded.deviation(trajectory[t], w) < TOLERANCE, t


@pytest.mark.parametrize("name", recorded.runs("vsam"))
def test_controller_alone_decides_as_recorded(name):
    h, run = recorded.RUNS[name]["hyperparameters"], recorded.arrays(name)
    sampled, s = vsam.simulate(
        run["g_norm"],
        run["psf_norm"],
        1.0 - run["uniform"],
        K=h["K"],
        m=h["m"],
        a=h["a"],
        max_rate=h["max_rate"],
        warmup=h["warmup_steps"],
    )
    np.testing.assert_array_equal(sampled, run["sampled"])
    np.testing.assert_allclose(s, run["s"], rtol=0, atol=TOLERANCE)
