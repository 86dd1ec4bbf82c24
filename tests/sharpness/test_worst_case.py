"""Worst cases in a ball: the ascent against exact maxima, and what is built on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness
from optax_sam.sharpness import auto_pgd

RHO = 0.1
ONE = jnp.zeros((1, 1))  # a batch for losses that look at none


def quadratic(w, batch):
    """``g w + w H w / 2`` around 1, and no examples: a batch is a problem."""
    d = w - 1
    return batch["g"] @ d + d @ batch["H"] @ d / 2


@functools.cache
def problems(count=20, size=50):
    """Condition 6e4, each eigenvalue 1.25 times the next, away from the minimum."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(count, size, size)))
    H = Q * np.geomspace(1e-3, 60, size) @ Q.transpose(0, 2, 1)
    return {"H": H, "g": np.einsum("bij,bj->bi", H, rng.normal(size=(count, size)))}


def exact(H, g, rho):
    """The maximum of ``g d + d H d / 2`` on the sphere, by the secular equation."""
    eigenvalues, Q = np.linalg.eigh(H)
    b = Q.T @ g
    if not g.any():
        return rho**2 / 2 * eigenvalues[-1]
    low, high = eigenvalues[-1], eigenvalues[-1] + np.linalg.norm(g) / rho
    for _ in range(200):
        mu = (low + high) / 2
        far = np.linalg.norm(b / (mu - eigenvalues)) > rho
        low, high = (mu, high) if far else (low, mu)
    d = b / (high - eigenvalues)
    return b @ d + d @ (eigenvalues * d) / 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("adaptive", "dtype"), [(False, "float64"), (False, "float32"), (True, "float64")]
)
def test_l2_reaches_the_exact_maximum(adaptive, dtype):
    batches = jax.tree.map(lambda x: jnp.asarray(x, dtype), problems())
    rng = np.random.default_rng(1)
    c = np.abs(rng.normal(size=50)) if adaptive else np.ones(50)
    # At w = c everything is as around 1, and |w| = c.
    loss = lambda w, batch: quadratic(w - jnp.asarray(c - 1, w.dtype), batch)
    w = jnp.asarray(c, dtype)
    scaled = [
        (c * H * c[:, None], c * g) for H, g in zip(*problems().values(), strict=True)
    ]

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(batches, steps, starts):
        options = dict(adaptive=adaptive, num_steps=steps, num_restarts=starts)
        return sharpness.worst_case_sharpness(loss, w, batches, RHO, 0, **options)

    rounding = 1e-4 if dtype == "float32" else 1e-6
    best = np.array([exact(H, g, RHO) for H, g in scaled])
    ratio = run(batches, 20, 1).per_batch / best
    assert ratio.min() > 0.99
    assert ratio.max() < 1 + rounding

    # At a minimum the gradient says nothing: it is the power method that is at work.
    at_minimum = batches | {"g": 0 * batches["g"]}
    best = np.array([exact(H, 0 * g, RHO) for H, g in scaled])
    short, several, long = (
        run(at_minimum, steps, starts) for steps, starts in ((20, 1), (20, 3), (100, 1))
    )
    assert np.median(short.per_batch / best) > 0.999
    assert (np.array(short.per_batch / best) > 0.9).mean() >= 0.85
    assert (several.per_batch / best).min() > 0.9
    assert (long.per_batch / best).min() > 0.999
    assert (long.per_batch / best).max() < 1 + rounding
    # What is said of convergence is true.
    assert 1e-4 * short.value < short.late_gain < 0.1 * short.value
    assert long.late_gain < 1e-4 * long.value
    np.testing.assert_allclose(long.value, long.per_batch.mean(), rtol=1e-5)


