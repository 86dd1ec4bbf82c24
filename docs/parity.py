"""What each method was compared with, from what the tests recorded."""

import json
import re

import docstrings

import optax_sam
from optax_sam.method import METHODS

RECORD = docstrings.ROOT / "tests/data/conformance.json"


def compared(function, source):
    """A source of what a method was compared with, as a link."""
    if source == "paper":
        arxiv = re.search(r"<(https://arxiv[^>]*/([\d.]+))>", function.__doc__)
        paper = f"[{arxiv[2]}]({arxiv[1]})" if arxiv else "its paper"
        return f"the algorithm of {paper}, in NumPy"
    place, _, path = source.partition(" ")
    name, _, commit = place.partition("@")
    if "/" not in name:
        return f"`{name}`, for `rho=0`"
    file = f"/blob/{commit}/{path.split()[0]}" if commit else ""
    cited = docstrings.section(function, "References").partition("code:")[2]
    whose = "the authors' code" if name in cited else "code by others"
    return f"{whose}, [{place}](https://github.com/{name}{file})"


def extent(entry):
    """How much was compared: trajectories, or values of a function."""
    cases = f"{entry['cases']} case{'s' * (entry['cases'] > 1)}"
    if entry["steps"]:
        return f"{cases} of up to {entry['steps']} steps"
    return f"{cases}, values and gradients"


def table():
    """A row for each method and source."""
    head = ["method", "compared with", "what", "largest deviation", "differences"]
    rows = [head, ["---"] * len(head)]
    for name, sources in json.loads(RECORD.read_text()).items():
        function = getattr(optax_sam, name)
        for source in sorted(sources, key=lambda x: (x != "paper", x)):
            entry = sources[source]
            what = compared(function, source), extent(entry)
            listed = source != "paper" and docstrings.differences(function)
            link = f"[{len(listed)}](#{name})" if name in METHODS and listed else ""
            rows.append([f"`{name}`", *what, f"{entry['deviation']:.0e}", link])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences():
    """What docstrings list of differences from the authors' code, by method."""
    parts = []
    for name, function in sorted(METHODS.items()):
        if listed := docstrings.differences(function):
            parts.append(f"### `{name}`\n\n" + "\n".join(f"- {x}" for x in listed))
    return "\n\n".join(parts)
