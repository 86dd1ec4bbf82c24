"""SAM-ON: the perturbation of the normalization layers alone."""

import functools

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods_lib import RHO, ascended, assert_apart, flat, points_of
from reference import sam_on
from side_by_side import draws, only
from trajectories import STEPS, biases, mask_of_biases, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE, ETA = map(rising, (0.2, 0.1))


def direction(adapted=()):
    return lambda t, w, grad: sam_on.sam_on(
        w, grad, SIZE(t), biases(w), set(adapted), ETA(t)
    )


def kernel_alone(t, w, grad):
    if draws(5, STEPS)[t] < 0.5:
        return sam_on.sam_on(w, grad, SIZE(t), ["layer0/kernel"])
    return grad(w)


member = functools.partial(optax_sam.sam_on, SIZE, eta=ETA, mask=mask_of_biases)
EVERYTHING = ("layer0/kernel", "layer0/bias", "layer1/kernel", "layer1/bias")
CASES = {
    "sam_on": (member(), direction()),
    "adapted": (member(adapt=True), direction(EVERYTHING)),
    "partly adapted": (
        member(adapt=lambda w: {leaf: "layer1" in leaf for leaf in w}),
        direction({"layer1/bias"}),
    ),
    "of a kernel, with probability": (
        optax_sam.sam_on(
            SIZE, mask=only("layer0/kernel"), when=when.bernoulli(0.5, key=5)
        ),
        kernel_alone,
    ),
}
test_ten_steps_are_those_of_the_reference, test_the_cases_differ = ten_steps(CASES)


def test_sam_on_all_layers_is_sam_or_asam(x64):
    params = harness.tree()
    for settings, member in (
        ({}, optax_sam.sam(RHO)),
        ({"adapt": True, "eta": 0.2}, optax_sam.asam(RHO, eta=0.2, adapt=True)),
    ):
        for mask in (True, None):
            on = optax_sam.sam_on(RHO, mask=mask, **settings)
            wanted = ascended(member, params)[1]
            harness.assert_close(ascended(on, params)[1], wanted, 1e-12)


def with_norms():
    """A network with a layer of each kind that is told by its name or its scale."""
    rng = np.random.default_rng(0)
    layer = lambda **leaves: {
        k: jnp.asarray(rng.normal(size=n)) for k, n in leaves.items()
    }
    return {
        "Dense_0": layer(kernel=(3, 4), bias=4),
        "LayerNorm_0": layer(scale=4, bias=4),
        "ln_f": layer(scale=4, bias=4),
        "bn1": layer(weight=4, bias=4),
        "head": layer(kernel=(4, 2), bias=2),
    }


CHOSEN = {"LayerNorm_0", "ln_f", "bn1"}


@pytest.mark.parametrize("adapt", [False, True])
def test_sam_on_moves_the_norms_alone(adapt, x64):
    """By ``rho``, on the sizes of their weights where these are adapted."""
    w, g = with_norms(), with_norms()
    g = jax.tree.map(lambda x: jnp.cos(9 * x), g)
    (point,) = points_of(optax_sam.sam_on(2.0, adapt=adapt, eta=0.1), w, g)
    e = jax.tree.map(jnp.subtract, point, w)
    for name in w.keys() - CHOSEN:
        harness.assert_equal(point[name], w[name])
    pick = lambda tree: flat({name: tree[name] for name in CHOSEN})
    t = np.abs(pick(w)) + 0.1 if adapt else 1.0
    wanted = 2.0 * t**2 * pick(g) / np.linalg.norm(t * pick(g))
    np.testing.assert_allclose(pick(e), wanted, rtol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(pick(e) / t), 2.0, rtol=1e-10)


def test_all_but_the_norms(x64):
    """The complement, as the documentation writes it."""
    no_norm = lambda params: jax.tree.map(
        lambda chosen: not chosen, ascent.normalization_layers(params)
    )
    w = with_norms()
    (point,) = points_of(optax_sam.sam(RHO, mask=no_norm), w, w)
    for name in w:
        if name in CHOSEN:
            harness.assert_equal(point[name], w[name])
        else:
            assert_apart(point[name], w[name])


def chosen_in(params):
    """The paths that the default mask chooses, and all, without NNX's last key."""
    mask = ascent.normalization_layers(params)
    found, every = set(), set()
    for path, kept in jax.tree_util.tree_flatten_with_path(mask)[0]:
        keys = [str(getattr(k, "key", getattr(k, "name", None))) for k in path]
        name = "/".join(k for k in keys if k not in ("value", "raw_value"))
        every.add(name)
        found |= {name} if kept else set()
    return found, every


