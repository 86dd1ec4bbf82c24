"""``value_and_grad``: one loss, both gradients, and means over mapped axes."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
import optax_sam.linen
import optax_sam.nnx

DEVICES, REPLICATED = 8, P()
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
X = RNG.normal(size=(DEVICES * 4, 3))
Y = RNG.normal(size=(DEVICES * 4, 2))


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


def moved(params):
    return jax.tree.map(lambda w: w + 0.3, params)


# Where a step is compiled for several devices, each with four rows.


def by_shard_map(check_vma, step, replicated, rows, out=REPLICATED):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), *(P("data") for _ in rows)),
        out_specs=out,
        check_vma=check_vma,
    )
    return jax.jit(mapped)(replicated, *rows)


def by_pmap(step, replicated, rows, out=REPLICATED):
    shards = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in rows]
    axes = (None, *(0 for _ in rows))
    found = jax.pmap(step, axis_name="data", in_axes=axes)(replicated, *shards)
    found = jax.device_get(found)

    def of_spec(spec, tree):
        if spec == P("data"):
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
        for x in jax.tree.leaves(tree):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        return jax.tree.map(lambda x: x[0], tree)

    is_spec = lambda x: isinstance(x, P)
    return jax.tree.map(of_spec, out, found, is_leaf=is_spec)


def by_vmap(step, replicated, rows, out=REPLICATED):
    shards = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in rows]
    axes = (None, *(0 for _ in rows))
    found = jax.jit(jax.vmap(step, axes, axis_name="data"))(replicated, *shards)
    whole = lambda x: x.reshape(-1, *x.shape[2:])
    of_spec = lambda spec, tree: jax.tree.map(
        whole if spec == P("data") else lambda x: x[0], tree
    )
    return jax.tree.map(of_spec, out, found, is_leaf=lambda x: isinstance(x, P))


MAPS = {
    "shard_map": functools.partial(by_shard_map, True),
    "shard_map without check_vma": functools.partial(by_shard_map, False),
    "pmap": by_pmap,
    "vmap": by_vmap,
}
on_each_map = pytest.mark.parametrize("mapped", MAPS.values(), ids=MAPS)


def test_it_is_jax_value_and_grad_and_the_gradient_elsewhere():
    value, grads, grad_fn = optax_sam.value_and_grad(loss_fn)(PARAMS, X, y=Y)
    wanted = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    harness.assert_equal((value, grads), wanted)
    harness.assert_equal(grad_fn(moved(PARAMS)), jax.grad(loss_fn)(moved(PARAMS), X, Y))


def test_the_perturbed_pass_has_the_key_and_drops_aux():
    seen = []

    def loss_fn(w, key, *, rate):
        seen.append(rate)
        mask = jax.random.bernoulli(key, rate, w.shape)
        return jnp.sum(mask * w**2), {"mask": mask}

    key = jax.random.key(1)
    both = optax_sam.value_and_grad(loss_fn, True)
    (loss, aux), grads, grad_fn = both(jnp.ones(32), key, rate=0.5)
    assert loss == aux["mask"].sum() == grads.sum() / 2
    np.testing.assert_array_equal(grad_fn(2 * jnp.ones(32)), 2 * grads)
    assert set(seen) == {0.5}


def test_linen_has_the_same_function():
    assert optax_sam.linen.value_and_grad is optax_sam.value_and_grad


def averages_itself(params, x, y):
    return jax.lax.pmean(loss_fn(params, x, y), "data")


@on_each_map
@pytest.mark.parametrize("loss", [loss_fn, averages_itself])
def test_means_over_devices_are_those_of_all_rows(mapped, loss, x64):
    def step(params, x, y):
        both = optax_sam.value_and_grad(loss, axis_name="data")
        value, grads, grad_fn = both(params, x, y)
        return value, grads, grad_fn(moved(params))

    value, grads, perturbed = mapped(step, PARAMS, (X, Y))
    wanted, at_w = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    harness.assert_close((value, grads), (wanted, at_w), 1e-12)
    elsewhere = jax.grad(loss_fn)(moved(PARAMS), X, Y)
    harness.assert_close(perturbed, elsewhere, 1e-12)


@on_each_map
@pytest.mark.parametrize(
    "method", [optax_sam.sam(0.3), optax_sam.vsam(0.3, window=4, num_slices=2, key=1)]
)
def test_a_training_run_is_that_of_one_device(mapped, method, x64):
    tx = optax.chain(method, optax.sgd(0.1, momentum=0.9))

    def run(params, x, y, axis_name="data"):
        def body(carry, _):
            params, opt_state = carry
            both = optax_sam.value_and_grad(loss_fn, axis_name=axis_name)
            loss, grads, grad_fn = both(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(body, (params, tx.init(params)), length=20)

    found = mapped(run, PARAMS, (X, Y))
    wanted = jax.jit(functools.partial(run, axis_name=None))(PARAMS, X, Y)
    harness.assert_close(found, wanted, 1e-9)
    assert optax_sam.metrics(wanted[0][1])["ascents"] > 8


def test_two_axes_and_one_of_two():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def step(names, params, x, y):
        return optax_sam.value_and_grad(loss_fn, axis_name=names)(params, x, y)[:2]

    for names, rows in ((("a", "b"), P(("a", "b"))), ("b", P("b"))):
        for check_vma in (True, False):
            found = jax.jit(
                jax.shard_map(
                    functools.partial(step, names),
                    mesh=mesh,
                    in_specs=(P(), rows, rows),
                    out_specs=P(),
                    check_vma=check_vma,
                )
            )(PARAMS, X, Y)
            wanted = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
            harness.assert_close(found, wanted, 1e-5)


# Aux.


class Net(nn.Module):
    """As many features as a device has examples."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(2)(x)


