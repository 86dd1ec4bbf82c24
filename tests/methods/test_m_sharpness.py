"""Each shard of a batch ascends by itself; what is emitted is the mean."""

import functools

import harness
import jax
import methods_lib as lib
import problems
import pytest

import optax_sam

SHARDED = {
    "sam": functools.partial(optax_sam.sam, lib.RHO),
    "gam": functools.partial(optax_sam.gam, lib.RHO, gamma=0.5),
    "sam, 2 steps": functools.partial(optax_sam.sam, lib.RHO, num_ascent_steps=2),
    "gnp": functools.partial(optax_sam.gnp, lib.RHO, alpha=2.0),
    "stable_sam": functools.partial(optax_sam.stable_sam, lib.RHO),
    "fisher_sam": functools.partial(optax_sam.fisher_sam, lib.RHO, eta=30.0),
    "amp": functools.partial(optax_sam.amp, 0.1, inner_iter=2),
}


@pytest.mark.parametrize(
    "name", [x if x in ("sam", "gam") else lib.later(x) for x in SHARDED]
)
def test_m_sharpness_over_a_vmapped_axis(name, x64):
    """The mean over shards of what each would do alone."""
    problem = problems.mlp()
    params, gradient = problem.params(), jax.grad(problem.loss_fn)

    def emit(member, shard):
        grad_fn = lambda p: gradient(p, shard)
        state = member.init(params)
        return member.update(grad_fn(params), state, params, grad_fn=grad_fn)

    split = lambda x: x.reshape(4, -1, *x.shape[1:])
    shards = jax.tree.map(split, problem.batch(0))
    row = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    together = functools.partial(emit, SHARDED[name](axis_name="shards"))
    d, states = jax.jit(jax.vmap(together, axis_name="shards"))(shards)
    alone = jax.jit(functools.partial(emit, SHARDED[name]()))
    single = [alone(row(shards, i))[0] for i in range(4)]
    mean = jax.tree.map(lambda *xs: sum(xs) / 4, *single)
    for i in range(4):
        harness.assert_close(row(d, i), mean, 1e-12)
        harness.assert_equal(row(states, i), row(states, 0))
    lib.assert_apart(mean, alone(problem.batch(0))[0])
