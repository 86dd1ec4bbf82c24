"""Roles of leaves, against the model with separate layers and biases of one axis."""

import functools
import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import Role, ascent, sharpness


def shapes(tree):
    """Leaves of these shapes, without numbers."""
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    # () is a number here, and None nothing at all.
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape
    )


def found(params, **settings):
    """The kinds, the stacked axes and the output axes, by path."""
    tree = optax_sam.roles(params, **settings)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    of_array = jax.tree_util.GetAttrKey("value")  # in NNX
    return {
        path(keys[:-1] if keys[-1] == of_array else keys): (
            role.kind,
            role.stack,
            role.output,
        )
        for keys, role in leaves
    }


def dense(inputs, outputs, *stack):
    return {"kernel": (*stack, inputs, outputs), "bias": (*stack, outputs)}


# What is found.


NAMED = {
    "a bias in a module called scale": (
        {"scale": dense(3, 4), "weight": dense(3, 4), "bias": dense(3, 4)},
        {
            f"{x}/{y}": (kind, 0, units)
            for x in ("scale", "weight", "bias")
            for y, kind, units in (("kernel", "kernel", (1,)), ("bias", "bias", ()))
        },
    ),
    "the same, stacked": (
        {"scale": dense(3, 4, 6)},
        {"scale/kernel": ("kernel", 1, (2,)), "scale/bias": ("bias", 1, ())},
    ),
    "Haiku": (
        {
            "net/~/batch_norm": {"scale": (1, 1, 1, 8), "offset": (1, 1, 1, 8)},
            "net/~/layer_norm": {"scale": (8,), "offset": (8,)},
            "net/~/conv": {"w": (3, 3, 4, 8), "b": (8,)},
            "net/~/channels_first": {"w": (3, 3, 4, 8), "b": (8, 1, 1)},
            "net/~/embed": {"embeddings": (9, 8)},
            "net/~/gru": {"w_i": (4, 24), "w_h": (8, 24), "b": (24,)},
        },
        {
            "net/~/batch_norm/scale": ("gain", 0, ()),
            "net/~/batch_norm/offset": ("offset", 0, ()),
            "net/~/layer_norm/scale": ("gain", 0, ()),
            "net/~/layer_norm/offset": ("offset", 0, ()),
            "net/~/conv/w": ("kernel", 0, (3,)),
            "net/~/conv/b": ("bias", 0, ()),
            "net/~/channels_first/w": ("kernel", 0, (3,)),
            "net/~/channels_first/b": ("bias", 0, ()),
            "net/~/embed/embeddings": ("embedding", 0, (1,)),
            "net/~/gru/w_i": ("kernel", 0, (1,)),
            "net/~/gru/w_h": ("kernel", 0, (1,)),
            "net/~/gru/b": ("bias", 0, ()),
        },
    ),
    "Haiku, stacked": (
        {
            "stack/bn": {"scale": (5, 1, 1, 1, 8), "offset": (5, 1, 1, 1, 8)},
            "stack/conv": {"w": (5, 3, 3, 4, 8), "b": (5, 8)},
        },
        {
            "stack/bn/scale": ("gain", 1, ()),
            "stack/bn/offset": ("offset", 1, ()),
            "stack/conv/w": ("kernel", 1, (4,)),
            "stack/conv/b": ("bias", 1, ()),
        },
    ),
    "PyTorch's names in a flat dict": (
        {
            "conv.weight": (8, 3, 3, 3),
            "conv.bias": (8,),
            "bn.weight": (8,),
            "bn.bias": (8,),
            "fc.weight": (8, 8),  # told by the others
            "fc.bias": (8,),
            "ln.weight": (8,),
            "wte.weight": (9, 8),
        },
        {
            "conv.weight": ("kernel", 0, (0,)),
            "conv.bias": ("bias", 0, ()),
            "bn.weight": ("gain", 0, ()),
            "bn.bias": ("offset", 0, ()),
            "fc.weight": ("kernel", 0, (0,)),
            "fc.bias": ("bias", 0, ()),
            "ln.weight": ("gain", 0, ()),
            "wte.weight": ("embedding", 0, (1,)),
        },
    ),
    "numbers and prefixes": (
        {
            "W1": (3, 4),
            "b1": (4,),
            "W2": (4, 2),
            "b2": (2,),
            "ln1_scale": (4,),
            "ln1_bias": (4,),
        },
        {
            "W1": ("kernel", 0, (1,)),
            "b1": ("bias", 0, ()),
            "W2": ("kernel", 0, (1,)),
            "b2": ("bias", 0, ()),
            "ln1_scale": ("gain", 0, ()),
            "ln1_bias": ("offset", 0, ()),
        },
    ),
    "an ensemble": (
        {"W1": (6, 3, 4), "b1": (6, 4), "W2": (6, 4, 1), "b2": (6, 1), "tau": (6,)},
        {
            "W1": ("kernel", 1, (2,)),
            "b1": ("bias", 1, ()),
            "W2": ("kernel", 1, (2,)),
            "b2": ("bias", 1, ()),
            "tau": ("other", 1, ()),
        },
    ),
    "tuples": (
        [((4, 5), (5,)), None, ((3, 3, 5, 8), (1, 1, 1, 8)), ((8,), (8,))],
        {
            "0/0": ("kernel", 0, (1,)),
            "0/1": ("bias", 0, ()),
            "2/0": ("kernel", 0, (3,)),
            "2/1": ("bias", 0, ()),
            "3/0": ("other", 0, ()),
            "3/1": ("other", 0, ()),
        },
    ),
    "tuples of dot(w, x)": (
        [((7, 5), (7,)), ((7, 7), (7,))],
        {
            "0/0": ("kernel", 0, (0,)),
            "0/1": ("bias", 0, ()),
            "1/0": ("kernel", 0, (0,)),
            "1/1": ("bias", 0, ()),
        },
    ),
    "tuples, stacked": (
        [((6, 4, 5), (6, 5)), ((6, 5, 1), (6, 1))],
        {
            "0/0": ("kernel", 1, (2,)),
            "0/1": ("bias", 1, ()),
            "1/0": ("kernel", 1, (2,)),
            "1/1": ("bias", 1, ()),
        },
    ),
    "two stacks in one": (
        {"ln": {"scale": (2, 3, 8), "bias": (2, 3, 8)}, "fc": dense(8, 8, 2, 3)},
        {
            "ln/scale": ("gain", 2, ()),
            "ln/bias": ("offset", 2, ()),
            "fc/kernel": ("kernel", 2, (3,)),
            "fc/bias": ("bias", 2, ()),
        },
    ),
    "kernels without biases in a stack": (
        {
            "block": {"ln": {"scale": (6, 8)}, "up": {"kernel": (6, 8, 16)}},
            "head": {"kernel": (8, 2)},
        },
        {
            "block/ln/scale": ("gain", 1, ()),
            "block/up/kernel": ("kernel", 1, (2,)),
            "head/kernel": ("kernel", 0, (1,)),
        },
    ),
    "a head that shares the length of a stack by chance": (
        {"block": {"scale": (3, 8), "bias": (3, 8)}, "head": {"kernel": (3, 5)}},
        {
            "block/scale": ("gain", 1, ()),
            "block/bias": ("offset", 1, ()),
            "head/kernel": ("kernel", 0, (1,)),
        },
    ),
    "attention without biases": (
        {
            **{x: {"kernel": (6, 8, 2, 4)} for x in ("query", "key", "value")},
            "out": {"kernel": (6, 2, 4, 8)},
        },
        {
            **{f"{x}/kernel": ("kernel", 1, (2, 3)) for x in ("query", "key", "value")},
            "out/kernel": ("kernel", 1, (3,)),
        },
    ),
    "heads as many as features": (
        {
            **{
                x: {"kernel": (4, 4, 1), "bias": (4, 1)}
                for x in ("query", "key", "value")
            },
            "out": {"kernel": (4, 1, 4), "bias": (4,)},
        },
        {
            **{f"{x}/kernel": ("kernel", 0, (1, 2)) for x in ("query", "key", "value")},
            **{f"{x}/bias": ("bias", 0, ()) for x in ("query", "key", "value", "out")},
            "out/kernel": ("kernel", 0, (2,)),
        },
    ),
    "a bias by its size, and a factor that is none": (
        {"w": (8, 6), "b": (2, 3), "low": {"w": (8, 6), "a": (8, 2), "b": (2, 6)}},
        {
            "w": ("kernel", 0, (1,)),
            "b": ("bias", 0, ()),
            "low/w": ("kernel", 0, (1,)),
            "low/a": ("kernel", 0, (1,)),
            "low/b": ("kernel", 0, (1,)),
        },
    ),
    "LoRA": (
        {
            "a": {"kernel": (8, 2, 4), "lora_a": (8, 2), "lora_b": (2, 2, 4)},
            "b": {"lora_a": (6, 8, 2), "lora_b": (6, 2, 8)},
        },
        {
            "a/kernel": ("kernel", 0, (2,)),
            "a/lora_a": ("kernel", 0, (1,)),
            "a/lora_b": ("kernel", 0, (1, 2)),
            "b/lora_a": ("kernel", 1, (2,)),
            "b/lora_b": ("kernel", 1, (2,)),
        },
    ),
    "what no name tells": (
        {
            "matrix": (3, 4),
            "vector": (3,),
            "cls": (1, 1, 8),
            "pos_embedding": (1, 5, 8),
            "logit_scale": (),
            "gain": (),
            "gamma": (8,),
            "regression": {"kernel": (4,), "bias": ()},
            "odd": {"kernel": (3, 4), "scale": (4,), "bias": (4,)},
        },
        {
            "matrix": ("kernel", 0, (1,)),
            "vector": ("other", 0, ()),
            "cls": ("embedding", 0, (2,)),
            "pos_embedding": ("embedding", 0, (2,)),
            "logit_scale": ("other", 0, ()),
            "gain": ("other", 0, ()),
            "gamma": ("other", 0, ()),
            "regression/kernel": ("kernel", 0, ()),
            "regression/bias": ("bias", 0, ()),
            "odd/kernel": ("kernel", 0, (1,)),
            "odd/scale": ("other", 0, ()),
            "odd/bias": ("bias", 0, ()),
        },
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_and_structure(name):
    tree, wanted = NAMED[name]
    assert found(shapes(tree)) == wanted


class Block(nn.Module):
    """Attention, a layer and three kinds of normalization."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(h)
        x = x + nn.Dense(6, name="scale")(nn.RMSNorm()(x))
        return nn.GroupNorm(2)(x), None


class Scanned(nn.Module):
    """Three blocks under ``nn.scan`` between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 6)(tokens)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=3, **axes)()(x, None)
        return nn.Dense(2)(x.mean(-2))


