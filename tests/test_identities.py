"""Where two methods, or a method and a formula, must coincide."""

import functools

import harness
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import every_method, every_skipping

import optax_sam
from optax_sam.ascent import adaptive, l2, n_step, restrict

RHO = 0.1
STEPS = 25


def trained(member, start=None, steps=STEPS, problem=problems.mlp):
    """Parameters after some steps of SGD with momentum behind the member."""
    tx = optax.chain(member, optax.sgd(0.1, momentum=0.9))
    params = problem().params() if start is None else start
    step = jax.jit(harness.make_step(tx, problem().loss_fn))
    params, _ = harness.run(step, params, tx.init(params), problem(), steps)
    return params


@functools.cache
def trained_by(name):
    """The same in double precision, for what is compared with most often."""
    members = {
        "sgd": lambda: optax.with_extra_args_support(optax.identity()),
        "sam": lambda: optax_sam.sam(RHO),
    }
    return trained(members[name]())


def ascended(member, params=None):
    """What a member emits, the points it looks at, and its state; not compiled."""
    params = harness.tree() if params is None else params
    points = []
    d, state = member.update(
        harness.tree(1),
        member.init(params),
        params,
        grad_fn=lambda p: points.append(p) or harness.tree(2),
        ascend=True,
    )
    return d, points, state


# The base optimizer.


@every_method
def test_no_radius_and_no_leaf_is_the_base_optimizer(method, x64):
    """The second gradient is taken at the very weights, and emitted as it is."""
    params, g_s = harness.tree(), harness.tree(2)
    still = method.of_radius(0.0)
    for member in (method.build(**still), method.build(mask=False)):
        d, points, state = ascended(member)
        assert len(points) == method.calls
        # R-SAM's first point is smoothed; it is masked, but not small with rho.
        for point in points if method.uses_incoming else points[-1:]:
            harness.assert_equal(point, params)
        harness.assert_emits(method, d, harness.tree(1), g_s, 1e-12)
        assert optax_sam.metrics(state)["survival"] == 1


@every_skipping
def test_no_radius_trains_as_the_base_optimizer(method, x64):
    still = method.build(**method.of_radius(0.0))
    harness.assert_close(trained(still), trained_by("sgd"), 1e-12)


# SAM.


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax_sam.sam(RHO, num_ascent_steps=1),
        lambda: optax_sam.sharpness_aware(l2(RHO)),
        lambda: optax_sam.sam(RHO, when=optax_sam.when.every_k(1)),
        lambda: optax_sam.sam(RHO, when=optax_sam.when.bernoulli(1.0)),
        lambda: optax_sam.vsam(RHO, window=4, num_slices=2, warmup_steps=STEPS),
        lambda: optax_sam.sharpness_aware(
            l2(RHO), blend=optax_sam.blend.reuse_difference()
        ),
    ],
    ids=["1 step", "l2", "k = 1", "p = 1", "vSAM in warm-up", "reuse without a gap"],
)
def test_is_sam(build, x64):
    harness.assert_close(trained(build()), trained_by("sam"), 1e-12)
    gap = jax.tree.map(jnp.subtract, trained_by("sam"), trained_by("sgd"))
    assert optax.tree.norm(gap) > 1e-3


def test_never_ascending_is_the_base_optimizer(x64):
    member = optax_sam.sam(RHO, when=optax_sam.when.bernoulli(0.0))
    harness.assert_close(trained(member), trained_by("sgd"), 1e-12)


def test_asam_of_unit_sizes_is_sam(x64):
    signs = jax.tree.map(jnp.sign, harness.tree())
    half = jax.tree.map(lambda x: x / 2, signs)
    for asam, params in (
        (optax_sam.asam(RHO, eta=0.0, adapt=True), signs),
        (optax_sam.asam(RHO, eta=0.5, adapt=True), half),
        # And on leaves of any size, if none is adapted.
        (optax_sam.asam(RHO, adapt=False), harness.tree()),
    ):
        sam = ascended(optax_sam.sam(RHO), params)
        harness.assert_close(ascended(asam, params)[1], sam[1], 1e-12)


