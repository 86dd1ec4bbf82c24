"""Loss scaling: an overflow of either gradient lowers the scale and skips the step."""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import over_devices
import pytest
from flax.training.dynamic_scale import DynamicScale

import optax_sam

RHO, RATE = 0.5, 0.1


def half(w):
    return jnp.asarray(w).astype(jnp.float16)


# Of one weight, whose gradient in half precision reaches 65504 at the latest.
convex = lambda w, x, dtype=jnp.float16: jnp.sum(w.astype(dtype) ** 2) / 2 * x
concave = lambda w, x, dtype=jnp.float16: -jnp.sum((w.astype(dtype) - 2) ** 2) / 2 * x


@pytest.mark.parametrize("scale", [2.0**20, np.float32(2.0**20), 2**20, "array"])
def test_both_gradients_are_scaled_and_unscaled(scale):
    """They would underflow in half precision; the value is not scaled."""
    scale = jnp.float32(2.0**20) if scale == "array" else scale
    w, x = jnp.array([0.25, -1.5]), np.float32(2.0**-30)

    def loss_fn(w, x):
        products = half(w) * jnp.array([3.0, 1.0], jnp.float16)
        return jnp.sum(products).astype(jnp.float32) * x

    exact = np.array([3.0, 1.0]) * 2.0**-30
    plain, grads, _ = optax_sam.value_and_grad(loss_fn)(w, x)
    assert not np.any(grads)
    value_and_grad = optax_sam.value_and_grad(loss_fn, loss_scale=scale)
    loss, grads, grad_fn = value_and_grad(w, x)
    assert loss == plain == -0.75 * 2.0**-30
    for found in (grads, grad_fn(w + 1)):
        np.testing.assert_array_equal(found, exact)
        assert found.dtype == jnp.float32
    # Half-precision parameters have gradients in float32, so that they do not vanish.
    np.testing.assert_array_equal(value_and_grad(half(w), x)[1], exact)


@pytest.mark.parametrize(
    ("loss_fn", "gradient", "start", "scale", "overflows"),
    [
        (convex, lambda w: w, 1.6, 2.0**15, [False, True]),  # 1.6 at w, 2.1 at w + e
        (concave, lambda w: 2 - w, 0.8, 2.0**16, [True, False]),  # 1.2 and 0.7
    ],
    ids=["perturbed", "first"],
)
def test_an_overflow_of_either_gradient_lowers_the_scale_and_skips(
    loss_fn, gradient, start, scale, overflows
):
    assert [scale * gradient(w) > 65504 for w in (start, start + RHO)] == overflows
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(RATE, momentum=0.9))

    @jax.jit
    def step(w, opt_state, scale, x):
        both = optax_sam.value_and_grad(loss_fn, loss_scale=scale)
        _, grads, grad_fn = both(w, x)
        updates, after = tx.update(grads, opt_state, w, grad_fn=grad_fn)
        scale, finite = optax_sam.update_loss_scale(scale, grads, opt_state, after)
        new = optax.apply_updates(w, updates), after
        return *optax.tree.where(finite, new, (w, opt_state)), scale, finite

    held = jnp.array([start], jnp.float32), tx.init(jnp.zeros(1))
    at, dynamic = held, DynamicScale(scale=jnp.float32(scale), growth_interval=3)
    *at, dynamic, finite = step(*at, dynamic, jnp.float16(1.0))
    assert (bool(finite), dynamic.scale, dynamic.fin_steps) == (False, scale / 2, 0)
    harness.assert_equal(tuple(at), held)
    # From here on as without a scale, in double precision.
    exact, trace = start, 0.0
    for _ in range(3):
        assert dynamic.scale == scale / 2
        *at, dynamic, finite = step(*at, dynamic, jnp.float16(1.0))
        trace = 0.9 * trace + gradient(exact + RHO * np.sign(gradient(exact)))
        exact -= RATE * trace
        np.testing.assert_allclose(at[0], [exact], rtol=2e-3)
        assert finite
    assert dynamic.scale == scale / 2
    assert optax_sam.metrics(at[1])["ascents"] == 3
    assert optax_sam.metrics(at[1])["rejected_ascents"] == 0
    *at, dynamic, finite = step(*at, dynamic, jnp.float16(1.0))
    assert (dynamic.scale, bool(finite)) == (scale, True)  # three steps were finite


