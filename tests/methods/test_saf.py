"""SAF and MESA: the loss, the table of past logits, and the average of the weights."""

import functools
import re

import flax.serialization
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import trajectory

import optax_sam

N, C = 6, 3


def table(**options):
    """A small one whose term starts as early as it can."""
    return optax_sam.saf(N, C, **{"delay": 2, "start": 0, **options})


def rows(seed, count=2, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(count, C))


def record(tx, state, logits, indices):
    """The state after a batch, from an update outside jit."""
    g = {"w": jnp.ones(2)}
    updates, state = tx.update(
        g, state, g, logits=jnp.asarray(logits), indices=jnp.asarray(indices)
    )
    assert updates is g
    return state


# The loss.


@pytest.mark.parametrize("name", ["loss_saf", "loss_mesa"])
@pytest.mark.parametrize("case", range(4))
def test_loss_of_the_authors(name, case, x64):
    h = recorded.RUNS[name]["cases"][case]
    wanted = {
        key.removeprefix(f"case{case}/"): value
        for key, value in recorded.arrays(name).items()
        if key.startswith(f"case{case}/")
    }
    term = functools.partial(
        optax_sam.trajectory_loss, temperature=h["temperature"], coefficient=1.0
    )

    def total(z, past):
        picked = jax.nn.log_softmax(z)[jnp.arange(h["B"]), wanted["labels"]]
        weighted = term(z, past, coefficient=h["coefficient"])
        return weighted - jnp.mean(picked)

    z, past = (jnp.asarray(wanted[key]) for key in ("logits", "old_logits"))
    for function, value, gradient in (
        (term, "kl_loss", "grad_kl"),
        (total, "total", "grad_total"),
    ):
        found = jax.value_and_grad(function)(z, past)
        np.testing.assert_allclose(found[0], wanted[value], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[1], wanted[gradient], rtol=0, atol=1e-12)
    # Nothing flows into the past.
    assert not np.any(jax.grad(total, argnums=1)(z, past))


def test_default_of_the_loss(x64):
    z, past = rows(0), rows(1)
    wanted = 0.3 * trajectory.trajectory(z, past, 5.0)[0]
    assert optax_sam.trajectory_loss(z, past) == pytest.approx(wanted, rel=1e-12)


def test_equal_logits_have_no_loss_and_no_gradient(x64):
    z = jnp.asarray(rows(0, 4))
    value, gradient = jax.value_and_grad(optax_sam.trajectory_loss)(z, z)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_loss_at_high_temperature(x64):
    z, past = rows(0, 4), rows(1, 4)
    centred = lambda x: x - x.mean(axis=1, keepdims=True)
    limit = np.mean(np.sum((centred(z) - centred(past)) ** 2, axis=1)) / (2 * C)
    term = functools.partial(optax_sam.trajectory_loss, z, past, coefficient=1.0)
    error = lambda tau: abs(float(term(temperature=tau)) - limit)
    assert error(1e3) < 1e-3 * limit
    # The next term of the expansion falls with the temperature.
    assert error(1e3) == pytest.approx(error(1e2) / 10, rel=0.1)


def test_loss_does_not_see_a_constant_added_to_all_logits(x64):
    z, past = rows(0, 4), rows(1, 4)
    shift = rows(2, 4)[:, :1]
    wanted = optax_sam.trajectory_loss(z, past)
    for moved in ((z + shift, past), (z, past + shift)):
        found = optax_sam.trajectory_loss(*moved)
        assert found == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_an_example_without_a_past_contributes_zero(garbage, x64):
    z, past = jnp.asarray(rows(0, 4)), jnp.asarray(rows(1, 4))
    known = jnp.array([True, False, True, False])
    wanted = jax.value_and_grad(optax_sam.trajectory_loss)(z[::2], past[::2])
    past = jnp.where(known[:, None], past, garbage)
    for logits in (z, jnp.where(known[:, None], z, garbage)):
        value, gradient = jax.value_and_grad(optax_sam.trajectory_loss)(
            logits, past, where=known
        )
        # The mean is over all four.
        np.testing.assert_allclose(value, wanted[0] / 2, rtol=1e-14)
        np.testing.assert_allclose(gradient[::2], wanted[1] / 2, rtol=1e-14)
        assert not np.any(gradient[1::2])


