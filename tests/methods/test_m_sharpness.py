"""Each shard of a batch ascends by itself; what is emitted is the mean."""

import functools

import harness
import jax
import numpy as np
import optax
import problems
import pytest
from methods_lib import RHO, assert_apart, flat

import optax_sam


def shards_of(batch, count):
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


ON_SHARDS = {
    "sam": functools.partial(optax_sam.sam, RHO),
    "sam, 2 steps": functools.partial(optax_sam.sam, RHO, num_ascent_steps=2),
    "gnp": functools.partial(optax_sam.gnp, RHO, alpha=2.0),
    "stable_sam": functools.partial(optax_sam.stable_sam, RHO),
    "fisher_sam": functools.partial(optax_sam.fisher_sam, RHO, eta=30.0),
    "amp": functools.partial(optax_sam.amp, 0.1, inner_iter=2),
    "gam": functools.partial(optax_sam.gam, RHO, gamma=0.5),
}
LIKE_OTHERS = {"sam, 2 steps", "fisher_sam", "stable_sam", "amp"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name
        for name in ON_SHARDS
    ],
)
def test_m_sharpness_over_a_vmapped_axis(name, x64):
    """The mean over shards of what each would do alone."""
    problem = problems.mlp()
    params, batch = problem.params(), problem.batch(0)

    def emit(member, shard):
        grad_fn = lambda p: jax.grad(problem.loss_fn)(p, shard)
        return member.update(
            grad_fn(params), member.init(params), params, grad_fn=grad_fn
        )

    alone = functools.partial(emit, ON_SHARDS[name]())
    together = functools.partial(emit, ON_SHARDS[name](axis_name="shards"))
    shards = shards_of(batch, 4)
    d, states = jax.device_get(jax.jit(jax.vmap(together, axis_name="shards"))(shards))
    single = jax.device_get(jax.jit(jax.vmap(alone))(shards)[0])
    mean = jax.tree.map(lambda x: x.mean(axis=0), single)
    for i in range(4):
        harness.assert_close(row(d, i), mean, 1e-12)
        harness.assert_equal(row(states, i), row(states, 0))
    if name == "sam":
        one, _ = jax.jit(jax.vmap(together, axis_name="shards"))(shards_of(batch, 1))
        whole, _ = jax.jit(alone)(batch)
        harness.assert_close(row(jax.device_get(one), 0), whole, 1e-12)
        assert_apart(mean, whole)
        grad, shards = jax.jit(jax.grad(problem.loss_fn)), jax.device_get(shards)
        by_hand = []
        for i in range(4):
            g = grad(params, row(shards, i))
            e = optax.tree.scale(RHO / np.linalg.norm(flat(g)), g)
            by_hand.append(flat(grad(optax.tree.add(params, e), row(shards, i))))
        np.testing.assert_allclose(flat(mean), np.mean(by_hand, axis=0), rtol=1e-9)
