"""SAF: whole runs, the table of past logits, and its replicas on devices."""

import functools
import re

import conformance
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import recorded
import trajectory_runs as runs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import trajectory
from trajectory_runs import EPOCHS, EXAMPLES, rows

import optax_sam

N, C = 6, 3


def table(**options):
    """A small one whose term starts as early as it can."""
    return optax_sam.saf(N, C, **{"delay": 2, "start": 0, **options})


def record(tx, state, logits, indices):
    """The state after a batch, from an update outside jit."""
    g = {"w": jnp.ones(2)}
    updates, state = tx.update(
        g, state, g, logits=jnp.asarray(logits), indices=jnp.asarray(indices)
    )
    assert updates is g
    return state


# Whole runs against the transcription.


@pytest.mark.parametrize(("delay", "start", "end"), [(3, 4, 8), (2, 2, None)])
def test_saf_is_the_authors_procedure(delay, start, end, x64):
    tx = optax.chain(
        optax_sam.saf(EXAMPLES, 10, delay=delay, start=start, end=end, dtype="float64"),
        runs.sgd(),
    )
    losses, w, state = runs.train(tx, runs.saf_term)
    last = EPOCHS if end is None else end
    method = trajectory.SAF(EXAMPLES, 10, delay, start, last, 0.3, 5.0)
    wanted, wanted_w = runs.transcribed(method)
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-10)
    assert recorded.deviation(w, wanted_w) < 1e-10
    conformance.hold(conformance.PAPER, w, wanted_w, len(losses))
    # The term matters, in its epochs alone, of four batches each.
    differs = (np.abs(losses - runs.plain()) > 1e-6).reshape(EPOCHS, -1).any(axis=1)
    assert not np.any(differs[: start + 1])
    assert np.all(differs[start + 1 :])
    assert np.all(state[0].visits == EPOCHS)


def test_coefficient_and_decay_zero_are_plain_training(x64):
    """Of SAF and MESA, which go together."""
    saf = optax_sam.saf(EXAMPLES, 10, start=0, dtype="float64")
    tx = optax.chain(saf, runs.sgd(), optax_sam.mesa(0.0))
    of_saf = functools.partial(runs.saf_term, coefficient=0.0)
    term = lambda *args: of_saf(*args) + runs.mesa_term(*args)
    losses, _, _ = runs.train(tx, term)
    np.testing.assert_allclose(losses, runs.plain(), rtol=0, atol=1e-12)


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


def test_an_example_is_unknown_before_its_first_delay_and_outside_its_bounds():
    for known, options in (
        ([3, 4], {"delay": 3}),
        ([6], {"start": 5, "end": 7}),  # the last end that leaves an epoch
        ([3], {"delay": 3, "end": 4}),
    ):
        tx = table(**options)
        state, found = tx.init(None), []
        for visit in range(5 if len(known) == 2 else 9):
            if optax_sam.saf_past_logits(state, jnp.array([0]))[1][0]:
                found.append(visit)
            state = record(tx, state, rows(visit, 1), [0])
        assert found == known


def test_defaults():
    state = optax_sam.saf(N, C).init(None)
    assert (state.logits.shape, state.logits.dtype) == ((N, 3, C), jnp.float32)
    assert (int(state.start), int(state.end)) == (5, 2**31 - 1)


@pytest.mark.parametrize("wrong", [-1, N, 2**31 - 1])
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


@pytest.mark.parametrize(
    ("dtype", "other"), [("int8", 127), ("uint32", 2**31 + 3), ("int64", 2**32 + 3)]
)
def test_dtypes_of_indices(dtype, other, x64):
    """Data sets beyond the range of the dtype, and values that would wrap in int32."""
    tx, indices = optax_sam.saf(300, C, delay=1, start=0), np.array([other, 3], dtype)
    state = jax.jit(functools.partial(record, tx))(tx.init(None), rows(0), indices)
    known = [3] if other > 300 else [3, other]
    assert np.flatnonzero(state.visits).tolist() == known
    assert int(state.num_dropped) == 2 - len(known)
    np.testing.assert_array_equal(state.logits[3, 0], rows(0)[1].astype(np.float32))


def test_of_a_repeated_index_the_last_row_counts_once():
    tx, logits = table(delay=1), rows(0, 5)
    state = record(tx, tx.init(None), logits, [2, 5, 2, 2, 5])
    assert state.visits.tolist() == [0, 0, 1, 0, 0, 1]
    past, known = optax_sam.saf_past_logits(state, jnp.array([2, 5]))
    np.testing.assert_array_equal(past, logits[[3, 4]].astype(np.float32))
    assert known.tolist() == [True, True]
    assert int(state.num_dropped) == 0


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
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
    # An empty batch changes nothing.
    harness.assert_equal(record(tx, after, np.zeros((0, C)), np.zeros(0, int)), after)