def test_leading_axes_are_one_mean(x64):
    z, past, known = rows(0, 6), rows(1, 6), np.arange(6) % 3 > 0
    wanted = optax_sam.trajectory_loss(z, past, where=known)
    stacked = [x.reshape(2, 3, C) for x in (z, past)]
    found = optax_sam.trajectory_loss(*stacked, where=known.reshape(2, 3))
    assert found == pytest.approx(float(wanted), rel=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loss_is_computed_in_float32(dtype):
    z, past = jnp.asarray(rows(0), dtype), jnp.asarray(rows(1), dtype)
    value, gradient = jax.value_and_grad(optax_sam.trajectory_loss)(z, past)
    wide = optax_sam.trajectory_loss(*(x.astype("float32") for x in (z, past)))
    assert value.dtype == jnp.float32
    assert value == wide
    assert gradient.dtype == z.dtype


def test_traced_settings_of_the_loss():
    z, past = rows(0), rows(1)
    found = jax.jit(
        lambda step, tau: optax_sam.trajectory_loss(
            z, past, coefficient=jnp.where(step > 3, 0.8, 0.0), temperature=tau
        )
    )
    assert found(3, 5.0) == 0
    wanted = optax_sam.trajectory_loss(z, past, coefficient=0.8, temperature=2.0)
    assert found(4, 2.0) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("message", "past", "options"),
    [
        (r"logits \(2, 3\) and past_logits \(3, 3\).*saf_past_logits", rows(1, 3), {}),
        (r"where must.*\(2,\).*got bool \(2, 1\)", rows(1), {"where": [[True]] * 2}),
        (r"where must.*got int32 \(2,\)", rows(1), {"where": np.ones(2, np.int32)}),
        (r"coefficient must be.*-0\.1", rows(1), {"coefficient": -0.1}),
        (r"temperature must be.*\(0\.0, inf\); got 0", rows(1), {"temperature": 0}),
        (r"temperature must be.*nan", rows(1), {"temperature": np.nan}),
    ],
)
def test_refused_by_the_loss(message, past, options):
    with pytest.raises(ValueError, match=message):
        optax_sam.trajectory_loss(rows(0), past, **options)


def test_the_loss_needs_an_axis_of_classes():
    with pytest.raises(ValueError, match=re.escape("both (..., C)")):
        optax_sam.trajectory_loss(1.0, 2.0)


# Whole runs against the transcription: digits, shuffled, the last batch incomplete.

EPOCHS, EXAMPLES, BATCH = 10, 200, 64
ORDERS = [np.random.default_rng(e).permutation(EXAMPLES) for e in range(EPOCHS)]
SGD = {"lr": 0.5, "momentum": 0.9}


def logits_of(w, x):
    h = jnp.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    return h @ w["layer1/kernel"] + w["layer1/bias"]


def cross_entropy(z, y):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(z, y))


def train(tx, term, orders=ORDERS):
    """``term(logits, x, indices, opt_state, epoch)``; losses, weights and state."""
    X, y = (jnp.asarray(recorded.PROBLEM[name]) for name in "Xy")

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w, state, indices, epoch):
        def loss_fn(w):
            z = logits_of(w, X[indices])
            return cross_entropy(z, y[indices]) + term(
                z, X[indices], indices, state, epoch
            ), z

        (loss, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
        updates, state = tx.update(grads, state, w, logits=z, indices=indices)
        return optax.apply_updates(w, updates), state, loss

    w = jax.tree.map(jnp.asarray, recorded.initial("sgd"))
    state, losses = tx.init(w), []
    for epoch, order in enumerate(orders):
        for first in range(0, len(order), BATCH):
            indices = jnp.asarray(order[first : first + BATCH])
            w, state, loss = step(w, state, indices, epoch)
            losses.append(loss)
    return np.array(losses), w, state


def sgd():
    return optax.sgd(SGD["lr"], SGD["momentum"])


def saf_term(z, x, indices, state, epoch, coefficient=0.3):
    past, known = optax_sam.saf_past_logits(state, indices)
    return optax_sam.trajectory_loss(z, past, coefficient=coefficient, where=known)


def mesa_term(z, x, indices, state, epoch):
    past = logits_of(optax_sam.mesa_params(state), x)
    coefficient = jnp.where(epoch > 2, 0.8, 0.0)
    return optax_sam.trajectory_loss(z, past, coefficient=coefficient)


def transcribed(method):
    X, y = recorded.PROBLEM["X"], recorded.PROBLEM["y"]
    w = recorded.initial("sgd")
    return trajectory.train(method, w, X, y, ORDERS, BATCH, **SGD)


@functools.cache
def plain():
    """The losses of the base optimizer, from the transcription."""
    never = trajectory.SAF(EXAMPLES, 10, 1, EPOCHS, EPOCHS, 0.0, 1.0)
    return transcribed(never)[0]


@pytest.mark.parametrize(
    ("delay", "start", "end"), [(3, 4, 8), (2, 2, None), (1, 5, 7), (3, 2, None)]
)
def test_saf_is_the_authors_procedure(delay, start, end, x64):
    tx = optax.chain(
        optax_sam.saf(EXAMPLES, 10, delay=delay, start=start, end=end, dtype="float64"),
        sgd(),
    )
    losses, w, state = train(tx, saf_term)
    last = EPOCHS if end is None else end
    method = trajectory.SAF(EXAMPLES, 10, delay, start, last, 0.3, 5.0)
    wanted, wanted_w = transcribed(method)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-10)
    assert recorded.deviation(w, wanted_w) < 1e-10
    # The term matters, in its epochs alone, of four batches each.
    differs = (np.abs(losses - plain()) > 1e-6).reshape(EPOCHS, -1).any(axis=1)
    assert not np.any(differs[: start + 1])
    assert np.all(differs[start + 1 :])
    assert np.all(state[0].visits == EPOCHS)


