"""The tables of docs/methods/index.md say what the code does."""

import ast
import inspect
import re

import harness
import pytest
from registry import METHODS, OTHERS

import optax_sam

COSTS = {
    cells[0]: cells[1:] for cells in harness.table("methods.md", "What a step costs")
}
DEFAULTS = {
    cells[0].strip("`"): cells[1].strip("`")
    for cells in harness.table("methods.md", "Hyperparameters")
}
NAMED = {m.factory.__name__: m for m in reversed(METHODS + OTHERS) if not m.variant}


def test_every_method_is_in_both_tables():
    methods = {name for name in NAMED if hasattr(optax_sam, name)}
    assert methods == set(DEFAULTS)
    assert methods == {re.match(r"`(\w+)", name)[1] for name in COSTS}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    call = ast.parse(f"f({DEFAULTS[name]})", mode="eval").body
    quoted = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    parameters = inspect.signature(getattr(optax_sam, name)).parameters
    plain = (bool, int, float, str)
    actual = {k: p.default for k, p in parameters.items() if k != "key"}
    assert quoted == {k: v for k, v in actual.items() if isinstance(v, plain)}


@pytest.mark.parametrize("name", DEFAULTS)
def test_trees_of_state(name):
    _, state, _ = COSTS[f"`{name}`"]
    assert ("1 tree" in state) == (NAMED[name].trees == 1)


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_it_needs(name):
    tx = optax_sam.saf(5, 2) if name == "saf" else name
    needs = optax_sam.summary(tx, {"norm": harness.tree()}).needs
    assert set(needs) == set(re.findall(r"`(\w+)`", COSTS[f"`{name}`"][2]))


def test_the_summary_is_what_it_prints(capsys):
    (block,) = [x for x in harness.code("methods.md") if "optax_sam.summary" in x]
    exec(block, {})
    assert f"```text\n{capsys.readouterr().out}```" in harness.page("methods.md")