def test_m_sharpness_with_one_device_is_sam(x64):
    """The collectives over an axis of one device change nothing."""
    problem = problems.mlp()
    mesh = jax.make_mesh(
        (1,), ("d",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)
    )
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(optax_sam.sam(RHO, axis_name="d"), sgd)

    def step(params, state, batch):
        local = jax.lax.pcast(params, "d", to="varying")
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, batch)
        updates, state = tx.update(grad_fn(local), state, local, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    specs = P(), P(), P("d")
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P())))
    params = problem.params()
    params, _ = harness.run(step, params, tx.init(params), problem, STEPS)
    harness.assert_close(params, trained_by("sam"), 1e-12)


def test_accumulating_inside_grad_fn_is_the_full_batch(x64):
    """One perturbation for the whole batch, whatever pieces it comes in."""
    problem = problems.mlp()
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(0.1, momentum=0.9))

    def grad_fn(params, batch):
        parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
        grads = jax.vmap(jax.grad(problem.loss_fn), in_axes=(None, 0))(params, parts)
        return jax.tree.map(lambda x: x.mean(axis=0), grads)

    @jax.jit
    def step(params, state, batch):
        g = functools.partial(grad_fn, batch=batch)
        updates, state = tx.update(g(params), state, params, grad_fn=g)
        return optax.apply_updates(params, updates), state

    params = problem.params()
    params, _ = harness.run(step, params, tx.init(params), problem, STEPS)
    harness.assert_close(params, trained_by("sam"), 1e-12)


# Masks.


@every_method
def test_masks(method, x64):
    """A mask that holds everything is none; what it leaves out stays in place."""
    params = harness.tree()
    everything = (
        None,
        True,
        {"layer": True, "gain": True},
        jax.tree.map(lambda _: True, params),
        lambda p: jax.tree.map(lambda _: True, p),
    )
    results = [ascended(method.build(mask=mask)) for mask in everything]
    for result in results[1:]:
        harness.assert_equal(result, results[0])

    kernels = (
        {"layer": {"kernel": True, "bias": False}, "gain": False},
        lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    )
    results = [ascended(method.build(mask=mask)) for mask in kernels]
    harness.assert_equal(results[1], results[0])
    d, points, _ = results[0]
    harness.assert_emits(method, d, harness.tree(1), harness.tree(2), 1e-12)
    for point in points:
        kernel = lambda tree: {"layer": {"kernel": tree["layer"]["kernel"]}}
        offset = jax.tree.map(jnp.subtract, kernel(point), kernel(params))
        g = kernel(harness.tree(1 if method.uses_incoming else 2))
        length = method.norm(offset, kernel(params), g)
        # R-SAM's first is noise, and GAM's later ones are of other lengths.
        of_rho = points[:1] if method.more_radii else points
        if point is of_rho[-1] or (method.uses_incoming and not method.more_radii):
            rho = method.settings[method.radius]
            np.testing.assert_allclose(length, rho, rtol=1e-9)
        harness.assert_equal(
            (point["gain"], point["layer"]["bias"]),
            (params["gain"], params["layer"]["bias"]),
        )


def test_a_mask_holds_for_rules_that_move_without_a_gradient():
    """Noise, for instance, is not zero where the gradient is masked out."""
    ones = optax.stateless(lambda g, params: jax.tree.map(jnp.ones_like, g))
    g = harness.tree()
    e, _ = restrict(ones, {"layer": True, "gain": False}).update(g, None, g)
    harness.assert_equal(e, {"layer": harness.like(g["layer"], 1.0), "gain": 0.0})


# vSAM.

WINDOW = {"window": 4, "num_slices": 2, "warmup_steps": 7}


