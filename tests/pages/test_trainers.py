"""The programs of the page on trainers: before, with SAM, and with dispatched vSAM."""

import difflib
import re

import harness
import jax
import numpy as np
import optax
import pytest

import optax_sam

PAGE = "trainers.md"
# The headings, and where a program ends up with its parameters and optimizer's state.
PROGRAMS = {
    "Plain JAX": ("params", "opt_state"),
    "Flax Linen with BatchNorm": ("state.params", "state"),
    "Flax NNX": ("nnx.state(model, nnx.Param)", "optimizer.opt_state"),
    "Equinox with a state": ("eqx.filter(model, eqx.is_inexact_array)", "opt_state"),
    "Haiku": ("params", "opt_state"),
    "Keras 3": ("params", "opt_state"),
    "`shard_map`": ("params", "opt_state"),
    "`pmap`, BatchNorm, loss scaling": ("state.params", "state"),
    "A sharded transformer": ("state.params", "state"),
}
STEPS = 40


# The line of the method, which the page names once for all programs.
METHOD = "optax_sam.vsam(0.05, window=10)", "optax_sam.sam(0.05)"


def versions(heading):
    """A program before, with SAM, with vSAM, and with vSAM and ``dispatch``."""
    text = harness.section(PAGE, heading)
    before, after = harness.before_and_after(text)
    (compiler,) = re.findall(r"With vSAM: `(.*)` in place of `(.*?)`", text)
    vsam = replaced(after, *METHOD)
    return before, after, vsam, replaced(vsam, *compiler)


def replaced(program, new, old):
    """The program with what stands there once replaced."""
    assert program.count(old) == 1
    return program.replace(old, new)


def count_changes(before, after):
    """Lines that differ; one that replaces another counts once."""
    lines = before.splitlines(), after.splitlines()
    codes = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    return sum(max(j - i, n - m) for tag, i, j, m, n in codes if tag != "equal")


@pytest.fixture
def keras_on_jax(monkeypatch, tmp_path):
    """Keras reads its backend when it is imported, and writes into its folder."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))


def run(program, heading):
    """Its names at the end, its parameters, and its optimizer's state."""
    if "import keras" in program:
        pytest.importorskip("keras")
    (shared,) = harness.code(PAGE)
    names = {}
    exec(compile(shared, PAGE, "exec"), names)
    exec(compile(program, f"{PAGE}, {heading}", "exec"), names)
    return names, *(eval(where, names) for where in PROGRAMS[heading])


def test_every_program_is_run():
    headings = re.findall(r"^## (.*)$", harness.page(PAGE), re.MULTILINE)
    assert headings == [*PROGRAMS]
    new, old = (re.escape(code) for code in METHOD)
    assert re.search(rf"`{new}` in\s+place\s+of\s+`{old}`", harness.page(PAGE))


@pytest.mark.parametrize("heading", PROGRAMS)
def test_at_most_five_lines_change(heading):
    before, sam, _, dispatched = versions(heading)
    assert "optax_sam" not in before
    assert "optax_sam.dispatch" in dispatched
    assert 0 < count_changes(before, sam) <= 4
    assert count_changes(before, dispatched) == count_changes(before, sam) + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.filterwarnings(  # the newest Haiku with the oldest JAX
    "ignore:jax.core.(take|set)_current_trace is deprecated:DeprecationWarning"
)
@pytest.mark.parametrize("heading", PROGRAMS)
def test_a_program_before_and_after(heading, keras_on_jax):
    found = [run(program, heading) for program in versions(heading)]
    before, sam, vsam, dispatched = found
    first = np.log(16 if "transformer" in heading else 4)
    for names, *_ in found:
        assert np.mean(names["loss"]) < 0.98 * first
    by_sam, by_vsam, by_dispatch = (
        int(optax_sam.metrics(state)["ascents"]) for _, _, state in found[1:]
    )
    assert by_sam == STEPS
    assert 0 < by_vsam == by_dispatch < STEPS
    leaves = lambda run: [np.asarray(x) for x in jax.tree.leaves(run[1])]
    for a, b in zip(leaves(vsam), leaves(dispatched), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert any((a != b).any() for a, b in zip(leaves(before), leaves(sam), strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings(  # the newest Haiku with the oldest JAX
    "ignore:jax.core.(take|set)_current_trace is deprecated:DeprecationWarning"
)
@pytest.mark.parametrize("heading", ["Haiku", "Keras 3"])
def test_a_step_is_sam_by_hand_with_the_old_state(heading, keras_on_jax):
    _, after = harness.before_and_after(harness.section(PAGE, heading))
    names, params, opt_state = run(after, heading)
    prefix, more = ("hk", [jax.random.key(3)]) if heading == "Haiku" else ("keras", [])
    loss_fn, step = names[f"{prefix}_loss"], names[f"{prefix}_step"]
    batch, state = (names["x"], names["y"]), names["state"]
    opt_state = names["tx"].init(params)  # without momentum
    found = step(params, state, opt_state, *more, *batch)
    by_hand = harness.sam_by_hand(loss_fn, 0.05, 0.1)
    carry = params, optax.tree.zeros_like(params), state
    (wanted, _, after), _ = by_hand(carry, *more, *batch)
    # Absolute: the bias before BatchNorm is trained by rounding alone.
    harness.assert_close(list(found[:2]), [wanted, after], 1e-4, atol=1e-6)
