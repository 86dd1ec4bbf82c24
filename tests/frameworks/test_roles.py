"""Which roles leaves have: found by names, shapes and neighbours, or said."""

import functools
import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from role_models import Stacked, equinox, scanned

import optax_sam


class Leaf(NamedTuple):
    """A shape, and the role that is to be found for it."""

    shape: tuple
    kind: str
    stack: int
    output: tuple


def of_kind(kind):
    """Leaves of a kind; of several axes the last counts the units, unless said."""

    def make(*shape, stack=0, out=None):
        units = (len(shape) - 1,) * (len(shape) - stack > 1)
        units = units if kind in ("kernel", "embedding") else ()
        return Leaf(shape, kind, stack, units if out is None else out)

    return make


kernel, bias, gain, offset, other = map(
    of_kind, ("kernel", "bias", "gain", "offset", "other")
)
table = of_kind("embedding")
is_leaf = lambda x: isinstance(x, Leaf)


def shapes(tree):
    """Leaves of these shapes, without numbers."""
    number = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.tree.map(number, tree, is_leaf=is_leaf)


def by_path(tree, is_leaf=None):
    """The kinds, the stacked axes and the output axes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    of_array = jax.tree_util.GetAttrKey("value")  # in NNX
    return {
        path(keys[:-1] if keys[-1] == of_array else keys): (
            *(role.kind, role.stack, role.output),
        )
        for keys, role in leaves
    }


def found(params, **settings):
    return by_path(optax_sam.roles(params, **settings))


# What is found.


NAMED = {
    "a bias in a module called scale": {
        "scale": {"kernel": kernel(3, 4), "bias": bias(4)},
        "weight": {"kernel": kernel(3, 4), "bias": bias(4)},
        "bias": {"kernel": kernel(3, 4), "bias": bias(4)},
    },
    "the same, stacked": {
        "scale": {"kernel": kernel(6, 3, 4, stack=1), "bias": bias(6, 4, stack=1)},
    },
    "Haiku": {
        "net/~/batch_norm": {"scale": gain(1, 1, 1, 8), "offset": offset(1, 1, 1, 8)},
        "net/~/layer_norm": {"scale": gain(8), "offset": offset(8)},
        "net/~/conv": {"w": kernel(3, 3, 4, 8), "b": bias(8)},
        "net/~/channels_first": {"w": kernel(3, 3, 4, 8), "b": bias(8, 1, 1)},
        "net/~/embed": {"embeddings": table(9, 8)},
        "net/~/gru": {"w_i": kernel(4, 24), "w_h": kernel(8, 24), "b": bias(24)},
    },
    "Haiku, stacked": {
        "stack/bn": {
            "scale": gain(5, 1, 1, 1, 8, stack=1),
            "offset": offset(5, 1, 1, 1, 8, stack=1),
        },
        "stack/conv": {"w": kernel(5, 3, 3, 4, 8, stack=1), "b": bias(5, 8, stack=1)},
    },
    "PyTorch's names in a flat dict": {
        "conv.weight": kernel(8, 3, 3, 3, out=(0,)), "conv.bias": bias(8),
        "bn.weight": gain(8), "bn.bias": offset(8),
        "fc.weight": kernel(8, 8, out=(0,)), "fc.bias": bias(8), "ln.weight": gain(8),
        "wte.weight": table(9, 8),
    },
    "numbers and prefixes": {
        "W1": kernel(3, 4), "b1": bias(4), "W2": kernel(4, 2), "b2": bias(2),
        "ln1_scale": gain(4), "ln1_bias": offset(4),
    },
    "an ensemble": {
        "W1": kernel(6, 3, 4, stack=1), "b1": bias(6, 4, stack=1),
        "W2": kernel(6, 4, 1, stack=1), "b2": bias(6, 1, stack=1),
        "tau": other(6, stack=1),
    },
    "tuples": [
        (kernel(4, 5), bias(5)), None, (kernel(3, 3, 5, 8), bias(1, 1, 1, 8)),
        (other(8), other(8)),
    ],
    "tuples of dot(w, x)": [
        (kernel(7, 5, out=(0,)), bias(7)), (kernel(7, 7, out=(0,)), bias(7)),
    ],
    "tuples, stacked": [
        (kernel(6, 4, 5, stack=1), bias(6, 5, stack=1)),
        (kernel(6, 5, 1, stack=1), bias(6, 1, stack=1)),
    ],
    "two stacks in one": {
        "ln": {"scale": gain(2, 3, 8, stack=2), "bias": offset(2, 3, 8, stack=2)},
        "fc": {"kernel": kernel(2, 3, 8, 8, stack=2), "bias": bias(2, 3, 8, stack=2)},
    },
    "kernels without biases in a stack": {
        "block": {
            "ln": {"scale": gain(6, 8, stack=1)},
            "up": {"kernel": kernel(6, 8, 16, stack=1)},
        },
        "head": {"kernel": kernel(8, 2)},
    },
    "a head that shares the length of a stack by chance": {
        "block": {"scale": gain(3, 8, stack=1), "bias": offset(3, 8, stack=1)},
        "head": {"kernel": kernel(3, 5)},
    },
    "attention without biases": {
        "query": {"kernel": kernel(6, 8, 2, 4, stack=1, out=(2, 3))},
        "key": {"kernel": kernel(6, 8, 2, 4, stack=1, out=(2, 3))},
        "value": {"kernel": kernel(6, 8, 2, 4, stack=1, out=(2, 3))},
        "out": {"kernel": kernel(6, 2, 4, 8, stack=1)},
    },
    "heads as many as features": {
        "query": {"kernel": kernel(4, 4, 1, out=(1, 2)), "bias": bias(4, 1)},
        "key": {"kernel": kernel(4, 4, 1, out=(1, 2)), "bias": bias(4, 1)},
        "value": {"kernel": kernel(4, 4, 1, out=(1, 2)), "bias": bias(4, 1)},
        "out": {"kernel": kernel(4, 1, 4), "bias": bias(4)},
    },
    "a bias by its size, and a factor that is none": {
        "w": kernel(8, 6), "b": bias(2, 3),
        "low": {"w": kernel(8, 6), "a": kernel(8, 2), "b": kernel(2, 6)},
    },
    "LoRA": {
        "a": {
            "kernel": kernel(8, 2, 4), "lora_a": kernel(8, 2),
            "lora_b": kernel(2, 2, 4, out=(1, 2)),
        },
        "b": {"lora_a": kernel(6, 8, 2, stack=1), "lora_b": kernel(6, 2, 8, stack=1)},
    },
    "what no name tells": {
        "matrix": kernel(3, 4), "vector": other(3), "cls": table(1, 1, 8),
        "pos_embedding": table(1, 5, 8), "logit_scale": other(), "gain": other(),
        "gamma": other(8), "regression": {"kernel": kernel(4), "bias": bias()},
        "odd": {"kernel": kernel(3, 4), "scale": other(4), "bias": bias(4)},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_names_and_structure_tell(name):
    assert found(shapes(NAMED[name])) == by_path(NAMED[name], is_leaf)


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


def test_nnx_in_all_its_forms():
    model = Stacked(nnx.Rngs(0))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    wanted = {
        "layers/ln/scale": ("gain", 1, ()), "layers/ln/bias": ("offset", 1, ()),
        "layers/weight/kernel": ("kernel", 1, (2,)),
        "layers/weight/bias": ("bias", 1, ()),
        "layers/free/kernel": ("kernel", 1, (2,)),
        "attention/query/kernel": ("kernel", 0, (1, 2)),
        "attention/query/bias": ("bias", 0, ()),
        "attention/out/kernel": ("kernel", 0, (2,)),
        "attention/out/bias": ("bias", 0, ()), "lora/kernel": ("kernel", 0, (1,)),
        "embed/embedding": ("embedding", 0, (1,)), "norm/scale": ("gain", 0, ()),
        "norm/bias": ("offset", 0, ()),
    }  # fmt: skip
    trees = [params, nnx.to_pure_dict(params), jax.eval_shape(lambda: params)]
    for tree in trees:
        assert found(tree).items() >= wanted.items()
    whole = nnx.state(model, nnx.Any(nnx.Param, nnx.LoRAParam))
    for tree in (whole, model):
        roles = found(tree)
        assert roles.items() >= wanted.items()
        assert roles["lora/lora/lora_a"] == ("kernel", 0, (1,))
        assert roles["lora/lora/lora_b"] == ("kernel", 0, (1,))


def test_equinox():
    assert found(equinox()) == {
        "a/weight": ("embedding", 0, (1,)), "b/weight": ("kernel", 0, (0,)),
        "b/bias": ("bias", 0, ()), "c/weight": ("kernel", 0, (0,)),
        "c/bias": ("bias", 0, ()), "d/weight": ("gain", 0, ()),
        "d/bias": ("offset", 0, ()), "e/weight": ("gain", 0, ()),
        "e/bias": ("offset", 0, ()), "f/weight_ih": ("kernel", 0, (0,)),
        "f/weight_hh": ("kernel", 0, (0,)), "f/bias": ("bias", 0, ()),
        "f/bias_n": ("bias", 0, ()), "g/weight": ("kernel", 0, (0,)),
        "g/bias": ("bias", 0, ()), "h/0/weight": ("kernel", 1, (1,)),
        "h/0/bias": ("bias", 1, ()), "h/1/weight": ("gain", 0, ()),
        "h/1/bias": ("offset", 0, ()), "i/negative_slope": ("other", 0, ()),
    }  # fmt: skip
    with_functions = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    assert found(with_functions)["layers/0/weight"] == ("kernel", 0, (0,))


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
    "encoder": {"blocks": {"up": {"kernel": kernel(6, 8, 16)}}},
    "head": {"kernel": kernel(3, 8, 2)},
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
    params = shapes({"w": kernel(4, 4), "extra": {"table": kernel(9, 4)}})
    assert found(params)["w"] == ("kernel", 0, (1,))
    assert found(params, output="first")["w"] == ("kernel", 0, (0,))
    kinds = {"extra": "embedding"}
    assert found(params, kinds=kinds)["extra/table"] == ("embedding", 0, (1,))
    # What shapes tell is not overruled by what they leave open.
    sure = shapes({"w": kernel(3, 4), "b": bias(4)})
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
    table = optax_sam.roles_table(shapes(BLOCKS | {"norm": {"scale": gain(3)}}))
    lines = [re.split(r"  +", x) for x in table.split("\n")]
    assert lines[0] == ["leaf", "shape", "kind", "stacked", "output"]
    assert lines[1] == ["encoder/blocks/up/kernel", "(6, 8, 16)", "kernel", "0?", "2"]
    assert lines[3] == ["norm/scale", "(3,)", "gain", "0"]
    assert "?: a default" in table
    said = functools.partial(optax_sam.roles, stacked=1)
    assert "?" not in optax_sam.roles_table(shapes(BLOCKS), said)


def test_the_page_prints_what_is_found(capsys):
    block, _ = [x for x in harness.code("own_method.md") if "roles_table" in x]
    exec(block, {})
    assert f"```text\n{capsys.readouterr().out}```" in harness.page("own_method.md")