def test_mesa_is_the_authors_procedure(x64):
    losses, w, state = train(optax.chain(sgd(), optax_sam.mesa(0.95)), mesa_term)
    method = trajectory.MESA(recorded.initial("sgd"), 0.95, 2, 0.8, 5.0)
    wanted, wanted_w = transcribed(method)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-10)
    assert recorded.deviation(w, wanted_w) < 1e-10
    assert recorded.deviation(optax_sam.mesa_params(state), method.v) < 1e-10
    assert np.max(np.abs(losses - plain())) > 1e-3


def test_the_gradient_of_the_transcription(x64):
    X, y = recorded.PROBLEM["X"][:32], recorded.PROBLEM["y"][:32]
    w = recorded.initial("sgd")
    _, z = trajectory.network(w, X)
    method = trajectory.MESA({k: 1.1 * x for k, x in w.items()}, 0.9, -1, 0.7, 2.0)
    loss, found = method(w, X, y, None, 0)

    def loss_fn(w):
        z = logits_of(w, X)
        past = trajectory.network(method.v, X)[1]
        term = optax_sam.trajectory_loss(z, past, coefficient=0.7, temperature=2.0)
        return cross_entropy(z, y) + term

    wanted = jax.value_and_grad(loss_fn)(jax.tree.map(jnp.asarray, w))
    assert loss == pytest.approx(float(wanted[0]), rel=1e-12)
    assert recorded.deviation(wanted[1], found) < 1e-12


def test_coefficient_zero_is_plain_training(x64):
    tx = optax.chain(optax_sam.saf(EXAMPLES, 10, start=0, dtype="float64"), sgd())
    losses, _, _ = train(tx, functools.partial(saf_term, coefficient=0.0))
    np.testing.assert_allclose(losses, plain(), rtol=0, atol=1e-12)


@functools.cache
def with_table_of(dtype):
    """Losses, and the table at the end."""
    member = optax_sam.saf(EXAMPLES, 10, start=2, dtype=dtype)
    losses, _, state = train(optax.chain(member, sgd()), saf_term)
    return losses, state[0].logits


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 0.02)]
)
def test_half_precision_of_the_table_hardly_matters(dtype, tolerance):
    (wanted, _), (losses, logits) = with_table_of("float32"), with_table_of(dtype)
    assert logits.dtype == dtype
    assert np.max(np.abs(losses - wanted)) < tolerance
    assert np.any(losses != wanted)


def test_an_incomplete_epoch_does_no_harm(x64):
    """A dropped batch shifts its own examples by a visit, and no others."""
    tx = optax.chain(optax_sam.saf(EXAMPLES, 10, start=0, dtype="float64"), sgd())
    orders = [order[: BATCH * 2] for order in ORDERS]
    seen = []

    def term(z, x, indices, state, epoch):
        past, known = optax_sam.saf_past_logits(state, indices)
        jax.debug.callback(lambda *xs: seen.append(xs), indices, known, past, z)
        return saf_term(z, x, indices, state, epoch)

    _, _, state = train(tx, term, orders)
    jax.effects_barrier()
    history = {}
    for indices, known, past, z in seen:
        for i, is_known, row, now in zip(indices, known, past, z, strict=True):
            visits = history.setdefault(int(i), [])
            assert is_known == (len(visits) >= 3)
            if is_known:
                np.testing.assert_array_equal(row, visits[-3])
            visits.append(now)
    assert {len(visits) for visits in history.values()} > {6, 7}
    for i, visits in history.items():
        assert state[0].visits[i] == len(visits)


# The table.


def test_ring_of_an_example():
    """The oldest entry is read, then overwritten."""
    tx = table(start=2, end=7)
    state, update = tx.init(None), jax.jit(functools.partial(record, tx))
    for visit in range(10):
        past, known = optax_sam.saf_past_logits(state, jnp.array([4, 1]))
        assert known.tolist() == [2 < visit < 7, False]
        if known[0]:
            np.testing.assert_array_equal(past[0], np.full(C, visit - 2.0))
        state = update(state, np.full((1, C), float(visit)), [4])
    assert state.visits.tolist() == [0, 0, 0, 0, 10, 0]
    np.testing.assert_array_equal(np.sort(state.logits[4, :, 0]), [8, 9])
    assert not np.any(state.logits[np.arange(N) != 4])


def test_an_example_is_unknown_before_its_first_delay():
    tx = table(delay=3)
    state = tx.init(None)
    for visit in range(5):
        _, known = optax_sam.saf_past_logits(state, jnp.array([0]))
        assert bool(known[0]) == (visit >= 3)
        state = record(tx, state, rows(visit, 1), [0])


def test_defaults():
    state = optax_sam.saf(N, C).init(None)
    assert state.logits.shape == (N, 3, C)
    assert state.logits.dtype == jnp.float32
    assert (int(state.start), int(state.end)) == (5, 2**31 - 1)
    w = jnp.zeros(2)
    tx = optax_sam.mesa()
    _, state = tx.update(w + 1, tx.init(w), w)
    np.testing.assert_allclose(state.average, 1 - 0.9998, rtol=1e-3)


