"""The transcriptions in reference/ against the recorded trajectories."""

import numpy as np
import pytest
import recorded
from reference import (
    asam,
    base,
    esam,
    friendly_sam,
    gam,
    gnp,
    gsam,
    looksam,
    random_sam,
    renyi_sam,
    sam,
    sampa,
    vsam,
    wsam,
)

TOLERANCE = 1e-10


class Batch:
    """The batch of a step: gradients, losses, and a record of the gradients taken."""

    def __init__(self, name, t):
        self.quad = recorded.RUNS[name]["problem"] == "quad"
        self.l2 = hyperparameters(name).get("l2_reg", 0.0)
        self.data = recorded.data(name, t)
        self.losses_taken, self.norms_taken = [], []

    def grad(self, w, kept=slice(None)):
        """The gradient of the mean loss, here over the examples kept."""
        if self.quad:
            loss, g = base.quad(w, *self.data)
        else:
            loss, g = base.mlp(w, *(column[kept] for column in self.data))
        g = base.add(g, w, self.l2)
        self.losses_taken.append(loss + self.l2 * base.norm(w) ** 2 / 2)
        self.norms_taken.append(base.norm(g))
        return g

    def losses(self, w):
        """The loss of each example; the quadratic counts as one."""
        if self.quad:
            return np.array([base.quad(w, *self.data)[0]])
        return base.mlp_losses(w, *self.data)


def hyperparameters(name):
    return recorded.RUNS[name]["hyperparameters"]


def rate(h, t):
    """The learning rate of a run in step t."""
    if "T_max" in h:
        cosine = (1.0 + np.cos(np.pi * t / h["T_max"])) / 2
        return h["lr_min"] + (h["lr"] - h["lr_min"]) * cosine
    if h.get("schedule") == "linear":
        return h["lr_max"] + (h["lr_min"] - h["lr_max"]) * t / h["T"]
    return h["lr"]


def radius(h, t):
    """The radius of a run in step t."""
    if "rho_max" not in h:
        return h["rho"]
    lr_max = h.get("lr_max", h.get("lr"))
    rhos = h["rho_max"], h["rho_min"]
    return gsam.tied_radius(rate(h, t), lr_max, h["lr_min"], *rhos)


