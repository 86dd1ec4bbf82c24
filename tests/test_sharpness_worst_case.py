"""Worst cases in a ball: the ascent against exact maxima, and what is built on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Counter
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness
from optax_sam.sharpness import auto_pgd

RHO = 0.1


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

    @functools.partial(jax.jit, static_argnames=("steps", "starts"))
    def run(batches, steps, starts):
        return sharpness.worst_case_sharpness(
            loss,
            w,
            batches,
            RHO,
            0,
            adaptive=adaptive,
            num_steps=steps,
            num_restarts=starts,
        )

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

    gradient = jax.grad(functools.partial(phi, lib=jnp))
    found, wanted = [], []

    @jax.jit
    def run(key):
        start = auto_pgd.random_start(key, jnp.zeros(6), 0.9, ball=ball)
        objective = jax.value_and_grad(functools.partial(phi, lib=jnp))
        return start, auto_pgd.auto_pgd(
            objective, start, 0.9, ball=ball, num_steps=steps
        )

    for seed in range(4):
        start, ascent = run(jax.random.key(seed))
        found.append((float(ascent.value), np.array(ascent.u)))
        wanted.append(
            reference_auto_pgd(
                functools.partial(phi, lib=np),
                lambda u: np.array(gradient(u)),
                np.array(start),
                0.9,
                ball,
                steps,
            )
        )
    for (value, u), (best, best_u, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, best, rtol=1e-9)
        np.testing.assert_allclose(u, best_u, rtol=1e-7, atol=1e-9)
    if steps == 20:
        assert sum(halvings for *_, halvings in wanted) > 4


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
    draw = lambda ball: jax.lax.map(
        lambda key: flat(auto_pgd.random_start(key, like, 0.3, ball=ball)), keys
    )
    l2, linf = np.array(draw("l2")), np.array(draw("linf"))
    np.testing.assert_allclose(np.linalg.norm(l2, axis=1), 0.3, rtol=1e-5)
    np.testing.assert_allclose((l2**2).mean(0), 0.09 / 8, rtol=0.25)
    assert np.abs(linf).max() <= 0.3
    np.testing.assert_allclose((linf**2).mean(0), 0.03, rtol=0.25)
    for draws in (l2, linf):
        assert np.abs(draws.mean(0)).max() < 0.05
        assert np.abs(np.corrcoef(draws.T) - np.eye(8)).max() < 0.2


def test_restarts_keep_the_best():
    """One hill on either side; the start decides which of them is climbed."""
    phi = lambda u: u["x"] ** 2 + 0.2 * jnp.maximum(u["x"], 0)
    like = {"x": jnp.zeros(())}
    run = jax.jit(
        lambda number: auto_pgd.maximize(
            jax.value_and_grad(phi),
            jnp.zeros(()),
            like,
            1.0,
            jax.random.key(1),
            num_steps=3,
            num_restarts=number,
        ),
        static_argnums=0,
    )
    start = lambda key: float(auto_pgd.random_start(key, like, 1.0)["x"])
    signs = [start(key) for key in jax.random.split(jax.random.key(1), 6)]
    assert signs[0] == signs[-1] == -1.0  # neither the first nor the last is the best
    assert 1.0 in signs
    one, several = run(1), run(6)
    np.testing.assert_allclose(several.gain, 1.2, rtol=1e-6)
    np.testing.assert_allclose(several.u["x"], 1.0, rtol=1e-6)
    assert start(jax.random.split(jax.random.key(1), 1)[0]) == -1.0
    np.testing.assert_allclose(one.gain, 1.0, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_linf_on_a_diagonal_quadratic(adaptive):
    h, w = jnp.array([1.0, 2.0, 5.0, 0.5]), jnp.array([0.5, -2.0, 0.0, 1.0])
    loss = lambda v, batch: 0.5 * jnp.sum(h * (v - w) ** 2)
    result = sharpness.worst_case_sharpness(
        loss, w, jnp.zeros((1, 1)), RHO, 1, norm="linf", adaptive=adaptive
    )
    c = jnp.abs(w) if adaptive else 1
    np.testing.assert_allclose(result.value, RHO**2 / 2 * jnp.sum(c**2 * h), rtol=1e-5)
    np.testing.assert_allclose(
        jnp.abs(result.perturbation), RHO * c * jnp.ones(4), rtol=1e-5
    )


def test_weights_of_zero_stay_and_do_not_use_up_the_radius():
    """With one weight that can move, every start is already the worst case."""
    w = {"a": jnp.zeros(200).at[7].set(3.0), "b": jnp.zeros(())}
    loss = lambda v, batch: (
        0.5
        * sum(
            jnp.sum((x - y) ** 2) for x, y in zip(v.values(), w.values(), strict=True)
        )
    )
    result = sharpness.worst_case_sharpness(
        loss, w, jnp.zeros((1, 1)), RHO, 0, adaptive=True, num_steps=1
    )
    np.testing.assert_allclose(result.value, RHO**2 / 2 * 9, rtol=1e-5)
    offset = jnp.abs(result.perturbation["a"]).at[7].add(-RHO * 3)
    np.testing.assert_allclose(offset, 0, atol=1e-6)
    assert result.perturbation["b"] == 0


def relu_net(w, batch):
    x, y = batch
    logits = jnp.maximum(x @ w["first"] + w["bias"], 0) @ w["second"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def net_problem(dtype=None):
    rng = np.random.default_rng(2)
    w = {
        "first": rng.normal(size=(4, 6)),
        "bias": rng.normal(size=6),
        "second": rng.normal(size=(6, 3)),
    }
    batches = rng.normal(size=(8, 5, 4)), rng.integers(0, 3, size=(8, 5))
    as_array = lambda x: jnp.asarray(x, dtype)
    return jax.tree.map(as_array, w), (as_array(batches[0]), jnp.asarray(batches[1]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("norm", "random_init"), [("l2", True), ("linf", False)])
def test_adaptive_is_invariant_under_rescaling_of_layers(norm, random_init):
    w, batches = net_problem()
    options = dict(norm=norm, random_init=random_init)
    run = jax.jit(
        lambda w, adaptive: (
            sharpness.worst_case_sharpness(
                relu_net, w, batches, 0.05, 0, adaptive=adaptive, **options
            ).value
        ),
        static_argnums=1,
    )
    scaled = lambda a: {
        "first": a * w["first"],
        "bias": a * w["bias"],
        "second": w["second"] / a,
    }
    for factor in (10, 0.01):
        np.testing.assert_allclose(run(scaled(factor), True), run(w, True), rtol=1e-9)
        assert abs(run(scaled(factor), False) / run(w, False) - 1) > 0.1


def test_each_batch_has_its_own_worst_case():
    """Slopes of opposite sign: m-sharpness is not that of the mean loss."""
    loss = lambda w, batch: jnp.mean(batch) * w
    error = lambda w, batch: {"high": w > 0.05}
    batches = jnp.array([[1.0], [-1.0], [2.0]])
    w = jnp.zeros(())
    run = functools.partial(
        sharpness.worst_case_sharpness, loss, w, batches, RHO, 0, metric_fn=error
    )
    result = run()
    np.testing.assert_allclose(result.per_batch, [0.1, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(result.value, 0.4 / 3, rtol=1e-6)
    np.testing.assert_allclose(result.metric["high"], 2 / 3, rtol=1e-6)
    assert result.perturbation is None
    weighted = run(weights=jnp.array([1.0, 0.0, 3.0]))
    np.testing.assert_allclose(weighted.value, 0.175, rtol=1e-6)
    np.testing.assert_allclose(weighted.metric["high"], 1, rtol=1e-6)


def test_the_perturbation_is_where_the_loss_is_as_large():
    w, batches = net_problem()
    batch = jax.tree.map(lambda x: x[0], batches)
    mask = {"first": True, "bias": False, "second": True}
    alone = jax.tree.map(lambda x: x[None], batch)
    result, sam = jax.jit(
        lambda w: (
            sharpness.worst_case_sharpness(relu_net, w, alone, 0.3, 0, mask=mask),
            sharpness.sam_sharpness(relu_net, w, alone, 0.3, mask=mask),
        )
    )(w)
    there = jax.tree.map(jnp.add, w, result.perturbation)
    rise = relu_net(there, batch) - relu_net(w, batch)
    np.testing.assert_allclose(result.value, rise, rtol=1e-4)
    assert not result.perturbation["bias"].any()
    square = sum(jnp.sum(x**2) for x in jax.tree.leaves(result.perturbation))
    np.testing.assert_allclose(jnp.sqrt(square), 0.3, rtol=1e-4)
    # One step from the same radius is no more.
    assert 0.5 * result.value < sam.value <= result.value


def test_there_is_no_negative_and_no_missing_value():
    run = functools.partial(sharpness.worst_case_sharpness, batches=jnp.zeros((1, 1)))
    hill = lambda w, batch: -jnp.sum(w**2)
    top = run(hill, jnp.zeros(3), rho=RHO, key=0)
    assert top.value == top.late_gain == 0
    assert not top.perturbation.any()
    flat = lambda w, batch: 0 * jnp.sum(w)
    assert run(flat, jnp.ones(3), rho=RHO, key=0).value == 0
    valley = lambda w, batch: jnp.sum(w**2)
    assert run(valley, jnp.zeros(3), rho=RHO, random_init=False).value == 0
    # A loss that is no number is not taken for flatness.
    hole = lambda w, batch: jnp.where(jnp.all(w == 0), 0, jnp.nan) * jnp.sum(w)
    assert jnp.isnan(run(hole, jnp.zeros(3), rho=RHO, key=0).value)
    undefined = lambda w, batch: jnp.sum(w) * jnp.nan
    assert jnp.isnan(run(undefined, jnp.zeros(3), rho=RHO, key=0).value)
    # But one such point on the way is left behind.
    cliff = lambda w, batch: jnp.where(w < 0.07, w, jnp.nan)
    found = run(cliff, jnp.zeros(()), rho=RHO, random_init=False, num_steps=50)
    assert 0.03 < found.value < 0.07


def counted_loss():
    """A quadratic that counts its values and, apart, its gradients."""
    values, gradients = Counter(), Counter()

    @jax.custom_vjp
    def loss(w, batch):
        return values(lambda w: jnp.sum((w - batch) ** 2))(w)

    def forward(w, batch):
        return loss(w, batch), (w, batch)

    def backward(kept, cotangent):
        w, batch = kept
        slope = gradients(lambda w: 2 * jnp.sum(w - batch, 0))(w)
        return cotangent * slope, jnp.zeros_like(batch)

    loss.defvjp(forward, backward)
    return loss, values, gradients


@pytest.mark.parametrize(
    ("measure", "passes", "forwards"),
    [
        # Per batch: 21 values with gradients for each start, and the value at w.
        (dict(rho=RHO, key=0), 21, 1),
        (dict(rho=RHO, key=0, num_restarts=3), 63, 1),
        (dict(rho=RHO, random_init=False, num_steps=7), 8, 1),
        ("keskar", 21, 1),
        ("sam", 1, 1),
        ("average", 0, 41),
        ("pac_bayes", 0, 151),
    ],
)
def test_the_program_takes_as_many_gradients_as_documented(measure, passes, forwards):
    loss, values, gradients = counted_loss()
    measures = {
        "keskar": lambda *a: sharpness.keskar_sharpness(*a, 0),
        "sam": lambda *a: sharpness.sam_sharpness(*a, RHO),
        "average": lambda *a: sharpness.average_sharpness(*a, RHO, 0),
        "pac_bayes": lambda *a: sharpness.pac_bayes_flatness(*a, 0),
    }
    run = (
        measures[measure]
        if isinstance(measure, str)
        else lambda *a: sharpness.worst_case_sharpness(*a, **measure)
    )
    batches = jnp.ones((2, 3, 4))
    jax.block_until_ready(jax.jit(lambda w: run(loss, w, batches))(jnp.zeros(4)))
    assert (values.read(), gradients.read()) == (2 * (passes + forwards), 2 * passes)


def test_keskar_has_its_closed_form():
    h, w = jnp.array([1.0, 2.0, 5.0]), jnp.array([0.5, -2.0, 0.0])
    loss = lambda v, batch: 0.5 * jnp.sum(h * (v - w) ** 2) + jnp.mean(batch)
    batches = jnp.zeros((1, 1))
    result = sharpness.keskar_sharpness(loss, w, batches, 0)
    np.testing.assert_allclose(result.value, 0.0012625, rtol=1e-3)
    # Relative to one plus the loss, in percent.
    result = sharpness.keskar_sharpness(loss, w, batches + 3, 0, eps=0.1)
    np.testing.assert_allclose(result.value, 12.625 / 4, rtol=1e-5)
    assert 0 <= result.late_gain < 0.1 * result.value


def test_keskar_is_of_the_mean_loss():
    loss = lambda w, batch: jnp.mean(batch) * w + 1
    opposite, alike = jnp.array([[1.0], [-1.0]]), jnp.array([[1.0], [3.0]])
    run = lambda batches, **options: (
        sharpness.keskar_sharpness(
            loss, jnp.zeros(()), batches, 0, eps=RHO, **options
        ).value
    )
    np.testing.assert_allclose(run(opposite), 0, atol=1e-5)
    np.testing.assert_allclose(run(alike), 100 * 0.2 / 2, rtol=1e-5)
    weights = jnp.array([3.0, 1.0])
    np.testing.assert_allclose(run(alike, weights=weights), 100 * 0.15 / 2, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_keskar_in_a_subspace():
    from optax_sam.sharpness.keskar import _subspace

    key = jax.random.split(jax.random.key(5))[1]  # as keskar_sharpness does
    zeros = {"a": jnp.zeros((4, 3)), "none": None, "b": jnp.zeros(7)}
    flat = lambda w: jnp.concatenate([w["a"].ravel(), w["b"]])
    like, point = _subspace(zeros, 5, key)
    assert like.shape == (5,)
    A = jax.lax.map(lambda u: flat(point(u)), jnp.eye(5)).T
    np.testing.assert_allclose((A**2).mean(), 1, rtol=0.3)
    y = jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])
    w = jax.tree.map(lambda x: x, point(y))
    slope = jnp.linspace(-1, 2, 19)
    loss = lambda w, batch: slope @ (jnp.concatenate([w["a"].ravel(), w["b"]]))
    before = loss(w, None)
    params = {name: w[name] for name in "ab"}
    result = jax.jit(
        lambda params: sharpness.keskar_sharpness(
            lambda w, batch: loss(w, batch) - before,
            params,
            jnp.zeros((1, 1)),
            5,
            subspace_dim=5,
            eps=0.01,
        )
    )(params)
    wanted = 100 * 0.01 * jnp.sum((jnp.abs(y) + 1) * jnp.abs(A.T @ slope))
    np.testing.assert_allclose(result.value, wanted, rtol=1e-9)


@functools.cache
def on_devices(devices):
    """All measures of the ReLU net, on one device or spread over eight."""
    w, batches = net_problem(jnp.float32)
    axis = None if devices == 1 else "d"

    def run(w, batches):
        lead = (relu_net, w, batches)
        tail = dict(axis_name=axis)
        accuracy = lambda *a: jnp.exp(-relu_net(*a))
        per_batch = {
            "worst": sharpness.worst_case_sharpness(
                *lead, 0.1, 0, num_restarts=2, metric_fn=relu_net, **tail
            ),
            "box": sharpness.worst_case_sharpness(
                *lead, 0.01, 0, norm="linf", adaptive=True, **tail
            ),
            "sam": sharpness.sam_sharpness(*lead, 0.1, adaptive=True, **tail),
            "average": sharpness.average_sharpness(*lead, 0.1, 0, **tail),
        }
        equal = {
            "keskar": sharpness.keskar_sharpness(*lead, 0, eps=0.01, **tail),
            "subspace": sharpness.keskar_sharpness(
                *lead, 0, eps=0.01, subspace_dim=3, **tail
            ),
            "noise": sharpness.pac_bayes_flatness(accuracy, w, batches, 0, **tail),
        }
        own = {name: result.per_batch for name, result in per_batch.items()}
        rest = {
            name: result._replace(per_batch=None) for name, result in per_batch.items()
        }
        return own, rest, equal

    if devices == 1:
        return jax.jit(run)(w, batches)
    mesh = Mesh(jax.devices(), "d")
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P("d"), P(), P())
    )
    spread = jax.device_put(batches, NamedSharding(mesh, P("d")))
    return jax.jit(mapped)(w, spread)


@pytest.mark.slow
def test_eight_devices_find_what_one_does():
    assert len(jax.devices()) == 8
    one, eight = on_devices(1), on_devices(8)
    assert jax.tree.structure(one) == jax.tree.structure(eight)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)


def test_batches_may_be_sharded():
    w, batches = net_problem(jnp.float32)
    run = jax.jit(
        lambda w, batches: sharpness.worst_case_sharpness(
            relu_net, w, batches, 0.1, 0, num_steps=5
        )
    )
    mesh = Mesh(jax.devices(), "d")
    x, y = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :3]], 1), batches)
    spread = jax.device_put((x, y), NamedSharding(mesh, P(None, "d")))
    np.testing.assert_allclose(run(w, spread).value, run(w, (x, y)).value, rtol=1e-4)


@pytest.mark.parametrize("measure", ["restarts", "draws", "noise"])
def test_memory_does_not_grow_with_repetitions(measure):
    def temporary(number):
        measures = {
            "restarts": lambda w, b: sharpness.worst_case_sharpness(
                relu, w, b, 0.1, 0, num_restarts=number, num_steps=3
            ),
            "draws": lambda w, b: sharpness.average_sharpness(
                relu, w, b, 0.1, 0, num_samples=number
            ),
            "noise": lambda w, b: sharpness.pac_bayes_flatness(
                relu, w, b, 0, num_samples=number, num_steps=3
            ),
        }
        relu = lambda w, batch: jnp.mean(jnp.maximum(batch @ w, 0))
        program = jax.jit(measures[measure])
        arguments = jnp.ones(50_000), jnp.ones((1, 1, 50_000))
        compiled = program.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(2), temporary(40)
    assert few > 50_000
    assert many - few < 8 * 50_000  # and not 38 more vectors


def test_half_precision_is_widened():
    w = jnp.full(3, 100.0, jnp.bfloat16)  # 100 + 0.1 rounds back to 100
    loss = lambda w, batch: 0.5 * jnp.sum((w - 100) ** 2)
    result = sharpness.worst_case_sharpness(loss, w, jnp.zeros((1, 1)), RHO, 0)
    np.testing.assert_allclose(result.value, RHO**2 / 2, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (dict(rho=0.0), r"rho must be a number in \(0, inf\); got 0"),
        (dict(rho=-1.0), "rho must be"),
        (dict(rho=float("nan")), "rho must be"),
        (dict(key="a"), "key must be an int"),
        (dict(norm="l1"), 'norm must be "l2" or "linf"; got \'l1\''),
        (dict(num_steps=0), "num_steps must be an integer >= 1"),
        (dict(num_restarts=0), "num_restarts must be an integer >= 1"),
        (dict(num_restarts=2, random_init=False), "would all be the same"),
        (dict(loss_fn=lambda w, batch: w), "must return a scalar"),
        (dict(mask=False), "the mask selects nothing"),
        (dict(batches=jnp.zeros((0, 1))), "empty"),
        (dict(params=jnp.arange(3)), "int32"),
    ],
)
def test_bad_input_is_refused(change, advice):
    good = dict(
        loss_fn=lambda w, batch: jnp.sum(w),
        params=jnp.ones(3),
        batches=jnp.zeros((1, 1)),
        rho=RHO,
        key=0,
    )
    with pytest.raises(ValueError, match=advice):
        sharpness.worst_case_sharpness(**good | change)


def test_bad_input_to_keskar_is_refused():
    run = lambda **options: sharpness.keskar_sharpness(
        lambda w, batch: jnp.sum(w), jnp.ones(3), jnp.zeros((1, 1)), 0, **options
    )
    with pytest.raises(ValueError, match="eps must be"):
        run(eps=0.0)
    with pytest.raises(ValueError, match="subspace_dim=4 is more than the 3 weights"):
        run(subspace_dim=4)
    with pytest.raises(ValueError, match="num_steps must be"):
        run(num_steps=0)


def test_without_a_key_it_is_zero():
    loss = lambda w, batch: jnp.mean((batch @ jnp.tanh(w)) ** 2)
    arguments = loss, jnp.array([0.3, -0.2]), jnp.eye(2)[None]
    worst = sharpness.worst_case_sharpness(*arguments, RHO, num_steps=1)
    zero = sharpness.worst_case_sharpness(*arguments, RHO, 0, num_steps=1)
    other = sharpness.worst_case_sharpness(*arguments, RHO, 1, num_steps=1)
    assert worst.value == zero.value != other.value
    keskar = sharpness.keskar_sharpness(*arguments, subspace_dim=1)
    assert keskar.value == sharpness.keskar_sharpness(*arguments, 0, subspace_dim=1)[0]
