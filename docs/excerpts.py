"""What the tables of the pages, and of the papers, say about one method.

The tables are printed from committed results and held to them by tests, so that a row
is copied here, not computed again. `make tables` writes the copies into the pages.
"""

import csv
import itertools
import re
from pathlib import Path

DOCS = Path(__file__).parent
PUBLISHED = DOCS.parent / "benchmarks/results/published.csv"

# The page of a table, the beginning of the line that it follows, and what it shows.
BENCHMARKS = "../benchmarks/README.md"
TABLES = [
    ("methods/index.md", "## What a step costs", "Cost"),
    ("methods/index.md", "## Hyperparameters", "Hyperparameters"),
    ("results/accuracy.md", "## Digits with wrong labels", "Digits, 36 % wrong labels"),
    ("results/accuracy.md", "## Fashion-MNIST with an MLP", "Fashion-MNIST, an MLP"),
    *((BENCHMARKS, f"**{name}**", "") for name in ("MLP", "CNN", "transformer")),
]
# These rows stand beside those of the method.
BASELINES = {"SGD", "SAM", "sam"}
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
MODELS = {
    "resnet18": "ResNet-18",
    "wrn28-10": "WRN-28-10",
    "pyramidnet110": "PyramidNet-110",
}


def table_behind(page, start):
    """The first table behind a line, as lists of cells: its head, a rule, its rows."""
    _, _, rest = (DOCS / page).read_text().partition(f"\n{start}")
    is_row = lambda line: line.startswith("|")
    rows = itertools.dropwhile(lambda line: not is_row(line), rest.splitlines())
    rows = list(itertools.takewhile(is_row, rows))
    if not rows:
        raise ValueError(
            f"{page} has no table behind a line that begins with {start!r}:"
            " correct TABLES in docs/excerpts.py."
        )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def is_about(cell, labels):
    """Whether a row's first cell is one of the labels, perhaps with a setting."""
    begins = lambda label: re.match(rf"{re.escape(label)}(?!\w)", cell.strip("`"))
    return any(map(begins, labels))


def markdown(head, *rows):
    """A table without the columns in which these rows have nothing."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


def published(labels):
    """The figures of the papers, a column for each network."""
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not any(is_about(row["method"], labels) for row in rows):
        return None
    columns = [(data, model) for model in MODELS for data in DATA]
    cells = {}
    for row in rows:
        if is_about(row["method"], labels) or row["method"] in BASELINES:
            of_method = cells.setdefault((row["method"], row["source"]), {})
            error = row["deviation"] and f" ± {row['deviation']}"
            of_method[row["data"], row["model"]] = f"{row['accuracy']}{error}"
    return markdown(
        ["method", *(f"{DATA[d]}, {MODELS[m]}" for d, m in columns), "source"],
        *(
            [method, *(found.get(column, "") for column in columns), source]
            for (method, source), found in cells.items()
        ),
    )


def about(labels, page, start):
    """The rows of a table about the labels, between those of the baselines."""
    head, _, *rows = table_behind(page, start)
    if not any(is_about(row[0], labels) for row in rows):
        return head, []
    # Of several rows the first, that of the method as it is.
    beside = {row[0]: row for row in reversed(rows) if row[0] in BASELINES}
    return head, [r for r in rows if is_about(r[0], labels) or r in beside.values()]


def step_times(labels):
    """The time of a step on a CPU, relative to SGD's, a column for each network."""
    columns = {start.strip("*"): page for page, start, shown in TABLES if not shown}
    cells = {}
    for network, page in columns.items():
        head, rows = about(labels, page, f"**{network}**")
        for row in rows:
            cells.setdefault(row[0], {})[network] = row[head.index("time / SGD")]
    row = lambda name: [name, *(cells[name].get(x, "") for x in columns)]
    return cells and markdown(["step", *columns], *map(row, cells))


def results(labels):
    """All that is known about the method with these labels, as Markdown."""
    parts = []
    for page, start, caption in TABLES:
        head, rows = about(labels, page, start)
        if rows and caption:
            anchor = start.lstrip("# ").lower().replace(" ", "-")
            parts += [f"**[{caption}](../{page}#{anchor})**", markdown(head, *rows)]
    page = "../../benchmarks/README.md#what-a-step-of-each-method-costs"
    if table := step_times(labels):
        parts += [f"**[Time of a step on a CPU, relative to SGD]({page})**", table]
    if table := published(labels):
        parts += ["**Published test accuracies (%)**", table]
    return "\n\n".join(parts)
