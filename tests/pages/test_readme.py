"""The README: its program runs as printed, and its comparison is what was measured."""

import json
import re
from pathlib import Path

import harness

from benchmarks.lib.study import RESULTS
from optax_sam.method import METHODS

ROOT = Path(__file__).parents[2]
README = harness.page("../README.md")


def test_the_program_runs_as_printed_and_without_the_lines_of_the_diff(capsys):
    (program,) = harness.code("../README.md")
    exec(compile(program, "README.md", "exec"), {})
    loss, ascents = capsys.readouterr().out.split()
    assert ascents == "100"
    assert float(loss) < 1e-2
    before, after = harness.before_and_after(README)
    imported, *changed = after.splitlines()
    assert f"{imported}\n" in program
    program, _, printed = program.replace(f"{imported}\n", "").rpartition("print(")
    assert "metrics" in printed
    for new, old in zip(changed, before.splitlines(), strict=True):
        assert program.count(new) == 1
        program = program.replace(new, old)
    assert "optax_sam" not in program
    exec(compile(program, "README.md, before", "exec"), names := {})
    assert names["loss"] < 1e-2


def test_the_comparison_is_measured():
    """test_migrating.py, test_cost.py and test_sharding.py hold the other cells."""
    rows = {
        name: cells
        for name, *cells in harness.table("../README.md", "Why not another package?")
    }
    methods = harness.table("methods/index.md", "Hyperparameters")
    assert rows["methods"][0] == str(len(methods)) >= str(len(METHODS))
    (bf16,) = [
        cells
        for dtype, *cells in harness.table("precision.md", "The perturbation")
        if dtype == "bfloat16"
    ]
    assert rows["perturbation left in bf16, float32 layers"][:2] == [bf16[0], bf16[-1]]
    compared = harness.page("reference/conformance.md")
    followed = set(re.findall(r"^\| `(\w+)` \| [^|]*\bcode\b", compared, re.M))
    followed -= {"trajectory_loss"}  # a loss, not a method
    assert rows["methods compared with published code"][0] == str(len(followed))

    peers = json.loads((RESULTS / "torch_peers_cpu.json").read_text())["models"]
    text = (ROOT / "benchmarks/README.md").read_text()

    def ours(model, method):
        table = text.split(f"\n**{model}** ")[1]
        return re.search(rf"^\| {re.escape(method)} \| 2.00 \| (\S+)", table, re.M)[1]

    theirs = lambda model, method: f"{peers[model]['to_sgd'][method][1]:.2f}"
    contrib = "optax.contrib.sam, opaque"
    both = "MLP", "CNN"
    assert rows["SAM's time / SGD, MLP and CNN"] == [
        ", ".join(ours(model, "sam") for model in both),
        ", ".join(ours(model, contrib) for model in both),
        ", ".join(theirs(model, "SAM") for model in both),
    ]
    gsam = rows["GSAM's time / SGD, CNN"]
    assert gsam == [ours("CNN", "gsam"), "–", theirs("CNN", "GSAM")]
    assert len(peers["MLP"]["to_sgd"]) == int(rows["methods"][2].split()[0])


def test_it_is_short():
    text = re.sub(r"\]\([^)]*\)", "]", README)
    assert len(re.findall(r"\S*\w\S*", text)) <= 450