# The helper averages, or each device makes a perturbation of its own.
AVERAGES = {
    "value_and_grad": (optax_sam.sam(RHO), "data", None),
    "method": (optax_sam.sam(RHO, axis_name="data"), None, "data"),
}


@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize(
    "kind",
    [
        "shard_map",
        pytest.param("shard_map without check_vma", marks=pytest.mark.slow),
        "pmap",
    ],
)
def test_one_device_decides_for_all(averages, kind):
    """Where its gradient overflows alone, all skip."""
    method, helpers_axis, axis_of_update = AVERAGES[averages]
    tx = optax.chain(method, optax.sgd(RATE))
    tracked = kind == "shard_map" and averages == "method"

    def step(scale, x):
        w = jnp.array([1.6])
        local = jax.lax.pcast(w, "data", to="varying") if tracked else w
        _, grads, grad_fn = optax_sam.value_and_grad(
            convex, axis_name=helpers_axis, loss_scale=scale
        )(local, half(x[0]))
        opt_state = tx.init(w)
        _, after = tx.update(grads, opt_state, w, grad_fn=grad_fn)
        scale, finite = optax_sam.update_loss_scale(
            scale, grads, opt_state, after, axis_name=axis_of_update
        )
        return scale.scale, finite

    # 1.6 * 2**15 is finite in half precision; 2.1 * 2**15 and 1.6 * 2**16 are not.
    rows = np.stack([np.full(over_devices.DEVICES, 0.25)] * 3)
    rows[:, 3] = 1.0, 2.0, 0.25  # the perturbed gradient, the first one, neither
    every = lambda scale, x: [step(scale, x[:, i]) for i in range(3)]
    dynamic = DynamicScale(scale=jnp.float32(2.0**15))
    found = over_devices.run(kind, every, dynamic, (rows.T,))
    skipped = 2.0**14, False
    assert [(s, bool(finite)) for s, finite in found] == [
        skipped,
        skipped,
        (2.0**15, True),
    ]


def test_several_transformations_and_none():
    grads = {"w": jnp.ones(2)}
    scale = DynamicScale()
    for tx in (optax.sgd(0.1), optax.chain(optax_sam.sam(0.1), optax_sam.gsam(0.1))):
        state = tx.init(grads)
        _, finite = optax_sam.update_loss_scale(scale, grads, state, state)
        assert finite
    one = optax_sam.sam(0.1).init(grads)
    rejected = one._replace(num_rejected=one.num_rejected + 1)
    after = (one, rejected)
    moved, finite = optax_sam.update_loss_scale(scale, grads, (one, one), after)
    assert (moved.scale, bool(finite)) == (scale.scale / 2, False)
    bad = {"w": jnp.array([1.0, jnp.inf])}
    moved, finite = optax_sam.update_loss_scale(scale, bad, (one, one), (one, one))
    assert (moved.scale, bool(finite)) == (scale.scale / 2, False)


def test_sampa_counts_too():
    tx = optax_sam.sampa(optax.sgd(0.1), learning_rate=0.1, rho=0.1)
    w = jnp.ones(2)
    before = tx.init(w)
    bad = lambda p: jnp.full_like(p, jnp.inf)
    _, after = tx.update(w, before, w, grad_fn=bad, previous_grad_fn=bad)
    moved, finite = optax_sam.update_loss_scale(DynamicScale(), w, before, after)
    assert (moved.scale, bool(finite)) == (2.0**15, False)


def test_it_says_what_to_write():
    state = optax_sam.sam(0.1).init(jnp.ones(2))
    with pytest.raises(
        ValueError, match="the rule of its object.*DynamicScale.*A number has"
    ):
        optax_sam.update_loss_scale(8.0, jnp.ones(2), state, state)
    with pytest.raises(ValueError, match="one optimizer.*hold 1 and 0"):
        optax_sam.update_loss_scale(DynamicScale(), jnp.ones(2), state, ())
