"""The package against the trajectories recorded from the authors' code, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
from reference import base

import optax_sam

pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(name):
    """The loss of a run, with the L2 term of those that have one."""
    plain = recorded.LOSSES[recorded.RUNS[name]["problem"]]
    l2 = recorded.RUNS[name]["hyperparameters"].get("l2_reg", 0.0)

    def loss(w, batch):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return plain(w, *batch) + 0.5 * l2 * squares

    return loss


def optimizer(name, member):
    """The member first, then what the authors' base optimizer does."""
    return optax.chain(member, *base_optimizer(name))


def base_optimizer(name):
    """The parts of the authors' base optimizer."""
    h = recorded.RUNS[name]["hyperparameters"]
    after = []
    if "clip_global_norm" in h:
        after.append(optax.clip_by_global_norm(h["clip_global_norm"]))
    if h.get("weight_decay"):
        after.append(optax.add_decayed_weights(h["weight_decay"]))
    lr = schedule(name, "lr_used") if "gsam" in name else h["lr"]
    sgd = optax.sgd(lr, momentum=h["momentum"], nesterov=h.get("nesterov", False))
    return [*after, sgd]


def schedule(name, array):
    """A recorded hyperparameter by step."""
    values = jnp.asarray(recorded.arrays(name)[array])
    return lambda count: values[count]


def descend(name, tx, ascend=None, recorded_extra=lambda t: {}):
    """Yields t, w_t and the state before step t, and once more after the last step."""
    loss = loss_fn(name)

    @functools.partial(jax.jit, static_argnames="ascend")
    def step(w, state, batch, extra, ascend):
        def per_example_loss_fn(p, indices=None):
            one = lambda *example: loss(p, jax.tree.map(lambda x: x[None], example))
            given = batch if indices is None else [x[indices] for x in batch]
            return jax.vmap(one)(*given)

        grad_fn = lambda p: jax.grad(loss)(p, batch)
        extra |= {"grad_fn": grad_fn, "ascend": ascend}
        if "esam" in name and "quad" not in name:
            extra["per_example_loss_fn"] = per_example_loss_fn
        elif "esam" in name:
            extra["per_example_loss_fn"] = lambda p: loss(p, batch)[None]
        if "previous_batch" in extra:
            previous = extra.pop("previous_batch")
            extra["previous_grad_fn"] = lambda p: jax.grad(loss)(p, previous)
        updates, state = tx.update(grad_fn(w), state, w, **extra)
        return optax.apply_updates(w, updates), state

    w = jax.tree.map(jnp.asarray, recorded.initial(name))
    state = tx.init(w)
    yield 0, w, state
    for t in range(recorded.RUNS[name]["steps"]):
        decision = None if ascend is None else bool(ascend[t])
        w, state = step(w, state, recorded.data(name, t), recorded_extra(t), decision)
        yield t + 1, w, state


