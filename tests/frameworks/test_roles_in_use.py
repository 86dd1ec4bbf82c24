"""Roles in use: a model is what it is with separate layers and biases of one axis."""

import functools
import re

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods_lib import later
from role_models import equinox, filled, scanned

import optax_sam
from optax_sam import Role, ascent, sharpness

SETTINGS = {
    "asam": {"rho": 0.5, "eta": 0.1},
    "sam_on": {"rho": 0.5, "adapt": None, "eta": 0.1},
    "look_layer_sam": {"rho": 0.3, "k": 1},
    "renyi_sam": {"rho": 0.4, "alpha": 1.3, "layerwise": True},
    "random_sam": {"rho": 0.3, "sigma": 0.2},
    "amp": {"epsilon": 0.1, "inner_lr": 0.03, "inner_iter": 3},
}
# The axes that count units, and layers, matter to these; the others take one of both.
QUICK = ("look_layer_sam", "random_sam")
some_methods = pytest.mark.parametrize(
    "method", [x if x in QUICK else later(x) for x in SETTINGS]
)


def build(method, **more):
    return getattr(optax_sam, method)(**SETTINGS[method], **more)


def gradient(w):
    """Of each entry by itself, so that it does not matter how they are arranged."""
    return jnp.cos(9 * w) + 0.2 * w


def offset(tx, w, noise=None):
    """Where a method looks last, minus ``w``; the gradient is a function of ``w``."""
    extra = {} if noise is None else {"noise": noise}
    always = functools.partial(tx.update, ascend=True)

    @jax.jit
    def looked_at(w, extra):
        points = []
        grad_fn = lambda p: points.append(p) or jax.tree.map(gradient, p)
        always(jax.tree.map(gradient, w), tx.init(w), w, grad_fn=grad_fn, **extra)
        return jax.tree.map(jnp.subtract, points[-1], w)

    return looked_at(w, extra)


# Roles that are given.


@pytest.mark.parametrize("method", SETTINGS)
def test_what_are_no_roles(method):
    w = {"norm": {"scale": jnp.ones((6, 4))}, "fc": {"kernel": jnp.ones((3, 8, 4))}}
    deep = {"norm": Role("gain", 1), "fc": Role("kernel", 4)}
    for given, message in (
        ({"norm": "gain", "fc": "kernel"}, "got 'kernel'"),
        (deep, r"axis 3 of a leaf of shape \(3, 8, 4\) at kernel"),
        ({"norm": Role("gain", 1)}, "roles must be a pytree of optax_sam.Role"),
        (lambda params: 3, "got 3"),
    ):
        tx = build(method, roles=given)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(offset, tx), w)


@some_methods
def test_given_roles_are_taken(method):
    """As a pytree, as a prefix of one and as a function."""
    w = {"norm": {"shift": filled((6, 4))}, "fc": filled((3, 8, 4))}
    like = {"norm": {"scale": w["norm"]["shift"]}, "fc": {"kernel": w["fc"]}}
    kinds = {"norm/scale": "gain"}
    said = {"norm": Role("gain", 1), "fc": Role("kernel", 1, (2,))}
    whole = {"norm": {"shift": said["norm"]}, "fc": said["fc"]}
    reference = functools.partial(optax_sam.roles, stacked=1, kinds=kinds)
    wanted = jax.tree.leaves(offset(build(method, roles=reference), like))
    for given in (said, whole, lambda params: whole):
        got = jax.tree.leaves(offset(build(method, roles=given), w))
        harness.assert_close(sorted(got, key=jnp.size), sorted(wanted, key=jnp.size), 0)


def test_adapt_and_roles_contradict_each_other():
    for make in (optax_sam.asam, ascent.adaptive):
        with pytest.raises(ValueError, match="adapt already says which"):
            make(0.1, adapt=True, roles=optax_sam.roles)


# The model with separate layers and biases of one axis.


def layers(block, count):
    return [jax.tree.map(lambda x, i=i: x[i], block) for i in range(count)]


