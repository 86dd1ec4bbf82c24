"""The programs of the page on trainers: before, with SAM, and with dispatched vSAM."""

import difflib
import re

import harness
import jax
import numpy as np
import pytest

import optax_sam

PAGE = "trainers.md"
# The headings, and where a program ends up with its parameters and optimizer's state.
PROGRAMS = {
    "Plain JAX": ("params", "opt_state"),
    "Flax Linen with BatchNorm": ("state.params", "state"),
    "Flax NNX": ("nnx.state(model, nnx.Param)", "optimizer.opt_state"),
    "Equinox with a state": ("eqx.filter(model, eqx.is_inexact_array)", "opt_state"),
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
    (program,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    lines = program.splitlines()
    assert {line[:1] for line in lines} <= {" ", "+", "-", ""}
    before, after = (
        "\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-"
    )
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


def run(program, heading):
    """Its names at the end, its parameters, and its optimizer's state."""
    (shared,) = harness.code(PAGE)
    names = {}
    exec(compile(shared, PAGE, "exec"), names)
    exec(compile(program, f"{PAGE}, {heading}", "exec"), names)
    return names, *(eval(where, names) for where in PROGRAMS[heading])


def test_every_program_is_run():
    headings = re.findall(r"^## (.*)$", harness.page(PAGE), re.MULTILINE)
    assert headings == [*PROGRAMS]
    new, old = (re.escape(code) for code in METHOD)
    assert re.search(rf"`{new}` in place of `{old}`", harness.page(PAGE))


@pytest.mark.parametrize("heading", PROGRAMS)
def test_at_most_five_lines_change(heading):
    before, sam, _, dispatched = versions(heading)
    assert "optax_sam" not in before
    assert "optax_sam.dispatch" in dispatched
    assert 0 < count_changes(before, sam) <= 4
    assert count_changes(before, dispatched) == count_changes(before, sam) + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
@pytest.mark.parametrize("heading", PROGRAMS)
def test_a_program_before_and_after(heading):
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