NET = Net()


@functools.cache
def variables():
    return jax.jit(NET.init)(jax.random.key(0), X)


def on_shards(function):
    """The mean of a function over the devices' rows."""
    shards = zip(np.split(X, DEVICES), np.split(Y, DEVICES), strict=True)
    found = [function(x, y) for x, y in shards]
    return jax.tree.map(lambda *leaves: sum(leaves) / DEVICES, *found)


def applied(params, model_state, x, y):
    logits, model_state = NET.apply(
        {"params": params, **model_state}, x, mutable=["batch_stats"]
    )
    return jnp.mean((logits - y) ** 2), (model_state, logits)


@on_each_map
@pytest.mark.parametrize("taken", ["as arguments", "from outside"])
def test_statistics_are_averaged_and_logits_are_not(mapped, taken):
    """The loss of many programs: all in a closure, logits beside the new state."""
    params, model_state = variables()["params"], {**variables()}
    model_state.pop("params")

    def step(held, x, y):
        params, model_state = held
        if taken == "as arguments":
            both = optax_sam.value_and_grad(applied, True, axis_name="data")
            value, _, _ = both(params, model_state, x, y)
        else:
            loss = lambda params: applied(params, model_state, x, y)
            both = optax_sam.value_and_grad(loss, True, axis_name="data")
            value, _, _ = both(params)
        loss, (model_state, logits) = value
        return (loss, model_state), logits

    out = (P(), P("data"))
    found, logits = mapped(step, (params, model_state), (X, Y), out)

    @jax.jit
    def one(x, y):
        loss, (after, logits) = applied(params, model_state, x, y)
        return loss, after

    harness.assert_close(found, on_shards(one), 1e-5)
    rows = [applied(params, model_state, x, y)[1][1] for x, y in shards_of()]
    np.testing.assert_allclose(logits, np.concatenate(rows), rtol=1e-4, atol=1e-5)


def shards_of():
    return zip(np.split(X, DEVICES), np.split(Y, DEVICES), strict=True)


class Extra(NamedTuple):
    average: Any
    rows: Any
    tokens: Any
    count: Any
    constant: Any