def scanned():
    """Its parameters, none of them zero."""
    params = Scanned().init(jax.random.key(0), jnp.zeros((2, 4), int))["params"]
    return filled(params)


def filled(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) + 0.3), tree)


def test_a_scanned_transformer():
    roles = found(scanned())
    attention = "ScanBlock_0/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        assert roles[f"{attention}/{name}/kernel"] == ("kernel", 1, (2, 3))
        assert roles[f"{attention}/{name}/bias"] == ("bias", 1, ())
    assert roles[f"{attention}/out/kernel"] == ("kernel", 1, (3,))
    assert roles["ScanBlock_0/scale/kernel"] == ("kernel", 1, (2,))
    assert roles["ScanBlock_0/scale/bias"] == ("bias", 1, ())
    assert roles["ScanBlock_0/RMSNorm_0/scale"] == ("gain", 1, ())
    assert roles["ScanBlock_0/GroupNorm_0/bias"] == ("offset", 1, ())
    assert roles["Embed_0/embedding"] == ("embedding", 0, (1,))
    assert roles["Dense_0/kernel"] == ("kernel", 0, (1,))
    assert all(x[1] == name.startswith("Scan") for name, x in roles.items())


def test_linen_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3,))(x))
            x = nn.RNN(nn.LSTMCell(3))(nn.WeightNorm(nn.Dense(3))(x))
            twice = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **twice)(3)(x)
            return nn.DenseGeneral((2, 3), axis=(-2, -1))(nn.PReLU()(x))

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 4, 3)))
    roles = found(params["params"])
    assert roles["BatchNorm_0/scale"] == ("gain", 0, ())
    assert roles["BatchNorm_0/bias"] == ("offset", 0, ())
    assert roles["Conv_0/kernel"] == ("kernel", 0, (2,))
    assert roles["WeightNorm_0/Dense_0/kernel/scale"] == ("gain", 0, ())
    assert roles["LSTMCell_0/hf/kernel"] == ("kernel", 0, (1,))
    assert roles["VmapDense_0/kernel"] == ("kernel", 1, (2,))
    assert roles["VmapDense_0/bias"] == ("bias", 1, ())
    assert roles["DenseGeneral_0/kernel"] == ("kernel", 0, (2, 3))
    assert roles["DenseGeneral_0/bias"] == ("bias", 0, ())
    assert roles["PReLU_0/negative_slope"] == ("other", 0, ())


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.ln = nnx.LayerNorm(4, rngs=rngs)
        self.weight = nnx.Linear(4, 4, rngs=rngs)
        self.free = nnx.Linear(4, 4, use_bias=False, rngs=rngs)


