"""SAM-ON: the perturbation of the normalization layers alone."""

import functools

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
import pytest
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
test_ten_steps_meet_the_reference, test_cases_differ = ten_steps(CASES)


def test_sam_on_all_layers_is_sam_or_asam(x64):
    params = harness.tree()
    for settings, member in (
        ({}, optax_sam.sam(lib.RHO)),
        ({"adapt": True, "eta": 0.2}, optax_sam.asam(lib.RHO, eta=0.2, adapt=True)),
    ):
        for mask in (True, None):
            on = optax_sam.sam_on(lib.RHO, mask=mask, **settings)
            wanted = lib.ascended(member, params)[1]
            harness.assert_close(lib.ascended(on, params)[1], wanted, 1e-12)


def with_norms():
    """A network with a layer of each kind that is told by its name or its scale.

    In a list a layer's neighbours are not chosen with it.
    """
    rng = np.random.default_rng(0)
    layer = lambda **leaves: {
        k: jnp.asarray(rng.normal(size=n)) for k, n in leaves.items()
    }
    return {
        "Dense_0": layer(kernel=(3, 4), bias=4),
        "LayerNorm_0": layer(scale=4, bias=4),
        "ln_f": layer(scale=4, bias=4),
        "bn1": layer(weight=4, bias=4),
        "before_head": layer(scale=4),
        "norm_without_scale": layer(bias=4),
        "layers": [layer(kernel=(4, 4), bias=4), layer(scale=4, bias=4)],
        "head": layer(kernel=(4, 2), bias=2),
    }


def split(tree):
    """The leaves of the normalization layers, and the others."""
    norms = ("LayerNorm_0", "ln_f", "bn1", "before_head", "norm_without_scale")
    first, second = tree["layers"]
    chosen = [tree[name] for name in norms] + [second]
    return lib.flat(chosen), lib.flat([tree["Dense_0"], tree["head"], first])


@pytest.mark.parametrize("adapt", [False, True])
def test_sam_on_moves_the_norms_alone(adapt, x64):
    """By ``rho``, on the sizes of their weights where these are adapted."""
    w, g = with_norms(), jax.tree.map(lambda x: jnp.cos(9 * x), with_norms())
    member = optax_sam.sam_on(2.0, adapt=adapt, eta=0.1)
    (point,) = lib.points_of(member, w, g)
    (moved, others), (norms, still), (g, _) = map(split, (point, w, g))
    np.testing.assert_array_equal(others, still)
    t = np.abs(norms) + 0.1 if adapt else 1.0
    wanted = 2.0 * t**2 * g / np.linalg.norm(t * g)
    np.testing.assert_allclose(moved - norms, wanted, rtol=1e-10)


def test_all_but_the_norms(x64):
    """The complement, as the documentation writes it."""
    no_norm = lambda params: jax.tree.map(
        lambda chosen: not chosen, ascent.normalization_layers(params)
    )
    w = with_norms()
    (point,) = lib.points_of(optax_sam.sam(lib.RHO, mask=no_norm), w, w)
    (norms, others), (before, moved) = map(split, (point, w))
    np.testing.assert_array_equal(norms, before)
    assert np.all(others != moved)


@pytest.mark.parametrize(
    "params",
    [
        {"Dense_0": {"kernel": 1.0, "bias": 2.0}},
        {"scaled": {"kernel": 1.0}, "norm": 2.0},  # a leaf, no layer
        1.0,
        {},
    ],
    ids=str,
)
def test_no_norm_at_all_is_an_error(params):
    params = jax.tree.map(jnp.asarray, params)
    with pytest.raises(
        ValueError, match="No normalization layer.*mask= a pytree of bo"
    ):
        ascent.normalization_layers(params)
    member = optax_sam.sam_on(lib.RHO)
    with pytest.raises(ValueError, match="No normalization layer was found"):
        member.update(params, member.init(params), params, grad_fn=lambda p: p)


def test_the_first_gradient_of_sam_on_may_be_zero_elsewhere(x64):
    """XLA then drops its weight gradients, a third of it; the result stays."""
    size, examples, layers = 320, 128, 3
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    layer = lambda: {"kernel": draw(size, size) / 18, "norm": {"scale": draw(size)}}
    params, x = {f"layer{i}": layer() for i in range(layers)}, draw(examples, size)
    tx = optax_sam.sam_on(0.5)
    state = tx.init(params)

    def loss_fn(params):
        h = x
        for layer in params.values():
            h = jnp.tanh(h @ layer["kernel"])
            h = h / jnp.sqrt(1 + jnp.mean(h**2)) * layer["norm"]["scale"]
        return jnp.mean(h**2)

    def step(params, partial):
        g = jax.grad(loss_fn)(params)
        if partial:
            chosen = ascent.normalization_layers(params)
            g = jax.tree.map(lambda x, on: x if on else jnp.zeros_like(x), g, chosen)
        return tx.update(g, state, params, grad_fn=jax.grad(loss_fn))[0]

    compiled = lambda f, **kw: (
        jax.jit(functools.partial(f, **kw)).lower(params).compile()
    )
    flops = lambda program: program.cost_analysis()["flops"]
    whole, part = (compiled(step, partial=partial) for partial in (False, True))
    harness.assert_close_in_size(part(params), whole(params), 1e-12)
    products = layers * 2 * examples * size**2
    assert flops(whole) - flops(part) == pytest.approx(products, rel=0.02)
    # A third, and more where there is no gradient of the data to take.
    assert 1 / 3 < products / flops(compiled(jax.grad(loss_fn))) < 0.4