@pytest.mark.parametrize("wrong", [-1, N, -N, 2**31 - 1])
def test_an_index_outside_the_data_set(wrong):
    tx = table()
    state = tx.init(None)
    for _ in range(3):
        state = record(tx, state, rows(0), [0, N - 1])
    with pytest.raises(ValueError, match=rf"saf: .*\[0, {N}\).*got \[{wrong}\]"):
        record(tx, state, rows(1), [1, wrong])
    # Not known while tracing: dropped and counted.
    after = jax.jit(functools.partial(record, tx))(state, rows(1), [1, wrong])
    wanted = record(tx, state, rows(1)[:1], [1])
    harness.assert_equal(after, wanted._replace(num_dropped=jnp.int32(1)))
    assert int(after.metrics()["dropped_examples"]) == 1
    for reader in (optax_sam.saf_past_logits, jax.jit(optax_sam.saf_past_logits)):
        past, known = reader(after, jnp.array([wrong, 0]))
        assert known.tolist() == [False, True]
        assert not np.any(past[0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_dtypes_of_indices(dtype, x64):
    """Data sets beyond the range of the dtype, and values beyond int32."""
    tx = optax_sam.saf(40_000, C, delay=1, start=0)
    indices = np.array([3, np.iinfo(dtype).max], dtype)
    first = record(tx, tx.init(None), rows(0)[:1], [3])
    for update in (record, jax.jit(record, static_argnums=0)):
        if np.iinfo(dtype).max < 40_000:
            state = update(tx, tx.init(None), rows(0), indices)
            assert int(state.num_dropped) == 0
            assert np.asarray(state.visits)[indices].tolist() == [1, 1]
        elif update is not record:
            state = update(tx, tx.init(None), rows(0), indices)
            harness.assert_equal(state, first._replace(num_dropped=jnp.int32(1)))
    wrapped = np.array([2**32 + 3, 3])
    state = jax.jit(record, static_argnums=0)(tx, tx.init(None), rows(0), wrapped)
    assert int(state.num_dropped) == 1
    assert state.visits[3] == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_repeated_index_the_last_row_counts_once(compiled):
    tx = table(delay=1)
    update = functools.partial(record, tx)
    update = jax.jit(update) if compiled else update
    logits = rows(0, 5)
    state = update(tx.init(None), logits, [2, 5, 2, 2, 5])
    assert state.visits.tolist() == [0, 0, 1, 0, 0, 1]
    past, known = optax_sam.saf_past_logits(state, jnp.array([2, 5]))
    np.testing.assert_array_equal(past, logits[[3, 4]].astype(np.float32))
    assert known.tolist() == [True, True]
    assert int(state.num_dropped) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_dropped(bad):
    tx = table()
    before = record(tx, tx.init(None), rows(0), [0, 1])
    logits = rows(1, 3)
    logits[1, 2] = bad
    after = record(tx, before, logits, [0, 1, 2])
    wanted = record(tx, before, logits[[0, 2]], [0, 2])
    harness.assert_equal(after, wanted._replace(num_dropped=jnp.int32(1)))
    # An earlier row of the same example stands in.
    after = record(tx, before, logits[:2], [3, 3])
    wanted = record(tx, before, logits[:1], [3])
    harness.assert_equal(after, wanted._replace(num_dropped=jnp.int32(1)))


def test_finite_means_in_the_dtype_of_the_table():
    logits = np.array([[1e5, 0.0, 0.0], [1.0, 2.0, 3.0]])
    for dtype, dropped in (("float16", 1), ("bfloat16", 0), ("float32", 0)):
        tx = table(dtype=dtype)
        state = record(tx, tx.init(None), logits, [0, 1])
        assert int(state.num_dropped) == dropped
        assert state.visits.tolist() == [1 - dropped, 1, 0, 0, 0, 0]
        assert harness.is_finite(state.logits)


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, np.dtype("float32")])
def test_the_past_is_read_in_float32(dtype):
    tx = table(delay=1, dtype=dtype)
    state = record(tx, tx.init(None), rows(0), [0, 1])
    assert state.logits.dtype == dtype
    assert state.logits.nbytes == N * C * jnp.dtype(dtype).itemsize
    past, _ = optax_sam.saf_past_logits(state, jnp.array([[0], [1]]))
    assert past.shape == (2, 1, C)
    assert past.dtype == jnp.float32
    np.testing.assert_allclose(past[:, 0], rows(0), rtol=1e-2)


def test_an_empty_batch_changes_nothing():
    tx = table()
    state = tx.init(None)
    after = record(tx, state, np.zeros((0, C)), np.zeros(0, int))
    harness.assert_equal(after, state)


# The average.


def test_average_of_the_weights(x64):
    """Against its closed form, with a decay that follows its own count."""
    decays, steps = [0.5, 0.9, 0.2], harness.tree(1)
    tx = optax.chain(
        optax.scale(-0.3), optax_sam.mesa(lambda count: jnp.array(decays)[count])
    )
    w = harness.tree(0)
    state = tx.init(w)
    average = w
    for decay in decays:
        updates, state = tx.update(steps, state, w)
        w = optax.apply_updates(w, updates)
        average = jax.tree.map(
            lambda v, x: decay * v + (1 - decay) * x,  # noqa: B023
            average,
            w,
        )
        harness.assert_close(optax_sam.mesa_params(state), average, 1e-14)
    assert int(state[1].count) == 3


