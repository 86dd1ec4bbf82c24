"""What runs on the host: progress bars, and means over data from an iterator."""

import functools
import io
import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_sam import sharpness

B = 3


def loss_fn(w, batch):
    """The mean of the examples that a batch marks as real."""
    x, y, real = batch
    losses = (jnp.tanh(x @ w["k"]) @ w["v"] - y) ** 2
    return jnp.sum(losses * real) / jnp.sum(real)


@functools.cache
def setting():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    w, v = ({"k": draw(4, 3), "v": draw(3)} for _ in range(2))
    return w, v, (draw(10, 4), draw(10), jnp.ones(10))


def batches():
    _, _, data = setting()
    return jax.tree.map(lambda x: x[: 3 * B].reshape(B, 3, *x.shape[1:]), data)


@pytest.mark.parametrize("jit", [True, False])
def test_a_product_ticks_once_for_each_batch(jit):
    w, v, _ = setting()
    with sharpness.progress(loss_fn, total=B) as counted:
        hvp = lambda w, batches, v: sharpness.hvp(counted, w, batches, v)
        hvp = jax.jit(hvp) if jit else hvp
        Hv = hvp(w, batches(), v)
        assert counted.count == B
        harness.assert_close_in_size(Hv, sharpness.hvp(loss_fn, w, batches(), v), 1e-6)
        hvp(w, batches(), v)
        hvp(w, jax.tree.map(lambda x: x[:1], batches()), v)
    assert counted.count == 2 * B + 1


def test_devices_count_together():
    w, v, data = setting()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    twice = jax.tree.map(lambda x: jnp.concatenate([x[:8], x[:8]]), data)
    stacked = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), twice)
    with sharpness.progress(loss_fn) as counted:
        # One program over sharded examples: a batch is one evaluation.
        hvp = jax.jit(functools.partial(sharpness.hvp, counted))
        parts = jax.device_put(stacked, NamedSharding(mesh, P(None, "d")))
        Hv = hvp(w, parts, v)
        harness.assert_close_in_size(Hv, sharpness.hvp(loss_fn, w, stacked, v), 1e-6)
        assert counted.count == 2
        # Each device with batches of its own: those of all.
        own = jax.shard_map(
            lambda w, batches: sharpness.hvp(counted, w, batches, v, axis_name="d"),
            mesh=mesh, in_specs=(P(), P("d")), out_specs=P(),
        )  # fmt: skip
        batches = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), twice)
        harness.assert_close_in_size(jax.jit(own)(w, batches), Hv, 1e-6)
    assert counted.count == 2 + 8


def tick(times=B, **options):
    with sharpness.progress(lambda w, b: w, **options) as counted:
        for _ in range(times):
            counted(1.0, None)
    return counted


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("total", [B, None])
def test_the_bar_is_written(rich, total, monkeypatch, capfd):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    file = io.StringIO()
    tick(total=total, file=file, description="a bar")
    last = file.getvalue().strip().split("\r")[-1]
    assert last.startswith("a bar ")
    assert ("━" in last) == rich
    if total or not rich:
        assert (f"{B}/{B}" if total else f"{B}") in last
    # Without a file or a terminal nothing is written.
    assert tick(total=total).count == B
    assert capfd.readouterr() == ("", "")
    if not rich:
        # A terminal gets a bar without being asked.
        monkeypatch.setattr(sys, "stderr", Terminal())
        tick(total=B)
        assert sys.stderr.getvalue().endswith(f"\rsharpness {B}/{B}\n")


def test_after_the_block_the_bar_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    file, seen = io.StringIO(), []

    def interrupted():
        with sharpness.progress(lambda w, b: w, total=9, file=file) as counted:
            seen.append(counted)
            counted(1.0, None)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    written = file.getvalue()
    assert written.endswith("sharpness 1/9\n")
    seen[0](1.0, None)
    assert seen[0].count == 2
    assert file.getvalue() == written


def test_the_bar_waits_for_the_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    file = io.StringIO()
    slow = lambda w, batch: jnp.linalg.norm(w @ (w @ (w @ batch)))
    batches = jnp.ones((60, 300, 300))
    with sharpness.progress(slow, file=file) as counted:
        run = jax.jit(lambda w, b: jax.lax.map(functools.partial(counted, w), b))
        run(batches[0], batches)  # and nobody asks for the result
    assert file.getvalue().endswith("sharpness 60\n")


def test_only_the_first_process_writes(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    file = io.StringIO()
    assert tick(total=B, file=file).count == B
    assert not file.getvalue()


def uneven():
    """Ten examples in batches of four, four and two."""
    _, _, data = setting()
    return [tuple(x[i : i + 4] for x in data) for i in (0, 4, 8)]


def padded():
    """The same with two that do not count, as one stack."""
    more = lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])])
    return tuple(more(x).reshape(3, 4, *x.shape[1:]) for x in setting()[2])


def stacked(batch):
    return jax.tree.map(lambda x: x[None], batch)


def test_the_host_loop_is_the_scan():
    w, v, data = setting()
    of_batch = jax.jit(lambda batch: sharpness.hvp(loss_fn, w, stacked(batch), v))
    weights = jnp.array([4, 4, 2])
    scanned = sharpness.hvp(loss_fn, w, padded(), v, weights=weights)
    harness.assert_close(sharpness.accumulate(of_batch, uneven()), scanned, 1e-5)
    assert of_batch._cache_size() == 2  # one for each size
    harness.assert_close_in_size(scanned, of_batch(data), 1e-6)
    # From a generator, and with padding that the weight knows of.
    split = [tuple(x[i] for x in padded()) for i in range(3)]
    real = lambda batch: batch[2].sum()
    counted = sharpness.accumulate(of_batch, iter(split), weight=real)
    harness.assert_close(counted, scanned, 1e-5)
    # Counting batches, or padding, would be another number.
    as_batches = sharpness.accumulate(of_batch, uneven(), weight=lambda batch: 1)
    for other in (as_batches, sharpness.accumulate(of_batch, split)):
        with pytest.raises(AssertionError):
            harness.assert_close(other, scanned, 1e-3, atol=1e-3)


def test_means_are_taken_in_float32_or_float64():
    ones = [jnp.ones(m, jnp.bfloat16) for m in (255, 2)]
    mean = sharpness.accumulate(lambda x: {"n": len(x), "x": x[0]}, ones)
    assert mean["n"].dtype == mean["x"].dtype == jnp.float32
    np.testing.assert_allclose(mean["n"], (255 * 255 + 4) / 257, rtol=1e-6)
    assert mean["x"] == 1
    with harness.x64():
        batches = [jnp.array([1.0, 2.0]), jnp.array([1e-12])]
        mean = sharpness.accumulate(jnp.mean, batches)
        np.testing.assert_allclose(mean, (3 + 1e-12) / 3, rtol=1e-15)


def test_the_host_waits_for_the_device(monkeypatch):
    """Before a batch is handed over, all before the last one are done with."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    handed = []
    f = lambda x: handed.append(len(waited)) or x.mean()
    sharpness.accumulate(f, [jnp.ones(2)] * 4)
    assert handed == [1, 2, 3, 4]
    assert [x is not None for x in waited] == [False, True, True, True]
