"""The tables of the page on methods say what the code does."""

import ast
import inspect
import re

import harness
import pytest
from registry import METHODS, OTHERS

import optax_sam

PAGE = "methods/index.md"
COSTS = {name: cells for name, *cells in harness.table(PAGE, "What a step costs")}
DEFAULTS = {
    name.strip("`"): values.strip("`")
    for name, values, *_ in harness.table(PAGE, "Hyperparameters")
}
NAMED = {m.factory.__name__: m for m in reversed(METHODS + OTHERS) if not m.variant}


def test_every_method_is_in_both_tables():
    methods = {name for name in NAMED if hasattr(optax_sam, name)}
    assert methods == set(DEFAULTS)
    assert methods == {re.match(r"`(\w+)", name)[1] for name in COSTS}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_state_and_needs(name):
    call = ast.parse(f"f({DEFAULTS[name]})", mode="eval").body
    quoted = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    parameters = inspect.signature(getattr(optax_sam, name)).parameters
    plain = (bool, int, float, str)
    actual = {k: p.default for k, p in parameters.items() if k != "key"}
    assert quoted == {k: v for k, v in actual.items() if isinstance(v, plain)}
    _, state, needed = COSTS[f"`{name}`"]
    assert ("1 pytree" in state) == (NAMED[name].trees == 1)
    tx = optax_sam.saf(5, 2) if name == "saf" else name
    needs = optax_sam.summary(tx, {"norm": harness.tree()}).needs
    assert set(needs) == set(re.findall(r"`(\w+)`", needed))


def test_the_summary_is_what_it_prints(capsys):
    (block,) = [x for x in harness.code(PAGE) if "optax_sam.summary" in x]
    exec(block, {})
    assert f"```text\n{capsys.readouterr().out}```" in harness.page(PAGE)
