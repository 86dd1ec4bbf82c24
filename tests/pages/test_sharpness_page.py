"""docs/measures/sharpness.md runs as printed, and its table has what there is."""

import inspect
import re

import harness
import pytest

from benchmarks.lib.study import RESULTS, read
from optax_sam import sharpness

PAGE = "sharpness.md"
COSTS = {
    name.partition(",")[0]: count
    for name, (count, _) in read(RESULTS / "measures.json")["rows"].items()
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
    names = "sharpness.md", "tracking.md", "gallery.md", "correlation.md"
    pages = "".join(map(harness.page, names))
    functions = [x for x in sharpness.__all__ if x.islower() and not x.endswith("_of")]
    assert [name for name in functions if name not in pages] == []


@pytest.mark.parametrize("name", COSTS)
def test_default_costs(name):
    parameters = inspect.signature(getattr(sharpness, name)).parameters
    default = {k: p.default for k, p in parameters.items()}
    get = lambda key: default.get(key, 0)
    first = COSTS[name]
    if "num_lanczos" in default:
        rest = default["num_lanczos"] * default["num_probes"]
        assert first == get("num_top_matvecs") + rest
    elif "num_matvecs" in default:
        assert first == default["num_matvecs"]
    elif name == "average_sharpness":
        assert first == 2 * default["num_samples"] + 1
    elif name == "pac_bayes_flatness":
        assert first == default["num_samples"] * default["num_steps"] + 1
    elif "num_steps" in default:
        assert first == default["num_steps"] + 2


def test_it_needs_no_optimizer():
    # The measures stand beside the methods, not on them.
    modules = {
        inspect.getmodule(getattr(sharpness, name)) for name in sharpness.__all__
    }
    source = "".join(map(inspect.getsource, modules))
    assert not re.search(r"import.*optax_sam\.(engine|methods)", source)
    assert not re.search(r"from optax_sam\.(engine|methods)", source)