def test_finite_means_in_the_dtype_of_the_table():
    logits = np.array([[1e5, 0.0, 0.0], [1.0, 2.0, 3.0]])
    for dtype, dropped in (("float16", 1), ("bfloat16", 0), ("float32", 0)):
        tx = table(dtype=dtype)
        state = record(tx, tx.init(None), logits, [0, 1])
        assert int(state.num_dropped) == dropped
        assert state.visits.tolist() == [1 - dropped, 1, 0, 0, 0, 0]
        assert harness.is_finite(state.logits)


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16])
def test_the_past_is_read_in_float32(dtype):
    tx = table(delay=1, dtype=dtype)
    state = record(tx, tx.init(None), rows(0), [0, 1])
    assert state.logits.dtype == dtype
    assert state.logits.nbytes == N * C * jnp.dtype(dtype).itemsize
    past, _ = optax_sam.saf_past_logits(state, jnp.array([[0], [1]]))
    assert past.shape == (2, 1, C)
    assert past.dtype == jnp.float32
    np.testing.assert_allclose(past[:, 0], rows(0), rtol=1e-2)


# As an Optax member.


def test_it_stands_before_an_optimizer_and_disturbs_it_in_no_form():
    plateau = optax.contrib.reduce_on_plateau()
    base = optax.chain(optax.sgd(0.1, momentum=0.9), plateau)
    runs.assert_stands_beside("first", table(), base, value=1.0)


def test_arguments_that_inject_hyperparams_must_not_trace():
    arguments = "num_examples num_classes delay start end dtype axis_name"
    static = optax_sam.static_args(optax_sam.saf)
    assert static == tuple(arguments.split())
    factory = optax.inject_hyperparams(optax_sam.saf, static_args=static)
    injected = factory(N, C, delay=1, start=0)
    state = record(injected, injected.init(jnp.zeros(2)), rows(0), [0, 1])
    _, known = optax_sam.saf_past_logits(state, jnp.array([1, 2]))
    assert known.tolist() == [True, False]


def test_readers_look_everywhere():
    """Into wrappers and containers."""
    w = {"w": jnp.ones(2)}
    inner = optax.chain(table(delay=1), optax.sgd(0.1), optax_sam.mesa(0.0))
    indices, batch = jnp.array([0, 1]), jnp.asarray(rows(0))
    for tx in (inner, optax.apply_if_finite(inner, 3), optax.MultiSteps(inner, 1)):
        updates, state = tx.update(w, tx.init(w), w, logits=batch, indices=indices)
        new = optax.apply_updates(w, updates)
        harness.assert_close(optax_sam.mesa_params({"train": [state]}), new, 1e-7)
        past, known = optax_sam.saf_past_logits((state, 3), indices)
        assert known.tolist() == [True, True]
        harness.assert_equal(past, batch)


def test_gradient_accumulation():
    """SAF outside sees every micro-batch, MESA inside every step of the optimizer."""
    inner = optax.MultiSteps(optax.chain(optax.sgd(0.1), optax_sam.mesa(0.5)), 2)
    tx = optax.chain(table(delay=1), inner.gradient_transformation())
    w = jnp.array([1.0])
    state = tx.init(w)
    for i in range(4):
        batch = {"logits": jnp.asarray(rows(i, 1)), "indices": jnp.array([i])}
        updates, state = tx.update(jnp.ones(1), state, w, **batch)
        w = optax.apply_updates(w, updates)
    _, known = optax_sam.saf_past_logits(state, jnp.arange(N))
    assert known.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(w, [0.8], rtol=1e-6)
    np.testing.assert_allclose(optax_sam.mesa_params(state), [0.875], rtol=1e-6)


@pytest.mark.parametrize("name", ["saf", "mesa"])
def test_saf_costs_a_gradient_and_mesa_a_forward_pass_more(name):
    problem = problems.mlp((32, 288, 320, 10), batch_size=128)
    params = jax.eval_shape(problem.params)
    x, _ = jax.eval_shape(lambda: problem.batch(0))
    base = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    wanted = runs.flops_of_a_step(problem, base, lambda *_: 0.0)
    if name == "saf":
        tx = optax.chain(optax_sam.saf(50_000, 10), base)
        term = lambda z, x, state, i: runs.saf_term(z, x, i, state, 0)
    else:
        wanted += runs.flops(runs.forward, params, x)
        tx = optax.chain(base, optax_sam.mesa())
        past = lambda x, state: runs.forward(optax_sam.mesa_params(state), x)
        term = lambda z, x, state, _: optax_sam.trajectory_loss(z, past(x, state))
    found = runs.flops_of_a_step(problem, tx, term)
    assert found == pytest.approx(wanted, rel=0.03)


