"""More of SAM's family against the transcriptions, with random hyperparameters.

Hyperparameters enter the compiled step as arguments, so that one program serves all
draws. Most are schedules, and behind every method stand momentum and weight decay.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import side_by_side
from reference import (
    amp,
    base,
    fisher_sam,
    friendly_sam,
    gam,
    gnp,
    gsam,
    sam,
    sam_on,
    sampa,
    stable_sam,
    wsam,
)
from side_by_side import assert_equal, draws, only

import optax_sam
from optax_sam import ascent, blend, when

STEPS = 15
SEEDS = range(3)


pytestmark = pytest.mark.usefixtures("x64")


# Name -> lowest and highest value in step 0. Schedules rise by up to a half.
RANGES = {
    "rho": (0.1, 0.4),
    "grad_rho": (0.05, 0.2),
    "step_size": (0.05, 0.2),
    "alpha": (0.3, 1.5),
    "above_one": (1.5, 3.0),
    "p": (0.3, 0.6),
    "sigma": (0.3, 0.6),
    "lam": (0.3, 0.6),
    "gamma": (0.3, 0.6),
    "beta": (0.3, 0.6),
    "share": (0.3, 0.6),
    "eta": (0.3, 3.0),
    "small_eta": (0.01, 0.3),
    "zeta": (0.5, 1.0),
    "leaf_limit": (0.3, 0.6),
    "limit": (0.6, 1.0),
    "slope": (0.01, 0.03),
    "lr": (0.05, 0.15),
    "adam_lr": (0.01, 0.03),
    "predict_lr": (0.05, 0.3),
    "momentum": (0.5, 0.9),
    "weight_decay": (0.001, 0.05),
}


def hyperparameters(seed):
    r = np.random.RandomState(100 + seed)
    return {name: r.uniform(low, high) for name, (low, high) in RANGES.items()}


class Schedules:
    """Attributes are schedules: ``h.rho(t)``; items are numbers: ``h["rho"]``."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __getitem__(self, name):
        return self.numbers[name]

    def __getattr__(self, name):
        if name not in RANGES:
            raise AttributeError(name)
        return lambda t: self.numbers[name] * (1.0 + self.numbers["slope"] * t)

    def fall(self, t):
        """A learning rate."""
        return self.numbers["lr"] * (1.0 - self.numbers["slope"] * t)


def behind(h):
    return [
        optax.add_decayed_weights(h["weight_decay"]),
        optax.sgd(h.fall, momentum=h["momentum"]),
    ]


def chained(member, fresh):
    """The package's optimizer, and the trajectory, of a method that stands first.

    ``fresh(h)`` makes the direction as a function of t, w and grad.
    """

    def trajectory(h, w, steps, grad):
        direction = fresh(h)
        step = lambda t, w: direction(t, w, lambda p: grad(t, p))
        settings = {"momentum": h["momentum"], "weight_decay": h["weight_decay"]}
        return base.descend(w, steps, step, lr=h.fall(np.arange(steps)), **settings)

    return lambda h: optax.chain(member(h), *behind(h)), trajectory


def stateless(member, direction):
    return chained(member, lambda h: lambda *args: direction(h, *args))


def sgd(h):
    """SGD to be wrapped, here and there."""
    return (
        optax.chain(*behind(h)),
        base.sgd(h.fall, h["momentum"], h["weight_decay"]),
    )


def adamw(h):
    """AdamW to be wrapped, here and there."""
    decay, lr = h["weight_decay"], h.adam_lr
    return optax.adamw(lr, weight_decay=decay), base.adamw(lr, weight_decay=decay)


def wrapping(build, trajectory, optimizer=sgd):
    """As ``chained``, of a method that wraps an optimizer."""
    return (
        lambda h: build(h, optimizer(h)[0]),
        lambda h, w, steps, grad: trajectory(h, w, steps, grad, optimizer(h)[1]),
    )


def product(*args, **kwargs):
    return optax_sam.sharpness_aware(*args, **kwargs)


def every(k, direction, phase=0):
    """A direction on some steps, and the plain gradient on the others."""
    return lambda h, t, w, grad: (
        grad(w) if (t + phase) % k else direction(h, t, w, grad)
    )


def biases(w):
    """The leaves for masks: the biases of the network, or the one of the quadratic."""
    return [leaf for leaf in w if "bias" in leaf] or list(w)


def mask_of_biases(params):
    return {leaf: leaf in biases(params) for leaf in params}


def friendly(k=1, **changes):
    """F-SAM whose hyperparameters change, on every k-th step."""

    def fresh(h):
        method = friendly_sam.FriendlySAM()

        def direction(t, w, grad):
            if t % k:
                return grad(w)
            method.rho, method.sigma, method.lam = h.rho(t), h.sigma(t), h.lam(t)
            vars(method).update(changes)
            return method.direction(w, grad)

        return direction

    return fresh