class Linen(nn.Module):
    """Each normalization of Flax by its own name, and one by another."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,))(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.LayerNorm()(x)
        x = nn.RMSNorm(name="before_head")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.LayerNorm(use_scale=False, name="norm_without_scale")(x)
        x = nn.Sequential([nn.Dense(4), nn.LayerNorm(name="ln_f")])(x)
        return nn.Dense(2)(x)


def test_norms_of_linen():
    variables = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((2, 8, 4)))
    params = variables["params"]
    found, every = chosen_in(params)
    assert found == {
        "BatchNorm_0/scale",
        "BatchNorm_0/bias",
        "GroupNorm_0/scale",
        "GroupNorm_0/bias",
        "LayerNorm_0/scale",
        "LayerNorm_0/bias",
        "before_head/scale",
        "norm_without_scale/bias",
        "ln_f/scale",
        "ln_f/bias",
    }
    assert {"Conv_0/kernel", "Dense_0/bias", "Dense_1/bias"} <= every - found
    # With the collection around, as ``init`` returns it.
    assert chosen_in({"params": params})[0] == {f"params/{name}" for name in found}


class NNX(nnx.Module):
    """The same with attributes that say nothing, in a list too."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.a = nnx.BatchNorm(4, rngs=rngs)
        self.b = nnx.LayerNorm(4, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(4, use_scale=False, rngs=rngs)])
        self.block = nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        )
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.b(self.a(self.first(x)))
        return self.head(self.block(self.norms[0](x)))


NNX_NORMS = {
    "a/scale",
    "a/bias",
    "b/scale",
    "b/bias",
    "norms/0/bias",
    "block/layers/1/scale",
}


def test_norms_of_nnx():
    """In a list a layer's neighbours are not chosen with it."""
    model = NNX()
    _, params, _ = nnx.split(model, nnx.Param, ...)
    for tree in (nnx.state(model, nnx.Param), params, nnx.to_pure_dict(params)):
        found, every = chosen_in(tree)
        assert found == NNX_NORMS
        assert {"first/kernel", "block/layers/0/kernel", "head/bias"} <= every - found
    listed = [{"kernel": 1.0, "bias": 1.0}, {"scale": 1.0, "bias": 1.0}]
    nobody = {"kernel": False, "bias": False}
    mask = ascent.normalization_layers(listed)
    assert mask == [nobody, {"scale": True, "bias": True}]


def test_sam_on_in_an_nnx_optimizer():
    model = NNX()
    tx = optax.chain(optax_sam.sam_on(0.5), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    outer = nnx.graphdef((model, optimizer))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    @jax.jit
    def update(variables):
        model, optimizer = nnx.merge(outer, variables)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss_fn = lambda p: jnp.mean(nnx.merge(graphdef, p, rest, copy=True)(x) ** 2)
        points = []
        grad_fn = lambda p: points.append(p) or jax.grad(loss_fn)(p)
        optimizer.update(model, jax.grad(loss_fn)(params), grad_fn=grad_fn)
        return nnx.state((model, optimizer)), points[0]

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    variables, point = update(nnx.state((model, optimizer)))
    nnx.update((model, optimizer), variables)
    moved = jax.tree.map(np.subtract, nnx.to_pure_dict(point), before)
    squares = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(moved)[0]:
        keys = [str(getattr(k, "key", None)) for k in path]
        squares["/".join(k for k in keys if k != "None")] = float(jnp.sum(leaf**2))
    assert {name for name, x in squares.items() if x} == NNX_NORMS
    assert np.sqrt(sum(squares.values())) == pytest.approx(0.5, rel=1e-4)
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 1


@pytest.mark.parametrize(
    "params",
    [
        {"Dense_0": {"kernel": 1.0, "bias": 2.0}},
        {"scaled": {"kernel": 1.0}, "norm": 2.0},  # a leaf, no layer
        [1.0, (2.0, 3.0)],
        1.0,
        {},
    ],
    ids=str,
)
def test_no_norm_at_all_is_an_error(params):
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(ValueError, match="No normalization layer.*mask= a tree of bo"):
        ascent.normalization_layers(params)
    member = optax_sam.sam_on(RHO)
    with pytest.raises(ValueError, match="No normalization layer was found"):
        member.update(params, member.init(params), params, grad_fn=lambda p: p)


def test_the_first_gradient_of_sam_on_may_be_zero_elsewhere(x64):
    """XLA then drops its weight gradients, a third of it; the result stays."""
    sizes, examples = (320, 320, 320, 320), 128
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {
        f"layer{i}": {"kernel": draw(n, m) / 18, "norm": {"scale": draw(m)}}
        for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    x = draw(examples, sizes[0])
    tx = optax_sam.sam_on(0.5)

    def loss_fn(params):
        h = x
        for layer in params.values():
            h = jnp.tanh(h @ layer["kernel"])
            h = h / jnp.sqrt(1 + jnp.mean(h**2)) * layer["norm"]["scale"]
        return jnp.mean(h**2)

    def step(params, state, partial):
        grad_fn = jax.grad(loss_fn)
        g = grad_fn(params)
        if partial:
            chosen = ascent.normalization_layers(params)
            g = jax.tree.map(lambda x, on: x if on else jnp.zeros_like(x), g, chosen)
        return tx.update(g, state, params, grad_fn=grad_fn)[0]

    whole, part = (
        jax.jit(functools.partial(step, partial=partial))
        .lower(params, tx.init(params))
        .compile()
        for partial in (False, True)
    )
    flops = lambda program: program.cost_analysis()["flops"]
    args = params, tx.init(params)
    harness.assert_close_in_size(part(*args), whole(*args), 1e-12)
    products = sum(
        2 * examples * n * m for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    )
    assert flops(whole) - flops(part) == pytest.approx(products, rel=0.02)
    gradient = jax.jit(jax.grad(loss_fn)).lower(params).compile()
    # A third, and more where there is no gradient of the data to take.
    assert 1 / 3 < products / flops(gradient) < 0.4