def test_vsam_without_reuse(x64):
    """vSAM-A stores no tree, and equals decay 0 and reuse 0 that do."""
    vsam_a = optax_sam.vsam(RHO, reuse_decay=0.0, **WINDOW)
    assert harness.member_state(vsam_a.init(harness.tree())).blend == ()
    wanted = trained(vsam_a)
    for changes in ({"reuse_decay": jnp.asarray(0.0)}, {"max_reuse": 0}):
        member = optax_sam.vsam(RHO, **changes, **WINDOW)
        harness.assert_close(trained(member), wanted, 1e-12)
    gap = jax.tree.map(jnp.subtract, wanted, trained(optax_sam.vsam(RHO, **WINDOW)))
    assert optax.tree.norm(gap) > 1e-4


def test_vsam_without_sensitivity_samples_once_per_window():
    tx = optax_sam.vsam(RHO, sensitivity=0.0, **WINDOW)
    params, g = harness.tree(), harness.tree(1)
    state = tx.init(params)
    update = jax.jit(lambda s, g_s: tx.update(g, s, params, grad_fn=lambda p: g_s)[1])
    decisions = []
    for t in range(7 + 3 + 40):
        decisions.append(bool(optax_sam.ascends_next(state)))
        state = update(state, harness.tree(t, scale=1.0 + t % 3))
    assert decisions[:10] == 7 * [True] + 3 * [False]
    assert [sum(decisions[i : i + 4]) for i in range(10, 50, 4)] == 10 * [1]


@pytest.mark.parametrize(("decay", "max_reuse"), [(0.8, 3), (0.5, None), (1.0, 2)])
def test_vsam_reuses_the_difference(decay, max_reuse, x64):
    """``g + beta^j PSF`` on the j-th step after, up to the last reuse."""
    tx = optax_sam.vsam(RHO, reuse_decay=decay, max_reuse=max_reuse, **WINDOW)
    params, g_s = harness.tree(), harness.tree(2)
    update = jax.jit(
        lambda g, state, ascend: tx.update(
            g, state, params, grad_fn=lambda p: g_s, ascend=ascend
        ),
        static_argnames="ascend",
    )
    state = tx.init(params)
    # The second time the memory is not empty, and its age not zero.
    for sampled in (harness.tree(1), harness.tree(3)):
        d, state = update(sampled, state, ascend=True)
        harness.assert_equal(d, g_s)
        psf = jax.tree.map(jnp.subtract, g_s, sampled)
        for j in range(1, 7):
            g = harness.tree(10 + j)
            d, state = update(g, state, ascend=False)
            weight = decay**j if max_reuse is None or j <= max_reuse else 0.0
            wanted = jax.tree.map(lambda x, y, w=weight: x + w * y, g, psf)
            harness.assert_close(d, wanted, 1e-12)


# Formulas.


def on_a_quadratic(member):
    """Flat gradients, offset and weights of one step where the Hessian is known."""
    problem = problems.quadratic()
    params = problem.params()
    grad_fn = lambda p: jax.grad(problem.loss_fn)(p, problem.batch(0))
    points = []
    d, state = member.update(
        grad_fn(params),
        member.init(params),
        params,
        grad_fn=lambda p: points.append(p) or grad_fn(p),
        ascend=True,
    )
    flat = lambda tree: np.concatenate([tree["a"], tree["b"]])
    return flat(params), flat(grad_fn(params)), flat(d), flat(points[-1]), state


def test_quadratic_sam(x64):
    """On a quadratic the difference is ``rho H g / ||g||``, to the last digits."""
    _, g, g_s, _, _ = on_a_quadratic(optax_sam.sam(RHO))
    wanted = RHO * problems.hessian() @ g / np.linalg.norm(g)
    np.testing.assert_allclose(g_s - g, wanted, rtol=1e-9, atol=1e-12)


