"""The methods of SAM's family against the transcriptions in reference/, in float64."""

import jax
import numpy as np
import optax
import pytest
import recorded
import side_by_side
from reference import ae_sam, base, esam, gsam, looksam, random_sam, renyi_sam, sam
from side_by_side import (
    assert_equal,
    compiled,
    generator,
    optimizer,
    package,
    problem,
)

import optax_sam
from optax_sam import ascent, blend, when

STEPS = 10


pytestmark = pytest.mark.usefixtures("x64")


def product(*args):
    return optax_sam.sharpness_aware(*args)


def rising(t):
    return 0.1 + 0.03 * t


def falling(t):
    return 0.9 - 0.05 * t


LR = optax.cosine_decay_schedule(0.3, STEPS, alpha=0.1)


def tied(t):
    return gsam.tied_radius(float(LR(t)), 0.3, 0.03, 0.4, 0.05)


def stateless(direction):
    return lambda: direction


def gsam_every_3(t, w, grad):
    return grad(w) if t % 3 else gsam.gsam(w, grad, 0.3, 0.4)


def looking(alpha=None, scheduled=None, **settings):
    """LookSAM, with an alpha that may change from step to step."""

    def fresh():
        method = looksam.LookSAM(alpha=alpha, **settings)

        def direction(t, w, grad):
            if scheduled is not None:
                method.alpha = scheduled(t)
            return method.direction(t, w, grad)

        return direction

    return fresh


def trend(threshold, **settings):
    def fresh():
        method = ae_sam.AESAM(**settings)
        return lambda t, w, grad: method.direction(w, grad, threshold(t))

    return fresh


def renyi_after_4_every_2(t, w, grad):
    """The clock of the rule starts after the warm-up."""
    ascends = t >= 4 and (t - 4) % 2 == 0
    return renyi_sam.renyi_sam(w, grad, 0.3, 1.2) if ascends else grad(w)


def capped_renyi(t, w, grad):
    """Where the offset is longer than 0.02 it has that length instead."""
    del t
    g = grad(w)
    n = base.norm(g)
    length = 0.05 * renyi_sam.elementwise(g, 1.2) / n**2.4 / n
    capped_renyi.caps.append(length > 0.02)
    if length > 0.02:
        return grad(base.add(w, base.unit(g, 0.0), 0.02))
    return renyi_sam.renyi_sam(w, grad, 0.05, 1.2)


capped_renyi.caps = []

fall = optax.linear_schedule(1.0, -1.0, STEPS)
fall_to_zero = optax.linear_schedule(2.0, 0.0, STEPS)