def plain_attention(layer):
    """Kernels with the heads in one axis, biases of one axis."""
    units = lambda x: x.reshape(*x.shape[:-2], -1)
    inner = {x: jax.tree.map(units, layer[x]) for x in ("query", "key", "value")}
    out = {
        "kernel": layer["out"]["kernel"].reshape(-1, layer["out"]["kernel"].shape[-1]),
        "bias": layer["out"]["bias"],
    }
    return inner | {"out": out}


def unscanned(params):
    blocks = layers(params["ScanBlock_0"], 3)
    name = "MultiHeadDotProductAttention_0"
    plain = [block | {name: plain_attention(block[name])} for block in blocks]
    return {"blocks": plain} | {x: params[x] for x in ("Embed_0", "Dense_0")}


one_axis = lambda x: x.reshape(-1)
# Kernels of Equinox come out first; in the plain model they come last.
flipped = lambda w: w.reshape(len(w), -1).T


def plain_equinox(m):
    linear = lambda x: {"kernel": flipped(x.weight), "bias": one_axis(x.bias)}
    norm = lambda x: {"scale": one_axis(x.weight), "bias": one_axis(x.bias)}
    return {
        "a": {"embedding": m.a.weight},
        **{x: linear(getattr(m, x)) for x in "bcg"},
        **{x: norm(getattr(m, x)) for x in "de"},
        "f": {"kernel": flipped(m.f.weight_ih), "bias": m.f.bias},
        "f2": {"kernel": flipped(m.f.weight_hh)},
        "f3": {"bias": m.f.bias_n},
        "h": [linear(x) for x in layers(m.h[0], 6)],
        "h1": norm(m.h[1]),
        "i": {"slope": m.i.negative_slope.reshape(1)},
    }


def ensemble():
    return filled(
        {
            "scale": {"kernel": (7, 3, 4), "bias": (7, 4)},
            "norm": {"scale": (7, 4), "bias": (7, 4)},
            "weight": {"kernel": (7, 4, 2), "bias": (7, 2)},
        }
    )


# How each is made, and the same with plain layers.
MODELS = {
    "scan": (scanned, unscanned),
    "equinox": (lambda: filled(equinox()), plain_equinox),
    "ensemble": (ensemble, lambda tree: layers(tree, 7)),
}


def cases():
    """Each method on one model, and one where kernels come out first; in CI all."""
    for model in MODELS:
        for method in SETTINGS:
            quick = model == "ensemble" or (method, model) == ("asam", "equinox")
            yield (method, model) if quick else later(method, model)


@pytest.mark.parametrize(("method", "model"), [*cases()])
def test_a_model_is_its_plain_layers(method, model, x64):
    make, separate = MODELS[model]
    stacked = make()
    # Nothing to find in the model to compare with: kernels of two axes, all by name.
    plain, noise = separate(stacked), filled(stacked, seed=1)
    for role in jax.tree.leaves(optax_sam.roles(plain)):
        assert role.stack == 0
        assert role.output == ((1,) if role.kind in ("kernel", "embedding") else ())
    got = separate(offset(build(method), stacked, noise))
    wanted = offset(build(method), plain, separate(noise))
    harness.assert_close(got, wanted, 1e-10)


@some_methods
def test_a_stack_that_was_said(method, x64):
    """Kernels without biases and norms, where only an argument can tell."""
    tree = filled({"up": {"kernel": (6, 4, 8)}, "norm": {"scale": (4,)}, "w": (4, 2)})
    separate = lambda tree: tree | {"up": layers(tree["up"], 6)}
    roles = functools.partial(optax_sam.roles, stacked={"up": 1})
    noise = filled(tree, seed=1)
    got = offset(build(method, roles=roles), tree, noise)
    wanted = offset(build(method), separate(tree), separate(noise))
    harness.assert_close(separate(got), wanted, 1e-10)
    if method not in ("asam", "sam_on"):
        apart = offset(build(method), tree, noise)["up"]["kernel"]
        assert not np.allclose(apart, got["up"]["kernel"], rtol=1e-3)


@pytest.mark.slow
def test_global_projection_of_amp_knows_no_layers(x64):
    make, separate = MODELS["ensemble"]
    params = make()
    tx = optax_sam.amp(0.1, inner_iter=2, projection="global")
    got = separate(offset(tx, params))
    harness.assert_close(got, offset(tx, separate(params)), 1e-10)


