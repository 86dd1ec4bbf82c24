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

INDEX, ACCURACY = "methods/index.md", "results/accuracy.md"
BENCHMARKS = "../benchmarks/README.md"
GAIN, TIME = "minus SGD", "time / SGD"
# The page of a table, the beginning of the line that it follows, its name, and the
# column to quote beside the same column of other tables; without one, whole rows.
TABLES = [
    (INDEX, "## What a step costs", "Cost", ""),
    (INDEX, "## Hyperparameters", "Hyperparameters", ""),
    (ACCURACY, "## Digits with wrong labels", "digits, wrong labels, MLP", GAIN),
    (ACCURACY, "## Fashion-MNIST with an MLP", "Fashion-MNIST, MLP", GAIN),
    (ACCURACY, "## Fashion-MNIST with a CNN", "Fashion-MNIST, CNN", GAIN),
    (ACCURACY, "## CIFAR-10 with a ResNet", "CIFAR-10, 5,000 images", GAIN),
    (ACCURACY, "## CIFAR-10 with all images", "all images, 5 epochs", GAIN),
    (ACCURACY, "## CIFAR-10 with a mixer", "5,000 images, mixer", GAIN),
    *((BENCHMARKS, f"**{x}**", x, TIME) for x in ("MLP", "CNN", "transformer")),
]
# These rows stand beside those of the method.
BASELINES = {"SGD", "SGD 2x", "SAM", "sam"}
# The rows of choosing.md, and how each is written.
BUDGET = {
    "SAM": "[`sam`](../methods/sam.md)",
    "SGD 2x": "SGD for twice the epochs, at the cost of SAM",
    "MSAM": "[`msam`](../methods/msam.md)",
    "quarter-batch SAM": "[`sam`, a quarter of the batch](../methods/ascent_batch.md)",
    "SAM-5": "[`sam(when=when.every_k(5))`](../methods/sam.md)",
    "SAM-3, reuse": "`when.every_k(3)` with `optax_sam.blend.reuse_difference`",
    "LookSAM-5": "[`looksam`](../methods/looksam.md)",
    "AE-SAM": "[`ae_sam`](../methods/ae_sam.md)",
    "vSAM .33 to .4": (
        "[`vsam`](../methods/vsam.md) with `initial_rate=0.33, max_rate=0.4`"
    ),
    "vSAM .33": "`vsam` with `initial_rate=0.33`",
    "vSAM": "`vsam` from the authors' start, which is the default",
    "ASAM": "[`asam`](../methods/asam.md)",
    "GSAM": "[`gsam`](../methods/gsam.md)",
    "ESAM": "[`esam`](../methods/esam.md)",
    "R-SAM": "[`random_sam`](../methods/random_sam.md)",
    "RSAM": "[`renyi_sam`](../methods/renyi_sam.md)",
    "SAF": "[`saf`](../methods/saf.md), which does not perturb",
    "MESA": "[`mesa`](../methods/mesa.md), which does not perturb",
}
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
    label = lambda row: row[0].partition(" (")[0]
    beside = {label(row): row for row in reversed(rows) if label(row) in BASELINES}
    return head, [r for r in rows if is_about(r[0], labels) or r in beside.values()]


def across(labels, column):
    """One column of all tables that have it, side by side, for a method."""
    names, cells = [], {}
    for page, start, name, quoted in TABLES:
        if quoted != column:
            continue
        names.append(name)
        head, rows = about(labels, page, start)
        for row in rows:
            if value := row[head.index(column)]:
                cells.setdefault(row[0], {})[name] = value
    row = lambda label: [label, *(cells[label].get(x, "") for x in names)]
    return cells and markdown(["row", *names], *map(row, cells))


def budget():
    """The gains of the rows of BUDGET on all tasks, and their cost."""
    names, costs, gains = [], {row: [] for row in BUDGET}, {row: {} for row in BUDGET}
    for page, start, name, quoted in TABLES:
        if quoted != GAIN:
            continue
        names.append(name)
        head, _, *rows = table_behind(page, start)
        for row in rows:
            label = row[0].partition(" (")[0]
            if label in BUDGET:
                costs[label].append(float(row[head.index("gradients / SGD")]))
                gains[label][name] = row[head.index(GAIN)]
    made = []
    for label, of in costs.items():
        span = " to ".join(dict.fromkeys((f"{min(of):.2f}", f"{max(of):.2f}")))
        made.append([span, BUDGET[label], *(gains[label].get(x, "") for x in names)])
    return markdown(["gradients / SGD", "method", *names], *made)


def results(labels):
    """All that is known about the method with these labels, as Markdown."""
    parts = []
    for page, start, caption, column in TABLES:
        head, rows = about(labels, page, start)
        if rows and not column:
            anchor = start.lstrip("# ").lower().replace(" ", "-")
            parts += [f"**[{caption}](../{page}#{anchor})**", markdown(head, *rows)]
    if table := across(labels, GAIN):
        caption = "Points of test accuracy over tuned SGD"
        parts += [f"**[{caption}](../{ACCURACY})**", table]
    if table := across(labels, TIME):
        page = f"../{BENCHMARKS}#what-a-step-of-each-method-costs"
        parts += [f"**[Time of a step on a CPU, relative to SGD]({page})**", table]
    if table := published(labels):
        parts += ["**Published test accuracies (%)**", table]
    return "\n\n".join(parts)