class Stacked(nnx.Module):
    """Three layers of ``nnx.vmap``, attention and LoRA."""

    def __init__(self, rngs):
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, 4, rngs=rngs, decode=False)
        self.lora = nnx.LoRALinear(4, 2, lora_rank=3, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def test_nnx_in_all_its_forms():
    model = Stacked(nnx.Rngs(0))
    _, params, lora, _ = nnx.split(model, nnx.Param, nnx.LoRAParam, ...)
    wanted = {
        "layers/ln/scale": ("gain", 1, ()),
        "layers/ln/bias": ("offset", 1, ()),
        "layers/weight/kernel": ("kernel", 1, (2,)),
        "layers/weight/bias": ("bias", 1, ()),
        "layers/free/kernel": ("kernel", 1, (2,)),
        "attention/query/kernel": ("kernel", 0, (1, 2)),
        "attention/query/bias": ("bias", 0, ()),
        "attention/out/kernel": ("kernel", 0, (2,)),
        "attention/out/bias": ("bias", 0, ()),
        "lora/kernel": ("kernel", 0, (1,)),
        "embed/embedding": ("embedding", 0, (1,)),
        "norm/scale": ("gain", 0, ()),
        "norm/bias": ("offset", 0, ()),
    }
    trees = [params, nnx.to_pure_dict(params), jax.eval_shape(lambda: params)]
    for tree in trees:
        assert found(tree).items() >= wanted.items()
    whole = nnx.state(model, nnx.Any(nnx.Param, nnx.LoRAParam))
    for tree in (whole, model):
        roles = found(tree)
        assert roles.items() >= wanted.items()
        assert roles["lora/lora/lora_a"] == ("kernel", 0, (1,))
        assert roles["lora/lora/lora_b"] == ("kernel", 0, (1,))
    del lora


class Modules(eqx.Module):
    """Layers of Equinox under names that say nothing, stacked ones among them."""

    a: eqx.nn.Embedding
    b: eqx.nn.Linear
    c: eqx.nn.Conv2d
    d: eqx.nn.LayerNorm
    e: eqx.nn.GroupNorm
    f: eqx.nn.GRUCell
    g: eqx.nn.ConvTranspose1d
    h: list
    i: eqx.nn.PReLU


def equinox():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    stack = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(2, 3, 1, key=key))
    model = Modules(
        eqx.nn.Embedding(5, 4, key=next(keys)),
        eqx.nn.Linear(4, 4, key=next(keys)),
        eqx.nn.Conv2d(2, 3, 1, key=next(keys)),
        eqx.nn.LayerNorm((2, 3)),
        eqx.nn.GroupNorm(1, 4),
        eqx.nn.GRUCell(2, 3, key=next(keys)),
        eqx.nn.ConvTranspose1d(2, 3, 2, key=next(keys)),
        [stack(jax.random.split(next(keys), 6)), eqx.nn.RMSNorm(4)],
        eqx.nn.PReLU(),
    )
    return eqx.filter(model, eqx.is_inexact_array)


