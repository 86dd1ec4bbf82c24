"""The engine with parts that are not the library's own."""

from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from registry import BY_NAME

import optax_sam
from optax_sam.blend import Blend
from optax_sam.when import When


class HistoryState(NamedTuple):
    ascends: jax.Array
    largest: jax.Array
    counts: jax.Array

    def metrics(self):
        return {"largest": self.largest}


def history():
    """Ascends after steps with an even count; remembers what it is shown."""

    def observe(state, g, g_s, step):
        size = step.mean(jnp.maximum(optax.tree.norm(g), optax.tree.norm(g_s)))
        return state._replace(
            largest=jnp.maximum(state.largest, size),
            counts=state.counts.at[step.count].set(step.count + 1),
        )

    return When(
        init=lambda params: HistoryState(
            jnp.array(True), jnp.zeros(()), jnp.zeros(8, jnp.int32)
        ),
        now=lambda state, g, step: (state.ascends, state),
        observe=observe,
        advance=lambda state, ascended: state._replace(ascends=~ascended),
    )


def remember_both():
    """Emits the mean of both gradients, or of the gradient and the last ascended."""

    def fresh(g, g_s, state, step):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, g, g_s)
        return mean, step.mean(g_s)

    def stale(g, state, step):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, g, state)
        return mean, jax.tree.map(lambda x: x / 2, state)

    return Blend(lambda params: jax.tree.map(jnp.zeros_like, params), fresh, stale)


def momentum_ascent(rho):
    """Climbs along an average of the gradients seen."""

    def update(g, state, params=None, **extra):
        del params, extra
        state = jax.tree.map(lambda m, x: 0.5 * m + 0.5 * x, state, g)
        return jax.tree.map(lambda m: rho * m, state), state

    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    return optax.GradientTransformation(zeros, update)


def method():
    return optax_sam.sharpness_aware(momentum_ascent(0.1), history(), remember_both())


def run(steps, first=1.0, second=1.0):
    """State and what was emitted; both gradients of step 2 are scaled."""
    tx, w = method(), jnp.array([1.0, -2.0])
    update = jax.jit(
        lambda w, state, scale, scale_s: tx.update(
            scale * 2 * w, state, w, grad_fn=lambda at: scale_s * 2 * at
        )
    )
    state, emitted = tx.init(w), []
    for t in range(steps):
        d, state = update(w, state, *((first, second) if t == 2 else (1.0, 1.0)))
        emitted.append(np.asarray(d))
        w = w - 0.1 * jnp.where(jnp.abs(d) < 1e9, d, 0)
    return state, emitted


def test_own_parts_by_hand():
    state, emitted = run(4)
    w, m, cached, expected = np.array([1.0, -2.0]), 0.0, 0.0, []
    for t in range(4):
        g = 2 * w
        if t % 2 == 0:
            m = 0.5 * m + 0.5 * g
            cached = 2 * (w + 0.1 * m)
        expected.append((g + cached) / 2)
        cached = cached / (1 + t % 2)  # the blend forgets where it is stale
        w = w - 0.1 * expected[-1]
    np.testing.assert_allclose(emitted, expected, rtol=1e-6)
    np.testing.assert_array_equal(state.when.counts, [1, 0, 3, 0, 0, 0, 0, 0])
    assert optax_sam.metrics(state)["largest"] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("which", ["first", "second"])
def test_nothing_bad_enters_own_parts(which, bad):
    """Parts that store what they are given, without a thought."""
    good, good_emitted = run(2)
    state, emitted = run(3, **{which: bad})
    assert harness.is_finite(state)
    assert int(state.num_rejected) == 1
    # The rule was not shown the bad pair, but its plan moved on.
    np.testing.assert_array_equal(state.when.counts, [1, 0, 0, 0, 0, 0, 0, 0])
    assert not bool(state.when.ascends)
    harness.assert_equal(state.blend, good.blend / 2)
    harness.assert_equal(state.ascent, good.ascent)
    if which == "first":  # for a guard to see
        assert not np.any(np.abs(emitted[2]) < 1e9)
    else:  # what the stale branch makes of that step
        w = np.array([1.0, -2.0]) - 0.1 * sum(good_emitted)
        expected = (2 * w + np.asarray(good.blend)) / 2
        np.testing.assert_allclose(emitted[2], expected, rtol=1e-6)


def test_no_conditional_is_compiled_outside_jit(monkeypatch):
    def no_cond(*args):
        raise AssertionError("a conditional was compiled")

    monkeypatch.setattr(jax.lax, "cond", no_cond)
    tx, w = optax_sam.sam(0.1, when=optax_sam.when.every_k(2)), jnp.ones(2)
    state, asked = tx.init(w), []
    for _ in range(4):
        grad_fn = lambda at: asked.append(at) or 2 * at
        _, state = tx.update(2 * w, state, w, grad_fn=grad_fn)
    assert len(asked) == int(state.num_ascents) == 2
    with pytest.raises(AssertionError, match="a conditional was compiled"):
        jax.jit(lambda s: tx.update(w, s, w, grad_fn=lambda at: at))(state)


def test_a_mask_holds_for_rules_that_ignore_the_gradient():
    ones = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
    rule = optax_sam.ascent.restrict(ones, {"moves": True, "stays": False})
    g = {"moves": jnp.zeros(2), "stays": jnp.zeros(3)}
    e, _ = rule.update(g, rule.init(g), g)
    np.testing.assert_array_equal(e["moves"], 1)
    np.testing.assert_array_equal(e["stays"], 0)


def lowered(tx, platform):
    loss_fn = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    def step(params, state):
        grads = jax.grad(loss_fn)(params)
        return tx.update(grads, state, params, grad_fn=jax.grad(loss_fn))

    params = harness.tree()
    traced = jax.jit(step).trace(params, tx.init(params))
    return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_gradients_pass_a_barrier_but_on_a_cpu(platform):
    program = lowered(optax_sam.sam(), platform).as_text()
    num_leaves = len(jax.tree.leaves(harness.tree()))
    barriers = program.count("stablehlo.optimization_barrier")
    assert barriers == (0 if platform == "cpu" else 2 * num_leaves)


@pytest.mark.parametrize(
    ("method", "branches"), [(optax_sam.sam, 0), (optax_sam.random_sam, 1)]
)
def test_random_numbers_come_out_of_a_branch_on_a_cpu(method, branches):
    """Nothing else does: what depends on the platform is settled when compiled."""
    program = lowered(method(), "cpu").compile().as_text()
    assert program.count(" conditional(") == branches


# Traps that users of SAM fall into; ``docs/guide/reliability.md`` lists them all.

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
