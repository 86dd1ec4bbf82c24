"""``value_and_grad``: one loss, both gradients, and means over mapped axes."""

import functools
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import over_devices
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
import optax_sam.linen

DEVICES = over_devices.DEVICES
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
X = RNG.normal(size=(DEVICES * 4, 3))
Y = RNG.normal(size=(DEVICES * 4, 2))
on_each_kind = pytest.mark.parametrize("kind", over_devices.KINDS)


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


def moved(params):
    return jax.tree.map(lambda w: w + 0.3, params)


def test_it_is_jax_value_and_grad_and_the_gradient_elsewhere():
    value, grads, grad_fn = optax_sam.value_and_grad(loss_fn)(PARAMS, X, y=Y)
    wanted = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    harness.assert_equal((value, grads), wanted)
    harness.assert_equal(grad_fn(moved(PARAMS)), jax.grad(loss_fn)(moved(PARAMS), X, Y))
    assert optax_sam.linen.value_and_grad is optax_sam.value_and_grad


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


# On several devices, each with four rows.


def averages_itself(params, x, y):
    return jax.lax.pmean(loss_fn(params, x, y), "data")


@on_each_kind
def test_means_over_devices_are_those_of_all_rows(kind, x64):
    def step(params, x, y):
        found = []
        for loss in (loss_fn, averages_itself):
            both = optax_sam.value_and_grad(loss, axis_name="data")
            value, grads, grad_fn = both(params, x, y)
            found.append((value, grads, grad_fn(moved(params))))
        return found

    value, grads = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    wanted = value, grads, jax.grad(loss_fn)(moved(PARAMS), X, Y)
    found = over_devices.run(kind, step, PARAMS, (X, Y))
    harness.assert_close(found, [wanted, wanted], 1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_two_axes_and_one_of_two(check_vma):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def step(names, params, x, y):
        return optax_sam.value_and_grad(loss_fn, axis_name=names)(params, x, y)[:2]

    wanted = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    for names, rows in ((("a", "b"), P(("a", "b"))), ("b", P("b"))):
        mapped = jax.shard_map(
            functools.partial(step, names),
            mesh=mesh,
            in_specs=(P(), rows, rows),
            out_specs=P(),
            check_vma=check_vma,
        )
        harness.assert_close(jax.jit(mapped)(PARAMS, X, Y), wanted, 1e-5)


# Aux: floats are averaged, but for rows of examples.


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


@on_each_kind
def test_what_is_averaged_of_aux(kind, x64):
    """Statistics are, even where they are as long as the rows of a device.

    They are told by the name of Flax's collection, by names that an argument has, as in
    Haiku, or by its type. A batch of tokens has rows as one long axis too. Arrays that
    the loss takes from outside are inputs as well.
    """
    state = {"norm/mean_ema": {"average": jnp.zeros(4), "counter": jnp.zeros((), int)}}
    tokens = np.arange(DEVICES * 4 * 5, dtype=np.int32).reshape(-1, 5)

    def loss_fn(params, state, objects, batch):
        x, tokens = batch["x"], batch["tokens"]
        extra = {
            "average": x.mean(0),
            "rows": x.sum(-1),
            "words": tokens.reshape(-1) * 1.0,
            "count": jnp.zeros((), jnp.int32) + 3,
        }
        sums, old = x @ jnp.ones(3), state["norm/mean_ema"]
        new = {"norm/mean_ema": {"average": sums, "counter": old["counter"] + 1}}
        known = {"batch_stats": {"mean": sums}}, {"of": {"x": sums}}, extra
        return jnp.mean(x @ params["w"]), (new, Statistics(objects.mean + sums), known)

    def step(held, x, tokens):
        params, *held = held
        args = *held, {"x": x, "tokens": tokens}
        both = functools.partial(optax_sam.value_and_grad, axis_name="data")
        (_, (new, objects, known)), *_ = both(loss_fn, True)(params, *args)
        closure = lambda params: loss_fn(params, *args)
        (_, (*_, outside)), *_ = both(closure, True)(params)
        return new["norm/mean_ema"], objects.mean, [known, outside]

    extra = {"average": P(), "rows": P("data"), "words": P("data"), "count": P()}
    out = P(), P(), [(P(), P("data"), extra)] * 2
    held = PARAMS, state, Statistics(jnp.zeros(4))
    new, mean, both = over_devices.run(kind, step, held, (X, tokens), out)
    wanted = X.sum(-1).reshape(DEVICES, 4).mean(0)
    for stats, sums, extra in both:
        for found in (stats["batch_stats"]["mean"], new["average"], mean):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        for found in (sums["of"]["x"], extra["rows"]):
            np.testing.assert_allclose(found, X.sum(-1), rtol=1e-6)
        np.testing.assert_allclose(extra["average"], X.mean(0), rtol=1e-6)
        np.testing.assert_array_equal(extra["words"], tokens.reshape(-1))
        assert (extra["count"], extra["count"].dtype) == (3, np.int32)
    assert new["counter"] == 1
    assert np.issubdtype(new["counter"].dtype, np.integer)


class Pair(NamedTuple):
    mean: jax.Array
    count: jax.Array


@pytest.mark.parametrize("closed_over", [False, True])
@on_each_kind
def test_statistics_without_names_are_averaged(kind, closed_over):
    """What goes in and out in one shape says nothing about rows, a raw key neither."""
    old = jnp.zeros(5)  # not the four rows of a device
    states = [{"mean": old}, [old, old], (old,), old, Pair(old, jnp.zeros((5, 1)))]
    key = jax.random.PRNGKey(0)

    def loss_fn(params, states, key, x):
        z = jnp.pad(x, ((0, 0), (0, 2))) + 0 * jax.random.uniform(key)
        new = jax.tree.map(lambda s: s + z.mean(0).reshape(s.shape), states)
        aux = new, z.sum(-1), jnp.stack([z.mean(), z.sum()])[:, None]
        return jnp.mean(x @ params["w"]), aux

    def step(params, x):
        both = functools.partial(optax_sam.value_and_grad, axis_name="data")
        if closed_over:
            closure = lambda params: loss_fn(params, states, key, x)
            return both(closure, True)(params)[0][1]
        return both(loss_fn, True)(params, states, key, x)[0][1]

    out = P(), P("data"), P()
    new, rows, pair = over_devices.run(kind, step, PARAMS, (X,), out)
    wanted = np.pad(X, ((0, 0), (0, 2)))
    for x in jax.tree.leaves(new):
        np.testing.assert_allclose(x.ravel(), wanted.mean(0), atol=1e-6)
    np.testing.assert_allclose(rows, wanted.sum(-1), atol=1e-5)
    total = wanted.sum() / DEVICES
    np.testing.assert_allclose(pair.ravel(), [wanted.mean(), total], atol=1e-5)


# What is refused.


def test_parameters_that_vary_are_refused():
    cast = lambda params: jax.lax.pcast(params, "data", to="varying")
    both = optax_sam.value_and_grad(loss_fn, axis_name="data")
    for step in (
        lambda params, x, y: both(cast(params), x, y)[1],
        lambda params, x, y: both(params, x, y)[2](cast(params)),
    ):
        with pytest.raises(
            ValueError, match=r"parameter at \['b'\] varies.*not to both"
        ):
            over_devices.run("shard_map", step, PARAMS, (X, Y))


def test_parts_of_parameters_are_averaged_as_advised(x64):
    """FSDP by hand, with the mean in the loss and no ``axis_name``."""
    whole = RNG.normal(size=(DEVICES, 3))

    def loss_fn(params, x):
        w = jax.lax.all_gather(params["w"], "data", tiled=True)
        return jax.lax.pmean(jnp.mean(jnp.tanh(w @ x.T)), "data")

    step = lambda _, w, x: optax_sam.value_and_grad(loss_fn)({"w": w}, x)[1]["w"]
    grads = over_devices.run("shard_map", step, (), (whole, X), P("data"))
    on_one = jax.grad(lambda w: jnp.mean(jnp.tanh(w @ X.T)))(whole)
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