def test_equinox():
    assert found(equinox()) == {
        "a/weight": ("embedding", 0, (1,)),
        "b/weight": ("kernel", 0, (0,)),
        "b/bias": ("bias", 0, ()),
        "c/weight": ("kernel", 0, (0,)),
        "c/bias": ("bias", 0, ()),
        "d/weight": ("gain", 0, ()),
        "d/bias": ("offset", 0, ()),
        "e/weight": ("gain", 0, ()),
        "e/bias": ("offset", 0, ()),
        "f/weight_ih": ("kernel", 0, (0,)),
        "f/weight_hh": ("kernel", 0, (0,)),
        "f/bias": ("bias", 0, ()),
        "f/bias_n": ("bias", 0, ()),
        "g/weight": ("kernel", 0, (0,)),
        "g/bias": ("bias", 0, ()),
        "h/0/weight": ("kernel", 1, (1,)),
        "h/0/bias": ("bias", 1, ()),
        "h/1/weight": ("gain", 0, ()),
        "h/1/bias": ("offset", 0, ()),
        "i/negative_slope": ("other", 0, ()),
    }


def test_a_whole_equinox_model_with_functions_among_its_leaves():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    assert found(model)["layers/0/weight"] == ("kernel", 0, (0,))


def test_tracers_and_other_containers():
    class Pair(NamedTuple):
        weight: jax.Array
        bias: jax.Array

    params = {"a": Pair(jnp.ones((3, 4)), jnp.ones(4)), "b": None}
    wanted = {"a/weight": ("kernel", 0, (1,)), "a/bias": ("bias", 0, ())}
    assert found(params) == wanted
    jax.make_jaxpr(lambda p: found(p) == wanted and p or 1 / 0)(params)
    flat = {("a", "kernel"): jnp.ones((3, 4)), ("a", "bias"): jnp.ones(4)}
    assert optax_sam.roles(flat)["a", "bias"].kind == "bias"
    assert optax_sam.roles(jnp.ones((3, 4))).kind == "kernel"
    assert optax_sam.roles(jnp.ones(3)).kind == "other"
    assert optax_sam.roles({}) == {}