def test_decay_zero_is_the_weights_and_one_the_first_weights():
    w, u = harness.tree(0), harness.tree(1)
    for decay, wanted in ((0.0, optax.apply_updates(w, u)), (1.0, w)):
        tx = optax_sam.mesa(decay)
        emitted, state = tx.update(u, tx.init(w), w)
        assert emitted is u
        harness.assert_equal(optax_sam.mesa_params(state), wanted)


def test_decay_zero_has_no_term(x64):
    losses, _, _ = train(optax.chain(sgd(), optax_sam.mesa(0.0)), mesa_term)
    np.testing.assert_allclose(losses, plain(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_do_not_enter_the_average(bad):
    w, u = harness.tree(0), harness.tree(1)
    tx = optax_sam.mesa(0.5)
    emitted, state = tx.update(harness.with_entry(u, bad), tx.init(w), w)
    assert not harness.is_finite(emitted)
    harness.assert_equal(state.average, w)
    assert int(state.count) == 1
    _, state = tx.update(u, state, w)
    harness.assert_close(
        state.average, jax.tree.map(lambda a, b: a + 0.5 * b, w, u), 1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_average_is_kept_in_float32_or_better(dtype, x64):
    w = harness.tree(0, dtype=dtype)
    u = harness.tree(1, scale=0.01, dtype=dtype)
    wide = jnp.promote_types(dtype, "float32")
    # A schedule in another precision does not change the state's.
    tx = optax_sam.mesa(lambda count: jnp.array(0.999, "float64"))
    state = tx.init(w)
    assert {x.dtype for x in jax.tree.leaves(state.average)} == {wide}
    for _ in range(20):
        _, after = tx.update(u, state, w)
        assert harness.kinds(after) == harness.kinds(state)
        state = after
    # Each step is far below what half precision resolves.
    cast = lambda tree: optax.tree.cast(tree, wide)
    new = cast(optax.apply_updates(w, u))
    wanted = jax.tree.map(
        lambda v, x: 0.999**20 * v + (1 - 0.999**20) * x, cast(w), new
    )
    harness.assert_close(optax_sam.mesa_params(state), wanted, 1e-6)
    back = optax_sam.mesa_params(state, w)
    assert harness.kinds(back) == harness.kinds(w)
    harness.assert_equal(back, optax.tree.cast(state.average, dtype))


def test_the_average_is_a_copy():
    w = harness.tree(0)
    state = optax_sam.mesa().init(w)
    pointers = lambda tree: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
    assert not pointers(w) & pointers(state)
    values = {"w": np.ones(3, np.float32)}
    state = optax_sam.mesa().init(values)
    values["w"][:] = 7
    assert np.all(state.average["w"] == 1)


@pytest.mark.parametrize("params", [{}, {"empty": np.zeros((0, 3))}, [None, ()]])
def test_nothing_to_average(params):
    tx = optax_sam.mesa()
    _, state = tx.update(params, tx.init(params), params)
    assert int(state.count) == 1


# Both, as Optax members.

MEMBERS = {
    "saf": (lambda: optax_sam.saf(N, C, delay=2, start=0), "first"),
    "mesa": (lambda: optax_sam.mesa(0.7), "last"),
}
every_member = pytest.mark.parametrize("name", MEMBERS)


def chained(name, base):
    build, place = MEMBERS[name]
    return optax.chain(*([build(), base] if place == "first" else [base, build()]))


def step_of(tx, **extra):
    def step(params, state, t):
        g = jax.tree.map(lambda x: jnp.sin(3 * x + t), params)
        indices = jnp.array([0, 3]) + t % 3
        logits = jnp.cos(indices[:, None] + jnp.arange(C) + t)
        updates, state = tx.update(
            g, state, params, logits=logits, indices=indices, unknown=3, **extra
        )
        return optax.apply_updates(params, updates), state

    return step


@every_member
def test_jit_scan_and_donation_equal_a_loop(name):
    params = harness.tree(0)
    tx = chained(name, optax.sgd(0.1, momentum=0.9))
    step = step_of(tx)
    wanted = params, tx.init(params)
    for t in range(8):
        wanted = step(*wanted, t)
    fresh = lambda: (jax.tree.map(jnp.copy, params), tx.init(params))
    donated = jax.jit(step, donate_argnums=(0, 1))
    found = fresh()
    for t in range(8):
        before = harness.kinds(found)
        found = donated(*found, t)
        assert harness.kinds(found) == before
    harness.assert_close(found, wanted, 1e-6)
    scanned = jax.jit(
        lambda carry: jax.lax.scan(
            lambda c, t: (step(*c, t), None), carry, jnp.arange(8)
        )[0],
        donate_argnums=0,
    )
    harness.assert_close(scanned(fresh()), wanted, 1e-6)
    assert harness.kinds(jax.eval_shape(fresh)) == harness.kinds(fresh())


@every_member
@pytest.mark.parametrize(
    ("base", "extra"),
    [
        (optax.sgd(0.1, momentum=0.9), {}),
        (optax.adamw(0.01), {}),
        (
            optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
            {"value": 1.0},
        ),
    ],
    ids=["sgd", "adamw", "reduce_on_plateau"],
)
def test_the_optimizer_is_not_disturbed(name, base, extra):
    params = harness.tree(0)
    tx = chained(name, base)
    base = optax.with_extra_args_support(base)
    step, base_step = jax.jit(step_of(tx, **extra)), jax.jit(step_of(base, **extra))
    found, wanted = (params, tx.init(params)), (params, base.init(params))
    for t in range(5):
        found, wanted = step(*found, t), base_step(*wanted, t)
    harness.assert_close(found[0], wanted[0], 1e-6)


@every_member
def test_a_saved_state_continues(name):
    tx = chained(name, optax.sgd(0.1, momentum=0.9))
    step = jax.jit(step_of(tx))
    start = harness.tree(0)
    half = start, tx.init(start)
    for t in range(4):
        half = step(*half, t)
    target = start, tx.init(start)
    restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(half))
    harness.assert_equal(restored, half)
    for t in range(4, 8):
        half, restored = step(*half, t), step(*restored, t)
    harness.assert_equal(restored, half)


def test_arguments_that_inject_hyperparams_must_not_trace():
    arguments = "num_examples num_classes delay start end dtype axis_name"
    assert optax_sam.static_args(optax_sam.saf) == tuple(arguments.split())
    assert optax_sam.static_args(optax_sam.mesa) == ()
    injected = optax.inject_hyperparams(
        optax_sam.saf, static_args=optax_sam.static_args(optax_sam.saf)
    )(N, C, delay=1, start=0)
    state = record(injected, injected.init(jnp.zeros(2)), rows(0), [0, 1])
    _, known = optax_sam.saf_past_logits(state, jnp.array([1, 2]))
    assert known.tolist() == [True, False]

    injected = optax.inject_hyperparams(optax_sam.mesa)(decay=0.9)
    w = jnp.array([1.0])
    state = injected.init(w)
    state.hyperparams["decay"] = jnp.array(0.25)
    _, state = jax.jit(injected.update)(w, state, w)
    np.testing.assert_allclose(optax_sam.mesa_params(state), [1.75])


def test_readers_look_everywhere():
    w = {"w": jnp.ones(2)}
    inner = optax.chain(table(delay=1), optax.sgd(0.1), optax_sam.mesa(0.0))
    for tx in (
        inner,
        optax.apply_if_finite(inner, 3),
        optax.MultiSteps(inner, 1),
    ):
        updates, state = tx.update(
            w, tx.init(w), w, logits=jnp.asarray(rows(0)), indices=jnp.array([0, 1])
        )
        new = optax.apply_updates(w, updates)
        harness.assert_close(optax_sam.mesa_params({"train": [state]}), new, 1e-7)
        past, known = optax_sam.saf_past_logits((state, 3), jnp.array([1]))
        assert known.tolist() == [True]
        np.testing.assert_allclose(past[0], rows(0)[1], rtol=1e-6)


def test_readers_look_into_nnx():
    model = nnx.Linear(2, C, rngs=nnx.Rngs(0))
    tx = optax.chain(table(delay=1), optax.sgd(0.1), optax_sam.mesa(0.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    logits, indices = jnp.asarray(rows(0)), jnp.array([0, 1])
    optimizer.update(model, grads, logits=logits, indices=indices)
    past, known = optax_sam.saf_past_logits(optimizer.opt_state, indices)
    harness.assert_equal(past, logits)
    assert known.tolist() == [True, True]
    average = optax_sam.mesa_params(optimizer.opt_state)
    averaged = nnx.merge(nnx.graphdef(model), average)
    np.testing.assert_allclose(averaged.kernel[...], model.kernel[...], rtol=1e-6)


def test_gradient_accumulation():
    """SAF outside sees every micro-batch, MESA inside every step of the optimizer."""
    tx = optax.chain(
        table(delay=1),
        optax.MultiSteps(
            optax.chain(optax.sgd(0.1), optax_sam.mesa(0.5)), every_k_schedule=2
        ).gradient_transformation(),
    )
    w = jnp.array([1.0])
    state = tx.init(w)
    for i in range(4):
        updates, state = tx.update(
            jnp.ones(1),
            state,
            w,
            logits=jnp.asarray(rows(i, 1)),
            indices=jnp.array([i]),
        )
        w = optax.apply_updates(w, updates)
    _, known = optax_sam.saf_past_logits(state, jnp.arange(N))
    assert known.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(w, [0.8], rtol=1e-6)
    np.testing.assert_allclose(optax_sam.mesa_params(state), [0.875], rtol=1e-6)


# Cost.


def test_floating_point_operations():
    """SAF: a gradient. MESA: a gradient and a forward pass."""
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params = jax.eval_shape(problem.params)
    assert sum(x.size for x in jax.tree.leaves(params)) >= 1e5
    x, y = jax.eval_shape(lambda: problem.batch(0))
    indices = jax.ShapeDtypeStruct((128,), jnp.int32)

    def forward(w, x):
        for i in range(3):
            layer = w[f"layer{i}"]
            x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"]
        return x

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def of_step(tx, term):
        def step(w, state, x, y, indices):
            def loss_fn(w):
                z = forward(w, x)
                return cross_entropy(z, y) + term(z, x, state, indices), z

            (_, z), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
            updates, state = tx.update(grads, state, w, logits=z, indices=indices)
            return optax.apply_updates(w, updates), state

        state = jax.eval_shape(tx.init, params)
        return flops(step, params, state, x, y, indices)

    base = lambda: optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    gradient = of_step(base(), lambda *_: 0.0)
    past = lambda z, x, state, _: forward(optax_sam.mesa_params(state), x)
    for tx, term, wanted in (
        (
            optax.chain(optax_sam.saf(50_000, 10), base()),
            lambda z, x, state, i: saf_term(z, x, i, state, 0),
            gradient,
        ),
        (
            optax.chain(base(), optax_sam.mesa()),
            lambda *args: optax_sam.trajectory_loss(args[0], past(*args)),
            gradient + flops(forward, params, x),
        ),
    ):
        assert of_step(tx, term) == pytest.approx(wanted, rel=0.03)


def test_bytes_of_state():
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    state = jax.eval_shape(optax_sam.saf(50_000, 10).init, None)
    assert sum(x.size * x.dtype.itemsize for x in state) < 6.3e6
    params = harness.tree()
    assert size(optax_sam.mesa().init(params)) == size(params) + 4


# Eight devices.

DEVICES = 8


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def batches():
    """Sixteen rows with a repeated and a missing example, four times."""
    rng = np.random.default_rng(0)
    for t in range(4):
        indices = rng.permutation(32)[:16]
        indices[3] = indices[12]
        indices[7] = 32 if t == 2 else indices[7]
        logits = rng.normal(size=(16, C)).astype(np.float32)
        logits[5, 0] = np.nan if t == 1 else 0
        yield jnp.asarray(logits), jnp.asarray(indices, jnp.int32)


def on_one_device(dtype="float32"):
    tx = optax_sam.saf(32, C, delay=1, start=0, dtype=dtype)
    state, pasts = tx.init(None), []
    for logits, indices in batches():
        pasts.append(optax_sam.saf_past_logits(state, indices))
        state = jax.jit(functools.partial(record, tx))(state, logits, indices)
    assert int(state.num_dropped) == 2
    return state, pasts


def assert_replicated(tree):
    for leaf in jax.tree.leaves(tree):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == DEVICES
        assert all(np.array_equal(shards[0], shard) for shard in shards)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_rows_of_all_devices_are_recorded_on_all(mesh, dtype, check_vma):
    tx = optax_sam.saf(32, C, delay=1, start=0, dtype=dtype, axis_name="data")

    def step(state, logits, indices):
        past = optax_sam.saf_past_logits(state, indices)
        g = jnp.ones(2)
        _, state = tx.update(g, state, g, logits=logits, indices=indices)
        return state, past

    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P(), P("data")),
            check_vma=check_vma,
        )
    )
    wanted, pasts = on_one_device(dtype)
    state = tx.init(None)
    for (logits, indices), past in zip(batches(), pasts, strict=True):
        state, found = step(state, logits, indices)
        harness.assert_equal(found, past)
    harness.assert_equal(state, wanted)
    assert_replicated(state)


@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "sharded"])
def test_a_sharded_batch_needs_no_axis_name(mesh, spec):
    """Also with the table spread over the devices."""
    wanted, _ = on_one_device()
    tx = optax_sam.saf(32, C, delay=1, start=0)
    place = lambda x: NamedSharding(mesh, spec if x.ndim else P())
    state = tx.init(None)
    shardings = jax.tree.map(place, state)
    state = jax.device_put(state, shardings)
    step = jax.jit(functools.partial(record, tx), out_shardings=shardings)
    for batch in batches():
        state = step(state, *jax.device_put(batch, NamedSharding(mesh, P("data"))))
    harness.assert_equal(jax.device_get(state), jax.device_get(wanted))


