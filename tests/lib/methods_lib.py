"""Training, single steps and random trees, for the tests of what methods must equal."""

import functools

import harness
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

RHO = 0.1
STEPS = 12


def later(*values):
    """Parameters of a test that only CI runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def flattened(tree):
    """In double precision; the tree may be empty."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def assert_apart(a, b, gap=1e-4):
    assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > gap


@functools.cache
def _network():
    """A problem and its gradient, compiled once for all methods."""
    problem = problems.mlp()
    return problem, jax.jit(jax.grad(problem.loss_fn))


def trained(member, steps=STEPS):
    """Parameters after some steps of SGD with momentum behind the member."""
    return trained_with(optax.chain(member, optax.sgd(0.1, momentum=0.9)), steps)[0]


def trained_with(tx, steps=STEPS):
    """Parameters and state after some steps of a whole optimizer.

    The gradient alone is compiled; a method in a compiled step is a matter of the tests
    of the engine and of the recorded runs.
    """
    problem, gradient = _network()
    params = problem.params()
    state = tx.init(params)
    for t in range(steps):
        grad_fn = functools.partial(gradient, batch=problem.batch(t))
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    return params, state


@functools.cache
def trained_by(name):
    """The same in double precision, for what is compared with most often."""
    members = {
        "sgd": lambda: optax.with_extra_args_support(optax.identity()),
        "sam": lambda: optax_sam.sam(RHO),
    }
    return trained(members[name]())


def answering(*answers):
    """A ``grad_fn`` that gives one answer after the other, and the points it saw."""
    points, answers = [], iter(answers)
    return lambda p: points.append(p) or next(answers), points


def points_of(member, w, *gradients):
    """Where a member looks that gets these gradients, the first one at ``w``."""
    grad_fn, points = answering(*gradients[1:], gradients[-1])
    member.update(gradients[0], member.init(w), w, grad_fn=grad_fn)
    return points


def averaged_on_devices(member):
    """Gradients of two steps on four devices, the second offset, and the average."""
    first, second = (np.random.default_rng(i).normal(size=(4, 5)) for i in range(2))
    w = jnp.zeros(5)

    def step(first, second):
        grad_fn, points = answering(first, second)
        _, state = member.update(first, member.init(w), w, grad_fn=grad_fn)
        _, state = member.update(second, state, w, grad_fn=grad_fn)
        return points[1], state.ascent.average

    on_devices = jax.vmap(step, axis_name="shards")
    return first, second, *on_devices(*map(jnp.asarray, (first, second)))


def ascended(member, params=None):
    """What a member emits, the points it looks at, and its state; not compiled."""
    params = harness.tree() if params is None else params
    points = []
    d, state = member.update(
        harness.tree(1),
        member.init(params),
        params,
        grad_fn=lambda p: points.append(p) or harness.tree(2),
        ascend=True,
    )
    return d, points, state


def emitted(member, g, g_s, state=None, params=None, ascend=True):
    """What a member emits for a pair of gradients, and its state; not compiled.

    The second may be a function of the point.
    """
    grad_fn = g_s if callable(g_s) else lambda p: g_s
    params = g if params is None else params
    state = member.init(params) if state is None else state
    return member.update(g, state, params, grad_fn=grad_fn, ascend=ascend)


def flattened_step(member, g, g_s):
    return flattened(emitted(member, g, g_s)[0])


def pair(scale=1.0, dtype=None):
    return harness.tree(1, scale, dtype), harness.tree(2, scale, dtype)


# Random trees for ascent rules.

SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (0,)])
DTYPES = st.sampled_from(["float32", "float64", "bfloat16", "float16"])
LEAVES = st.tuples(SHAPES, DTYPES, st.sampled_from([0.0, 1e-2, 1.0, 1e2]))
TREES = st.recursive(
    LEAVES,
    lambda node: st.one_of(
        st.lists(node, max_size=3),
        st.dictionaries(st.sampled_from("abc"), node, max_size=3),
    ),
    max_leaves=5,
)
# Of the gradient's own rounding and of sums in float32.
ROUNDING = 1e-5
seeds = st.integers(0, 1000)


def filled(description, seed):
    """Arrays for a tree of (shape, dtype, scale)."""
    rng = np.random.default_rng(seed)
    is_leaf = lambda x: isinstance(x, tuple)
    draw = lambda d: jnp.asarray(d[2] * rng.normal(size=d[0]), d[1])
    return jax.tree.map(draw, description, is_leaf=is_leaf)


def offset_of(rule, g, params=None, **extra):
    """The offset, after the checks that hold for every rule."""
    e, _ = rule.update(g, rule.init(g), params, count=0, **extra)
    assert jax.tree.structure(e) == jax.tree.structure(g)
    for x, like in zip(jax.tree.leaves(e), jax.tree.leaves(g), strict=True):
        assert x.shape == like.shape
        assert x.dtype == jnp.promote_types(like.dtype, jnp.float32)
    assert np.all(np.isfinite(flattened(e)))
    return flattened(e)