@on_each_map
def test_what_is_averaged_of_aux(mapped):
    """Floats but for rows of examples; also of a batch of tokens as one long axis."""
    tokens = np.arange(DEVICES * 4 * 5, dtype=np.int32).reshape(-1, 5)

    def loss_fn(params, batch):
        x, tokens = batch["x"], batch["tokens"]
        extra = Extra(
            average=x.mean(0),
            rows=x.sum(-1),
            tokens=tokens.reshape(-1) * 1.0,
            count=jnp.zeros((), jnp.int32) + 3,
            constant=None,
        )
        return jnp.mean(x @ params["w"]), extra

    def step(params, x, tokens):
        both = optax_sam.value_and_grad(loss_fn, True, axis_name="data")
        (_, aux), *_ = both(params, {"x": x, "tokens": tokens})
        return aux

    out = Extra(P(), P("data"), P("data"), P(), P())
    found = mapped(step, PARAMS, (X, tokens), out)
    np.testing.assert_allclose(found.average, X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.rows, X.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, tokens.reshape(-1))
    assert (found.count, found.count.dtype, found.constant) == (3, np.int32, None)


@on_each_map
def test_names_of_an_argument_are_state(mapped):
    """As in Haiku: named as what was given, even where it is as long as a batch."""
    state = {"norm/mean_ema": {"average": jnp.zeros(4), "counter": jnp.zeros((), int)}}

    def loss_fn(params, state, x):
        old, rows = state["norm/mean_ema"], x @ jnp.ones(3, x.dtype)
        new = {"average": rows, "counter": old["counter"] + 1}
        return jnp.mean(x @ params["w"]), ({"norm/mean_ema": new}, {"of": {"x": rows}})

    def step(held, x):
        params, state = held
        both = optax_sam.value_and_grad(loss_fn, True, axis_name="data")
        return both(params, state, x)[0][1]

    out = P(), P("data")
    state, rows = mapped(step, (PARAMS, state), (X,), out)
    expected = X.sum(-1).reshape(DEVICES, 4)
    found = state["norm/mean_ema"]
    np.testing.assert_allclose(found["average"], expected.mean(0), rtol=1e-4)
    np.testing.assert_allclose(rows["of"]["x"], expected.ravel(), rtol=1e-4)
    assert (found["counter"], found["counter"].dtype) == (1, np.int32)


@jax.tree_util.register_pytree_node_class
class Statistics:
    """Without names of its leaves, as ``eqx.nn.State``."""

    def __init__(self, mean):
        self.mean = mean

    def tree_flatten(self):
        return (self.mean,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_objects_of_an_argument_are_state(x64):
    """Even where they are as long as a batch."""
    state = Statistics(jnp.zeros(4))

    def loss_fn(params, state, x, y):
        new = Statistics(x @ jnp.ones(3))
        return jnp.mean(x @ params["w"]), (new, y)

    def step(held, x, y):
        params, state = held
        both = optax_sam.value_and_grad(loss_fn, True, axis_name="data")
        (_, (state, y)), *_ = both(params, state, x, y)
        return state.mean, y

    for mapped in MAPS.values():
        mean, y = mapped(step, (PARAMS, state), (X, Y), (P(), P("data")))
        expected = X.sum(-1).reshape(DEVICES, 4).mean(0)
        np.testing.assert_allclose(mean, expected, rtol=1e-6)
        np.testing.assert_array_equal(y, Y)


# NNX.


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.outer = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.norm(self.inner(x)))


def module_loss(model, x, *, y, training=True):
    assert training is True
    return jnp.mean((model(x) - y) ** 2), model(x)[:1]


@on_each_map
def test_nnx_averages_gradients_and_statistics(mapped, x64):
    graphdef, state = nnx.split(Module())
    state = jax.tree.map(lambda x: x.astype(float), state)

    def step(state, x, y, axis_name="data"):
        model = nnx.merge(graphdef, state)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        both = optax_sam.nnx.value_and_grad(module_loss, True, axis_name=axis_name)
        (loss, _), grads, grad_fn = both(model, x, y=y, training=True)
        others = nnx.state(model, nnx.BatchStat)
        elsewhere = grad_fn(nnx.State(moved(params)))
        found = grads, elsewhere, others, nnx.state(model, nnx.Param)
        return tuple(map(nnx.to_pure_dict, found)), loss

    found = mapped(step, state, (X, Y))
    alone = jax.jit(functools.partial(step, axis_name=None))
    wanted = on_shards(functools.partial(alone, state))
    # Absolute: the gradient of a bias before BatchNorm is zero but for rounding.
    harness.assert_close(found, wanted, 1e-10, atol=1e-14)