def friendly_member(h, **changes):
    settings = {"sigma": h.sigma, "decay": h.lam} | changes
    return optax_sam.friendly_sam(h.rho, **settings)


def gam_member(h, **changes):
    settings = {
        "norm_rho": h.rho,
        "beta0": h.beta,
        "beta1": h.share,
        "gamma": h.gamma,
    }
    return optax_sam.gam(h.grad_rho, **settings | changes)


def gam_direction(h_minus="paper", masked=False):
    def direction(h, t, w, grad):
        numbers = (x(t) for x in (h.rho, h.grad_rho, h.share, h.beta, h.gamma))
        leaves = biases(w) if masked else None
        return gam.gam(w, grad, *numbers, h_minus=h_minus, leaves=leaves)

    return direction


def amp_pair(projection="leaf", n=1):
    limit = {"leaf": "leaf_limit", "global": "limit"}[projection]
    project = {"leaf": "by_leaf", "global": "shortened"}[projection]

    def member(h, **settings):
        epsilon = getattr(h, limit)
        settings |= {"inner_lr": h.zeta, "inner_iter": n, "projection": projection}
        return optax_sam.amp(epsilon, **settings)

    def direction(h, t, w, grad):
        epsilon = getattr(h, limit)(t)
        # Looked up when called: a test below counts how often a ball is left.
        return amp.amp(w, grad, epsilon, h.zeta(t), n, getattr(amp, project))

    return member, direction


def wsam_build(limited=False, lr="fall", k=1):
    def build(h, inner):
        return optax_sam.wsam(
            inner,
            learning_rate=getattr(h, lr),
            rho=h.rho,
            gamma=h.gamma,
            max_norm=h.limit if limited else None,
            when=when.every_k(k),
        )

    return build


def wsam_trajectory(limited=False, lr="fall", k=1):
    """Without an ascent the sharpness has no weight."""

    def trajectory(h, w, steps, grad, U):
        gamma = lambda t: 0.0 if t % k else h.gamma(t)
        limit = h.limit if limited else None
        rate = getattr(h, lr)
        return wsam.decoupled(w, steps, grad, U, h.rho, gamma, rate, limit)

    return trajectory


def wsam_pair(optimizer=sgd, **settings):
    return wrapping(wsam_build(**settings), wsam_trajectory(**settings), optimizer)


def sampa_pair(optimizer=sgd, predict="optimizer", **changes):
    shares = lambda h: changes.get("share", h.share)
    lr = lambda h: h.predict_lr if predict == "gradient" else None

    def build(h, inner):
        settings = {"rho": h.rho, "interpolation": shares(h), "predict": predict}
        return optax_sam.sampa(inner, learning_rate=lr(h), **settings)

    def trajectory(h, w, steps, grad, U):
        settings = {"predict": predict, "lr": lr(h)}
        return sampa.sampa(w, steps, grad, U, h.rho, shares(h), **settings)

    return wrapping(build, trajectory, optimizer)


