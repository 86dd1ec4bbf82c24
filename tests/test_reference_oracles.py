"""The transcriptions in reference/ where nothing was recorded: closed forms."""

import numpy as np
import pytest
from reference import (
    ae_sam,
    amp,
    asam,
    base,
    esam,
    fisher_sam,
    friendly_sam,
    gam,
    gnp,
    gsam,
    looksam,
    random_sam,
    sam,
    sam_on,
    sampa,
    stable_sam,
    wsam,
)


def assert_near(actual, expected, tolerance=0.0):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def trajectory(direction, steps=30):
    """SGD on a quadratic, with direction(t, w, grad)."""
    r = np.random.RandomState(3)
    A, b = np.diag(np.logspace(-2, 0.5, 6)), r.randn(6)
    grad = lambda w: base.quad(w, A, b)[1]
    step = lambda t, w: direction(t, w, grad)
    path = base.descend({"w": r.randn(6)}, steps, step, lr=0.1, momentum=0.9)
    return np.array([w["w"] for w in path])


def test_layerwise_ascent_moves_each_leaf_by_a_share_of_its_norm():
    r = np.random.RandomState(0)
    w = {"a": r.randn(3, 2), "b": np.zeros(2), "c": r.randn(4)}
    g = {"a": r.randn(3, 2), "b": r.randn(2), "c": np.zeros(4)}
    e = looksam.layerwise(w, g, 0.1)
    assert_near(base.norm(e, ["a"]), 0.1 * base.norm(w, ["a"]), 1e-15)
    assert_near(e["b"], 0.1 * g["b"], 0.0)
    assert_near(e["c"], 0.0, 0.0)


def test_selections_differ_by_the_example_at_the_threshold():
    rise = np.array([0.1, 0.5, 0.3, 0.4, 0.3, 0.2])
    strict, exact = esam.strictly_above(rise, 0.5), esam.largest(rise, 0.5)
    np.testing.assert_array_equal(np.flatnonzero(strict), [1, 3])
    np.testing.assert_array_equal(np.flatnonzero(exact), [1, 2, 3])


def test_noise_of_an_output_unit_follows_its_norm():
    r = np.random.RandomState(4)
    w = {"kernel": r.randn(3, 4, 5), "bias": np.zeros(5)}
    w["kernel"][..., 2] = 0.0
    normal = {leaf: np.ones_like(w[leaf]) for leaf in w}
    delta = random_sam.noise(w, normal, 0.1)
    norms = np.linalg.norm(w["kernel"].reshape(12, 5), axis=0)
    assert_near(delta["kernel"], np.broadcast_to(0.1 * norms, (3, 4, 5)), 1e-15)
    assert_near(delta["bias"], 1e-17)


def test_noise_alone_may_set_the_direction_of_the_ascent():
    w, delta = {"w": np.zeros(4)}, {"w": np.array([0.0, 3.0, 0.0, -4.0])}
    e = random_sam.perturbation(w, lambda w: w, delta, rho=0.5, lam=0.0)
    assert_near(e["w"], [0.0, 0.3, 0.0, -0.4], 1e-12)


# The share of ascending steps for independent Gaussian x, delta = 0.9.
@pytest.mark.parametrize(
    ("first", "last", "share"),
    [
        (-1, -1, 0.84),
        (0, 0, 0.50),
        (1, 1, 0.16),
        (2, 2, 0.01),
        (1, -1, 0.50),
        (2, 0, 0.196),
    ],
)
def test_ae_sam_ascends_as_often_as_the_threshold_says(first, last, share):
    steps = 40_000
    x = 10.0 + np.random.RandomState(0).randn(steps)
    c = ae_sam.threshold(np.arange(steps), steps, last, first)
    assert_near(np.mean(ae_sam.simulate(x, c)), share, 0.01)


def test_threshold_goes_from_lambda2_to_lambda1_and_stays():
    c = ae_sam.threshold(np.array([0, 10, 40, 60]), 40, lambda1=-1.0, lambda2=3.0)
    assert_near(c, [3.0, 2.0, -1.0, -1.0])


def test_ae_sam_statistics_are_weighted_sums():
    x = np.random.RandomState(1).rand(30)
    statistics, means = ae_sam.Statistics(delta=0.8), []
    for x_t in x:
        statistics.observe(x_t)
        means.append(statistics.mu)
    weights = 0.2 * 0.8 ** np.arange(30)[::-1]
    assert_near(statistics.mu, weights @ x + 0.8**30 * x[0], 1e-14)
    assert_near(statistics.var, weights @ (x - means) ** 2, 1e-14)