def test_explicit_axes_want_replicated_rows():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    tx = optax_sam.saf(32, C, delay=1, start=0)
    wanted, pasts = on_one_device()

    def step(state, logits, indices):
        everywhere = jax.sharding.reshard((logits, indices), P())
        past = optax_sam.saf_past_logits(state, everywhere[1])
        return record(tx, state, *everywhere), past

    with jax.set_mesh(mesh):
        state = tx.init(None)
        for batch, past in zip(batches(), pasts, strict=True):
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            state, found = jax.jit(step)(state, *batch)
            harness.assert_equal(jax.device_get(found), jax.device_get(past))
    harness.assert_equal(jax.device_get(state), jax.device_get(wanted))


def test_pmap():
    tx = optax_sam.saf(32, C, delay=1, start=0, axis_name="data")
    step = jax.pmap(functools.partial(record, tx), axis_name="data")
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tx.init(None))
    for batch in batches():
        state = step(state, *(x.reshape(DEVICES, 2, *x.shape[1:]) for x in batch))
    wanted, _ = on_one_device()
    for device in range(DEVICES):
        harness.assert_equal(jax.tree.map(lambda x: x[device], state), wanted)  # noqa: B023


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_the_average_keeps_the_sharding_of_the_parameters(axes):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axes,))
    w = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("data")))
    tx = optax_sam.mesa(0.5)
    state = tx.init(w)
    for _ in range(2):
        assert state.average.sharding.is_equivalent_to(w.sharding, 1)
        _, state = jax.jit(tx.update)(w, state, w)
    np.testing.assert_allclose(state.average, 1.75 * np.arange(16.0))