# Name -> the package's optimizer, and the trajectory by the transcription, as functions
# of the hyperparameters.
METHODS = {
    "gnp": stateless(
        lambda h: optax_sam.gnp(h.rho, alpha=h.alpha),
        lambda h, t, w, grad: gnp.gnp(w, grad, h.rho(t), h.alpha(t)),
    ),
    "gnp every 3": stateless(
        lambda h: optax_sam.gnp(h.rho, alpha=h["alpha"], when=when.every_k(3)),
        every(3, lambda h, t, w, grad: gnp.gnp(w, grad, h.rho(t), h["alpha"])),
    ),
    "gnp, unit gradient": stateless(
        lambda h: product(
            ascent.l2(h.rho), blend=blend.interpolate(h["share"], unit_gradient=True)
        ),
        lambda h, t, w, grad: gnp.gnp(w, grad, h.rho(t), h["share"], True),
    ),
    "g-rst": stateless(
        lambda h: optax_sam.gnp(
            h.rho, alpha=h.above_one, when=when.bernoulli(h.p, key=5)
        ),
        lambda h, t, w, grad: gnp.g_rst(
            draws(5, STEPS)[t], w, grad, h.rho(t), h.above_one(t), h.p(t)
        ),
    ),
    "friendly_sam": chained(friendly_member, friendly()),
    "friendly_sam, sigma = 1": chained(
        lambda h: friendly_member(h, sigma=1.0), friendly(sigma=1.0)
    ),
    "friendly_sam without memory": chained(
        lambda h: friendly_member(h, decay=0.0), friendly(lam=0.0)
    ),
    "friendly_sam every 3": chained(
        lambda h: friendly_member(h, when=when.every_k(3)), friendly(k=3)
    ),
    "wsam": wsam_pair(),
    "wsam, clipped": wsam_pair(limited=True),
    "wsam, clipped, every 2": wsam_pair(limited=True, k=2),
    "wsam, a learning rate of its own": wsam_pair(lr="predict_lr"),
    "wsam, adamw": wsam_pair(adamw, lr="adam_lr"),
    "wsam, adamw, clipped": wsam_pair(adamw, lr="adam_lr", limited=True),
    "wsam, coupled": stateless(
        lambda h: optax_sam.gnp(h.rho, alpha=lambda t: h.gamma(t) / (1.0 - h.gamma(t))),
        lambda h, t, w, grad: wsam.coupled(w, grad, h.rho(t), h.gamma(t)),
    ),
    "sam_on": stateless(
        lambda h: optax_sam.sam_on(h.rho, mask=mask_of_biases),
        lambda h, t, w, grad: sam_on.sam_on(w, grad, h.rho(t), biases(w)),
    ),
    "sam_on, adapted": stateless(
        lambda h: optax_sam.sam_on(
            h.rho, adapt=True, eta=h.small_eta, mask=mask_of_biases
        ),
        lambda h, t, w, grad: sam_on.sam_on(
            w, grad, h.rho(t), biases(w), set(w), h.small_eta(t)
        ),
    ),
    "sam_on, partly adapted": stateless(
        lambda h: optax_sam.sam_on(
            h.rho,
            adapt=lambda w: {leaf: "layer1" in leaf for leaf in w},
            eta=h.small_eta,
            mask=mask_of_biases,
        ),
        lambda h, t, w, grad: sam_on.sam_on(
            w, grad, h.rho(t), biases(w), {"layer1/bias"}, h.small_eta(t)
        ),
    ),
    "sam_on of a kernel, with probability": stateless(
        lambda h: optax_sam.sam_on(
            h.rho, mask=only("layer0/kernel"), when=when.bernoulli(h.p, key=5)
        ),
        lambda h, t, w, grad: (
            sam_on.sam_on(w, grad, h.rho(t), ["layer0/kernel"])
            if draws(5, STEPS)[t] < h.p(t)
            else grad(w)
        ),
    ),
    "gam": stateless(gam_member, gam_direction()),
    "gam, as in the code": stateless(
        lambda h: gam_member(h, h_minus="code"), gam_direction("code")
    ),
    "gam every 2": stateless(
        lambda h: gam_member(h, when=when.every_k(2, phase=1)),
        every(2, gam_direction(), phase=1),
    ),
    "gam, masked": stateless(
        lambda h: gam_member(h, mask=mask_of_biases), gam_direction(masked=True)
    ),
    "sampa": sampa_pair(),
    "sampa without a share of the prediction": sampa_pair(share=0.0),
    "sampa, adamw": sampa_pair(adamw),
    "sampa along the gradient": sampa_pair(predict="gradient"),
    "sampa along the gradient, adamw": sampa_pair(adamw, predict="gradient"),
    "fisher_sam": stateless(
        lambda h: optax_sam.fisher_sam(h.rho, eta=h.eta),
        lambda h, t, w, grad: fisher_sam.fisher_sam(w, grad, h.rho(t), h.eta(t)),
    ),
    "fisher_sam with probability": stateless(
        lambda h: optax_sam.fisher_sam(
            h.rho, eta=h.eta, when=when.bernoulli(h["p"], key=5)
        ),
        lambda h, t, w, grad: (
            fisher_sam.fisher_sam(w, grad, h.rho(t), h.eta(t))
            if draws(5, STEPS)[t] < h["p"]
            else grad(w)
        ),
    ),
    "amp": stateless(*amp_pair()),
    "amp, global": stateless(*amp_pair("global")),
    "amp, 3 steps": stateless(*amp_pair(n=3)),
    "amp, global, 10 steps in a loop": stateless(*amp_pair("global", n=10)),
    "amp every 2": stateless(
        lambda h: amp_pair()[0](h, when=when.every_k(2, phase=1)),
        every(2, amp_pair()[1], phase=1),
    ),
    "stable_sam": stateless(
        lambda h: optax_sam.stable_sam(h.rho),
        lambda h, t, w, grad: stable_sam.stable_sam(w, grad, h.rho(t)),
    ),
    "stable_sam every 3": stateless(
        lambda h: optax_sam.stable_sam(h.rho, when=when.every_k(3)),
        every(3, lambda h, t, w, grad: stable_sam.stable_sam(w, grad, h.rho(t))),
    ),
    "stable gsam": stateless(
        lambda h: product(
            ascent.l2(h.rho), blend=blend.renormalize(blend.surrogate_gap(h["share"]))
        ),
        lambda h, t, w, grad: stable_sam.renormalized(
            gsam.gsam(w, grad, h.rho(t), h["share"]), grad(w)
        ),
    ),
    "4 projected steps": stateless(
        lambda h: product(ascent.n_step(h.rho, 4, step_size=h.step_size)),
        lambda h, t, w, grad: sam.n_step(w, grad, h.rho(t), 4, h.step_size(t)),
    ),
}
# Once more on a quadratic of one leaf; the others differ by when or by leaves alone.
ON_THE_QUADRATIC = [
    "gnp",
    "gnp, unit gradient",
    "g-rst",
    "friendly_sam",
    "wsam",
    "wsam, clipped",
    "wsam, adamw",
    "sam_on",
    "sam_on, adapted",
    "gam",
    "gam, as in the code",
    "sampa",
    "sampa, adamw",
    "sampa along the gradient",
    "fisher_sam",
    "amp",
    "amp, 3 steps",
    "stable_sam",
    "4 projected steps",
]
PROBLEMS = {
    "mlp": (side_by_side.problem, recorded.mlp, base.mlp),
    "quad": (side_by_side.quadratic, recorded.quad, base.quad),
}
CASES = [(name, "mlp") for name in METHODS]
CASES += [(name, "quad") for name in ON_THE_QUADRATIC]