def test_lagged_ae_sam_decides_on_the_step_before():
    r = np.random.RandomState(2)
    x, c = r.rand(200), r.randn(200)
    lagged = ae_sam.simulate(x, c, lag=1)
    assert lagged[0]
    np.testing.assert_array_equal(lagged[1:], ae_sam.simulate(x[:-1], c[1:]))


@pytest.mark.parametrize("lag", [0, 1])
def test_ae_sam_below_every_threshold_is_sam(lag):
    method = ae_sam.AESAM(rho=0.3, lag=lag)
    always = trajectory(lambda t, w, grad: method.direction(w, grad, -1e9))
    expected = trajectory(lambda t, w, grad: sam.sam(w, grad, 0.3))
    assert_near(always, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_ae_looksam_above_every_threshold_is_looksam_with_one_sam_step(alpha):
    method = ae_sam.AESAM(rho=0.3, alpha=alpha)
    once = looksam.LookSAM(rho=0.3, alpha=alpha, k=1000)
    never = trajectory(lambda t, w, grad: method.direction(w, grad, 1e9))
    assert_near(never, trajectory(once.direction))


# What follows takes gradients of a small network, one batch per step.


def network(seed=5, steps=12):
    """Weights, and grad(t, w) on the batch of step t."""
    r = np.random.RandomState(seed)
    shapes = [(6, 5), (5,), (5, 4), (4,)]
    leaves = ["layer0/kernel", "layer0/bias", "layer1/kernel", "layer1/bias"]
    w = {leaf: r.randn(*shape) for leaf, shape in zip(leaves, shapes, strict=True)}
    batches = [(r.randn(8, 6), r.randint(4, size=8)) for _ in range(steps)]
    return w, lambda t, w: base.mlp(w, *batches[t])[1]


W, GRAD = network()
g = lambda w: GRAD(0, w)
U = base.sgd(0.1, 0.9, 0.01)


def difference(a, b):
    return base.norm(base.add(a, b, -1.0))


def path(direction, **settings):
    """SGD with direction(t, w, grad)."""
    step = lambda t, w: direction(t, w, lambda p: GRAD(t, p))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | settings
    return base.descend(W, 12, step, **settings)


def assert_same_path(a, b, tolerance=1e-13):
    assert len(a) == len(b) == 13
    assert difference(b[0], b[-1]) > 0.1
    assert max(difference(x, y) for x, y in zip(a, b, strict=True)) < tolerance


def test_the_wrapped_sgd_is_that_of_descend():
    w, v, expected = W, None, path(lambda t, w, grad: grad(w))
    for t, wanted in enumerate(expected[1:]):
        w, v = U(t, w, GRAD(t, w), v)
        assert difference(w, wanted) < 1e-14


def test_the_first_step_of_adamw_is_a_step_of_the_sign():
    d = g(W)
    w, _ = base.adamw(0.1, eps=0.0, weight_decay=0.5)(0, W, d)
    for leaf in W:
        expected = W[leaf] - 0.1 * (np.sign(d[leaf]) + 0.5 * W[leaf])
        assert_near(w[leaf], expected, 1e-13)


@pytest.mark.parametrize("r", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0, 2.5])
def test_gnp_on_a_quadratic_is_the_gradient_of_the_penalized_loss(r, alpha):
    random = np.random.RandomState(6)
    A, b, w = np.diag(np.logspace(-2, 0.5, 6)), random.randn(6), random.randn(6)
    g = A @ w + b
    # The gradient of ||A w + b|| is A g / ||g||.
    expected = g + alpha * r * A @ g / np.linalg.norm(g)
    d = gnp.gnp({"w": w}, lambda w: base.quad(w, A, b)[1], r, alpha)
    assert_near(d["w"], expected, 1e-11)


def test_gnp_between_the_base_optimizer_and_sam():
    assert difference(gnp.gnp(W, g, 0.3, 0.0), g(W)) == 0.0
    assert difference(gnp.gnp(W, g, 0.3, 1.0), sam.sam(W, g, 0.3)) == 0.0
    assert difference(sam.sam(W, g, 0.3), g(W)) > 0.1
    unit = gnp.gnp(W, g, 0.3, 0.0, unit_gradient=True)
    assert_near(base.norm(unit), 1.0, 1e-14)


