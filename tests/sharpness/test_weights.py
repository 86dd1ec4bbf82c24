"""What is no weight, no deterministic loss, or no mean over devices is refused."""

import functools
import warnings
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), "float32")
trace = lambda loss_fn, params, **options: float(
    sharpness.hessian_trace(loss_fn, params, X, 0, **options).estimate
)


class Net(nn.Module):
    dropout: bool = False
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.LayerNorm()(jnp.tanh(x))
        if self.dropout:
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(1)(x)


def linen(train=False, **options):
    net = Net(**options)
    variables = net.init(jax.random.key(0), X[0])

    def loss(variables, x):
        draws = {"dropout": jax.random.key(2)}
        state = ["batch_stats"] if train else False
        y = net.apply(variables, x, train, rngs=draws, mutable=state)
        # Padding is no statistic, though it is counted over the batch.
        losses, real = jnp.square(y[0] if train else y)[:, 0], x[:, 0] > -9
        return jnp.sum(losses * real) / jnp.sum(real)

    return loss, variables


def test_running_statistics_of_linen():
    loss, variables = linen()
    with pytest.raises(ValueError, match=r"BatchNorm_0'\]\['mean'\] is a running stat.*"
                       r'variables\["params"\].*mask=lambda variables'):  # fmt: skip
        trace(loss, variables)
    of_params = lambda params, x: loss({**variables, "params": params}, x)
    right = trace(of_params, variables["params"])
    mask = lambda variables: {name: name == "params" for name in variables}
    assert trace(loss, variables, mask=mask) == pytest.approx(right, rel=1e-4)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.LoRALinear(4, 1, lora_rank=1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def test_variables_of_nnx():
    model = Model(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    loss = lambda model, x: jnp.mean(model(x) ** 2)
    for whole in (state, model):
        with pytest.raises(ValueError, match=r"is a (BatchStat|Rng\w+), not a weight.*"
                           r"nnx.split\(model, nnx.Param, ...\)"):  # fmt: skip
            trace(lambda m, x: 0.0, whole)
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)
    of_weights = lambda weights, x: loss(nnx.merge(graphdef, weights, rest), x)
    assert trace(of_weights, weights) > 0


def test_models_of_equinox():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    with pytest.raises(ValueError, match=r"activation.*eqx.partition\(model"):
        trace(loss, model)
    direction = sharpness.filter_normalized_direction
    with pytest.raises(ValueError, match=r"activation.*eqx.partition\(model"):
        direction(0, model)
    arrays = lambda model: jax.tree.map(eqx.is_inexact_array, model)
    moved = direction(0, model, mask=arrays)
    assert moved.activation is model.activation
    assert moved.layers[0].weight.any()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert trace(lambda p, x: loss(eqx.combine(p, static), x), params) > 0
    norm = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    _, state = norm(3, "batch", mode="batch")
    with pytest.raises(ValueError, match=r"\[1\] is a State, not a weight"):
        trace(lambda p, x: 0.0, (params, state))


class Line(eqx.Module):
    weight: jax.Array
    activation: Callable

    def __call__(self, x):
        return self.activation(x @ self.weight)


@pytest.mark.parametrize("batches", [X, list(X)])
def test_whole_models_of_equinox_with_a_mask(batches):
    """Their functions stay where they are."""
    model = Line(jnp.array([3.0, 4.0, 5.0]), jnp.abs)
    loss = lambda model, x: jnp.mean(model(x) ** 2) / 2
    H = np.einsum("bij,bik->jk", X, X) / 12
    options = dict(mask=jax.tree.map(eqx.is_inexact_array, model))
    top = sharpness.hessian_eigenvalues(loss, model, batches, 0, **options).vector(0)
    expected = np.linalg.eigh(H)[1][:, -1]
    assert abs(top.weight @ expected) == pytest.approx(1, abs=1e-4)
    diagonal = sharpness.hessian_diagonal(loss, model, batches, 0, **options).estimate
    np.testing.assert_allclose(diagonal.weight, np.diag(H), rtol=1e-4)
    assert top.activation is diagonal.activation is model.activation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(train=True, dropout=True, norm=False), "draws random numbers"),
        (dict(train=True), "statistics over the examples"),
        (dict(dropout=True), None),
    ],
)
def test_a_loss_in_training_mode(options, message):
    loss, variables = linen(**options)
    of_params = lambda params, x: loss({**variables, "params": params}, x)
    # It is said once.
    found = [warned(of_params, variables["params"]) for _ in range(2)]
    assert [len(x) for x in found] == [message is not None, 0]
    if message:
        assert message in found[0][0]


def warned(loss, params, batches=X):
    """What a measure warns of."""
    product = lambda p: sharpness.hvp(loss, p, batches, p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.make_jaxpr(product)(params)
    return [str(x.message) for x in caught]


@pytest.mark.parametrize("number", [jnp.full(2, 6), jnp.ones((2, 2))])
def test_other_arrays_in_a_batch_hide_no_batch_norm(number):
    loss, variables = linen(train=True)
    of_params = lambda params, b: loss({**variables, "params": params}, b["x"])
    batches = {"x": X, "number": number}
    product = lambda p: sharpness.hvp(of_params, p, batches, p, weights=jnp.ones(2))
    with pytest.warns(UserWarning, match="statistics over the examples"):
        jax.make_jaxpr(product)(variables["params"])


def test_batch_norm_of_equinox():
    """Its mean is a collective operation along the axis of the vmap."""
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    norm, state = make(4, axis_name="batch", mode="batch")

    def loss(layer, x, inference):
        model = lambda x, s: eqx.nn.inference_mode(norm, inference)(layer(x), s)[0]
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None))
        return jnp.mean(run(x, state) ** 2)

    train, evaluate = (functools.partial(loss, inference=x) for x in (False, True))
    (message,) = warned(train, layer)
    assert "statistics over the examples" in message
    assert not warned(evaluate, layer)


def test_a_loss_is_looked_at_again_until_it_has_warned():
    losses = {train: linen(train)[0] for train in (False, True)}
    mode, variables = {"train": False}, linen()[1]
    loss = lambda p, x: losses[mode["train"]]({**variables, "params": p}, x)
    assert not warned(loss, variables["params"])
    mode["train"] = True
    assert len(warned(loss, variables["params"])) == 1
    assert not warned(loss, variables["params"])


@pytest.mark.parametrize("check", [True, False])
def test_batches_of_one_device_need_an_axis(check):
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def on_devices(batches, **options):
        run = lambda w, x: sharpness.hessian_trace(loss, w, x, 0, **options).estimate
        specs = dict(in_specs=(P(), batches), out_specs=P(), check_vma=check)
        return jax.jit(jax.shard_map(run, mesh=mesh, **specs))(jnp.ones(3), X)

    with pytest.raises(ValueError, match=r"along 'd'.*axis_name='d'"):
        on_devices(P("d"))
    right = trace(loss, jnp.ones(3))
    assert on_devices(P("d"), axis_name="d") == pytest.approx(right, rel=1e-5)
    if check:  # the same on all devices, as JAX knows
        assert on_devices(P()) == pytest.approx(right, rel=1e-5)
