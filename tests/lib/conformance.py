"""How far each method is from its paper's algorithm, and from published code.

A test that compares parameters says so to :func:`hold`, which holds it to the largest
deviation that `make conformance` recorded. There, what is held is recorded:

    python tests/lib/conformance.py LINES
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np

RECORD = Path(__file__).parents[1] / "data" / "conformance.json"
PAPER = "paper"
# Another compiler rounds otherwise, and the steps of a training amplify that.
FACTOR, FLOOR = 10, 1e-13


def hold(source, found, wanted, step=None):
    """Parameters or values are as near to those of a source as they were.

    The test file names the method. Deviations are relative to the largest number.
    """
    of = lambda pairs: max(float(np.max(np.abs(np.asarray(x)))) for x in pairs)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    deviation = of(np.asarray(a) - b for a, b in pairs) / of(jax.tree.leaves(wanted))
    test = os.environ["PYTEST_CURRENT_TEST"]
    (method,) = re.findall(r"/test_(\w+)\.py", test)
    if path := os.environ.get("CONFORMANCE"):
        with Path(path).open("a") as file:
            print(json.dumps([method, source, test, step, deviation]), file=file)
        return
    known = json.loads(RECORD.read_text()).get(method, {}).get(source)
    assert known, f"make conformance records {method} beside {source}"
    assert deviation <= max(FLOOR, FACTOR * known["deviation"]), (source, step)


def merged(lines):
    """By method and source: the largest deviation, of how many cases and steps."""
    record, cases = {}, {}
    for method, source, test, step, deviation in sorted(map(json.loads, lines)):
        entry = record.setdefault(method, {}).setdefault(source, {"deviation": 0.0})
        entry["deviation"] = max(entry["deviation"], float(f"{deviation:.1e}"))
        entry["steps"] = max(entry.get("steps", 0), step or 0)
        cases.setdefault((method, source), set()).add(test)
        entry["cases"] = len(cases[method, source])
    return record


if __name__ == "__main__":
    record = merged(Path(sys.argv[1]).read_text().splitlines())
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