def test_g_rst_is_sam_in_the_mean():
    draws = (np.arange(200) + 0.5) / 200
    p, total = 0.4, base.scaled(W, 0.0)
    for u in draws:
        total = base.add(total, gnp.g_rst(u, W, g, 0.3, 1.0 / p, p), 1.0 / 200)
    assert difference(total, sam.sam(W, g, 0.3)) < 1e-13
    for u in draws[::40]:
        assert difference(gnp.g_rst(u, W, g, 0.3, 1.7, 0.0), g(W)) == 0.0
        rst = gnp.g_rst(u, W, g, 0.3, 1.0, p)
        assert difference(rst, sam.bernoulli(u, W, g, 0.3, p)) == 0.0


def test_friendly_sam_that_takes_nothing_out_is_sam():
    method = friendly_sam.FriendlySAM(0.3, sigma=0.0)
    friendly = path(lambda t, w, grad: method.direction(w, grad))
    assert_same_path(friendly, path(lambda t, w, grad: sam.sam(w, grad, 0.3)), 1e-15)


def test_friendly_sam_without_memory_follows_the_last_difference():
    method = friendly_sam.FriendlySAM(lam=0.0)
    gradients = [GRAD(t, W) for t in range(5)]
    a = [method.noise(x) for x in gradients]
    assert difference(a[0], gradients[0]) == 0.0
    for t in range(1, 5):
        expected = base.add(gradients[t], gradients[t - 1], -1.0)
        assert difference(a[t], expected) == 0.0


def test_friendly_sam_of_a_constant_gradient_has_nothing_left():
    method = friendly_sam.FriendlySAM()
    method.noise(g(W))
    assert base.norm(method.noise(g(W))) == 0.0


@pytest.mark.parametrize("order", ["code", "paper"])
def test_the_average_of_friendly_sam_is_a_weighted_sum(order):
    method = friendly_sam.FriendlySAM(lam=0.8, order=order)
    gradients = [GRAD(t, W) for t in range(6)]
    for x in gradients:
        method.noise(x)
    total = base.scaled(gradients[0], 0.8**5)
    for t in range(1, 6):
        total = base.add(total, gradients[t], 0.2 * 0.8 ** (5 - t))
    assert difference(method.m, total) < 1e-14


@pytest.mark.parametrize(("sigma", "agree"), [(1.0, True), (0.5, False)])
def test_the_orders_of_friendly_sam_agree_on_the_direction_for_sigma_1(sigma, agree):
    code, paper = (
        friendly_sam.FriendlySAM(0.3, sigma, 0.7, order=order)
        for order in ("code", "paper")
    )
    code.noise(GRAD(0, W))
    paper.noise(GRAD(0, W))
    a, b = code.noise(GRAD(1, W)), paper.noise(GRAD(1, W))
    assert difference(a, b) > 0.01
    assert (difference(base.unit(a), base.unit(b)) < 1e-11) == agree


def decoupled(U, gamma, **settings):
    return wsam.decoupled(W, 12, GRAD, U, 0.3, gamma, 0.1, **settings)


def test_wsam_without_weight_is_the_base_optimizer():
    plain = path(lambda t, w, grad: grad(w))
    assert_same_path(decoupled(U, 0.0), plain)
    assert difference(wsam.coupled(W, g, 0.3, 0.0), g(W)) == 0.0


def test_wsam_of_equal_weights_is_sam():
    assert difference(wsam.coupled(W, g, 0.3, 0.5), sam.sam(W, g, 0.3)) == 0.0
    settings = {"momentum": 0.0, "weight_decay": 0.01}
    as_sam = path(lambda t, w, grad: sam.sam(w, grad, 0.3), **settings)
    assert_same_path(decoupled(base.sgd(0.1, 0.0, 0.01), 0.5), as_sam)


@pytest.mark.parametrize("gamma", [0.2, 0.8])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_coupled_and_decoupled_wsam_coincide_without_momentum(gamma, limit):
    direction = lambda t, w, grad: wsam.coupled(w, grad, 0.3, gamma, limit)
    coupled = path(direction, momentum=0.0)
    plain = base.sgd(0.1, 0.0, 0.01)
    assert_same_path(decoupled(plain, gamma, max_norm=limit), coupled)
    with_momentum = decoupled(U, gamma, max_norm=limit)
    assert difference(with_momentum[-1], path(direction)[-1]) > 0.01


def test_wsam_clips_each_gradient_after_the_ascent():
    limit = 0.5 * base.norm(g(W))
    a, a_s = wsam.gradients(W, g, 0.3, limit)
    b, b_s = wsam.gradients(W, g, 0.3)
    for short, long in ((a, b), (a_s, b_s)):
        assert_near(base.norm(short), limit, 1e-6)
        assert difference(base.unit(short), base.unit(long)) < 1e-11
    assert difference(wsam.gradients(W, g, 0.3, 1e3)[1], b_s) == 0.0