def test_nnx_pmap_smoke():
    model = Module()
    tx = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.pmap(axis_name="data", in_axes=(None, None, 0, 0), out_axes=0)
    def step(model, optimizer, x, y):
        both = optax_sam.nnx.value_and_grad(module_loss, True, axis_name="data")
        (loss, _), grads, grad_fn = both(model, x, y=y)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return loss

    shards = [x.reshape(DEVICES, 4, -1).astype(np.float32) for x in (X, Y)]
    first = step(model, optimizer, *shards)
    for _ in range(30):
        last = step(model, optimizer, *shards)
    assert np.all(first == first[0])
    assert last[0] < first[0]
    assert optax_sam.metrics(optimizer.opt_state)["ascents"] == 31


# What is refused.


def test_parameters_that_vary_are_refused():
    def step(give, params, x, y):
        both = optax_sam.value_and_grad(loss_fn, axis_name="data")
        return give(both, params, x, y)

    def cast(both, params, x, y):
        return both(jax.lax.pcast(params, "data", to="varying"), x, y)[1]

    def in_grad_fn(both, params, x, y):
        return both(params, x, y)[2](jax.lax.pcast(params, "data", to="varying"))

    for give in (cast, in_grad_fn):
        with pytest.raises(
            ValueError, match=r"parameter at \['b'\] varies.*not to both"
        ):
            by_shard_map(True, functools.partial(step, give), PARAMS, (X, Y))


def test_parts_of_parameters_are_averaged_as_advised(x64):
    """FSDP by hand, with the mean in the loss and no ``axis_name``."""
    whole = {"w": RNG.normal(size=(DEVICES, 3)), "b": RNG.normal(size=3)}

    def loss_fn(params, x):
        w = jax.lax.all_gather(params["w"], "data", tiled=True)
        return jax.lax.pmean(jnp.mean(jnp.tanh(w @ x.T)), "data")

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda w, x: optax_sam.value_and_grad(loss_fn)({"w": w}, x)[1]["w"],
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    grads = jax.jit(mapped)(whole["w"], X)
    on_one = jax.grad(lambda w: jnp.mean(jnp.tanh(w @ X.T)))(whole["w"])
    np.testing.assert_allclose(grads, on_one, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(loss_fn, axis_name="data")(PARAMS, X, Y), "no axis 'data'.*pmap"),
        (lambda f: f(3.0), "takes the loss function"),
        (lambda f: f(loss_fn, loss_scale=0.0), r"loss_scale must be .* in \(0.0, inf"),
        (lambda f: f(loss_fn, loss_scale=-8), "loss_scale must be"),
        (lambda f: f(loss_fn, loss_scale="dynamic"), "number > 0.*DynamicScale"),
        (lambda f: f(loss_fn, loss_scale=jnp.ones(2)), "number > 0.*DynamicScale"),
        (lambda f: f(loss_fn, loss_scale=True), "number > 0.*DynamicScale"),
        (lambda f: f(lambda w: w)(jnp.ones(3)), r"shape \(3,\).*jnp.mean"),
        (lambda f: f(lambda w: w[0])({0: jnp.ones((), int)}), r"at \[0\] is int32"),
        (lambda f: f(lambda w: 1.0)({"a": {"f": jnp.tanh}}), r"\['f'\] is a .*Equinox"),
        (lambda f: f(lambda w: 1.0)({"k": jax.random.key(0)}), r"\['k'\] is key<"),
        (lambda f: f(lambda w: (w, {}))(1.0), r"return \(loss, aux\).*has_aux=True"),
        (lambda f: f(lambda w: w, True)(1.0), r"must return a pair, \(loss, aux\)"),
    ],
)
def test_it_says_what_to_write(call, message):
    with pytest.raises(ValueError, match=message):
        call(optax_sam.value_and_grad)