# Name -> the package's member, and what makes the emitted gradient as a function of t,
# w, grad, with a memory of its own for each training.
METHODS = {
    "gsam": (
        lambda: optax_sam.gsam(0.3, alpha=0.4),
        stateless(lambda t, w, grad: gsam.gsam(w, grad, 0.3, 0.4)),
    ),
    "gsam, alpha = 1": (
        lambda: optax_sam.gsam(0.3, alpha=1.0),
        stateless(lambda t, w, grad: gsam.gsam(w, grad, 0.3, 1.0)),
    ),
    "gsam every 3": (
        lambda: optax_sam.gsam(0.3, when=when.every_k(3)),
        stateless(gsam_every_3),
    ),
    "gsam, schedules": (
        lambda: optax_sam.gsam(rising, alpha=falling),
        stateless(lambda t, w, grad: gsam.gsam(w, grad, rising(t), falling(t))),
    ),
    "gsam, radius tied to the learning rate": (
        lambda: optax_sam.gsam(optax_sam.rho_from_lr(LR, 0.05, 0.4)),
        stateless(lambda t, w, grad: gsam.gsam(w, grad, tied(t), 0.4)),
    ),
    "gsam, clean": (
        lambda: product(
            ascent.l2(0.3), when.always(), blend.surrogate_gap(0.7, "clean")
        ),
        stateless(lambda t, w, grad: gsam.gsam(w, grad, 0.3, 0.7, minimize="clean")),
    ),
    "gsam, weight-scaled": (
        lambda: product(
            ascent.weight_scaled(0.5), when.always(), blend.surrogate_gap(0.4)
        ),
        stateless(
            lambda t, w, grad: gsam.gsam(w, grad, 0.5, 0.4, ascend=gsam.weight_scaled)
        ),
    ),
    "gsam, adaptive": (
        lambda: product(
            ascent.adaptive(2.0, eta=0.0, adapt=True),
            when.always(),
            blend.surrogate_gap(0.4),
        ),
        stateless(
            lambda t, w, grad: gsam.gsam(w, grad, 2.0, 0.4, ascend=gsam.adaptive)
        ),
    ),
    "looksam": (
        lambda: optax_sam.looksam(0.3, k=3),
        looking(rho=0.3, alpha=0.7, k=3),
    ),
    "looksam, a schedule": (
        lambda: optax_sam.looksam(0.2, k=4, alpha=falling),
        looking(rho=0.2, scheduled=falling, k=4),
    ),
    "look_layer_sam": (
        lambda: optax_sam.look_layer_sam(0.1, k=3, alpha=0.4),
        looking(rho=0.1, alpha=0.4, k=3, ascend=looksam.layerwise),
    ),
    "ae_sam": (
        lambda: optax_sam.ae_sam(0.3, decay=0.5, threshold=0.5),
        trend(lambda t: 0.5, rho=0.3, delta=0.5),
    ),
    "ae_sam, a falling threshold": (
        lambda: optax_sam.ae_sam(0.3, decay=0.5, threshold=fall),
        trend(lambda t: ae_sam.threshold(t, STEPS), rho=0.3, delta=0.5),
    ),
    "ae_sam, lagged": (
        lambda: optax_sam.ae_sam(0.3, decay=0.5, threshold=fall, lag=1),
        trend(lambda t: ae_sam.threshold(t, STEPS), rho=0.3, delta=0.5, lag=1),
    ),
    "ae_looksam": (
        lambda: optax_sam.ae_looksam(0.3, decay=0.5, threshold=fall_to_zero, alpha=0.4),
        trend(
            lambda t: ae_sam.threshold(t, STEPS, 0.0, 2.0),
            rho=0.3,
            delta=0.5,
            alpha=0.4,
        ),
    ),
    "ae_looksam, lagged": (
        lambda: optax_sam.ae_looksam(0.3, decay=0.5, threshold=0.2, alpha=0.6, lag=1),
        trend(lambda t: 0.2, rho=0.3, delta=0.5, alpha=0.6, lag=1),
    ),
    "renyi_sam": (
        lambda: optax_sam.renyi_sam(0.3),
        stateless(lambda t, w, grad: renyi_sam.renyi_sam(w, grad, 0.3, 1.2)),
    ),
    "renyi_sam, alpha = 2": (
        lambda: optax_sam.renyi_sam(0.5, alpha=2.0),
        stateless(lambda t, w, grad: renyi_sam.renyi_sam(w, grad, 0.5, 2.0)),
    ),
    "renyi_sam, alpha = 1 / 2": (
        lambda: optax_sam.renyi_sam(0.01, alpha=0.5),
        stateless(lambda t, w, grad: renyi_sam.renyi_sam(w, grad, 0.01, 0.5)),
    ),
    "renyi_sam, schedules": (
        lambda: optax_sam.renyi_sam(rising, alpha=lambda t: 1.2 + 0.1 * t),
        stateless(
            lambda t, w, grad: renyi_sam.renyi_sam(w, grad, rising(t), 1.2 + 0.1 * t)
        ),
    ),
    "renyi_sam, layer-wise": (
        lambda: optax_sam.renyi_sam(0.15, alpha=1.5, layerwise=True),
        stateless(
            lambda t, w, grad: renyi_sam.renyi_sam(
                w, grad, 0.15, 1.5, renyi_sam.layerwise
            )
        ),
    ),
    "renyi_sam, capped": (
        lambda: optax_sam.renyi_sam(0.05, max_offset_norm=0.02),
        stateless(capped_renyi),
    ),
    "renyi_sam, after a warm-up": (
        lambda: optax_sam.renyi_sam(0.3, warmup_steps=4, when=when.every_k(2)),
        stateless(renyi_after_4_every_2),
    ),
}


def reference(fresh, w, batches):
    return side_by_side.reference(fresh(), w, batches)


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps(name):
    member, fresh = METHODS[name]
    tx = optimizer(member())
    step = compiled(tx)
    for seed in range(3):
        w, batches = problem(seed, STEPS)
        trajectory, _ = package(step, w, tx.init(w), batches)
        assert_equal(trajectory, reference(fresh, w, batches))


def test_the_methods_differ():
    w, batches = problem(0, STEPS)
    plain = side_by_side.reference(lambda t, w, grad: grad(w), w, batches)[-1]
    as_sam = lambda t, w, grad: sam.sam(w, grad, 0.3)
    ends = [plain, side_by_side.reference(as_sam, w, batches)[-1]]
    capped_renyi.caps.clear()
    ends += [reference(fresh, w, batches)[-1] for _, fresh in METHODS.values()]
    assert 0 < sum(capped_renyi.caps) < STEPS
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert recorded.deviation(a, b) > 1e-4


# R-SAM.