N = ("layer0/bias", "layer1/bias")


def test_sam_on_everything_is_sam_and_asam():
    assert difference(sam_on.sam_on(W, g, 0.3, set(W)), sam.sam(W, g, 0.3)) == 0.0
    adapted = sam_on.sam_on(W, g, 0.3, set(W), {"layer0/kernel"}, 0.1)
    expected = asam.asam(W, g, 0.3, {"layer0/kernel"}, 0.1)
    assert difference(adapted, expected) == 0.0


@pytest.mark.parametrize("adapted", [(), N])
def test_sam_on_moves_its_leaves_alone_by_its_radius(adapted):
    e = sam_on.perturbation(W, g(W), 0.3, N, adapted, 0.1)
    assert all(np.all(e[leaf] == 0.0) == (leaf not in N) for leaf in W)
    T = asam.operator(W, adapted, 0.1)
    length = base.norm({leaf: e[leaf] / T[leaf] for leaf in W})
    assert_near(length, 0.3, 1e-12)


GAM = {"rho": 0.2, "rho2": 0.1, "alpha": 0.6, "beta": 0.3, "gamma": 0.4}


def gam_with(**settings):
    return gam.gam(W, g, **GAM | settings)


def test_gam_without_flatness_is_sam():
    assert difference(gam_with(alpha=1.0, gamma=0.0), sam.sam(W, g, 0.1)) == 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_gam_of_one_point_is_gsam(alpha):
    """g2 = g0 and g3 = g1 where w2 = w."""
    expected = gsam.gsam(W, g, 0.1, 0.4)
    assert difference(gam_with(rho=0.0, alpha=alpha), expected) < 1e-14
    in_code = gsam.gsam(W, g, 0.1, 0.4 * (1.0 + 1.0 - 0.3))
    found = gam_with(rho=0.0, alpha=alpha, h_minus="code")
    assert difference(found, in_code) < 1e-14


@pytest.mark.parametrize("h_minus", ["paper", "code"])
def test_gam_takes_out_what_is_normal_to_h_plus(h_minus):
    d, h_plus = gam_with(h_minus=h_minus), gam_with(gamma=0.0)
    assert_near(base.dot(d, h_plus), base.norm(h_plus) ** 2, 1e-14)
    assert difference(d, h_plus) > 0.01


def test_the_forms_of_gam_agree_where_beta_is_1():
    assert difference(gam_with(beta=1.0), gam_with(beta=1.0, h_minus="code")) == 0.0
    assert difference(gam_with(), gam_with(h_minus="code")) > 1e-3


def test_gam_asks_for_its_four_gradients_around_w():
    points = []

    def grad(w):
        points.append(w)
        return g(w)

    gam.gam(W, grad, **GAM, leaves=N)
    w, w1, w2, w3 = points
    assert difference(w, W) == 0.0
    moves = [(w1, w, 0.1), (w2, w, 0.2), (w3, w2, 0.1)]
    for point, origin, radius in moves:
        assert_near(difference(point, origin), radius, 1e-10)
        move = base.add(point, origin, -1.0)
        assert all(np.all(move[leaf] == 0.0) == (leaf not in N) for leaf in W)


def sampa_points(steps, **settings):
    """The batches and points of the gradients, and the trajectory."""
    asked = []

    def grad(b, w):
        asked.append((b, w))
        return GRAD(b, w)

    arguments = {"U": U, "rho": 0.3, "lam": 0.2} | settings
    return asked, sampa.sampa(W, steps, grad, **arguments)


def test_the_first_step_of_sampa_is_one_of_the_base_optimizer():
    asked, trajectory = sampa_points(1)
    assert [b for b, _ in asked] == [0, 0]
    assert all(difference(point, W) == 0.0 for _, point in asked)
    assert difference(trajectory[1], U(0, W, g(W))[0]) < 1e-15


def test_sampa_without_radius_and_share_has_delayed_batches():
    _, trajectory = sampa_points(12, rho=0.0, lam=0.0)
    delayed = lambda t, w: GRAD(max(t - 1, 0), w)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    assert_same_path(trajectory, base.descend(W, 12, delayed, **settings))