def program(build, loss):
    """The training of all batches; the batch before the first one is the first."""

    @jax.jit
    def train(numbers, w, state, batches):
        tx = build(Schedules(numbers))
        before = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:-1]]), batches)

        def step(carry, pair):
            w, state = carry
            batch, previous = pair
            grad_fn = lambda p: jax.grad(loss)(p, *batch)
            extra = {
                "grad_fn": grad_fn,
                "previous_grad_fn": lambda p: jax.grad(loss)(p, *previous),
            }
            updates, state = tx.update(grad_fn(w), state, w, **extra)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (w, state), (batches, before))[1]

    return train


def expected(name, kind, seed, numbers):
    draw, _, loss = PROBLEMS[kind]
    w, batches = draw(seed, STEPS)
    grad = lambda t, w: loss(w, *batches[t])[1]
    return METHODS[name][1](Schedules(numbers), w, STEPS, grad)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_all_steps(name, kind):
    build, _ = METHODS[name]
    draw, loss, _ = PROBLEMS[kind]
    train = program(build, loss)
    for seed in SEEDS:
        numbers = hyperparameters(seed)
        w, batches = draw(seed, STEPS)
        columns = tuple(np.stack(column) for column in zip(*batches, strict=True))
        state = build(Schedules(numbers)).init(w)
        path = train(numbers, w, state, columns)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves(path))
        steps = [w] + [jax.tree.map(lambda x: x[t], path) for t in range(STEPS)]  # noqa: B023
        assert_equal(steps, expected(name, kind, seed, numbers))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_methods_differ(kind):
    draw, _, loss = PROBLEMS[kind]
    w, batches = draw(0, STEPS)
    numbers = hyperparameters(0)
    grad = lambda t, w: loss(w, *batches[t])[1]
    plain, as_sam = (
        chained(None, lambda h: direction)[1](Schedules(numbers), w, STEPS, grad)  # noqa: B023
        for direction in (
            lambda t, w, grad: grad(w),
            lambda t, w, grad: sam.sam(w, grad, Schedules(numbers).rho(t)),
        )
    )
    ends = {"plain": plain[-1], "sam": as_sam[-1]}
    for name, other in CASES:
        if other == kind:
            ends[name] = expected(name, kind, 0, numbers)[-1]
    if kind == "quad":  # all of one leaf
        assert recorded.deviation(ends.pop("sam_on"), ends["sam"]) == 0.0
    names = list(ends)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert recorded.deviation(ends[a], ends[b]) > 1e-4, (a, b)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (amp, "shortened", "amp"),
        (amp, "shortened", "amp, global"),
        (wsam, "clipped", "wsam, clipped"),
        (wsam, "clipped", "wsam, adamw, clipped"),
    ],
)
def test_bounds_are_reached_at_times(module, function, name, kind, monkeypatch):
    shorten, reached = getattr(module, function), []

    def counted(x, limit):
        short = shorten(x, limit)
        reached.append(base.norm(short) < base.norm(x))
        return short

    monkeypatch.setattr(module, function, counted)
    for seed in SEEDS:
        expected(name, kind, seed, hyperparameters(seed))
    assert 0.05 < np.mean(reached) < 0.95