def stacked(states):
    """One state whose leaves have a leading axis of steps."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def check(name, steps):
    """Compares every stored step and norm; returns the states before each step."""
    saved, arrays = recorded.saved(name), recorded.arrays(name)
    compared, norms, states = set(), [], []
    for t, w, state in steps:
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(w))
        if t in saved:
            assert recorded.deviation(w, saved[t]) < recorded.atol(name, t), t
            compared.add(t)
        norms.append(float(optax.tree.norm(w)))
        states.append(state)
    assert compared == set(saved)
    if "param_norm" in arrays:
        last = max(saved)
        np.testing.assert_allclose(
            norms[1:], arrays["param_norm"], rtol=0, atol=recorded.atol(name, last)
        )
    return stacked(states)


SAM_RUNS = recorded.runs("sgd", "sam_", "asam")  # not SAMPa
VSAM_RUNS = recorded.runs("vsam")


def member(name):
    h = recorded.RUNS[name]["hyperparameters"]
    if "sgd" in name:
        return optax.identity()
    if "asam_davda54" in name:
        return optax_sam.asam(h["rho"], adapt=True, eta=0.0)
    if "asam_samsung" in name:
        # The one leaf of quad is called "weight" in the authors' code.
        adapt = True if "quad" in name else None
        return optax_sam.asam(h["rho"], eta=h["eta"], adapt=adapt)
    return optax_sam.sam(h["rho"])


@pytest.mark.parametrize("name", SAM_RUNS)
def test_sam_and_asam(name):
    check(name, descend(name, optimizer(name, member(name))))


@pytest.mark.parametrize("name", recorded.runs("gsam"))
def test_gsam(name):
    h, run = recorded.RUNS[name]["hyperparameters"], recorded.arrays(name)
    rho = schedule(name, "rho_used")
    blend = optax_sam.blend.surrogate_gap(h["alpha"])
    if not h.get("minimize_fp", True):
        blend = optax_sam.blend.surrogate_gap(h["alpha"], minimize="clean")
    if h.get("adaptive_perturbation"):
        rule = optax_sam.ascent.weight_scaled(rho)
    elif h.get("adaptive"):
        rule = optax_sam.ascent.adaptive(rho, eta=0.0, adapt=True)
    else:
        rule = optax_sam.ascent.l2(rho)
    parts = optax_sam.sharpness_aware(rule, blend=blend)
    check(name, descend(name, optimizer(name, parts)))
    if "adaptive" in name or "minimize_f" in name:
        return
    # The named method, with the radius tied to the learning rate.
    tied = rho
    if "rho_max" in h:
        steps = recorded.RUNS[name]["steps"]
        low, high = h["lr_min"], h.get("lr_max", h.get("lr"))
        decay = {
            "linear": optax.linear_schedule(high, low, steps),
            "cosine": optax.cosine_decay_schedule(high, steps, low / high),
        }[h.get("schedule", h.get("lr_schedule"))]
        # Optax computes in float32 where it is given an int32.
        lr = lambda count: decay(jnp.asarray(count, float))
        np.testing.assert_allclose(lr(np.arange(steps)), run["lr_used"], rtol=1e-12)
        tied = optax_sam.rho_from_lr(lr, h["rho_min"], h["rho_max"])
    check(name, descend(name, optimizer(name, optax_sam.gsam(tied, alpha=h["alpha"]))))


@pytest.mark.parametrize("name", recorded.runs("looksam"))
def test_looksam(name):
    h = recorded.RUNS[name]["hyperparameters"]
    tx = optimizer(name, optax_sam.looksam(h["rho"], k=h["k"], alpha=h["alpha"]))
    states = check(name, descend(name, tx))
    decisions = optax_sam.ascends_next(states)[:-1]
    np.testing.assert_array_equal(decisions, recorded.arrays(name)["is_sam_step"])


@pytest.mark.parametrize("name", recorded.runs("renyi_sam"))
def test_renyi_sam(name):
    h = recorded.RUNS[name]["hyperparameters"]
    member = optax_sam.renyi_sam(h["rho"], alpha=h["a"], layerwise=h["cls"] == "RSAM")
    check(name, descend(name, optimizer(name, member)))


RUNS_OF = {"fsam": 3, "wsam_coupled": 2, "wsam_decoupled": 3, "sampa": 3, "gam": 2}


@pytest.mark.parametrize("method", RUNS_OF)
def test_the_recorded_runs_are_all_there(method):
    assert len(recorded.runs(method)) == RUNS_OF[method]


@pytest.mark.parametrize("name", recorded.runs("fsam"))
def test_friendly_sam(name):
    h = recorded.RUNS[name]["hyperparameters"]
    member = optax_sam.friendly_sam(h["rho"], sigma=h["sigma"], decay=h["lmbda"])
    check(name, descend(name, optimizer(name, member)))


@pytest.mark.parametrize("name", recorded.runs("wsam_coupled"))
def test_coupled_wsam_is_gnp(name):
    h = recorded.RUNS[name]["hyperparameters"]
    member = optax_sam.gnp(h["rho"], alpha=h["gamma"] / (1 - h["gamma"]))
    check(name, descend(name, optimizer(name, member)))


@pytest.mark.parametrize("name", recorded.runs("wsam_decoupled"))
def test_decoupled_wsam(name):
    h = recorded.RUNS[name]["hyperparameters"]
    tx = optax_sam.wsam(
        optax.chain(*base_optimizer(name)),
        learning_rate=h["lr"],
        rho=h["rho"],
        gamma=h["gamma"],
        max_norm=h.get("max_norm"),
    )
    check(name, descend(name, tx))


@pytest.mark.parametrize("name", recorded.runs("sampa"))
def test_sampa(name):
    h = recorded.RUNS[name]["hyperparameters"]
    inner = optax.chain(*base_optimizer(name))
    tx = optax_sam.sampa(inner, rho=h["rho"], interpolation=h["og"])
    before = lambda t: {"previous_batch": recorded.data(name, max(t - 1, 0))}
    check(name, descend(name, tx, recorded_extra=before))


@pytest.mark.parametrize("name", recorded.runs("gam"))
def test_gam(name):
    h = recorded.RUNS[name]["hyperparameters"]
    member = optax_sam.gam(
        h["grad_rho"],
        norm_rho=h["grad_norm_rho"],
        beta0=h["grad_beta_0"],
        beta1=h["grad_beta_1"],
        gamma=h["grad_gamma"],
        h_minus="code",
    )
    check(name, descend(name, optimizer(name, member)))


@pytest.mark.parametrize("name", recorded.runs("esam"))
def test_esam(name):
    h, run = recorded.RUNS[name]["hyperparameters"], recorded.arrays(name)
    order = ("w",) if "quad" in name else recorded.TENSORS
    draws = run.get("mask_uniforms")
    extra = lambda t: (
        {}
        if draws is None
        else {"mask_uniforms": dict(zip(order, draws[t], strict=True))}
    )
    member = optax_sam.esam(h["rho"], beta=h["beta"], gamma=h["gamma"])
    steps = descend(name, optimizer(name, member), recorded_extra=extra)
    states = check(name, steps)
    if "active_tensors_first_pass" in run:
        active = optax.tree.get(states, "active")[:-1]
        in_our_order = [order.index(leaf) for leaf in sorted(order)]
        np.testing.assert_array_equal(
            active, run["active_tensors_first_pass"][:, in_our_order]
        )


@pytest.mark.parametrize("name", recorded.runs("random_sam"))
def test_random_sam(name):
    h, run = recorded.RUNS[name]["hyperparameters"], recorded.arrays(name)
    deltas = {}
    for key, value in run.items():
        if key.startswith("delta/"):
            _, step, leaf = key.split("/", 2)
            deltas.setdefault(int(step.removeprefix("step")) - 1, {})[leaf] = value

    grow = optax.cosine_decay_schedule(h["sigma0"], h["T"], alpha=h["inc"])
    sigma = lambda count: grow(count + 1)  # theirs starts at 1
    np.testing.assert_allclose(
        sigma(np.arange(len(run["sigma"]))), run["sigma"], rtol=1e-12
    )
    weights = {}

    def standard_normals(t):
        """The recorded noise, without its size at the weights of the step."""
        sizes = lambda w: (
            np.linalg.norm(w, axis=0) if w.ndim > 1 else np.linalg.norm(w) + 1e-16
        )
        return {
            "noise": {
                leaf: delta / (run["sigma"][t] * sizes(np.asarray(weights[leaf])))
                for leaf, delta in deltas[t].items()
            }
        }

    member = optax_sam.random_sam(
        schedule(name, "rho_used"), sigma=sigma, gradient_weight=h["lam"]
    )

    def steps():
        for t, w, state in descend(
            name, optimizer(name, member), recorded_extra=standard_normals
        ):
            weights.update(w)
            yield t, w, state

    states = check(name, steps())
    norms = optax_sam.metrics(states)["gradient_norm"][1:]
    np.testing.assert_allclose(norms, run["g1_norm"], rtol=1e-10)
    for step in (0, 1):
        if f"normal/step{step + 1:03}/layer0/kernel" in run:
            weights.update(
                recorded.initial(name) if step == 0 else recorded.saved(name)[step]
            )
            noise = standard_normals(step)["noise"]
            for leaf, normal in noise.items():
                expected = run[f"normal/step{step + 1:03}/{leaf}"]
                np.testing.assert_allclose(normal, expected, rtol=1e-9)


def vsam_member(name, **changes):
    h = recorded.RUNS[name]["hyperparameters"]
    tail = recorded.TENSORS[-h["last_layer"] :]
    return optax_sam.vsam(
        h["rho"],
        window=h["K"],
        num_slices=h["m"],
        sensitivity=h["a"],
        max_rate=h["max_rate"],
        warmup_steps=h["warmup_steps"],
        reuse_decay=h["beta"],
        norm_mask={leaf: leaf in tail for leaf in recorded.TENSORS},
        **changes,
    )


@pytest.mark.parametrize("name", VSAM_RUNS)
def test_vsam_driven_by_the_recorded_decisions(name):
    run = recorded.arrays(name)
    tx = optimizer(name, vsam_member(name))
    states = check(name, descend(name, tx, run["sampled"]))
    rate = optax.tree.get(states, "rate")[:-1]
    np.testing.assert_allclose(rate, run["s"], rtol=0, atol=1e-10)
    samples = optax_sam.metrics(states)["ascents"][1:]
    np.testing.assert_array_equal(samples, run["n_samples"])
    latest = {"psf_norms": "psf_norm", "ratios": "ratio", "variances": "var"}
    for field, array in latest.items():
        ring = optax.tree.get(states, field)[1:]
        np.testing.assert_allclose(ring[:, -1], run[array], rtol=0, atol=1e-10)
    used = optax.tree.get(states, "used")[:-1]
    warm = recorded.RUNS[name]["hyperparameters"]["warmup_steps"]
    before = run["used_in_window"] - run["sampled"]
    np.testing.assert_array_equal(used[warm:], before[warm:])


def draws(key, steps):
    """The uniforms that a package key stands for, one per step."""
    generator = jax.random.key(key, impl="threefry2x32")
    at = lambda t: jax.random.uniform(jax.random.fold_in(generator, t))
    return np.asarray(jax.vmap(at)(jnp.arange(steps)))


@pytest.mark.parametrize(("key", "name"), list(enumerate(VSAM_RUNS)))
def test_vsam_decides_by_itself_as_the_transcription(key, name):
    h = recorded.RUNS[name]["hyperparameters"]
    tx = optimizer(name, vsam_member(name, key=key))
    steps = list(descend(name, tx))
    states = stacked([state for _, _, state in steps])

    reference = recorded.transcribed_vsam(name)
    control, u = reference.controller, draws(key, h["steps"])
    samples, s = [0], []

    def direction(t, w):
        grad = lambda p: base.mlp(p, *recorded.data(name, t))[1]
        d = reference.direction(w, grad, u[t])
        samples.append(control.samples)
        s.append(control.s)
        return d

    expected = base.descend(
        recorded.initial(name),
        h["steps"],
        direction,
        lr=h["lr"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
    )
    decisions = optax_sam.ascends_next(states)[:-1]
    np.testing.assert_array_equal(decisions, np.diff(samples))
    rate = optax.tree.get(states, "rate")[:-1]
    np.testing.assert_allclose(rate, s, rtol=0, atol=1e-10)
    for (t, w, _), w_expected in zip(steps, expected, strict=True):
        assert recorded.deviation(w, w_expected) < 1e-10, t
