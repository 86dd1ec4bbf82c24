"""Traps that users of SAM fall into, where no other test holds them.

``docs/reliability.md`` lists them all.
"""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax.training import train_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import BY_NAME

import optax_sam

PARAMS, G, G_S = (harness.tree(seed) for seed in range(3))


def emitted(tx, ascend=True):
    update = lambda g, state: tx.update(
        g, state, PARAMS, grad_fn=lambda p: G_S, ascend=ascend
    )
    return jax.jit(update)(G, tx.init(PARAMS))[0]


@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_weight_decay_belongs_after_a_member(name):
    """Before it, only what uses the first gradient sees any of it."""
    method = BY_NAME[name]
    decay, member = optax.add_decayed_weights(10.0), method.build()
    decayed, _ = decay.update(G, decay.init(PARAMS), PARAMS)
    before = emitted(optax.chain(decay, member))
    harness.assert_emits(method, before, decayed, G_S, 1e-5)
    after = emitted(optax.chain(member, decay))
    wanted = jax.tree.map(lambda d, w: d + 10 * w, emitted(member), PARAMS)
    harness.assert_close(after, wanted, 1e-5)


# Where means over devices belong.

MEAN = lambda tree: jax.lax.pmean(tree, "data")
LOCAL = lambda tree: tree


def mapped(tx, on_first, on_second):
    """Traces an update under ``shard_map``, whose results are to be replicated."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    problem = problems.mlp()

    def update(params, batch):
        local = jax.lax.pcast(params, "data", to="varying")
        gradient = lambda p: jax.grad(problem.loss_fn)(p, batch)
        return tx.update(
            on_first(gradient(local)),
            tx.init(params),
            local,
            grad_fn=lambda p: on_second(gradient(p)),
        )

    jax.eval_shape(
        jax.shard_map(
            update, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())
        ),
        problem.params(),
        problem.batch(0),
    )


@pytest.mark.parametrize(
    ("on_first", "on_second"), [(MEAN, LOCAL), (LOCAL, MEAN)], ids=["second", "first"]
)
def test_a_mean_forgotten_on_one_gradient(on_first, on_second):
    """JAX's types see it, if nobody asked for one perturbation per device."""
    with pytest.raises(ValueError, match="out_specs"):
        mapped(optax_sam.sam(0.1), on_first, on_second)


@pytest.mark.parametrize(
    ("on_first", "on_second", "what"),
    [
        (MEAN, LOCAL, "the incoming gradient"),
        (LOCAL, MEAN, "what grad_fn returned"),
        (MEAN, MEAN, "the incoming gradient"),
    ],
    ids=["first", "second", "both"],
)
def test_an_early_mean_is_refused(on_first, on_second, what):
    """One perturbation per device needs the gradient of each."""
    with pytest.raises(ValueError, match=rf"{what}(.|\n)*jax\.lax\.pcast"):
        mapped(optax_sam.sam(0.1, axis_name="data"), on_first, on_second)


def test_means_where_they_belong():
    mapped(optax_sam.sam(0.1), MEAN, MEAN)
    mapped(optax_sam.sam(0.1, axis_name="data"), LOCAL, LOCAL)


# Plumbing.


@pytest.mark.parametrize("name", ["sam", "esam", "sampa", "saf"])
def test_flax_own_train_state_drops_what_it_is_given(name):
    method = BY_NAME[name]
    factory = getattr(method.factory, "__wrapped__", method.factory)
    tx = factory(*[optax.sgd(0.1)] * (method.place == "around"), **method.settings)
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match=rf"{name} needs .*optax_sam\.linen\.Train"):
        state.apply_gradients(grads=G, grad_fn=lambda p: G_S)


def test_split_real_and_imaginary_drops_it_too():
    tx = optax.chain(optax.contrib.split_real_and_imaginary(optax_sam.sam(0.1)))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        tx.update(G, state, PARAMS, grad_fn=lambda p: G_S)


def test_three_meanings_of_adaptive():
    """Each has a name; a radius of one is none for another."""
    w, g = {"kernel": jnp.array([[1.0, -2.0]])}, {"kernel": jnp.array([[3.0, 2.0]])}
    x, y = np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]])  # sizes and gradient
    for rule, expected in (
        (optax_sam.ascent.adaptive(1.0, eta=0.0), x**2 * y / np.linalg.norm(x * y)),
        (
            optax_sam.ascent.adaptive(1.0, eta=0.5),
            (x + 0.5) ** 2 * y / np.linalg.norm((x + 0.5) * y),
        ),
        (optax_sam.ascent.weight_scaled(1.0), x * y / np.linalg.norm(y)),
    ):
        e, _ = rule.update(g, rule.init(w), w)
        np.testing.assert_allclose(e["kernel"], expected, rtol=1e-6)