def test_quadratic_asam(x64):
    member = optax_sam.asam(RHO, eta=0.2, adapt=True)
    w, g, g_s, point, _ = on_a_quadratic(member)
    t = np.abs(w) + 0.2
    offset = RHO * t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(point - w, offset, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(g_s - g, problems.hessian() @ offset, rtol=1e-9)


def test_quadratic_vsam(x64):
    """The PSF, its norm and its ratio to the gradient's are what is stored."""
    _, g, _, _, state = on_a_quadratic(optax_sam.vsam(RHO, **WINDOW))
    psf = RHO * problems.hessian() @ g / np.linalg.norm(g)
    stored = np.concatenate(jax.tree.leaves(state.blend.psf))
    np.testing.assert_allclose(stored, psf, rtol=1e-9, atol=1e-12)
    size = np.linalg.norm(psf)
    np.testing.assert_allclose(optax_sam.metrics(state)["psf_norm"], size, rtol=1e-9)
    ratio = size / np.linalg.norm(g)
    np.testing.assert_allclose(state.when.ratios[-1], ratio, rtol=1e-9)


def test_quadratic_two_steps(x64):
    member = optax_sam.sam(RHO, num_ascent_steps=2)
    w, g, _, point, _ = on_a_quadratic(member)
    first = RHO * g / np.linalg.norm(g)
    again = g + problems.hessian() @ first
    second = first + RHO * again / np.linalg.norm(again)
    second *= min(1, RHO / np.linalg.norm(second))
    np.testing.assert_allclose(point - w, second, rtol=1e-9, atol=1e-12)


def test_asam_follows_a_rescaling_of_layers(x64):
    """Layers scaled by c and 1/c: the same function, and the same perturbation."""
    c, rng = 3.0, np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    loss_fn = lambda w: jnp.mean((jax.nn.relu(x @ w["in"]) @ w["out"] - y) ** 2)
    params = {
        "in": jnp.asarray(rng.normal(size=(3, 4))),
        "out": jnp.asarray(rng.normal(size=(4, 2))),
    }
    rescale = lambda w, c: {"in": c * w["in"], "out": w["out"] / c}

    def step(member, params):
        points = []
        grad_fn = lambda p: points.append(p) or jax.grad(loss_fn)(p)
        state = member.init(params)
        d, _ = member.update(jax.grad(loss_fn)(params), state, params, grad_fn=grad_fn)
        return d, points[-1]

    asam = optax_sam.asam(RHO, eta=0.0, adapt=True)
    d, point = step(asam, params)
    d_rescaled, point_rescaled = step(asam, rescale(params, c))
    harness.assert_close(point_rescaled, rescale(point, c), 1e-12)
    harness.assert_close(d_rescaled, rescale(d, 1 / c), 1e-10)
    # SAM does not, or the test would be blind.
    _, point = step(optax_sam.sam(RHO), params)
    _, point_rescaled = step(optax_sam.sam(RHO), rescale(params, c))
    gap = jax.tree.map(jnp.subtract, point_rescaled, rescale(point, c))
    assert optax.tree.norm(gap) > 0.01


# The ascent rules on random trees.

SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0,)])
DTYPES = st.sampled_from(["float32", "float64", "bfloat16", "float16"])
LEAVES = st.tuples(SHAPES, DTYPES, st.sampled_from([0.0, 1e-2, 1.0, 1e2]))
TREES = st.recursive(
    LEAVES,
    lambda node: st.one_of(
        st.lists(node, max_size=3),
        st.dictionaries(st.sampled_from("abc"), node, max_size=3),
    ),
    max_leaves=5,
)


def filled(description, seed):
    """Arrays for a tree of (shape, dtype, scale)."""
    rng = np.random.default_rng(seed)
    is_leaf = lambda x: isinstance(x, tuple)
    draw = lambda d: jnp.asarray(d[2] * rng.normal(size=d[0]), d[1])
    return jax.tree.map(draw, description, is_leaf=is_leaf)