def normals(key, w):
    """Standard normals like the parameters, one tree per step."""
    like = lambda t: optax.tree.random_like(generator(key, t), w, jax.random.normal)
    return [jax.tree.map(np.asarray, like(t)) for t in range(STEPS)]


def grown(t):
    return random_sam.sigma(t, STEPS, 0.02)


RANDOM = {
    "numbers": ({"rho": 0.3, "sigma": 0.1}, lambda t: 0.3, lambda t: 0.1, 2.0),
    "schedules": (
        {
            "rho": rising,
            "sigma": optax.cosine_decay_schedule(0.02, STEPS, alpha=5.0),
            "gradient_weight": 0.5,
        },
        rising,
        grown,
        0.5,
    ),
}


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_sam(name, given):
    settings, rho, sigma, weight = RANDOM[name]
    step = compiled(optimizer(optax_sam.random_sam(**settings)))
    for seed in range(3):
        w, batches = problem(seed, STEPS)
        noise = normals(seed, w)
        if given:  # of another key than the one in the state
            noise = normals(seed + 7, w)
        extras = [{"noise": z} for z in noise] if given else None
        state = optimizer(optax_sam.random_sam(**settings, key=seed)).init(w)
        trajectory, _ = package(step, w, state, batches, extras)

        def direction(t, w, grad, noise=noise):
            delta = random_sam.noise(w, noise[t], sigma(t))
            return random_sam.random_sam(w, grad, delta, rho(t), weight)

        assert_equal(trajectory, side_by_side.reference(direction, w, batches))


# ESAM.


def uniforms(key, w):
    """One number per leaf, in the order of ``jax.tree.leaves``, for every step."""
    leaves, structure = jax.tree.flatten(w)
    draw = lambda t: np.asarray(jax.random.uniform(generator(key, t), (len(leaves),)))
    return [jax.tree.unflatten(structure, list(draw(t))) for t in range(STEPS)]


def first_of_equal(rise, gamma):
    """The authors' number of examples, where theirs are too few: ties by order."""
    kept = np.full(len(rise), False)
    count = max(1, int(gamma * len(rise)) - 1)
    kept[np.argsort(-rise, kind="stable")[:count]] = True
    return kept


def select(rise, gamma):
    """The authors' rule, unless it keeps none: losses are equal, or gamma = 1 / B."""
    kept = esam.strictly_above(rise, gamma)
    return kept if kept.any() else first_of_equal(rise, gamma)


def esam_reference(method, u, w, batches):
    """Its trajectory, and which leaves and how many examples were chosen."""
    leaves, examples = [], []

    def direction(t, w, _):
        x, y = batches[t]
        leaves.append(method.active)
        d = method.direction(
            w,
            lambda p, kept: base.mlp(p, x[kept], y[kept])[1],
            lambda p: base.mlp_losses(p, x, y),
            u[t],
        )
        examples.append(int(method.kept.sum()))
        return d

    return side_by_side.reference(direction, w, batches), leaves, examples


ESAM = {
    "default": ({"rho": 0.1, "beta": 0.6, "gamma": 0.5}, 3),
    "few leaves, many examples": ({"rho": 0.1, "beta": 0.3, "gamma": 0.8}, 5),
    "all leaves, few examples": ({"rho": 0.3, "beta": 1.0, "gamma": 0.25}, 1),
    "one example": ({"rho": 0.1, "beta": 0.6, "gamma": 0.125}, 1),
    "all examples": ({"rho": 0.2, "beta": 0.5, "gamma": 0.99}, 8),
}


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("name", ESAM)
def test_esam(name, given):
    settings, kept = ESAM[name]
    step = compiled(optimizer(optax_sam.esam(**settings)))
    drawn = set()
    for seed in range(3):
        w, batches = problem(seed, STEPS)
        u = uniforms(seed, w)
        if given:
            u = uniforms(seed + 7, w)
        # As a tree, and as an array in the order of the leaves.
        form = lambda x: x if seed else np.array(jax.tree.leaves(x))  # noqa: B023
        extras = [{"mask_uniforms": form(x)} for x in u] if given else None
        state = optimizer(optax_sam.esam(**settings, key=seed)).init(w)
        trajectory, states = package(step, w, state, batches, extras)

        method = esam.ESAM(**settings, select=select)
        expected, leaves, examples = esam_reference(method, u, w, batches)
        assert_equal(trajectory, expected)
        active = optax.tree.get(states, "active")
        for t in range(1, STEPS):
            order = [leaf for leaf, on in zip(sorted(w), active[t], strict=True) if on]
            assert set(order) == leaves[t]
            drawn.add(frozenset(order))
        assert examples == STEPS * [kept]
    assert len(drawn) > 3 or settings["beta"] == 1.0