# Overrides and what is printed.

BLOCKS = {
    "encoder": {"blocks": {"up": {"kernel": (6, 8, 16)}}},
    "head": {"kernel": (3, 8, 2)},
}


def test_a_stack_that_nobody_can_see_is_said():
    params = shapes(BLOCKS)
    assert found(params)["encoder/blocks/up/kernel"] == ("kernel", 0, (2,))
    roles = optax_sam.roles(params)
    assert roles["encoder"]["blocks"]["up"]["kernel"].unsure == ("stack",)
    for path in ("encoder", "encoder/blocks", "encoder/blocks/up/kernel"):
        roles = found(params, stacked={path: 1})
        assert roles["encoder/blocks/up/kernel"] == ("kernel", 1, (2,))
        assert roles["head/kernel"] == ("kernel", 0, (2,))
    roles = found(params, stacked={"encoder": 1, "encoder/blocks/up": 0})
    assert roles["encoder/blocks/up/kernel"][1] == 0
    assert {x[1] for x in found(params, stacked=1).values()} == {1}
    assert {x[1] for x in found(scanned(), stacked=0).values()} == {0}


def test_other_overrides():
    params = shapes({"w": (4, 4), "extra": {"table": (9, 4)}})
    assert found(params)["w"] == ("kernel", 0, (1,))
    assert found(params, output="first")["w"] == ("kernel", 0, (0,))
    kinds = {"extra": "embedding"}
    assert found(params, kinds=kinds)["extra/table"] == ("embedding", 0, (1,))
    # What shapes tell is not overruled by what they leave open.
    sure = shapes({"w": (3, 4), "b": (4,)})
    assert found(sure, output="first")["w"] == ("kernel", 0, (1,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stacked": {"decoder": 1}}, "'decoder', where there is no leaf.*encoder/bl"),
        ({"stacked": {"head": 4}}, r"4 leading axes.*head/kernel.*\(3, 8, 2\)"),
        ({"stacked": {"head": True}}, "integers; got True"),
        ({"stacked": -1}, "-1 leading axes"),
        ({"kinds": {"head": "weight"}}, "got 'weight'"),
        ({"kinds": {"nose": "bias"}}, "kinds names 'nose'"),
        ({"output": "middle"}, '"first", "last" or None'),
    ],
)
def test_wrong_overrides(settings, message):
    with pytest.raises(ValueError, match=message):
        optax_sam.roles(shapes(BLOCKS), **settings)


def test_the_table():
    table = optax_sam.roles_table(shapes(BLOCKS | {"norm": {"scale": (3,)}}))
    lines = [re.split(r"  +", x) for x in table.split("\n")]
    assert lines[0] == ["leaf", "shape", "kind", "stacked", "output"]
    assert lines[1] == ["encoder/blocks/up/kernel", "(6, 8, 16)", "kernel", "0?", "2"]
    assert lines[3] == ["norm/scale", "(3,)", "gain", "0"]
    assert "?: a default" in table
    said = functools.partial(optax_sam.roles, stacked=1)
    assert "?" not in optax_sam.roles_table(shapes(BLOCKS), said)


RULES = {
    "asam": lambda roles: optax_sam.asam(roles=roles),
    "sam_on": lambda roles: optax_sam.sam_on(roles=roles),
    "look_layer_sam": lambda roles: optax_sam.look_layer_sam(roles=roles),
    "renyi_sam": lambda roles: optax_sam.renyi_sam(layerwise=True, roles=roles),
    "random_sam": lambda roles: optax_sam.random_sam(roles=roles),
    "amp": lambda roles: optax_sam.amp(roles=roles),
}