@pytest.mark.parametrize(
    ("model", "not_adapted"),
    [
        later("scan", r"bias$"),
        ("equinox", r"bias(_n)?$|negative_slope"),
    ],
)
def test_asam_by_hand(model, not_adapted, x64):
    """With the leaves that are not adapted written down by name."""
    w = MODELS[model][0]()
    leaves = jax.tree_util.tree_leaves_with_path(w)
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    t = [
        np.ones(x.shape) if re.search(not_adapted, path(k)) else np.abs(x) + 0.1
        for k, x in leaves
    ]
    g = [np.cos(9 * x) + 0.2 * x for x in map(np.asarray, jax.tree.leaves(w))]
    length = np.sqrt(sum(np.sum((a * b) ** 2) for a, b in zip(t, g, strict=True)))
    wanted = [0.5 * a**2 * b / length for a, b in zip(t, g, strict=True)]
    harness.assert_close(jax.tree.leaves(offset(build("asam"), w)), wanted, 1e-10)


# Sharpness.


@pytest.mark.parametrize("ignore_1d", [True, False])
@pytest.mark.parametrize("norm", ["filter", "layer"])
def test_filters_of_a_stack_are_those_of_its_layers(norm, ignore_1d, x64):
    """Each filter of the direction is as long as the one in the weights."""
    params = scanned()
    settings = {"norm": norm, "ignore_1d": ignore_1d}
    d = sharpness.filter_normalized_direction(0, params, **settings)
    plain, plain_d = unscanned(params), unscanned(d)
    lengths = lambda x: np.linalg.norm(
        x, axis=0 if norm == "filter" and x.ndim > 1 else None
    )
    for w, x in zip(jax.tree.leaves(plain), jax.tree.leaves(plain_d), strict=True):
        if w.ndim == 1 and ignore_1d:
            assert not np.any(x)
        else:
            np.testing.assert_allclose(lengths(x), lengths(w), rtol=1e-8)


def test_filters_of_equinox_come_first(x64):
    params = filled(equinox())
    d = sharpness.filter_normalized_direction(0, params)
    rows = lambda x: np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)
    for name in "bcg":
        w, x = getattr(params, name), getattr(d, name)
        np.testing.assert_allclose(rows(x.weight), rows(w.weight), rtol=1e-8)
        assert not np.any(x.bias)
    for w, x in zip(params.h[0].weight, d.h[0].weight, strict=True):
        np.testing.assert_allclose(rows(x), rows(w), rtol=1e-8)


def test_a_filter_axis_of_a_stack_leaves_its_layers_apart(x64):
    params = filled({"fc": {"kernel": (5, 3, 4), "bias": (5, 4)}})
    d = sharpness.filter_normalized_direction(0, params, filter_axis=1)
    lengths = lambda x: np.linalg.norm(x["fc"]["kernel"], axis=2)
    np.testing.assert_allclose(lengths(d), lengths(params), rtol=1e-8)


@pytest.mark.slow
def test_renyi_entropy_of_a_stack_is_that_of_its_layers(x64):
    """Small enough that each spectrum is found exactly, whatever the key."""
    w = jax.tree.map(lambda x: 0.7 * x, filled({"kernel": (2, 2, 2), "bias": (2, 2)}))

    def loss_fn(w, x):
        for layer in w if isinstance(w, list) else layers(w, 2):
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((x - 0.5) ** 2)

    sizes = dict.fromkeys(("num_eigs", "num_top_matvecs", "num_lanczos"), 4)
    sizes |= {"num_probes": 4, "alpha": (0.5, 2.0), "layerwise": True}
    measure = jax.jit(
        lambda w: sharpness.renyi_entropy(loss_fn, w, filled((2, 6, 2)), 0, **sizes)
    )
    got, wanted = measure(w), measure(layers(w, 2))
    assert got["bias"] is None
    assert got["kernel"].value.shape == (2, 2)
    values = jnp.stack([x["kernel"].value for x in wanted])
    np.testing.assert_allclose(got["kernel"].value, values, rtol=1e-6)