def test_sampa_predicts_the_step_that_it_would_take():
    """With lam = 1 the emitted gradient is g_y, so y is what a look-ahead reaches."""
    asked, trajectory = sampa_points(3, lam=1.0)
    (_, x), (_, y) = asked[4:]
    g_y = GRAD(1, asked[3][1])
    assert_near(difference(x, trajectory[2]), 0.3, 1e-11)
    # The step from w_1 along g_y, and then once more the same g_y with the momentum.
    v = base.add(base.add(g_y, trajectory[1], 0.01), GRAD(0, W), 0.9)
    v = base.add(v, base.scaled(W, 0.9 * 0.01))
    v = base.add(base.add(g_y, trajectory[2], 0.01), v, 0.9)
    assert difference(y, base.add(trajectory[2], v, -0.1)) < 1e-14


def test_the_prediction_of_the_paper_is_a_step_along_the_gradient():
    asked, trajectory = sampa_points(2, predict="gradient", lr=0.4)
    expected = base.add(trajectory[1], GRAD(0, W), -0.4)
    assert difference(asked[3][1], expected) < 1e-15
    asked, trajectory = sampa_points(2, predict="gradient", lr=0.0)
    assert difference(asked[3][1], trajectory[1]) == 0.0


def test_fisher_sam_in_the_metric_of_the_weights_is_sam():
    expected = sam.sam(W, g, 0.3)
    assert difference(fisher_sam.fisher_sam(W, g, 0.3, eta=0.0), expected) < 1e-14


@pytest.mark.parametrize("eta", [0.0, 1.0, 50.0])
def test_the_length_of_a_fisher_perturbation_is_its_radius(eta):
    e = fisher_sam.perturbation(g(W), 0.3, eta)
    F_e = base.times(fisher_sam.metric(g(W), eta), e)
    assert_near(np.sqrt(base.dot(e, F_e)), 0.3, 1e-11)


def test_a_fisher_perturbation_under_a_large_weight():
    """e tends to rho / (g sqrt(eta dim))."""
    x, eta = np.array([0.5, -1.0, 4.0]), 1e10
    e = fisher_sam.perturbation({"w": x}, 0.3, eta, eps=0.0)
    assert_near(e["w"] * np.sqrt(3 * eta) / 0.3, 1.0 / x, 1e-8)


@pytest.mark.parametrize("settings", [{"n": 0}, {"epsilon": 0.0}, {"zeta": 0.0}])
def test_amp_that_does_not_move_is_the_base_optimizer(settings):
    assert difference(amp.amp(W, g, **{"epsilon": 0.5} | settings), g(W)) == 0.0


def test_amp_inside_its_ball_is_raw_ascent():
    once = amp.perturbation(W, g, 100.0, zeta=0.7)
    assert difference(once, base.scaled(g(W), 0.7)) == 0.0
    twice = base.add(once, g(base.add(W, once)), 0.7)
    assert difference(amp.perturbation(W, g, 100.0, zeta=0.7, n=2), twice) == 0.0


def test_amp_of_one_leaf_at_its_bound_is_sam():
    A, w = np.diag([1.0, 2.0, 3.0]), {"w": np.array([1.0, -1.0, 2.0])}
    grad = lambda w: base.quad(w, A, np.ones(3))[1]
    assert base.norm(grad(w)) > 0.5
    for project in (amp.by_leaf, amp.shortened):
        d = amp.amp(w, grad, 0.5, project=project)
        assert difference(d, sam.sam(w, grad, 0.5)) < 1e-11


def test_the_balls_of_amp():
    epsilon = np.median([base.norm(g(W), [leaf]) for leaf in W])
    leaves = amp.perturbation(W, g, epsilon)
    whole = amp.perturbation(W, g, epsilon, project=amp.shortened)
    at_bound = 0
    for leaf in W:
        n = base.norm(g(W), [leaf])
        assert_near(base.norm(leaves, [leaf]), min(n, epsilon), 1e-11)
        at_bound += n > epsilon
    assert at_bound == 2
    assert_near(base.norm(whole), epsilon, 1e-11)


def test_stable_sam_has_one_length_and_the_other_direction():
    d, g_s = stable_sam.stable_sam(W, g, 0.3), sam.sam(W, g, 0.3)
    assert_near(base.norm(d), base.norm(g(W)), 1e-14)
    assert difference(base.unit(d), base.unit(g_s)) < 1e-11
    assert difference(d, g_s) > 0.01
    assert difference(stable_sam.stable_sam(W, g, 0.0), g(W)) < 1e-14
    nothing = stable_sam.renormalized(base.scaled(W, 0.0), g(W))
    assert base.norm(nothing) == 0.0
