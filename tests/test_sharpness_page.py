"""docs/measures/sharpness.md runs as printed, and its table has what there is."""

import inspect
import re

import harness
import pytest

from optax_sam import sharpness

PAGE = "sharpness.md"
COSTS = {
    name: cost
    for names, _, cost in harness.table(PAGE, "What there is")
    for name in re.findall(r"`(\w+)`", names)
}


@pytest.mark.slow
def test_the_page_runs(capsys):
    names = {}
    exec("\n".join(harness.code(PAGE)), names)
    shown = capsys.readouterr().out
    assert "True" in shown
    assert "sharpness/trace/estimate" in shown
    trace = float(names["trace"](names["params"], names["batches"]).estimate)
    expected = float(names["result"]["trace"].estimate)
    # Other batches by one, so that the probes are the same and the sums another order.
    assert trace == pytest.approx(expected, rel=1e-2)


def test_every_measure_is_on_a_page():
    pages = "".join(
        harness.page(name)
        for name in ("sharpness.md", "tracking.md", "gallery.md", "correlation.md")
    )
    functions = [
        name
        for name in sharpness.__all__
        if name.islower() and not name.endswith("_of")
    ]
    assert [name for name in functions if name not in pages] == []


@pytest.mark.parametrize("name", COSTS)
def test_default_costs(name):
    function = getattr(sharpness, name)
    default = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    first = int(re.search(r"\d+", COSTS[name])[0])
    if "num_top_matvecs" in default:
        rest = default["num_lanczos"] * default["num_probes"]
        assert first == default["num_top_matvecs"] + rest
    elif "num_lanczos" in default:
        assert first == default["num_lanczos"] * default["num_probes"]
    elif "num_matvecs" in default:
        assert first == default["num_matvecs"]
    elif name == "average_sharpness":
        assert first == 2 * default["num_samples"] + 1
    elif name == "pac_bayes_flatness":
        assert first == default["num_samples"] * default["num_steps"] + 1
    elif "num_steps" in default:
        assert f"{default['num_steps'] + 1} gradients" in COSTS[name]


def test_it_needs_no_optimizer():
    # The measures stand beside the methods, not on them.
    imports = [
        line
        for name in sharpness.__all__
        for line in inspect.getsource(
            inspect.getmodule(getattr(sharpness, name))
        ).splitlines()
        if "import" in line
    ]
    assert not any("optax_sam.engine" in line for line in imports)
    assert not any("optax_sam.methods" in line for line in imports)
