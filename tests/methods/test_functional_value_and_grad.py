"""Functional-SAM: any method, with the gradient of the loss at the outputs of ``w``."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import over_devices
import problems
import pytest
import recorded
import side_by_side
import trajectory_runs
from harness import each_part
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import base, functional_sam

import optax_sam
from optax_sam import ascent

functional = optax_sam.functional_value_and_grad
TX = side_by_side.optimizer(optax_sam.sam(0.3))


def network(w, x, y):
    h = jnp.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    return h @ w["layer1/kernel"] + w["layer1/bias"]


def cross_entropy(z, x, y):
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(y)), y])


def train_step(tx, value_and_grad, w, state, x, y, wrap=lambda grad_fn: grad_fn):
    _, grads, grad_fn = value_and_grad(w, x, y)
    updates, state = tx.update(grads, state, w, grad_fn=wrap(grad_fn))
    return optax.apply_updates(w, updates), state


def trained(tx, value_and_grad, w, batches):
    """The parameters before each step, and after the last."""
    step = jax.jit(functools.partial(train_step, tx, value_and_grad))
    trajectory = [(jax.tree.map(jnp.asarray, w), tx.init(w))]
    for x, y in batches:
        trajectory.append(step(*trajectory[-1], x, y))
    return [w for w, _ in trajectory]


def test_ten_steps_meet_the_reference(x64):
    for seed in range(3):
        w, batches = side_by_side.problem(seed, 10)
        found = trained(TX, functional(network, cross_entropy), w, batches)
        direction = lambda t, w: functional_sam.functional_sam(w, *batches[t], 0.3)  # noqa: B023
        expected = base.descend(w, 10, direction, **side_by_side.SGD)
        side_by_side.assert_equal(found, expected)
        of_sam = trained(TX, optax_sam.value_and_grad(recorded.mlp), w, batches)
        assert recorded.deviation(of_sam[-1], found[-1]) > 1e-2


def test_it_is_the_jacobian_there_times_the_gradient_here(x64):
    """The whole Jacobian, of an output in two parts."""
    w, ((x, y), *_) = side_by_side.problem(0, 1)
    at = jax.tree.map(lambda w: 1.1 * w + 0.1, w)
    parts = lambda w, x, y: {
        "a": network(w, x, y),
        "b": [jnp.sin(x @ w["layer0/kernel"])],
    }
    loss = lambda z, x, y: cross_entropy(z["a"], x, y) + jnp.sum(z["b"][0] ** 3)
    value, grads, grad_fn = functional(parts, loss)(w, x, y)
    whole = lambda w: loss(parts(w, x, y), x, y)
    harness.assert_close((value, grads), jax.value_and_grad(whole)(w), 1e-12)
    harness.assert_close(grad_fn(w), grads, 1e-12)

    flat = lambda w: jax.flatten_util.ravel_pytree(parts(w, x, y))[0]
    c = jax.flatten_util.ravel_pytree(jax.grad(loss)(parts(w, x, y), x, y))[0]
    wanted = jax.tree.map(
        lambda jacobian: jnp.tensordot(c, jacobian, 1), jax.jacrev(flat)(at)
    )
    harness.assert_close(grad_fn(at), wanted, 1e-10)


@each_part(lambda method: method.needs == "grad_fn", quick="vsam gsam asam")
def test_of_a_loss_linear_in_the_outputs_every_method_is_as_it_was(method, x64):
    """And of a network linear in the weights no method sees another gradient."""
    w, batches = side_by_side.problem(1, 6)
    tx = method.optimizer()
    linear = lambda z, x, y: jnp.mean(z @ jnp.arange(1.0, 5))
    whole = lambda w, x, y: linear(network(w, x, y), x, y)
    found = trained(tx, functional(network, linear), w, batches)[-1]
    wanted = trained(tx, optax_sam.value_and_grad(whole), w, batches)[-1]
    harness.assert_close_in_size(found, wanted, 1e-11)

    both = functional(
        lambda w, x, y: x @ w["layer0/kernel"], lambda z, x, y: jnp.sum(z**3)
    )
    seen = []
    wrap = lambda grad_fn: lambda p: seen.append(grad_fn(p)) or seen[-1]
    train_step(tx, both, w, tx.init(w), *batches[0], wrap)
    for g_s in seen:
        harness.assert_close(g_s, both(w, *batches[0])[1], 1e-12)


def test_the_state_is_of_the_pass_at_w_and_the_key_is_one():
    """BatchNorm's statistics, and a dropout mask."""

    def apply_fn(w, mean, key, x):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        h = x * mask * w
        return h - mean, {"mean": 0.9 * mean + 0.1 * h.mean(0), "mask": mask}

    loss = lambda z, mean, key, x: jnp.sum(z**2)
    x, key, mean = jnp.arange(6.0).reshape(2, 3), jax.random.key(0), jnp.ones(3)
    w = jnp.arange(1.0, 4)
    (value, aux), grads, grad_fn = functional(apply_fn, loss, True)(w, mean, key, x=x)
    z, wanted = apply_fn(w, mean, key, x)
    harness.assert_equal((value, aux), (jnp.sum(z**2), wanted))
    # The network is linear in w: its Jacobian does not move, if the mask does not.
    harness.assert_close(
        (grads, grad_fn(3 * w)), (jnp.sum(2 * z * x * aux["mask"], 0),) * 2, 1e-6
    )