# Errors.

CALL = re.escape("tx.update(grads, opt_state, params, logits=logits, indices=indices)")


@pytest.mark.parametrize(
    ("message", "logits", "indices"),
    [
        (f"saf needs logits.*{CALL}", None, [0, 1]),
        (f"saf needs indices.*{CALL}", rows(0), None),
        (rf"saf: logits must be \(B, 3\).*\(2, 4\).*{CALL}", np.ones((2, 4)), [0, 1]),
        (r"saf: .*logits \(3,\) and indices \(3,\)", np.ones(3), [0, 1, 2]),
        (r"saf: .*logits \(2, 3\) and indices \(3,\)", rows(0), [0, 1, 2]),
        (r"saf: .*logits \(2, 3\) and indices \(2, 1\)", rows(0), [[0], [1]]),
        (r"saf: .*logits \(1, 3\) and indices \(\)", rows(0, 1), 0),
        (rf"indices must be integers.*float32 \(2,\).*{CALL}", rows(0), [0.0, 1.0]),
        (r"indices must be integers.*bool", rows(0), [True, False]),
        (r"logits must be real floats; got int32", np.ones((2, 3), np.int32), [0, 1]),
    ],
)
def test_refused_rows(message, logits, indices):
    tx = table()
    g = jnp.ones(2)
    logits, indices = (x if x is None else jnp.asarray(x) for x in (logits, indices))
    for wrap in (lambda f: f, jax.jit):
        update = wrap(lambda z, i: tx.update(g, tx.init(g), g, logits=z, indices=i))
        with pytest.raises(ValueError, match=message):
            update(logits, indices)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("num_examples must be an integer >= 1; got 0", {"num_examples": 0}),
        ("num_classes must be an integer >= 1; got 2.5", {"num_classes": 2.5}),
        ("delay must be an integer >= 1; got 0", {"delay": 0}),
        ("start must be an integer >= 0; got -1", {"start": -1}),
        ("end must be an integer >= 7; got 6", {"end": 6}),
        ("end must be an integer >= 4; got 3", {"start": 0, "end": 3}),
        ("delay sets a shape.*static_args", {"delay": jnp.array(3)}),
        ("dtype must be one of float32.*int8", {"dtype": "int8"}),
        ("dtype must be one of float32.*None", {"dtype": None}),
        ("dtype must be one of float32.*float8", {"dtype": jnp.float8_e4m3fn}),
    ],
)
def test_refused_settings(message, options):
    with pytest.raises(ValueError, match=message):
        optax_sam.saf(**{"num_examples": N, "num_classes": C, **options})