def reference_auto_pgd(phi, gradient, u, rho, ball, n):
    """The ascent as its paper writes it, with plain Python numbers."""

    def P(u):
        if ball == "linf":
            return np.clip(u, -rho, rho)
        return u * min(1, rho / np.linalg.norm(u))

    def s(g):
        return np.sign(g) if ball == "linf" else g / np.linalg.norm(g)

    marks = [22, 41, 57, 70, 80, 87, 93, 99]
    checkpoints = sorted({-(-mark * n // 100) for mark in marks})
    eta, previous, halvings = 2 * rho, u, 0
    best, best_u, rises, last = phi(u), u, 0, 0
    for k in range(n):
        z = P(u + eta * s(gradient(u)))
        step = z if k == 0 else P(u + 0.75 * (z - u) + 0.25 * (u - previous))
        previous, u = u, step
        if phi(u) > best:
            best, best_u, rises = phi(u), u, rises + 1
        if k + 1 in checkpoints:
            if rises < 0.75 * (k + 1 - last):
                eta, u, previous = eta / 2, best_u, best_u
                halvings += 1
            rises, last = 0, k + 1
    return best, best_u, halvings


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_ascent_is_auto_pgd(ball, steps):
    """Where it overshoots, so that steps are halved, against a plain version."""
    a = np.linspace(1, 9, 6)

    def phi(u, lib):
        return lib.sum(lib.sin(a * u) * lib.cos(3 * a[::-1] * u[::-1])) + u[0]

    gradient = jax.jit(jax.grad(functools.partial(phi, lib=jnp)))
    objective = jax.value_and_grad(functools.partial(phi, lib=jnp))
    halved = 0

    @jax.jit
    def run(key):
        start = auto_pgd.random_start(key, jnp.zeros(6), 0.9, ball=ball)
        options = dict(ball=ball, num_steps=steps)
        return start, auto_pgd.auto_pgd(objective, start, 0.9, **options)

    for seed in range(4):
        start, ascent = run(jax.random.key(seed))
        best, best_u, halvings = reference_auto_pgd(
            functools.partial(phi, lib=np),
            lambda u: np.array(gradient(u)),
            np.array(start),
            0.9,
            ball,
            steps,
        )
        np.testing.assert_allclose(ascent.value, best, rtol=1e-9)
        np.testing.assert_allclose(ascent.u, best_u, rtol=1e-7, atol=1e-9)
        halved += halvings
    assert halved > 4 or steps < 20


def test_checkpoints_are_counted_in_integers():
    positions = lambda n: np.nonzero(auto_pgd.checkpoint_demands(n))[0].tolist()
    assert positions(20) == [0, 5, 9, 12, 14, 16, 18, 19, 20]
    assert positions(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert positions(1) == [0, 1]
    # Three in four of the steps since the one before.
    assert auto_pgd.checkpoint_demands(20)[[5, 9, 12, 20]].tolist() == [15, 12, 9, 3]


def test_random_starts_lie_in_the_ball_and_are_spread():
    like = {"a": jnp.zeros((2, 3)), "none": None, "b": jnp.zeros(2)}
    flat = lambda u: jnp.concatenate([u["a"].ravel(), u["b"]])
    keys = jax.random.split(jax.random.key(0), 500)
    draw = lambda ball, key: flat(auto_pgd.random_start(key, like, 0.3, ball=ball))
    l2, linf = (
        np.array(jax.lax.map(functools.partial(draw, ball), keys))
        for ball in ("l2", "linf")
    )
    np.testing.assert_allclose(np.linalg.norm(l2, axis=1), 0.3, rtol=1e-5)
    np.testing.assert_allclose((l2**2).mean(0), 0.09 / 8, rtol=0.25)
    assert np.abs(linf).max() <= 0.3
    np.testing.assert_allclose((linf**2).mean(0), 0.03, rtol=0.25)
    for draws in (l2, linf):
        assert np.abs(draws.mean(0)).max() < 0.05
        assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.2


def test_restarts_keep_the_best():
    """One hill on either side; the start decides which of them is climbed."""
    loss = lambda w, batch: w**2 + 0.2 * jnp.maximum(w, 0)
    run = lambda number, key: (
        sharpness.worst_case_sharpness(
            loss, jnp.zeros(()), ONE, 1.0, key, num_steps=3, num_restarts=number
        ).value
    )
    # Of six keys, so that no place among the starts is always the best one.
    keys = jax.random.split(jax.random.key(1), 6)
    one, several = (jax.lax.map(functools.partial(run, x), keys) for x in (1, 6))
    np.testing.assert_allclose([one.min(), one.max()], [1, 1.2], rtol=1e-6)
    np.testing.assert_allclose(several, 1.2, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_linf_on_a_diagonal_quadratic(adaptive):
    h, w = jnp.array([1.0, 2.0, 5.0, 0.5]), jnp.array([0.5, -2.0, 0.0, 1.0])
    loss = lambda v, batch: 0.5 * jnp.sum(h * (v - w) ** 2)
    options = dict(norm="linf", adaptive=adaptive)
    result = sharpness.worst_case_sharpness(loss, w, ONE, RHO, 1, **options)
    c = jnp.abs(w) if adaptive else jnp.ones(4)
    np.testing.assert_allclose(result.value, RHO**2 / 2 * jnp.sum(c**2 * h), rtol=1e-5)
    np.testing.assert_allclose(jnp.abs(result.perturbation), RHO * c, rtol=1e-5)


def test_weights_of_zero_stay_and_do_not_use_up_the_radius():
    """With one weight that can move, every start is already the worst case."""
    w = {"a": jnp.zeros(200).at[7].set(3.0), "b": jnp.zeros(())}
    loss = lambda v, batch: sum(jnp.sum((v[x] - w[x]) ** 2) for x in "ab") / 2
    result = sharpness.worst_case_sharpness(
        loss, w, ONE, RHO, 0, adaptive=True, num_steps=1
    )
    np.testing.assert_allclose(result.value, RHO**2 / 2 * 9, rtol=1e-5)
    offset = jnp.abs(result.perturbation["a"]).at[7].add(-RHO * 3)
    np.testing.assert_allclose(offset, 0, atol=1e-6)
    assert result.perturbation["b"] == 0


def relu_net(w, batch):
    x, y = batch
    logits = jnp.maximum(x @ w["first"] + w["bias"], 0) @ w["second"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def net_problem():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    w = {"first": draw(4, 6), "bias": draw(6), "second": draw(6, 3)}
    return w, (draw(2, 5, 4), jnp.asarray(rng.integers(0, 3, size=(2, 5))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("norm", "random_init"), [("l2", True), ("linf", False)])
def test_adaptive_is_invariant_under_rescaling_of_layers(norm, random_init):
    w, batches = net_problem()
    options = dict(norm=norm, random_init=random_init, num_steps=5)
    run = jax.jit(
        lambda w: [
            sharpness.worst_case_sharpness(
                relu_net, w, batches, 0.05, 0, adaptive=adaptive, **options
            ).value
            for adaptive in (True, False)
        ]
    )
    first, plain = run(w)
    for a in (10, 0.01):
        shrunk = w["second"] / a
        other = {"first": a * w["first"], "bias": a * w["bias"], "second": shrunk}
        adaptive, moved = run(other)
        np.testing.assert_allclose(adaptive, first, rtol=1e-9)
        assert abs(moved / plain - 1) > 0.1


def test_each_batch_has_its_own_worst_case():
    """Slopes of opposite sign: m-sharpness is not that of the mean loss."""
    loss = lambda w, batch: jnp.mean(batch) * w
    error = lambda w, batch: {"high": w > 0.05}
    batches = jnp.array([[1.0], [-1.0], [2.0]])
    measure = sharpness.worst_case_sharpness
    run = functools.partial(
        measure, loss, jnp.zeros(()), batches, RHO, 0, metric_fn=error
    )
    result = run()
    np.testing.assert_allclose(result.per_batch, [0.1, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(result.value, 0.4 / 3, rtol=1e-6)
    np.testing.assert_allclose(result.metric["high"], 2 / 3, rtol=1e-6)
    assert result.perturbation is None
    sam = sharpness.sam_sharpness(loss, jnp.zeros(()), batches, RHO)
    np.testing.assert_allclose(sam.per_batch, result.per_batch, rtol=1e-6)
    weighted = run(weights=jnp.array([1.0, 0.0, 3.0]))
    np.testing.assert_allclose(weighted.value, 0.175, rtol=1e-6)
    np.testing.assert_allclose(weighted.metric["high"], 1, rtol=1e-6)


def test_the_perturbation_is_where_the_loss_is_as_large():
    w, batches = net_problem()
    batch = jax.tree.map(lambda x: x[0], batches)
    mask = {"first": True, "bias": False, "second": True}
    args = relu_net, w, jax.tree.map(lambda x: x[None], batch), 0.3
    result, sam = jax.jit(
        lambda: (
            sharpness.worst_case_sharpness(*args, 0, mask=mask),
            sharpness.sam_sharpness(*args, mask=mask),
        )
    )()
    there = jax.tree.map(jnp.add, w, result.perturbation)
    rise = relu_net(there, batch) - relu_net(w, batch)
    np.testing.assert_allclose(result.value, rise, rtol=1e-4)
    assert not result.perturbation["bias"].any()
    square = sum(jnp.sum(x**2) for x in jax.tree.leaves(result.perturbation))
    np.testing.assert_allclose(jnp.sqrt(square), 0.3, rtol=1e-4)
    # One step from the same radius is no more.
    assert 0.5 * result.value < sam.value <= result.value


def test_there_is_no_negative_and_no_missing_value():
    def run(loss, w, **options):
        options = dict(rho=RHO, key=0) | options
        loss_fn = lambda w, batch: loss(w)
        return sharpness.worst_case_sharpness(loss_fn, w, ONE, **options)

    top = run(lambda w: -jnp.sum(w**2), jnp.zeros(3))
    assert top.value == top.late_gain == 0
    assert not top.perturbation.any()
    assert run(lambda w: 0 * jnp.sum(w), jnp.ones(3)).value == 0
    valley = run(lambda w: jnp.sum(w**2), jnp.zeros(3), random_init=False)
    assert valley.value == 0
    # A loss that is no number is not taken for flatness.
    hole = lambda w: jnp.where(jnp.all(w == 0), 0, jnp.nan) * jnp.sum(w)
    assert jnp.isnan(run(hole, jnp.zeros(3)).value)
    assert jnp.isnan(run(lambda w: jnp.sum(w) * jnp.nan, jnp.zeros(3)).value)
    # But one such point on the way is left behind.
    cliff = lambda w: jnp.where(w < 0.07, w, jnp.nan)
    found = run(cliff, jnp.zeros(()), random_init=False, num_steps=50)
    assert 0.03 < found.value < 0.07


def test_keskar_has_its_closed_form():
    h, w = jnp.array([1.0, 2.0, 5.0]), jnp.array([0.5, -2.0, 0.0])
    loss = lambda v, batch: 0.5 * jnp.sum(h * (v - w) ** 2) + jnp.mean(batch)
    result = sharpness.keskar_sharpness(loss, w, ONE, 0)
    np.testing.assert_allclose(result.value, 0.0012625, rtol=1e-3)
    # Relative to one plus the loss, in percent.
    result = sharpness.keskar_sharpness(loss, w, ONE + 3, 0, eps=0.1)
    np.testing.assert_allclose(result.value, 12.625 / 4, rtol=1e-5)
    assert 0 <= result.late_gain < 0.1 * result.value


def test_keskar_is_of_the_mean_loss():
    loss = lambda w, batch: jnp.mean(batch) * w + 1
    opposite, alike = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [3.0]])

    def run(batches, **options):
        args = loss, jnp.zeros(()), batches, 0
        return sharpness.keskar_sharpness(*args, eps=RHO, **options).value

    np.testing.assert_allclose(run(opposite), 0, atol=1e-5)
    np.testing.assert_allclose(run(alike), 100 * 0.2 / 2, rtol=1e-5)
    weights = jnp.array([3.0, 1.0])
    np.testing.assert_allclose(run(alike, weights=weights), 100 * 0.15 / 2, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_keskar_in_a_subspace():
    from optax_sam.sharpness.keskar import _subspace

    key = jax.random.split(jax.random.key(5))[1]  # as keskar_sharpness does
    flat = lambda w: jnp.concatenate([w["a"].ravel(), w["b"]])
    zeros = {"a": jnp.zeros((4, 3)), "none": None, "b": jnp.zeros(7)}
    like, point = _subspace(zeros, 5, key)
    assert like.shape == (5,)
    A = jax.lax.map(lambda u: flat(point(u)), jnp.eye(5)).T
    np.testing.assert_allclose((A**2).mean(), 1, rtol=0.3)
    y = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])
    w, slope = point(y), jnp.linspace(-1, 2, 19)
    before, params = slope @ flat(w), {name: w[name] for name in "ab"}
    loss = lambda w, batch: slope @ flat(w) - before
    result = jax.jit(
        lambda params: sharpness.keskar_sharpness(
            loss, params, ONE, 5, subspace_dim=5, eps=0.01
        )
    )(params)
    wanted = 100 * 0.01 * jnp.sum((jnp.abs(y) + 1) * jnp.abs(A.T @ slope))
    np.testing.assert_allclose(result.value, wanted, rtol=1e-9)