@pytest.mark.parametrize("name", RULES)
def test_what_are_no_roles(name):
    w = {"norm": {"scale": jnp.ones((6, 4))}, "fc": {"kernel": jnp.ones((3, 8, 4))}}
    deep = {"norm": Role("gain", 1), "fc": Role("kernel", 4)}
    for given, message in (
        ({"norm": "gain", "fc": "kernel"}, "got 'kernel'"),
        (deep, r"axis 3 of a leaf of shape \(3, 8, 4\) at kernel"),
        ({"norm": Role("gain", 1)}, "roles must be a pytree of optax_sam.Role"),
        (lambda params: 3, "got 3"),
    ):
        tx = RULES[name](given)
        with pytest.raises(ValueError, match=message):
            tx.update(w, tx.init(w), w, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", RULES)
def test_given_roles_are_taken(name):
    """As a pytree, as a prefix of one and as a function."""
    w = {"norm": {"shift": filled(jnp.ones((6, 4)))}, "fc": filled(jnp.ones((3, 8, 4)))}
    like = {"norm": {"scale": w["norm"]["shift"]}, "fc": {"kernel": w["fc"]}}
    kinds = {"norm/scale": "gain"}
    said = {"norm": Role("gain", 1), "fc": Role("kernel", 1, (2,))}
    whole = {"norm": {"shift": said["norm"]}, "fc": said["fc"]}
    reference = functools.partial(optax_sam.roles, stacked=1, kinds=kinds)
    wanted = jax.tree.leaves(offset(RULES[name](reference), like))
    for given in (said, whole, lambda params: whole):
        got = jax.tree.leaves(offset(RULES[name](given), w))
        harness.assert_close(sorted(got, key=jnp.size), sorted(wanted, key=jnp.size), 0)


def test_adapt_and_roles_contradict_each_other():
    for make in (optax_sam.asam, ascent.adaptive):
        with pytest.raises(ValueError, match="adapt says which leaves"):
            make(0.1, adapt=True, roles=optax_sam.roles)


# ASAM by hand, with the leaves that are not adapted written down by name.


def nnx_params():
    _, params, _ = nnx.split(Stacked(nnx.Rngs(0)), nnx.Param, ...)
    return filled(params)


TREES = {
    "linen": (scanned, r"bias$"),
    "nnx": (nnx_params, r"bias/value$"),
    "equinox": (lambda: filled(equinox()), r"bias(_n)?$|negative_slope"),
    "haiku": (
        lambda: filled(
            shapes(
                {
                    "scale": {"w": (3, 4), "b": (4,)},
                    "batch_norm": {"scale": (1, 1, 1, 8), "offset": (1, 1, 1, 8)},
                    "stack": {"w": (5, 4, 4), "b": (5, 4)},
                    "embed": {"embeddings": (9, 4)},
                }
            )
        ),
        r"/b$|offset",
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_asam_by_hand(name, x64):
    make, not_adapted = TREES[name]
    w = make()
    leaves = jax.tree_util.tree_leaves_with_path(w)
    path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    t = [
        1.0 if re.search(not_adapted, path(keys)) else np.abs(x) + 0.1
        for keys, x in leaves
    ]
    g = [gradient(x) for _, x in leaves]
    length = np.sqrt(sum(np.sum((a * b) ** 2) for a, b in zip(t, g, strict=True)))
    wanted = [0.5 * a**2 * b / length for a, b in zip(t, g, strict=True)]
    got = jax.tree.leaves(offset(optax_sam.asam(0.5, eta=0.1), w))
    harness.assert_close(got, wanted, 1e-10)


# The model with separate layers and biases of one axis.


def offset(tx, w, noise=None):
    """Where a method looks last, minus ``w``; the gradient is a function of ``w``."""
    points = []
    grad_fn = lambda p: points.append(p) or jax.tree.map(gradient, p)
    extra = {} if noise is None else {"noise": noise}
    tx.update(jax.tree.map(gradient, w), tx.init(w), w, grad_fn=grad_fn, **extra)
    return jax.tree.map(jnp.subtract, points[-1], w)


def gradient(w):
    """Of each entry by itself, so that it does not matter how they are arranged."""
    return jnp.cos(9 * w) + 0.2 * w


METHODS = {
    "asam": lambda: optax_sam.asam(0.5, eta=0.1),
    "sam_on": lambda: optax_sam.sam_on(0.5, adapt=None, eta=0.1),
    "look_layer_sam": lambda: optax_sam.look_layer_sam(0.3, k=1),
    "renyi_sam": lambda: optax_sam.renyi_sam(0.4, alpha=1.3, layerwise=True),
    "random_sam": lambda: optax_sam.random_sam(0.3, sigma=0.2),
    "amp": lambda: optax_sam.amp(0.1, inner_lr=0.03, inner_iter=3),
}


def check(method, stacked, separate):
    """``separate`` takes a tree like the stacked one to that of plain layers."""
    # Nothing to find in the model to compare with: kernels of two axes, all by name.
    plain = separate(stacked)
    for role in jax.tree.leaves(optax_sam.roles(plain)):
        assert role.stack == 0
        assert role.output == ((1,) if role.kind in ("kernel", "embedding") else ())
    noise = filled(stacked, seed=1)
    got = separate(offset(METHODS[method](), stacked, noise))
    wanted = offset(METHODS[method](), plain, separate(noise))
    harness.assert_close(got, wanted, 1e-10)


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


@pytest.mark.parametrize("method", METHODS)
def test_a_scanned_stack_is_its_layers(method, x64):
    check(method, scanned(), unscanned)


@pytest.mark.parametrize("method", METHODS)
def test_nnx_attention_and_a_stack_are_plain_layers(method, x64):
    _, params, _ = nnx.split(Stacked(nnx.Rngs(0)), nnx.Param, ...)
    params = filled(nnx.to_pure_dict(params))

    def separate(tree):
        rest = {x: tree[x] for x in ("lora", "embed", "norm")}
        attention = plain_attention(tree["attention"])
        return rest | {"attention": attention, "layers": layers(tree["layers"], 3)}

    check(method, params, separate)


@pytest.mark.parametrize("method", METHODS)
def test_haiku_with_batch_norm_and_a_stack_is_plain_layers(method, x64):
    tree = shapes(
        {
            "batch_norm": {"scale": (1, 1, 1, 8), "offset": (1, 1, 1, 8)},
            "conv": {"w": (2, 2, 3, 8), "b": (8,)},
            "first": {"w": (2, 2, 3, 8), "b": (8, 1, 1)},
            "stack/bn": {"scale": (5, 1, 1, 1, 4), "offset": (5, 1, 1, 1, 4)},
            "stack/linear": {"w": (5, 4, 4), "b": (5, 4)},
            "embed": {"embeddings": (9, 4)},
        }
    )

    def separate(tree):
        one_axis = lambda x: x.reshape(-1)
        matrix = lambda x: x.reshape(-1, x.shape[-1])
        conv = lambda layer: {"w": matrix(layer["w"]), "b": one_axis(layer["b"])}
        norm = lambda layer: jax.tree.map(one_axis, layer)
        return {
            "batch_norm": norm(tree["batch_norm"]),
            "conv": conv(tree["conv"]),
            "first": conv(tree["first"]),
            "bn": [norm(x) for x in layers(tree["stack/bn"], 5)],
            "linear": layers(tree["stack/linear"], 5),
            "embed": tree["embed"],
        }

    check(method, filled(tree), separate)


@pytest.mark.parametrize("method", METHODS)
def test_equinox_is_plain_layers_the_other_way_around(method, x64):
    """Kernels come out first; in the plain model they come last."""
    params = filled(equinox())
    flip = lambda w: w.reshape(len(w), -1).T
    one_axis = lambda x: x.reshape(-1)
    linear = lambda layer: {"kernel": flip(layer.weight), "bias": one_axis(layer.bias)}
    norm = lambda layer: {"scale": one_axis(layer.weight), "bias": one_axis(layer.bias)}

    def separate(m):
        return {
            "a": {"embedding": m.a.weight},
            "b": linear(m.b),
            "c": linear(m.c),
            "d": norm(m.d),
            "e": norm(m.e),
            "f": {"kernel": flip(m.f.weight_ih), "bias": m.f.bias},
            "f2": {"kernel": flip(m.f.weight_hh)},
            "f3": {"bias": m.f.bias_n},
            "g": linear(m.g),
            "h": [linear(x) for x in layers(m.h[0], 6)],
            "h1": norm(m.h[1]),
            "i": {"slope": m.i.negative_slope.reshape(1)},
        }

    check(method, params, separate)


@pytest.mark.parametrize("method", METHODS)
def test_an_ensemble_is_its_networks(method, x64):
    one = {
        "scale": {"kernel": (3, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "weight": {"kernel": (4, 2), "bias": (2,)},
    }
    many = jax.tree.map(lambda s: (7, *s), one, is_leaf=lambda x: isinstance(x, tuple))
    check(method, filled(shapes(many)), lambda tree: layers(tree, 7))


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_that_was_said(method, x64):
    """Kernels without biases and norms, where only an argument can tell."""
    tree = filled(
        shapes({"up": {"kernel": (6, 4, 8)}, "norm": {"scale": (4,)}, "w": (4, 2)})
    )
    separate = lambda tree: tree | {"up": layers(tree["up"], 6)}
    factory = METHODS[method]
    keywords = {"roles": functools.partial(optax_sam.roles, stacked={"up": 1})}
    make = getattr(optax_sam, method)
    settings = {
        "asam": {"rho": 0.5, "eta": 0.1},
        "sam_on": {"rho": 0.5, "adapt": None, "eta": 0.1},
        "look_layer_sam": {"rho": 0.3, "k": 1},
        "renyi_sam": {"rho": 0.4, "alpha": 1.3, "layerwise": True},
        "random_sam": {"rho": 0.3, "sigma": 0.2},
        "amp": {"epsilon": 0.1, "inner_lr": 0.03, "inner_iter": 3},
    }[method]
    noise = filled(tree, seed=1)
    got = offset(make(**settings, **keywords), tree, noise)
    wanted = offset(factory(), separate(tree), separate(noise))
    harness.assert_close(separate(got), wanted, 1e-10)
    if method not in ("asam", "sam_on"):
        apart = offset(factory(), tree, noise)["up"]["kernel"]
        assert not np.allclose(apart, got["up"]["kernel"], rtol=1e-3)


def test_global_projection_of_amp_knows_no_layers(x64):
    params = scanned()
    make = lambda: optax_sam.amp(0.1, inner_iter=2, projection="global")
    got = unscanned(offset(make(), params))
    harness.assert_close(got, offset(make(), unscanned(params)), 1e-10)


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
    params = filled(shapes({"fc": dense(3, 4, 5)}))
    d = sharpness.filter_normalized_direction(0, params, filter_axis=1)
    lengths = lambda x: np.linalg.norm(x["fc"]["kernel"], axis=2)
    np.testing.assert_allclose(lengths(d), lengths(params), rtol=1e-8)


def test_renyi_entropy_of_a_stack_is_that_of_its_layers(x64):
    """Small enough that each spectrum is found exactly, whatever the key."""
    rng = np.random.default_rng(0)
    w = {"stack": {"kernel": (3, 2, 2), "bias": (3, 2)}, "head": {"kernel": (2, 2)}}
    w = jax.tree.map(lambda x: 0.7 * x, filled(shapes(w)))
    batches = jnp.asarray(rng.normal(size=(1, 6, 2)))

    def loss_fn(w, x):
        for layer in (
            layers(w["stack"], 3) if isinstance(w["stack"], dict) else w["stack"]
        ):
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((x @ w["head"]["kernel"] - 0.5) ** 2)

    settings = {
        "layerwise": True,
        "alpha": (0.5, 2.0),
        "num_eigs": 4,
        "num_top_matvecs": 4,
        "num_lanczos": 4,
        "num_probes": 4,
    }
    plain = w | {"stack": layers(w["stack"], 3)}
    got = sharpness.renyi_entropy(loss_fn, w, batches, 0, **settings)
    wanted = sharpness.renyi_entropy(loss_fn, plain, batches, 0, **settings)
    assert got["stack"]["bias"] is None
    assert got["stack"]["kernel"].value.shape == (3, 2)
    for i in range(3):
        np.testing.assert_allclose(
            got["stack"]["kernel"].value[i],
            wanted["stack"][i]["kernel"].value,
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        got["head"]["kernel"].value, wanted["head"]["kernel"].value, rtol=1e-6
    )


def test_renyi_entropy_of_a_stack_on_two_devices():
    w = filled(shapes({"stack": {"kernel": (2, 2, 2), "bias": (2, 2)}}))
    batches = filled(jnp.ones((2, 6, 2)))

    def loss_fn(w, x):
        for layer in layers(w["stack"], 2):
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((x - 0.5) ** 2)

    sizes = {"num_eigs": 4, "num_top_matvecs": 4, "num_lanczos": 4, "num_probes": 4}
    measure = functools.partial(
        sharpness.renyi_entropy, loss_fn, layerwise=True, alpha=2.0, **sizes
    )
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda w, x: measure(w, x, 0, axis_name="d"),
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    got, wanted = (
        f(w, batches)["stack"]["kernel"].value
        for f in (spread, lambda w, x: measure(w, x, 0))
    )
    assert got.shape == (2, 1)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_the_page_prints_what_is_found(capsys):
    block, _ = [x for x in harness.code("own_method.md") if "roles_table" in x]
    exec(block, {})
    assert f"```text\n{capsys.readouterr().out}```" in harness.page("own_method.md")
