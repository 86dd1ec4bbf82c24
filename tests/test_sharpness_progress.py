"""What runs on the host: progress bars, and means over data from an iterator."""

import csv
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
        assert counted.count == 2 * B
        one = jax.tree.map(lambda x: x[:1], batches())
        hvp(w, one, v)
    assert counted.count == 2 * B + 1


def test_a_measure_ends_at_its_total():
    w, *_ = setting()
    with sharpness.progress(loss_fn, total=6 * B) as counted:
        top = jax.jit(
            lambda w, batches: sharpness.hessian_eigenvalues(
                counted, w, batches, 0, num_matvecs=6
            )
        )(w, batches())
    assert counted.count == B * top.num_matvecs == 6 * B
    with sharpness.progress(loss_fn) as counted:
        sharpness.hessian_trace(
            counted, w, batches(), 0, num_matvecs=5, method="hutchinson"
        )
    assert counted.count == 5 * B


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


def run(**options):
    w, v, _ = setting()
    with sharpness.progress(loss_fn, description="a bar", **options) as counted:
        sharpness.hvp(counted, w, batches(), v)
    return counted


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("total", [B, None])
def test_the_bar_is_written(rich, total, monkeypatch, capsys):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    file = io.StringIO()
    run(total=total, file=file)
    last = file.getvalue().strip().split("\r")[-1]
    assert last.startswith("a bar ")
    assert ("━" in last) == rich
    if total or not rich:
        assert (f"{B}/{B}" if total else f"{B}") in last
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rich", [True, False])
def test_nothing_is_written_where_there_is_no_terminal(rich, monkeypatch, capfd):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert run(total=B).count == B
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_without_being_asked(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(total=B)
    assert sys.stderr.getvalue().endswith(f"\ra bar {B}/{B}\n")


def test_after_the_block_the_bar_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    w, v, _ = setting()
    file = io.StringIO()
    seen = []

    def interrupted():
        with sharpness.progress(loss_fn, total=9, file=file) as counted:
            seen.append(counted)
            sharpness.hvp(counted, w, batches(), v)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    (counted,) = seen
    written = file.getvalue()
    assert written.endswith(f"sharpness {B}/9\n")
    sharpness.hvp(counted, w, batches(), v)
    assert counted.count == 2 * B
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
    assert run(total=B, file=file).count == B
    assert not file.getvalue()


def test_progress_advises():
    with pytest.raises(ValueError, match="loss_fn must be a function"):
        sharpness.progress(3).__enter__()
    with pytest.raises(ValueError, match="total must be an integer >= 1"):
        sharpness.progress(loss_fn, total=0).__enter__()


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


def measured(what, w, v, batches, weights=None):
    """The loss with its gradient, or a product, the scanned way."""
    if what == "hvp":
        return sharpness.hvp(loss_fn, w, batches, v, weights=weights)
    o = sharpness.objective.objective(loss_fn, w, batches, weights=weights)
    return o.mean(lambda batch: jax.value_and_grad(loss_fn)(w, batch))


@pytest.mark.parametrize("what", ["hvp", "gradient"])
def test_the_host_loop_is_the_scan(what):
    w, v, data = setting()
    of_batch = jax.jit(lambda w, v, batch: measured(what, w, v, stacked(batch)))
    f = functools.partial(of_batch, w, v)
    scanned = measured(what, w, v, padded(), jnp.array([4, 4, 2]))
    harness.assert_close(sharpness.accumulate(f, uneven()), scanned, 1e-5)
    assert of_batch._cache_size() == 2  # one for each size
    harness.assert_close_in_size(scanned, f(data), 1e-6)
    # From a generator, and with padding that the weight knows of.
    split = [tuple(x[i] for x in padded()) for i in range(3)]
    real = lambda batch: batch[2].sum()
    counted = sharpness.accumulate(f, iter(split), weight=real)
    harness.assert_close(counted, scanned, 1e-5)
    # Counting batches, or padding, would be another number.
    as_batches = sharpness.accumulate(f, uneven(), weight=lambda batch: 1)
    wrong = sharpness.accumulate(f, split)
    for other in (as_batches, wrong):
        with pytest.raises(AssertionError):
            harness.assert_close(other, scanned, 1e-3, atol=1e-3)


def test_top_eigenvalue_of_data_on_the_host():
    """Power iteration, each of whose products goes over the data once."""
    w, v, data = setting()
    product = jax.jit(lambda w, v, batch: sharpness.hvp(loss_fn, w, stacked(batch), v))
    unit = jax.jit(lambda v: jax.tree.map(lambda x: x / optax.tree.norm(v), v))
    for _ in range(40):
        v = unit(v)
        v = sharpness.accumulate(functools.partial(product, w, v), uneven())
    length = optax.tree.norm(v)
    top = sharpness.hessian_eigenvalues(loss_fn, w, stacked(data), 0, which="LM")
    np.testing.assert_allclose(length, jnp.abs(top.eigenvalues[0]), rtol=1e-3)


def test_means_are_taken_in_float32():
    ones = [jnp.ones(m, jnp.bfloat16) for m in (255, 2)]
    mean = sharpness.accumulate(lambda x: {"n": len(x), "x": x[0]}, ones)
    assert mean["n"].dtype == mean["x"].dtype == jnp.float32
    np.testing.assert_allclose(mean["n"], (255 * 255 + 4) / 257, rtol=1e-6)
    assert mean["x"] == 1


def test_means_are_taken_in_float64(x64):
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


def test_accumulate_advises():
    with pytest.raises(ValueError, match="no batch.*make a new one for each call"):
        sharpness.accumulate(jnp.mean, iter(()))
    with pytest.raises(ValueError, match="same number of examples"):
        sharpness.accumulate(jnp.mean, [(jnp.ones(2), jnp.ones(3))])
    with pytest.raises(ValueError, match=r"weight=lambda batch"):
        sharpness.accumulate(jnp.mean, [1.0])
    with pytest.raises(ValueError, match="must be positive in sum"):
        sharpness.accumulate(jnp.mean, [jnp.ones(2)], weight=lambda batch: 0)


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    """All blocks of docs/tracking.md; those of writers where they are installed."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {}
    writers = []
    for block in harness.code("tracking.md"):
        if block.startswith("from "):
            writers.append(block)
        else:
            exec(block, names)
    rows = names["rows"]
    with open("sharpness.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 60
    probed = [row for row in read if row["sharpness/trace/estimate"]]
    assert [int(row["step"]) for row in probed] == [0, 20, 40]
    for row in map(dict, probed):
        top = float(row["sharpness/lambda_max/eigenvalues/0"])
        assert float(row["train/rayleigh_quotient"]) < 1.5 * top
        assert float(row["sharpness/lambda_max/converged/0"]) == 1
        assert float(row["train/stability_edge_sam"]) < 4
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    # The table of the page names what is logged.
    documented = {
        name
        for cells in harness.table("tracking.md", "Free, on each step")
        for name in re.findall(r"`(\w+)`", cells[0])
    }
    assert {f"train/{name}" for name in documented} == {
        name for name in rows[0] if name.startswith("train/")
    }
    assert names["counted"].count == 80
    whole = jax.tree.map(lambda x: x[None], names["data"])
    params = names["params"]
    exact = sharpness.hvp(names["loss_fn"], params, whole, params)
    harness.assert_close_in_size(names["Hg"], exact, 1e-5)
    assert ["clu" in block for block in writers] == [True, False]


@pytest.mark.parametrize("writer", ["clu.metric_writers", "tensorboardX"])
def test_writers_take_what_is_logged(writer, tmp_path, monkeypatch):
    pytest.importorskip(writer, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    (block,) = [
        block
        for block in harness.code("tracking.md")
        if block.startswith(f"from {writer.split('.')[0]} ")
    ]
    logged = sharpness.to_scalars({"a": jnp.float32(1.5), "flag": True})
    exec(block, {"rows": [{"step": 3} | logged]})
    (written,) = (tmp_path / "runs/sam").iterdir()
    assert b"sharpness/flag" in written.read_bytes()


@pytest.mark.slow
def test_the_example_tracks(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("flax")
    root = Path(__file__).parents[1]
    output = subprocess.run(
        [sys.executable, root / "examples/track_sharpness.py", "--steps", "121"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    _, *shown = (line.split() for line in output.splitlines())
    assert [int(row[0]) for row in shown] == [0, 40, 80, 120]
    with open(tmp_path / "sharpness.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 121
    for row in shown:
        loss, perturbed, curvature, top, _, edge, gd = map(float, row[1:])
        assert loss < perturbed
        assert curvature < top
        assert edge < gd == 4
    # With SAM it goes down with its edge; gradient descent would end at 2 / lr.
    assert top < 1.3 * edge < 2.2
