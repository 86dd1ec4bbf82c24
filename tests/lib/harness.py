"""What the tests share: a train step, a compiled update on given gradients, counters.

Compiling dominates the time, so what several tests need is compiled once.
"""

import contextlib
import functools
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
from registry import BY_NAME, ascended, each, grad_fn_only

import optax_sam

# A method for each rule of ascent, when and blend: what holds for a part is tried with
# one that has it. The first keep or decide something, or climb in a way of their own.
_FIRST = "sam vsam looksam ae_sam gsam random_sam friendly_sam gam"
_THEN = (
    "sam_2_steps ss_sam asam look_layer_sam esam renyi_sam_after_warmup gnp fisher_sam"
    " amp stable_sam vasso le_sam gcsam awp mrwp"
)
PARTS = [BY_NAME[name] for name in f"{_FIRST} {_THEN}".split()]


def each_part(chosen=lambda method: True, quick=_FIRST, more=()):
    """Parametrizes a test by parts; only CI runs those that are not among ``quick``."""
    methods = [*filter(chosen, PARTS), *more]
    return each(*methods, slow=lambda m: m in PARTS and m.name not in quick.split())


@contextlib.contextmanager
def x64():
    """Double precision inside; afterwards what was set before."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Counter:
    """Counts how often a function runs in the compiled program, not in tracing."""

    def __init__(self):
        self._count = 0

    def _add(self):
        self._count += 1

    def __call__(self, function):
        def counted(*args):
            jax.debug.callback(self._add)
            return function(*args)

        return counted

    def read(self):
        jax.effects_barrier()
        return self._count


def make_step(tx, loss_fn, extra_args=grad_fn_only, wrap=lambda grad_fn: grad_fn):
    """The train step of the documentation, for any method."""

    def step(params, state, batch, ascend=None):
        extra = extra_args(loss_fn, batch)
        extra["grad_fn"] = wrap(extra["grad_fn"])
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, ascend=ascend, **extra)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(method, problem=problems.mlp):
    """Its optimizer and its compiled step, whose ``ascend`` is static."""
    tx = method.optimizer()
    step = make_step(tx, problem().loss_fn, method.extra_args)
    return tx, jax.jit(step, static_argnames="ascend")


@functools.cache
def compiled_update(method):
    """Its member and a compiled update for gradients that are given.

    ``update(g, g_s, state, params, ascend=...)`` returns what it emits, the state,
    and the points at which it asked for a gradient (with a static ``ascend``).
    """
    tx = method.build()

    def update(g, g_s, state, params, ascend):
        points = []

        def grad_fn(at):
            points.append(at)
            return g_s

        emitted, state = tx.update(g, state, params, grad_fn=grad_fn, ascend=ascend)
        return emitted, state, points if ascend is not None else []

    return tx, jax.jit(update, static_argnames="ascend")


def run(step, params, state, problem, count, first=0):
    """``count`` steps in a Python loop, the decision being the program's own."""
    for t in range(first, first + count):
        params, state = step(params, state, problem.batch(t))
    return params, state


def sam_by_hand(loss_fn, rho, rate, momentum=0.0):
    """Compiled: a step of SAM before SGD, of what a framework's model is made of.

    ``loss_fn(params, state, *args)`` returns the loss and the model's new state.
    ``step((params, trace, state), *args)`` returns the same after it, and the loss.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    @jax.jit
    def step(carry, *args):
        params, trace, state = carry
        (loss, after), g = value_and_grad(params, state, *args)
        norm = optax.tree.norm(g)
        perturbed = jax.tree.map(lambda w, x: w + rho * x / norm, params, g)
        _, g_s = value_and_grad(perturbed, state, *args)
        trace = jax.tree.map(lambda v, x: momentum * v + x, trace, g_s)
        params = jax.tree.map(lambda w, v: w - rate * v, params, trace)
        return (params, trace, after), loss

    return step


def tree(seed=0, scale=1.0, dtype=None):
    """Random numbers in a small tree: a kernel, a bias and a scalar."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), dtype)
    return {"layer": {"kernel": draw(3, 2), "bias": draw(2)}, "gain": draw()}


def linear(first, last, steps):
    """A schedule in the precision that JAX has at its use.

    Those of Optax are in single precision, and two programs round that differently.
    """
    return lambda count: first + (last - first) * jnp.minimum(count, steps) / steps


def like(tree, value):
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


# Entries of a gradient that no method may use: the last one's square overflows.
BAD = [np.nan, np.inf, -np.inf, 1e30]


def with_entry(tree, value):
    """The tree with one entry of one leaf replaced."""
    kernel = tree["layer"]["kernel"].at[1, 1].set(value)
    return {**tree, "layer": {**tree["layer"], "kernel": kernel}}


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def kinds(tree):
    """Structure, shapes, dtypes and weak types."""
    describe = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))
    return jax.tree.structure(tree), [describe(x) for x in jax.tree.leaves(tree)]


def assert_equal(actual, desired):
    """Equal to the bit, structure included."""
    chex.assert_trees_all_equal(actual, desired)


def assert_close(actual, desired, rtol, atol=0.0):
    """Each entry equal to ``rtol`` of its size and ``atol``, structure included."""
    chex.assert_trees_all_close(actual, desired, rtol=rtol, atol=atol)


def assert_close_in_size(actual, desired, rtol):
    """Equal to ``rtol`` of the largest entry of each leaf, structure included.

    For leaves whose entries cancel, so that small ones hold the rounding of large ones.
    """

    def compare(path, a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        atol = rtol * np.max(np.abs(b), initial=0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)

    chex.assert_trees_all_equal_structs(actual, desired)
    jax.tree.map_with_path(compare, actual, desired)


def assert_emits(method, d, g, g_s, rtol):
    """What a method emits on an ascended step: to the bit, if it is ``g_s`` itself."""
    if method.fresh is ascended:
        assert_equal(d, g_s)
    else:
        assert_close(d, method.fresh(g, g_s), rtol)


def members(opt_state):
    """The states of the members on the engine."""
    is_member = lambda x: isinstance(x, optax_sam.SharpnessAwareState)
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_member) if is_member(x)]


def member_state(opt_state):
    """The state of the one sharpness-aware member."""
    (found,) = members(opt_state)
    return found


def ascents(opt_state):
    """The second gradients that were asked for so far."""
    return sum(int(member.num_ascents) for member in members(opt_state))


def page(name):
    """The text of a page of the documentation, by its path there or by its name."""
    docs = Path(__file__).parents[2] / "docs"
    named = (path for path in docs.rglob(name) if path.parent.name != "api")
    (path,) = [docs / name] if (docs / name).is_file() else named
    return path.read_text()


def code(name):
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)


def before_and_after(text):
    """Both programs of the one diff in a text."""
    (program,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    lines = program.splitlines()
    assert {line[:1] for line in lines} <= {" ", "+", "-", ""}
    return tuple(
        "\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-"
    )


def defined(name, function, **given):
    """All names of the block of a page that defines a function, with ``given`` ones."""
    (block,) = [block for block in code(name) if f"def {function}(" in block]
    names = {"jax": jax, "jnp": jnp, "optax": optax, "optax_sam": optax_sam, **given}
    exec(block, names)
    return names


def section(name, heading):
    """The text of a page below a heading."""
    _, below = re.split(rf"^##+ {re.escape(heading)}\n", page(name), flags=re.M)
    return re.split(r"^##+ ", below, flags=re.M)[0]


def table(name, heading):
    """The rows of the table under a heading of a page, as lists of cells."""
    lines = section(name, heading).splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]