def test_the_last_end_that_leaves_an_epoch():
    for options in ({"start": 5, "end": 7}, {"start": 0, "delay": 3, "end": 4}):
        tx = table(**options)
        state, known = tx.init(None), 0
        for visit in range(9):
            known += int(optax_sam.saf_past_logits(state, jnp.array([0]))[1][0])
            state = record(tx, state, rows(visit, 1), [0])
        assert known == 1


@pytest.mark.parametrize("decay", [-0.1, 1.1, np.nan, "much"])
def test_refused_decay(decay):
    with pytest.raises(ValueError, match=r"decay must be.*\[0\.0, 1\.0\]"):
        optax_sam.mesa(decay)


def test_mesa_needs_params():
    tx = optax_sam.mesa()
    with pytest.raises(ValueError, match=r"mesa needs the parameters: tx\.update"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_mesa_refuses_a_part_of_the_parameters():
    params = harness.tree()
    message = r"mesa stands inside.*lack the other.*partition\(.*optax_sam\.mesa\(\)"
    mask = {"layer": True, "gain": False}
    with pytest.raises(ValueError, match=message):
        optax.masked(optax_sam.mesa(), mask).init(params)
    tx = optax_sam.mesa()
    placeholders = {**params, "gain": optax.MaskedNode()}
    with pytest.raises(ValueError, match=message):
        tx.update(placeholders, tx.init(params), placeholders)


@pytest.mark.parametrize("count", [0, 2])
def test_readers_want_one_state(count):
    w = jnp.ones(2)
    read_saf = lambda state: optax_sam.saf_past_logits(state, jnp.array([0]))
    for member, read, name in (
        (table(), read_saf, "saf"),
        (optax_sam.mesa(), optax_sam.mesa_params, "mesa"),
    ):
        state = optax.chain(*[member] * count, optax.sgd(0.1)).init(w)
        message = rf"one state of {name}, found {count}; .*optax_sam\.{name}\("
        with pytest.raises(ValueError, match=message):
            read(state)


def test_the_reader_wants_integers():
    with pytest.raises(ValueError, match="indices must be integers"):
        optax_sam.saf_past_logits(table().init(None), jnp.array([0.0]))