# Eight devices.

DEVICES = 8


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


@functools.cache
def on_one_device(dtype="float32"):
    """The state after all batches, and what was read before each; two are dropped."""
    tx = optax_sam.saf(32, C, delay=1, start=0, dtype=dtype)
    state, pasts, step = tx.init(None), [], jax.jit(functools.partial(record, tx))
    for logits, indices in batches():
        pasts.append(optax_sam.saf_past_logits(state, indices))
        state = step(state, logits, indices)
    assert int(state.num_dropped) == 2
    return jax.device_get((state, pasts))


def make_mesh(axes=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(axes,))


def read_and_record(tx, state, logits, indices):
    past = optax_sam.saf_past_logits(state, indices)
    return record(tx, state, logits, indices), past


@pytest.mark.parametrize(
    ("dtype", "check_vma"), [("float32", True), ("bfloat16", False)]
)
def test_the_rows_of_all_devices_are_recorded_on_all(dtype, check_vma):
    tx = optax_sam.saf(32, C, delay=1, start=0, dtype=dtype, axis_name="data")
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
    step = functools.partial(read_and_record, tx)
    step = jax.shard_map(step, mesh=make_mesh(), check_vma=check_vma, **specs)
    (wanted, pasts), state, step = on_one_device(dtype), tx.init(None), jax.jit(step)
    for batch, past in zip(batches(), pasts, strict=True):
        state, found = step(state, *batch)
        harness.assert_equal(jax.device_get(found), past)
    harness.assert_equal(jax.device_get(state), wanted)
    for leaf in state:
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == DEVICES
        assert all(np.array_equal(shards[0], shard) for shard in shards)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [(AxisType.Auto, P("data")), (AxisType.Explicit, P())],
    ids=["table sharded", "explicit axes"],
)
def test_a_sharded_batch_needs_no_axis_name(axes, spec):
    """Explicit axes want replicated rows."""
    tx, mesh = optax_sam.saf(32, C, delay=1, start=0), make_mesh(axes)

    def step(state, *batch):
        if axes == AxisType.Explicit:
            batch = jax.sharding.reshard(batch, P())
        return read_and_record(tx, state, *batch)

    place = lambda x: NamedSharding(mesh, spec if x.ndim else P())
    (wanted, pasts), state = on_one_device(), tx.init(None)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(place, state)
        state = jax.device_put(state, shardings)
        step = jax.jit(step, out_shardings=(shardings, None))
        for batch, past in zip(batches(), pasts, strict=True):
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            state, found = step(state, *batch)
            harness.assert_equal(jax.device_get(found), past)
    harness.assert_equal(jax.device_get(state), wanted)


# Errors.

CALL = re.escape("tx.update(grads, opt_state, params, logits=logits, indices=indices)")


@pytest.mark.parametrize(
    ("message", "logits", "indices"),
    [
        (rf"saf: logits must be \(B, 3\).*\(2, 4\).*{CALL}", np.ones((2, 4)), [0, 1]),
        (r"saf: .*logits \(2, 3\) and indices \(2, 1\)", rows(0), [[0], [1]]),
        (r"saf: .*logits \(1, 3\) and indices \(\)", rows(0, 1), 0),
        (rf"indices must be integers.*float32 \(2,\).*{CALL}", rows(0), [0.0, 1.0]),
        (r"indices must be integers.*bool", rows(0), [True, False]),
        (r"logits must be real floats; got int32", np.ones((2, 3), np.int32), [0, 1]),
    ],
)
def test_refused_rows(message, logits, indices):
    tx = table()
    update = functools.partial(record, tx, tx.init(None))
    for run in (update, jax.jit(update)):
        with pytest.raises(ValueError, match=message):
            run(logits, jnp.asarray(indices))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("num_examples must be an integer >= 1; got 0", {"num_examples": 0}),
        ("start must be an integer >= 0; got -1", {"start": -1}),
        ("end must be an integer >= 7; got 6", {"end": 6}),
        ("end must be an integer >= 4; got 3", {"start": 0, "end": 3}),
        ("delay sets a shape.*static_args", {"delay": jnp.array(3)}),
        ("dtype must be one of float32.*int8", {"dtype": "int8"}),
        ("dtype must be one of float32.*None", {"dtype": None}),
    ],
)
def test_refused_settings(message, options):
    with pytest.raises(ValueError, match=message):
        optax_sam.saf(**{"num_examples": N, "num_classes": C, **options})


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