def assert_near(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def descend(name, direction):
    """The trajectory and the batches of direction(t, w, batch), as in the run."""
    h, steps = hyperparameters(name), recorded.RUNS[name]["steps"]
    batches = [Batch(name, t) for t in range(steps)]
    trajectory = base.descend(
        recorded.initial(name),
        steps,
        lambda t, w: direction(t, w, batches[t]),
        lr=[rate(h, t) for t in range(steps)],
        momentum=h["momentum"],
        weight_decay=h.get("weight_decay", 0.0),
        nesterov=h.get("nesterov", False),
    )
    return trajectory, batches


def assert_descends_as_recorded(name, direction):
    """Compare parameters, their norms and the losses; returns what descend returns."""
    trajectory, batches = descend(name, direction)
    assert_is_recorded(name, trajectory, [batch.losses_taken for batch in batches])
    return trajectory, batches


def assert_is_recorded(name, trajectory, losses):
    """Compare a trajectory, its norms and the losses of each step, as far as stored."""
    run, saved = recorded.arrays(name), recorded.saved(name)
    assert max(saved) >= len(losses) - 10  # the long runs store their end in norms
    for t, w in saved.items():
        assert recorded.deviation(trajectory[t], w) < TOLERANCE, t
    if "param_norm" in run:
        assert_near([base.norm(w) for w in trajectory[1:]], run["param_norm"])
    if "losses" in run:
        taken = np.full_like(run["losses"], np.nan)
        for row, losses_taken in zip(taken, losses, strict=True):
            first = losses_taken[: len(row)]
            row[: len(first)] = first
        # Relative as well, because one run diverges to losses in the hundreds.
        np.testing.assert_allclose(taken, run["losses"], rtol=TOLERANCE, atol=TOLERANCE)


def sam_google(h, w, grad):
    return base.clip(sam.sam(w, grad, h["rho"], 0.0), h["clip_global_norm"])


def asam_samsung(h, w, grad):
    adapted = {leaf for leaf in w if not leaf.endswith("bias")}
    return asam.asam(w, grad, h["rho"], adapted, h["eta"], eps=1e-16)


def gsam_torch(h, t, w, grad):
    ascend = gsam.adaptive if h["adaptive"] else gsam.ascend
    return gsam.gsam(w, grad, radius(h, t), h["alpha"], ascend=ascend)


def gsam_jax(h, t, w, grad):
    ascend = gsam.weight_scaled if h["adaptive_perturbation"] else gsam.ascend
    minimize = "perturbed" if h["minimize_fp"] else "clean"
    return gsam.gsam(w, grad, radius(h, t), h["alpha"], minimize, ascend)


def renyi(h, w, grad):
    power_sums = {"NEWRSAM": renyi_sam.elementwise, "RSAM": renyi_sam.layerwise}
    return renyi_sam.renyi_sam(w, grad, h["rho"], h["a"], power_sums[h["cls"]])


def gam_code(h, w, grad):
    alpha, beta = h["grad_beta_1"], h["grad_beta_0"]
    radii = h["grad_norm_rho"], h["grad_rho"]
    return gam.gam(w, grad, *radii, alpha, beta, h["grad_gamma"], h_minus="code")


# Run -> the emitted gradient as a function of its hyperparameters, t, w and grad. The
# key is how the run's name starts.
METHODS = {
    "sgd": lambda h, t, w, grad: grad(w),
    "sam_davda54": lambda h, t, w, grad: sam.sam(w, grad, h["rho"]),
    "sam_google": lambda h, t, w, grad: sam_google(h, w, grad),
    "asam_davda54": lambda h, t, w, grad: asam.asam(w, grad, h["rho"], set(w), eta=0.0),
    "asam_samsung": lambda h, t, w, grad: asam_samsung(h, w, grad),
    "gsam_torch": gsam_torch,
    "gsam_jax": gsam_jax,
    "renyi_sam": lambda h, t, w, grad: renyi(h, w, grad),
    "wsam_coupled": lambda h, t, w, grad: wsam.coupled(w, grad, h["rho"], h["gamma"]),
    "gam": lambda h, t, w, grad: gam_code(h, w, grad),
}


@pytest.mark.parametrize("batch", ["batch0", "all"])
def test_gradient_of_the_network(batch):
    examples = slice(0, 64) if batch == "batch0" else slice(None)
    x, y = recorded.PROBLEM["X"][examples], recorded.PROBLEM["y"][examples]
    loss, grads = base.mlp(recorded.initial("sgd"), x, y)
    assert_near(loss, recorded.PROBLEM[f"check/{batch}/loss"], 1e-14)
    assert loss == np.mean(base.mlp_losses(recorded.initial("sgd"), x, y))
    for leaf, g in grads.items():
        assert_near(g, recorded.PROBLEM[f"check/{batch}/grad/{leaf}"], 1e-14)


@pytest.mark.parametrize("name", recorded.runs(*METHODS))
def test_trajectory(name):
    h = hyperparameters(name)
    (method,) = (m for m in METHODS if name.removeprefix("quad_").startswith(m))
    direction = lambda t, w, batch: METHODS[method](h, t, w, batch.grad)
    assert_descends_as_recorded(name, direction)


@pytest.mark.parametrize("name", recorded.runs("gsam", "random_sam"))
def test_the_radius_follows_the_learning_rate_as_recorded(name):
    h, run = hyperparameters(name), recorded.arrays(name)
    steps = range(recorded.RUNS[name]["steps"])
    assert_near([radius(h, t) for t in steps], run["rho_used"])
    if "lr_used" in run:
        assert_near([rate(h, t) for t in steps], run["lr_used"])


@pytest.mark.parametrize("name", recorded.runs("looksam"))
def test_looksam(name):
    h = hyperparameters(name)
    method = looksam.LookSAM(h["rho"], h["alpha"], h["k"])
    direction = lambda t, w, batch: method.direction(t, w, batch.grad)
    _, batches = assert_descends_as_recorded(name, direction)
    ascended = [len(batch.losses_taken) == 2 for batch in batches]
    np.testing.assert_array_equal(ascended, recorded.arrays(name)["is_sam_step"])


@pytest.mark.parametrize("name", recorded.runs("fsam"))
def test_friendly_sam(name):
    h = hyperparameters(name)
    method = friendly_sam.FriendlySAM(h["rho"], h["sigma"], h["lmbda"])
    direction = lambda t, w, batch: method.direction(w, batch.grad)
    assert_descends_as_recorded(name, direction)


@pytest.mark.parametrize("name", recorded.runs("wsam_coupled"))
def test_coupled_wsam_is_gnp(name):
    h = hyperparameters(name)
    alpha = h["gamma"] / (1.0 - h["gamma"])
    direction = lambda t, w, batch: gnp.gnp(w, batch.grad, h["rho"], alpha)
    assert_descends_as_recorded(name, direction)


def wraps(name, method, **arguments):
    """Compare a method that wraps SGD, with grad(t, w) on the batch of step t."""
    h, steps = hyperparameters(name), recorded.RUNS[name]["steps"]
    losses = []

    def grad(t, w):
        batch = Batch(name, t)
        g = batch.grad(w)
        losses.extend(batch.losses_taken)
        return g

    U = base.sgd(h["lr"], h["momentum"], h["weight_decay"])
    trajectory = method(recorded.initial(name), steps, grad, U, h["rho"], **arguments)
    assert_is_recorded(name, trajectory, np.reshape(losses, (steps, -1)))


@pytest.mark.parametrize("name", recorded.runs("wsam_decoupled"))
def test_decoupled_wsam(name):
    h = hyperparameters(name)
    limit = h.get("max_norm")
    wraps(name, wsam.decoupled, gamma=h["gamma"], lr=h["lr"], max_norm=limit)


@pytest.mark.parametrize("name", recorded.runs("sampa"))
def test_sampa(name):
    wraps(name, sampa.sampa, lam=hyperparameters(name)["og"])


@pytest.mark.parametrize("name", recorded.runs("esam"))
def test_esam_chooses_tensors_and_examples_as_recorded(name):
    h, run = hyperparameters(name), recorded.arrays(name)
    method, log = esam.ESAM(h["rho"], h["beta"], h["gamma"]), []
    tensors = list(recorded.initial(name))

    def direction(t, w, batch):
        active = [method.active is None or leaf in method.active for leaf in tensors]
        u = dict(zip(tensors, run["mask_uniforms"][t], strict=True))
        d = method.direction(w, batch.grad, batch.losses, u)
        log.append((active, method.kept, method.rise))
        return d

    assert_descends_as_recorded(name, direction)
    active, kept, rise = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(active, run["active_tensors_first_pass"])
    np.testing.assert_array_equal(kept, run["selected"])
    assert_near(rise, run["instance_sharpness"])


@pytest.mark.parametrize("name", recorded.runs("random_sam"))
def test_random_sam(name):
    h, run = hyperparameters(name), recorded.arrays(name)
    tree = lambda kind, t, w: {leaf: run[f"{kind}/step{t + 1:03}/{leaf}"] for leaf in w}

    def direction(t, w, batch):
        delta = tree("delta", t, w)
        return random_sam.random_sam(w, batch.grad, delta, radius(h, t), h["lam"])

    trajectory, batches = assert_descends_as_recorded(name, direction)
    assert_near([batch.norms_taken[0] for batch in batches], run["g1_norm"])
    t = np.arange(len(batches))
    sigma = random_sam.sigma(t + 1, h["T"], h["sigma0"], h["inc"])
    assert_near(sigma, run["sigma"], 1e-16)
    for t, w in enumerate(trajectory[:2]):
        delta = random_sam.noise(w, tree("normal", t, w), sigma[t])
        assert recorded.deviation(delta, tree("delta", t, w)) < 1e-15


@pytest.mark.parametrize("name", recorded.runs("vsam"))
def test_vsam_decides_and_descends_as_recorded(name):
    run = recorded.arrays(name)
    method = recorded.transcribed_vsam(name)
    control, log = method.controller, []

    def direction(t, w, batch):
        before = control.samples
        d = method.direction(w, batch.grad, 1.0 - run["uniform"][t])
        sampled = control.samples > before
        r, v = control.r[-1], control.v[-1]
        log.append((sampled, control.samples, control.used, control.s, r, v))
        return d

    assert_descends_as_recorded(name, direction)
    sampled, samples, used, s, ratio, var = map(np.array, zip(*log, strict=True))
    np.testing.assert_array_equal(sampled, run["sampled"])
    np.testing.assert_array_equal(samples, run["n_samples"])
    np.testing.assert_array_equal(used, run["used_in_window"])
    assert_near(s, run["s"])
    assert_near(ratio, run["ratio"])
    assert_near(var, run["var"])


@pytest.mark.parametrize("name", recorded.runs("vsam"))
def test_controller_alone_decides_as_recorded(name):
    h, run = hyperparameters(name), recorded.arrays(name)
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
    assert_near(s, run["s"])
