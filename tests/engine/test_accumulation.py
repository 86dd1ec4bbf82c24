"""Micro-batches inside ``grad_fn`` train as the large batch; ``MultiSteps`` does not.

The functions are those of docs/guide/accumulation.md, and so are the numbers.
"""

import functools

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods_lib import later
from registry import BY_NAME

import optax_sam
import optax_sam.linen

MICRO = 4
RHO, RATE, UPDATES = 0.1, 0.1, 20
PROBLEM = problems.mlp((8, 16, 4), batch_size=32)
GRADIENT = jax.grad(PROBLEM.loss_fn)
needs_microbatching = pytest.mark.skipif(
    not hasattr(optax, "microbatching"), reason="optax.microbatching came with 0.2.7"
)


def on_the_page(name, **given):
    """A function of the page, in which other names are the ``given`` ones."""
    return harness.defined("accumulation.md", name, **given)[name]


accumulated = on_the_page("accumulated")


def cut(batch, num_micro=MICRO):
    """The micro-batches of a batch, stacked."""
    return jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[1:]), batch)


def part_of(batch, i, num_micro=MICRO):
    return jax.tree.map(lambda x: x[i], cut(batch, num_micro))


def parts(batch, num_micro=MICRO):
    """The micro-batches of a batch."""
    return [part_of(batch, i, num_micro) for i in range(num_micro)]


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def microbatched(gradients, num_micro=MICRO, batch_size=32):
    micro = optax.microbatching
    return micro.microbatch(
        gradients,
        argnums=1,
        microbatch_size=batch_size // num_micro,
        accumulator=micro.AccumulationType.MEAN,
    )


def step_of(tx, gradients):
    """The train step of the page."""

    def step(params, state, batch):
        grad_fn = lambda p: gradients(p, batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def trained(step, tx):
    start = PROBLEM.params()
    return harness.run(jax.jit(step), start, tx.init(start), PROBLEM, UPDATES)


@functools.cache
def on_the_large_batch(method):
    tx = method.optimizer()
    return trained(step_of(tx, GRADIENT), tx)


# SAM is below.
LATER = "gsam looksam ae_sam random_sam friendly_sam"


@pytest.mark.parametrize("name", ["vsam", "msam", *map(later, LATER.split())])
def test_accumulated_gradients_train_as_the_large_batch(name):
    method = BY_NAME[name]
    tx = method.optimizer()
    found = trained(step_of(tx, accumulated(GRADIENT, MICRO)), tx)
    # With the states: what was decided, counted and cached.
    harness.assert_close_in_size(found, on_the_large_batch(method), 5e-5)


@needs_microbatching
def test_microbatching_of_optax_trains_as_the_large_batch():
    tx = WAYS["accumulated"][0]
    params, state = trained(step_of(tx, microbatched(GRADIENT)), tx)
    wanted, _, wanted_state = updated("accumulated")
    harness.assert_close((params, state), (wanted, wanted_state), 1e-5)


@pytest.mark.slow
def test_esam_selects_from_the_whole_batch():
    """Its losses of examples by ``lax.map``, with a rest of the selected ones."""
    params, (x, y) = PROBLEM.params(), PROBLEM.batch(0)

    def large(p, indices=None):
        batch = (x, y) if indices is None else (x[indices], y[indices])
        one = lambda x, y: PROBLEM.loss_fn(p, (x[None], y[None]))
        return jax.vmap(one)(*batch)

    given = {"loss_fn": PROBLEM.loss_fn, "x": x, "y": y}
    small = on_the_page("per_example_loss_fn", **given)
    tx = optax_sam.esam(RHO, beta=1.0, gamma=0.7)
    assert (int(0.7 * len(x)) - 1) % 8 == 5

    @functools.partial(jax.jit, static_argnums=0)
    def update(losses):
        grads = jax.grad(lambda p: losses(p).mean())(params)
        return tx.update(grads, tx.init(params), params, per_example_loss_fn=losses)

    (d, state), wanted = update(small), update(large)
    harness.assert_close_in_size((d, state), wanted, 5e-6)
    assert state.num_ascents == 1
    # Of a selection, and not of all.
    sam = optax_sam.sam(RHO)
    grad_fn = jax.jit(lambda p: GRADIENT(p, (x, y)))
    whole, _ = sam.update(grad_fn(params), sam.init(params), params, grad_fn=grad_fn)
    assert np.max(abs(whole["layer1"]["bias"] - d["layer1"]["bias"])) > 0.01


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(4)(x)


@pytest.mark.slow
def test_batch_norm_sees_micro_batches():
    """The gradients and statistics of micro-batches; and not those of the batch."""
    net, batch, key = Net(), PROBLEM.batch(0), jax.random.key(5)
    variables = jax.jit(functools.partial(net.init, train=False))(key, batch[0])
    start, model_state = variables["params"], {"batch_stats": variables["batch_stats"]}

    @functools.partial(jax.jit, static_argnums=0)
    def passes(num_micro):
        loss_fn = on_the_page("batch_norm_loss", model=net, num_micro=num_micro)
        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
        (_, stats), grads, grad_fn = value_and_grad(start, model_state, batch, key)
        return stats, grads, grad_fn(start)

    stats, grads, again = passes(MICRO)
    harness.assert_close(again, grads, 1e-6)

    @jax.jit
    def by_hand(params):
        state, losses = model_state, []
        for i, (x, y) in enumerate(parts(batch)):
            logits, state = net.apply(
                {"params": params, **state},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, i)},
            )
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
            losses.append(-jnp.mean(picked))
        return sum(losses) / MICRO, state

    wanted, wanted_stats = jax.grad(by_hand, has_aux=True)(start)
    # BatchNorm subtracts the bias before it, whose gradient is rounding.
    harness.assert_close((stats, grads), (wanted_stats, wanted), 1e-5, atol=1e-7)
    whole_stats, whole, _ = passes(1)
    assert optax.tree.norm(optax.tree.sub(grads, whole)) > 0.1
    assert optax.tree.norm(optax.tree.sub(stats, whole_stats)) > 0.1