def flattened(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def offset_of(rule, g, params=None, **extra):
    """The offset, after the checks that hold for every rule."""
    e, _ = rule.update(g, rule.init(g), params, count=0, **extra)
    assert jax.tree.structure(e) == jax.tree.structure(g)
    for x, like in zip(jax.tree.leaves(e), jax.tree.leaves(g), strict=True):
        assert x.shape == like.shape
        assert x.dtype == jnp.promote_types(like.dtype, jnp.float32)
    flat = flattened(e)
    assert np.all(np.isfinite(flat))
    return flat


# Of the gradient's own rounding and of sums in float32.
ROUNDING = 1e-5
rhos = st.sampled_from([0.0, 1e-3, 0.05, 2.0])
seeds = st.integers(0, 1000)


@hypothesis.given(TREES, seeds, rhos)
def test_l2_on_random_trees(description, seed, rho):
    with harness.x64():
        g = filled(description, seed)
        e, flat = offset_of(l2(rho), g), flattened(g)
        size = np.linalg.norm(flat)
        wanted = rho * flat / size if size else 0 * flat
        np.testing.assert_allclose(e, wanted, rtol=ROUNDING, atol=0)
        assert np.linalg.norm(e) <= rho * (1 + ROUNDING)


@hypothesis.given(TREES, seeds, rhos, st.sampled_from([0.0, 0.01, 1.0]))
def test_adaptive_on_random_trees(description, seed, rho, eta):
    with harness.x64():
        g, w = filled(description, seed), filled(description, seed + 1)
        e = offset_of(adaptive(rho, eta, adapt=True), g, w)
        t = np.abs(flattened(w)) + eta
        size = np.linalg.norm(t * flattened(g))
        wanted = rho * t**2 * flattened(g) / size if size else 0 * e
        # In half precision |w| + eta is rounded to 11 or 8 bits.
        np.testing.assert_allclose(e, wanted, rtol=0.03, atol=1e-30)


@hypothesis.given(TREES, seeds, st.data())
def test_restrict_on_random_trees(description, seed, data):
    with harness.x64():
        g = filled(description, seed)
        mask = jax.tree.map(lambda _: data.draw(st.booleans()), g)
        e = offset_of(restrict(l2(0.5), mask), g, g)
        parts = jax.tree.map(lambda x, kept: kept * jnp.ones_like(x), g, mask)
        kept = flattened(parts) * flattened(g)
        size = np.linalg.norm(kept)
        wanted = 0.5 * kept / size if size else 0 * kept
        np.testing.assert_allclose(e, wanted, rtol=ROUNDING, atol=0)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    TREES, seeds, rhos, st.integers(1, 3), st.sampled_from([None, 0.01, 1.0])
)
def test_n_step_on_random_trees(description, seed, rho, num_steps, step_size):
    with harness.x64():
        g = filled(description, seed)
        others = [filled(description, seed + i) for i in range(1, num_steps)]
        length = rho if step_size is None else step_size
        for project in (True, False):
            answers, seen = iter(others), []
            grad_fn = lambda p: seen.append(p) or next(answers)  # noqa: B023
            rule = n_step(rho, num_steps, step_size=step_size, project=project)
            e = offset_of(rule, g, g, grad_fn=grad_fn)
            wanted = np.zeros_like(e)
            for tree in (g, *others):
                flat = flattened(tree)
                size = np.linalg.norm(flat)
                wanted = wanted + (length * flat / size if size else 0)
                if project and np.linalg.norm(wanted) > rho:
                    wanted = wanted * (rho / np.linalg.norm(wanted))
            assert len(seen) == num_steps - 1
            np.testing.assert_allclose(e, wanted, rtol=1e-3, atol=1e-4 * length)
            assert not project or np.linalg.norm(e) <= rho * (1 + ROUNDING)


def test_many_steps_run_in_a_loop_and_agree(x64):
    """Nine steps are a loop, eight are unrolled: the ninth must not differ in kind."""
    problem = problems.quadratic()
    params = problem.params()
    grad_fn = lambda p: jax.grad(problem.loss_fn)(p, problem.batch(0))
    run = lambda n, **extra: n_step(RHO, n, step_size=0.02, **extra).update(
        grad_fn(params), (), params, grad_fn=grad_fn
    )[0]
    flat = lambda tree: np.concatenate([tree["a"], tree["b"]])
    w, h = flat(params), problems.hessian()
    wanted = np.zeros(5)
    for n in range(1, 12):
        g = h @ (w + wanted)
        wanted = wanted + 0.02 * g / np.linalg.norm(g)
        wanted *= min(1, RHO / np.linalg.norm(wanted))
        if n in (8, 9, 11):
            np.testing.assert_allclose(flat(run(n)), wanted, rtol=1e-9)