def test_wider_perturbed_weights_and_a_scaled_loss():
    """Of float16, whose smallest number is 6e-8, the gradient at the outputs is 0."""
    w, x = jnp.ones(3, jnp.float16), jnp.arange(3, dtype=jnp.float16)
    apply_fn, loss = (
        lambda w, x: jnp.sin(w * x),
        lambda z, x: 1e-8 * z.astype(float).sum(),
    )
    for scale, factor in ((None, 0), (2.0**14, 1)):
        both = functional(apply_fn, loss, loss_scale=scale)
        value, grads, grad_fn = both(w, x)
        wanted = factor * 1e-8 * np.arange(3) * np.cos(np.arange(3))
        for found in (grads, grad_fn(w.astype("float32"))):
            np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=1e-12)


X, Y = side_by_side.problem(2, 8)[1][0][0], np.arange(8) % 4


@pytest.mark.parametrize("kind", over_devices.KINDS)
def test_means_over_devices_are_those_of_all_rows(kind, x64):
    w, _ = side_by_side.problem(2, 1)
    at = jax.tree.map(lambda w: w + 0.3, w)

    def step(w, x, y, axis_name="data"):
        value, grads, grad_fn = functional(network, cross_entropy, axis_name=axis_name)(
            w, x, y
        )
        return value, grads, grad_fn(jax.tree.map(lambda w: w + 0.3, w))

    found = over_devices.run(kind, step, w, (X, Y))
    harness.assert_close(found, step(w, X, Y, None), 1e-11, atol=1e-15)
    assert recorded.deviation(found[2], jax.grad(recorded.mlp)(at, X, Y)) > 1e-3


def test_rows_over_devices_and_m_sam(x64):
    """Under plain jit one perturbation; under the method's axis one for each shard."""
    w, _ = side_by_side.problem(2, 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (X, Y)]
    both = functional(network, cross_entropy)
    found = trained(TX, both, w, [rows] * 3)[-1]
    harness.assert_close(found, trained(TX, both, w, [(X, Y)] * 3)[-1], 1e-10)

    member = optax_sam.sam(0.3, axis_name="shards")

    def of_shard(x, y):
        _, grads, grad_fn = both(w, x, y)
        return member.update(grads, member.init(w), w, grad_fn=grad_fn)[0]

    shards = X.reshape(2, 4, -1), Y.reshape(2, 4)
    emitted = jax.vmap(of_shard, axis_name="shards", out_axes=None)(*shards)
    each = [
        functional_sam.functional_sam(w, *shard, 0.3)
        for shard in zip(*shards, strict=True)
    ]
    wanted = base.scaled(base.add(*each), 0.5)
    harness.assert_close(emitted, wanted, 1e-10)


def test_cost():
    """Without the loss, and without the forward pass of the last layer."""
    problem = problems.mlp((32, 288, 320, 256), batch_size=128)
    shapes = jax.eval_shape(lambda: (problem.params(), *problem.batch(0)))
    apply_fn = lambda w, x, y: trajectory_runs.forward(w, x)
    loss = lambda z, x, y: trajectory_runs.cross_entropy(z, y)
    whole = lambda w, x, y: loss(apply_fn(w, x, y), x, y)

    def flops(value_and_grad):
        def both_gradients(w, x, y):
            _, grads, grad_fn = value_and_grad(w, x, y)
            return grads, grad_fn(optax.tree.add(w, grads))

        return trajectory_runs.flops(both_gradients, *shapes)

    one = trajectory_runs.flops(jax.grad(whole), *shapes)
    saved = 2 - flops(functional(apply_fn, loss)) / one
    assert flops(optax_sam.value_and_grad(whole)) / one == pytest.approx(2, rel=0.01)
    assert saved == pytest.approx(2 * 128 * 320 * 256 / one, abs=0.01)
    assert saved > 0.1


def test_what_is_refused():
    w, loss = jnp.ones(2), jnp.sum
    whole_numbers = lambda w: (w, w.astype(int))
    for match, build, args in (
        (r"write functional_value_and_grad\(apply_fn, loss", (loss, None), ()),
        ("must return .outputs, aux.; got a", (jnp.sin, loss, True), (w,)),
        (r"\[1\] is int32. Return .*has_aux", (whole_numbers, loss), (w,)),
        ("loss must be a scalar", (jnp.sin, jnp.cos), (w,)),
        ("only real floats", (jnp.sin, loss), (w.astype(int),)),
    ):
        with pytest.raises(ValueError, match=match):
            functional(*build)(*args)
    with pytest.raises(ValueError, match="loss_scale must be"):
        functional(jnp.sin, loss, loss_scale=-1.0)


# Preconditioned SAM, alone and with the former.


def test_preconditioned_ascent_is_along_the_gradient_as_adam_scales_it(x64):
    """The recipe on the page, by hand."""
    rule = optax.chain(optax.scale_by_rms(0.9, eps_in_sqrt=False), ascent.l2(0.3))
    tx = side_by_side.optimizer(optax_sam.sharpness_aware(rule))
    w, batches = side_by_side.problem(0, 10)
    found = trained(tx, functional(network, cross_entropy), w, batches)
    u = base.scaled(w, 0.0)

    def direction(t, w):
        nonlocal u
        x, y = batches[t]
        g = base.mlp(w, x, y)[1]
        u = base.add(base.scaled(u, 0.9), base.times(g, g), 0.1)
        a = {leaf: g[leaf] / (np.sqrt(u[leaf]) + 1e-8) for leaf in g}
        return functional_sam.functional_sam(w, x, y, 0.3, along=a)

    side_by_side.assert_equal(found, base.descend(w, 10, direction, **side_by_side.SGD))