# MultiSteps.


SGD = optax.sgd(RATE)
SAM = optax.chain(optax_sam.sam(RHO), SGD)
BEHIND = optax.MultiSteps(SGD, MICRO).gradient_transformation()
# Optimizers, and what the two gradients of a call are of.
WAYS = {
    "sgd": (optax.with_extra_args_support(SGD), "batch", "batch"),
    "accumulated": (SAM, "batch", "batch"),
    "around": (optax.MultiSteps(SAM, MICRO), "part", "part"),
    "behind": (optax.chain(optax_sam.sam(RHO), BEHIND), "part", "part"),
    "told": (optax.MultiSteps(SAM, MICRO), "part", "batch"),
}


@functools.cache
def updated(way):
    """Parameters after some updates, micro-batch gradients per update, the state."""
    tx, first, second = WAYS[way]
    counter = harness.Counter()
    micro = counter(GRADIENT)
    whole = accumulated(micro, MICRO)

    @functools.partial(jax.jit, static_argnames="ascend")
    def step(params, state, batch, i, ascend=None):
        part = part_of(batch, i)
        of = {"batch": lambda p: whole(p, batch), "part": lambda p: micro(p, part)}
        updates, state = tx.update(
            of[first](params), state, params, grad_fn=of[second], ascend=ascend
        )
        return optax.apply_updates(params, updates), state

    params = PROBLEM.params()
    state = tx.init(params)
    for t in range(UPDATES):
        for i in range(MICRO) if first == "part" else [0]:
            early = way == "told" and i < MICRO - 1
            ascend = {"ascend": False} if early else {}
            params, state = step(params, state, PROBLEM.batch(t), i, **ascend)
    return params, counter.read() / UPDATES, state


def distance(way):
    """From SAM of the whole batch, in units of what SAM does."""
    end = {name: updated(name)[0] for name in ("sgd", "accumulated", way)}
    gap = lambda a, b: optax.tree.norm(optax.tree.sub(end[a], end[b]))
    return float(gap(way, "accumulated") / gap("sgd", "accumulated"))


def by_hand(second):
    """SAM along the mean gradient, with the second one of ``parts[second]``."""

    @jax.jit
    def step(params, batch):
        g = mean([GRADIENT(params, part) for part in parts(batch)])
        offset = optax.tree.scale(RHO / optax.tree.norm(g), g)
        point = optax.tree.add(params, offset)
        g_s = mean([GRADIENT(point, part) for part in parts(batch)[second]])
        return optax.tree.add_scale(params, -RATE, g_s)

    params = PROBLEM.params()
    for t in range(UPDATES):
        params = step(params, PROBLEM.batch(t))
    return params


def test_accumulated_is_sam_by_hand():
    params, count, _ = updated("accumulated")
    harness.assert_close(params, by_hand(slice(None)), 1e-5)
    assert count == 2 * MICRO


def test_multi_steps_around_sees_the_last_micro_batch():
    """A second gradient on each micro-step; one is used, and it is of the last."""
    params, count, state = updated("around")
    harness.assert_close(params, by_hand(slice(-1, None)), 1e-5)
    assert count == 2 * MICRO
    assert harness.ascents(state) == state.gradient_step == UPDATES
    assert harness.member_state(state).count == UPDATES
    assert distance("around") > 0.1


