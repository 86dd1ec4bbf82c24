"""MSAM's search for a momentum: states of one's own, other forms, transformations."""

import functools
import threading
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import optax_sam
from optax_sam import probe

SGD = optax.sgd(0.1, momentum=0.9)
rms = functools.partial(optax.rmsprop, momentum=0.9)


def kernel(seed=0):
    """A kernel and a bias; SM3 takes no scalars."""
    return harness.tree(seed)["layer"]


# Momenta of one's own.


class Own(NamedTuple):
    velocity: Any
    squares: Any


class Unnamed(NamedTuple):
    first: Any
    second: Any


def own(pack, unpack, sign=-1.0):
    """SGD whose momentum is where one likes, perhaps beside squares."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return pack(zeros, jax.tree.map(jnp.ones_like, params))

    def update(updates, state, params=None):
        v, squares = unpack(state)
        v = jax.tree.map(lambda v, g: 0.9 * v + g, v, updates)
        squares = jax.tree.map(lambda n, g: n + g**2, squares, updates)
        return jax.tree.map(lambda v: sign * 0.1 * v, v), pack(v, squares)

    return optax.GradientTransformation(init, update)


OWN = {
    "field": own(Own, lambda s: s),
    "key": own(lambda v, n: {"n": n, "Momentum": v}, lambda s: (s["Momentum"], s["n"])),
    "bare": own(lambda v, n: v, lambda s: (s, s)),
    "list": own(lambda v, n: [(), {"any": v}], lambda s: (s[1]["any"],) * 2),
}  # fmt: skip


def moved_once(inner, params, g):
    """The parameters after a step, and those to evaluate."""
    tx = optax_sam.msam(inner, rho=0.5)
    updates, state = tx.update(g, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    return moved, optax_sam.msam_eval_params(state, moved)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("names", [("kernel", "bias"), ("mu", "m"), ("trace", "nu")])
def test_a_momentum_of_ones_own(name, names):
    """Also where parameters have the names of momenta."""
    params = dict(zip(names, kernel().values(), strict=True))
    g = dict(zip(names, kernel(1).values(), strict=True))
    ours, plain = (moved_once(inner, params, g) for inner in (OWN[name], SGD))
    harness.assert_close(ours, plain, 1e-6)


def test_a_momentum_of_ones_own_that_is_refused():
    two = optax_sam.msam(own(Unnamed, lambda s: s))
    with pytest.raises(
        ValueError, match=r"Unnamed.first, Unnamed.second. Keep your mom"
    ):
        two.init(kernel())
    uphill = own(lambda v, n: v, lambda s: (s, s), sign=1.0)
    with pytest.raises(ValueError, match="its state leads uphill"):
        optax_sam.msam(uphill).init(kernel())


def test_parameters_that_are_one_array():
    """Then every array of the shape is like them, and the names decide."""
    for inner in (optax.adam(0.1), optax.inject_hyperparams(rms)(0.1)):
        for start in (jnp.ones(()), jnp.ones(3)):
            moved, w = moved_once(inner, start, start)
            assert float(jnp.linalg.norm(moved - start)) > 0.5
            assert bool(jnp.all((w < 1) & (w > 0.6)))


# Copies whose state has another form.


def test_optimizers_that_follow_the_size_of_a_leaf():
    params = {"large": jnp.ones((200, 5)), "small": jnp.ones((50, 5))}
    by_size = lambda p: jax.tree.map(lambda x: "ab"[x.size > 500], p)
    axis = lambda p: jax.tree.map(lambda x: "ab"[x.shape[0] > 120], p)
    for labels in (by_size, axis):
        inner = optax.partition({"a": SGD, "b": optax.adam(0.1)}, labels)
        moved, w = moved_once(inner, params, params)
        np.testing.assert_allclose(w["small"], 0.9, rtol=1e-5)  # SGD
        distance = float(optax.tree.norm(optax.tree.sub(moved, w)))
        assert distance == pytest.approx(0.5, rel=1e-5)


def test_an_optimizer_that_holds_arrays_like_the_parameters():
    rates = {"kernel": jnp.full((300, 2), -0.1), "bias": jnp.full(2, -0.2)}
    own_rates = optax.stateless(lambda u, p: jax.tree.map(jnp.multiply, u, rates))
    inner = optax.chain(own_rates, optax.trace(0.9))
    tx = optax_sam.msam(inner, rho=0.5)
    state = tx.init(jax.tree.map(jnp.ones_like, rates))
    g = jax.tree.map(jnp.ones_like, rates)
    assert tx.update(g, state, g)[1].scale < 0


# Where it is asked.


def counted(inner):
    calls = []

    def update(*args, **kwargs):
        calls.append(threading.get_ident())
        return inner.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(inner.init, update), calls


def test_it_is_asked_once():
    inner, calls = counted(optax.with_extra_args_support(SGD))
    tx, params = optax_sam.msam(inner, rho=0.5), kernel()
    state = tx.init(params)
    assert len(calls) == 1
    for t in range(3):
        tx.update(params, state, params)
        assert len(calls) == 2 + t
    jax.jit(tx.init)(params)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    assert len(calls) == 4
    tx.init(half)
    assert len(calls) == 5


@pytest.mark.parametrize("inner", [SGD, rms(0.1)])
def test_without_init(inner):
    """A state from a file, in a program that has not made one."""
    params, g = kernel(), kernel(1)
    state = optax_sam.msam(inner, rho=0.5).init(params)
    update = lambda: optax_sam.msam(inner, rho=0.5).update
    found, wanted = (f(g, state, params) for f in (jax.jit(update()), update()))
    harness.assert_close(found, wanted, 1e-6)


def transformed():
    """Ways to run ``f(x)`` in which numbers may not be numbers."""
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": PartitionSpec("d"), "out_specs": PartitionSpec("d")}
    guarded = in_context(lambda: jax.transfer_guard("disallow"))
    return {
        "eager": lambda f: f,
        "jit": jax.jit,
        "vmap": jax.vmap,
        "grad": lambda f: jax.grad(lambda x: f(x).sum()),
        "scan": lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, x)[1],
        "shard_map": lambda f: jax.jit(jax.shard_map(f, mesh=mesh, **specs)),
        "guard": lambda f: guarded(jax.jit(f)),
        "debug_nans": in_context(lambda: jax.debug_nans(True)),
        "set_mesh": in_context(lambda: jax.set_mesh(mesh)),
        "another thread": in_thread,
    }  # fmt: skip


def in_context(context):
    def run(f):
        def call(x):
            with context():
                return f(x)

        return call

    return run


def in_thread(f):
    def call(x):
        out = []
        thread = threading.Thread(target=lambda: out.append(f(x)))
        thread.start()
        thread.join()
        return out[0]

    return call


@pytest.mark.parametrize("way", transformed())
def test_under_transformations(way):
    """The state is made and used inside, where arrays may be traced or split."""
    w = jnp.ones((2, 3))
    for inner, sign in ((rms(0.1), -1), (optax.adam(0.1), 1)):
        tx = optax_sam.msam(inner, rho=0.5)

        def moved(x, tx=tx, sign=sign):
            updates, state = tx.update(x, tx.init(x), x)
            return updates * state.scale * sign

        x = jax.device_put(w)
        assert bool(jnp.all(transformed()[way](moved)(x) < 0)) or way == "grad"


def test_abstract_parameters():
    tx, shapes = optax_sam.msam(optax.contrib.muon(0.1)), jax.eval_shape(kernel)
    state = jax.eval_shape(tx.init, shapes)
    found = state, jax.eval_shape(tx.update, shapes, state, shapes)[0]
    wanted = tx.init(kernel()), kernel()
    shape = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shape(found) == shape(wanted)


def test_a_traced_learning_rate():
    """One behind the momentum has no say; one before it has, and nobody knows it."""
    w = jnp.ones(3)

    def after_a_step(rate, base):
        return moved_once(base(rate), w, w)[1]

    sgd = lambda rate: after_a_step(rate, lambda x: optax.sgd(x, momentum=0.9))
    rates = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(jax.jit(sgd)(0.1), 0.9, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(sgd)(rates)[1], 0.8, rtol=1e-5)
    np.testing.assert_allclose(jax.jacobian(sgd)(0.1), -1.0, rtol=1e-5)
    adam = lambda x: optax.adamw(x, b1=x, b2=x, eps=x, weight_decay=x)
    assert bool(jnp.all(jax.jit(lambda x: after_a_step(x, adam))(0.1) < 1))
    with pytest.raises(
        ValueError, match=r"TraceState.trace.*traced learning rate. Put"
    ):
        jax.jit(lambda rate: after_a_step(rate, rms))(0.1)
    # As the error says.
    behind = lambda rate: optax.chain(
        optax.scale_by_rms(), optax.trace(0.9), optax.scale_by_learning_rate(rate)
    )
    assert bool(jnp.all(jax.jit(lambda x: after_a_step(x, behind))(0.1) < 1))


# Extra arguments, axes and accumulation inside.


def test_an_extra_argument_that_nobody_knows():
    """It is asked when the argument is there, and not before."""

    def heated(updates, state, params=None, *, temperature, **extra):
        del params, extra
        return jax.tree.map(lambda x: x * temperature, updates), state

    heat = optax.GradientTransformationExtraArgs(optax.init_empty_state, heated)
    for base, sign in ((SGD, 1), (rms(0.1), -1)):
        tx, w = optax_sam.msam(optax.chain(heat, base), rho=0.5), jnp.ones(3)
        state = tx.init(w)
        step = jax.jit(
            lambda t, s, tx=tx, w=w: tx.update(w, s, w, temperature=t, x="x")
        )
        updates, state = step(2.0, state)
        assert np.sign(state.scale) == sign
        assert bool(jnp.all(updates < 0))
    uphill = optax_sam.msam(optax.chain(heat, optax.trace(0.9)))
    state = uphill.init(w)
    with pytest.raises(ValueError, match="up the gradient"):
        uphill.update(w, state, w, temperature=1.0)


@pytest.mark.parametrize("base", [SGD, rms(0.1)])
def test_an_average_over_a_mapped_axis_inside(base):
    mean = optax.stateless(lambda u, p: jax.lax.pmean(u, "seeds"))
    g, w = jnp.arange(6.0).reshape(2, 3) - 2, jnp.ones(3)

    def after_a_step(g, inner):
        tx = optax_sam.msam(inner, rho=0.5)
        return tx.update(g, tx.init(w), w)[0]

    inside = jax.vmap(
        lambda g: after_a_step(g, optax.chain(mean, base)), axis_name="seeds"
    )(g)
    harness.assert_close(inside[0], after_a_step(g.mean(0), base), 1e-6)


def test_accumulation_inside():
    """The perturbation stays until the optimizer steps."""
    w, g = jnp.ones(3), jnp.array([1.0, -2.0, 3.0])
    base, k = rms(0.1), 5
    tx = optax_sam.msam(optax.MultiSteps(base, k).gradient_transformation(), rho=0.5)
    params, state, update = w, tx.init(w), jax.jit(tx.update)
    for t in range(k + 1):
        updates, state = update(g, state, params)
        params = params + updates
        moved = t >= k - 1
        point = optax_sam.msam_eval_params(state, params)
        length = float(jnp.linalg.norm(params - point))
        assert length == pytest.approx(0.5 * moved, abs=1e-5)
        assert bool(jnp.any(point != w)) == moved
    wanted = optax_sam.msam(base, rho=0.5)
    harness.assert_close(params, w + wanted.update(g, wanted.init(w), w)[0], 1e-6)


@pytest.mark.parametrize("freeze", ["masked", "freeze", "partition"])
def test_leaves_that_are_frozen_after_the_momentum_are_refused(freeze):
    """Their momentum would still displace them."""
    frozen = {"a": False, "b": True}
    last = {
        "masked": lambda: optax.masked(optax.set_to_zero(), frozen),
        "freeze": lambda: optax.transforms.freeze(frozen),
        "partition": lambda: optax.partition(
            {"a": optax.identity(), "b": optax.set_to_zero()}, {"a": "a", "b": "b"}
        ),
    }[freeze]()
    w = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    tx = optax_sam.msam(optax.chain(SGD, last))
    with pytest.raises(ValueError, match=r"perturb \['b'\], which.* To freeze leaves"):
        tx.init(w)


def test_evaluation_of_stacked_states():
    """One state a seed, also where the axes of a leaf are as long."""
    w, tx = jnp.arange(9.0).reshape(3, 3), optax_sam.msam(SGD, rho=0.5)
    first = jax.vmap(tx.init)(w)
    updates, state = jax.vmap(tx.update)(w - 3, first, w)
    found = optax_sam.msam_eval_params(state, w + updates)
    one = lambda i: jax.tree.map(lambda x: x[i], (state, w + updates))
    wanted = jnp.stack([optax_sam.msam_eval_params(*one(i)) for i in range(3)])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


# Evaluation, from the state alone.


def test_evaluation_in_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax_sam.msam(optax.contrib.muon(0.1), rho=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    state = tx.init(params)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    for _ in range(3):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
        loss = lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    wanted = optax_sam.msam_eval_params(state, params)
    live = nnx.state(model, nnx.Param)
    for given in (live, nnx.to_pure_dict(live)):
        w = optax_sam.msam_eval_params(optimizer.opt_state, given)
        for leaf in ("kernel", "bias"):
            harness.assert_close(jnp.asarray(w[leaf][...]), wanted[leaf], 1e-5)


# The parts that decide.


def test_what_the_probe_sees():
    see = lambda inner: probe.sign(optax.with_extra_args_support(inner), kernel())
    assert see(SGD) == see(optax.adam(0.1)) == 1
    assert see(optax.lars(0.1)) == see(rms(0.1)) == -1
    frozen = optax.masked(optax.set_to_zero(), {"kernel": True, "bias": False})
    for base, sign in ((optax.adamw(0.1), 1), (rms(0.1), -1)):
        assert see(optax.chain(frozen, base)) == sign
    nothing = {"kernel": jnp.ones((0, 3)), "bias": jnp.ones(3)}
    assert probe.sign(optax.with_extra_args_support(SGD), nothing) == 1
    assert probe.sign(optax.with_extra_args_support(SGD), {"kernel": jnp.ones((0, 3))})
