"""Writes results, docstrings and parity into the pages.

The written part is between two comments. The first one names its kind and its source:

    <!-- table lsq, 4 bits: written by make tables -->

    <!-- end -->

A table comes from committed results; ``KINDS`` has the other kinds.

    python benchmarks/pages.py
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

# The package in this folder, whatever is installed.
sys.path[:0] = [str(Path(__file__).parents[1] / x) for x in ("", "docs")]

import docstrings
import errors
import excerpts
import jax
import parity

import optax_sam
from benchmarks.lib.study import RESULTS, ROOT
from benchmarks.lib.study import read as read_json
from benchmarks.pods import pods
from benchmarks.quality import protocol, report
from benchmarks.steps import cost_report, overhead, torch_peers
from benchmarks.studies import (
    correlation,
    coverage,
    curvature_peers,
    language,
    lsq,
    measures,
)
from optax_sam.method import METHODS

PAGES = sorted(ROOT.glob("docs/**/*.md")) + [ROOT / "benchmarks/README.md"]
# Pages that quote tables of other pages are written last.
PAGES.sort(key=lambda page: bool(re.search("<!-- (results|budget)", page.read_text())))
MARKED = re.compile(
    r"(<!-- (\w+) ?([^:\n]*): written by make tables -->\n).*?(<!-- end -->)", re.DOTALL
)
KINDS = {
    "method": docstrings.method,
    "names": docstrings.names,
    "modules": lambda _: docstrings.modules(),
    "errors": lambda _: errors.listing(),
    "results": lambda labels: excerpts.results(labels.split("; ")),
    "budget": lambda _: excerpts.budget(),
    "published": lambda labels: excerpts.published(labels.split("; ")),
    "parity": lambda part: getattr(parity, part)(),
}


def tables() -> dict[str, str]:
    """All tables, by the names that the pages use."""
    read = lambda name: read_json(RESULTS / f"{name}.json")
    steps = read("step_cost_cpu")
    variants = read("overhead_cpu"), read("overhead_glibc_cpu")
    found = {
        "step_cost": cost_report.markdown(steps),
        "overhead": overhead.markdown(*variants),
        "curvature_peers": curvature_peers.markdown(read("curvature_peers")),
        "torch_peers": torch_peers.markdown(read("torch_peers_cpu"), steps),
        **pods.markdown(read("pods")["rows"]),
    }
    lines = protocol.read(RESULTS / "protocol.jsonl")
    for part, text in report.markdown(lines).items():
        found[f"protocol, {part}"] = text
    again = protocol.read(RESULTS / "protocol_repeated.jsonl")
    found["protocol, repeated"] = report.repeated(lines, again)
    lines = protocol.read(RESULTS / "language.jsonl")
    for part, text in language.markdown(lines).items():
        found[f"language, {part}"] = text
    for study in (lsq, correlation, coverage, measures):
        name = study.__name__.rpartition(".")[2]
        for part, text in study.markdown(read(name)).items():
            found[f"{name}, {part}"] = text
    return found


def names(text: str) -> list[str]:
    """The names of the tables of results in a page."""
    return [name for _, kind, name, _ in MARKED.findall(text) if kind == "table"]


def rendered(text: str, made: dict[str, str]) -> str:
    """A page with all its written parts."""
    if unknown := sorted({*names(text)} - made.keys()):
        raise SystemExit(
            f"no results have a table {unknown[0]!r}; there are {', '.join(made)}"
        )

    def written(found: re.Match) -> str:
        start, kind, name, end = found.groups()
        part = made[name] if kind == "table" else KINDS[kind](name)
        return f"{start}\n{part}\n\n{end}"

    return MARKED.sub(written, text)


METHODS_PAGE = ROOT / "docs/methods/index.md"


def cost_row(name: str) -> str:
    """The row of the cost of a method, counted in its program."""
    found = optax_sam.summary(name, {"w": jax.ShapeDtypeStruct((100, 100), "float32")})
    skipped = found.gradients_when_skipped
    gradients = f"{found.gradients:.3g}" + (f" or {skipped:.3g}" if skipped else "")
    trees = round(found.state_bytes / found.parameter_bytes)
    state = "1 pytree" if trees == 1 else f"{trees} pytrees" if trees else "scalars"
    needs = ", ".join(f"`{x}`" for x in found.needs)
    return f"| `{name}` | {gradients} | {state} | {needs} |"


def default_row(name: str) -> str:
    """The row of the defaults of a method that are numbers or strings."""
    parameters = inspect.signature(METHODS[name]).parameters.items()
    plain = (bool, int, float, str)
    chosen = [(k, p.default) for k, p in parameters if k != "key"]
    values = [f"{k}={x!r}" for k, x in chosen if isinstance(x, plain)]
    return f"| `{name}` | `{', '.join(values)}` | |"


def with_methods(text: str) -> str:
    """The page on methods, with a row for each method that a table lacks."""
    rows = {"What a step costs": cost_row, "Hyperparameters": default_row}
    lines = text.split("\n")
    for title, row in rows.items():
        start = lines.index(f"## {title}")
        in_table = lambda i: lines[i].startswith("|")
        first = next(i for i in range(start, len(lines)) if in_table(i))
        end = next(i for i in range(first, len(lines)) if not in_table(i))
        known = re.findall(r"^\| `(\w+)", "\n".join(lines[first:end]), re.MULTILINE)
        lines[end:end] = map(row, sorted(METHODS.keys() - set(known)))
    return "\n".join(lines)


def main() -> None:
    """Writes the pages that change."""
    made, asked = tables(), set()
    METHODS_PAGE.write_text(with_methods(METHODS_PAGE.read_text()))
    for page in PAGES:
        text = page.read_text()
        asked |= {*names(text)}
        if (new := rendered(text, made)) != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: written")
    if lost := sorted(made.keys() - asked):
        raise SystemExit(
            f"no page shows {'; '.join(lost)}: put the two comments where it belongs"
        )


if __name__ == "__main__":
    main()