def test_multi_steps_around_takes_one_decision_for_all_its_micro_steps():
    """Of SAM-2: the first update ascends on each, of which one counts."""
    executed = harness.Counter()
    member = optax_sam.sam(RHO, when=optax_sam.when.every_k(2))
    tx = optax.MultiSteps(optax.chain(member, SGD), MICRO)
    step = jax.jit(harness.make_step(tx, PROBLEM.loss_fn, wrap=executed))
    params, calls = PROBLEM.params(), []
    carry = params, tx.init(params)
    for t in range(2):
        carry = harness.run(step, *carry, PROBLEM, MICRO, first=t * MICRO)
        calls.append((executed.read(), harness.ascents(carry[1])))
        assert bool(optax_sam.ascends_next(carry[1])) == (t == 1)
    assert calls == [(MICRO, 1), (MICRO, 1)]


def test_multi_steps_behind_is_m_sharpness():
    params, count, state = updated("behind")
    member = optax_sam.sam(RHO, axis_name="shards")
    tx = optax.chain(optax_sam.micro_sharpness(member, MICRO), SGD)

    def step(params, state, batch):
        grad_fn = lambda p, i: GRADIENT(p, part_of(batch, i))
        updates, state = tx.update(None, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    harness.assert_close_in_size(params, trained(step, tx)[0], 5e-6)
    assert count == 2 * MICRO
    assert harness.ascents(state) == MICRO * UPDATES
    assert distance("behind") > 0.1


def test_multi_steps_that_is_told_is_the_large_batch():
    params, count, state = updated("told")
    wanted, _, wanted_state = updated("accumulated")
    harness.assert_close(params, wanted, 1e-5)
    assert count == 2 * MICRO
    found, wanted = map(optax_sam.metrics, (state, wanted_state))
    harness.assert_close(found, wanted, 1e-5)


def test_multi_steps_around_msam_is_the_large_batch():
    """No second gradient, so nothing is lost."""
    tx = optax.MultiSteps(BY_NAME["msam"].optimizer(), MICRO)

    @jax.jit
    def step(params, state, batch, i):
        grads = GRADIENT(params, part_of(batch, i))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = PROBLEM.params()
    state = tx.init(params)
    for t in range(UPDATES):
        for i in range(MICRO):
            params, state = step(params, state, PROBLEM.batch(t), i)
    wanted, _ = on_the_large_batch(BY_NAME["msam"])
    harness.assert_close_in_size(params, wanted, 5e-6)


# The page.


def test_the_table_of_multi_steps():
    rows = harness.table("accumulation.md", "`optax.MultiSteps` is something else")
    for cells, way in zip(rows, ("accumulated", "around", "behind"), strict=True):
        assert float(cells[1]) == updated(way)[1]
        assert float(cells[4]) == pytest.approx(distance(way), rel=0.01, abs=1e-3)


@pytest.mark.slow
def test_the_table_of_memory():
    """As XLA counts it, whose next version may do a tenth better or worse."""
    problem = problems.mlp((64, 256, 256, 256, 10), batch_size=4096, num_batches=1)
    params, batch = problem.params(), problem.batch(0)
    gradients, num_micro = jax.grad(problem.loss_fn), 8

    def checkpointed(params, batch):
        def loss_fn(p):
            one = lambda total, part: (total + problem.loss_fn(p, part), None)
            zero, micro = jnp.zeros(()), cut(batch, num_micro)
            total, _ = jax.lax.scan(jax.checkpoint(one), zero, micro)
            return total / num_micro

        return jax.grad(loss_fn)(params)

    def unrolled(params, batch):
        return mean([gradients(params, part) for part in parts(batch, num_micro)])

    found = {
        "of the whole batch": gradients,
        "`accumulated`": accumulated(gradients, num_micro),
        "`optax.microbatching`": None,
        "a Python loop under `jit`": unrolled,
        "a loss that is a checkpointed `scan` (below)": checkpointed,
    }
    if hasattr(optax, "microbatching"):
        found["`optax.microbatching`"] = microbatched(gradients, num_micro, 4096)
    rows = dict(harness.table("accumulation.md", "What it saves"))
    assert rows.keys() == found.keys()
    for name, way in found.items():
        if way is None:
            continue
        step = jax.jit(step_of(SAM, way)).lower(params, SAM.init(params), batch)
        megabytes = step.compile().memory_analysis().temp_size_in_bytes / 1e6
        # Nothing is promised of the loop under jit, but that it does not save.
        rel = 0.3 if "Python" in name else 0.1
        assert megabytes == pytest.approx(float(rows[name]), rel=rel), name


@needs_microbatching
@pytest.mark.slow
def test_the_page_runs():
    names = {}
    blocks = [b for b in harness.code("accumulation.md") if "batch_norm" not in b]
    exec("\n".join(blocks), names)
    # Three steps, one from the host and one by MultiSteps, whose state is another.
    assert optax_sam.metrics(names["opt_state"])["ascents"] == 4
    assert optax_sam.metrics(names["state"])["ascents"] == 1
    assert harness.is_finite((names["params"], names["updates"]))
