"""The tables and the figure of the protocol, from its lines of JSON."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.lib import study, tables
from benchmarks.quality import rows
from benchmarks.quality.tasks import parted
from optax_sam.plots.colours import BLACK, METHODS, WHITE

Line = dict[str, Any]
SHORT = {"rate": "lr", "decay": "wd", "max_offset_norm": "cap"}
REFERENCES = "SGD", "SGD 2x", "SAM"
CAPPED = "vSAM .33 to .4"


class Found:
    """One search of a task in a file: its settings, and the tested lines by row.

    Attributes:
      settings: of the task.
      rows: the tested lines of each row, in the order of their seeds.
      tried: the number of settings that each row's search tried, for each search.
      held: the mean held-out accuracy of each row's setting, which chose it.
    """

    def __init__(self, name: str, lines: list[Line]) -> None:
        """Sorts the lines of the search."""
        of = [line for line in lines if line["task"] == name]
        self.settings = next(line["settings"] for line in of if "settings" in line)
        tested = [line for line in of if line.get("tested")]
        self.rows = {
            row: sorted(
                (line for line in tested if line["row"] == row),
                key=lambda line: line["seed"],
            )
            for row in rows.ROWS
        }
        # A row with a single seed has no interval yet, and is not shown.
        few = max(1, min(2, len(self.rows["SGD"])))
        self.rows = {row: x for row, x in self.rows.items() if len(x) >= few}
        self.tried: dict[str, list[int]] = {}
        self.held: dict[str, float] = {}
        for row, made in self.rows.items():
            judge = "SGD" if rows.ROWS[row].early else row
            judged = [x for x in of if x.get("tested") is False and x["row"] == judge]
            self.tried[row] = [len({setting(line) for line in judged})]
            chosen = [x["accuracy"] for x in judged if x["values"] == made[0]["values"]]
            self.held[row] = float(np.mean(chosen)) if chosen else -np.inf

    def mean(self, row: str, field: str) -> float:
        """Over the seeds."""
        return float(np.mean([line[field] for line in self.rows[row]]))

    def gradients(self, row: str) -> float:
        """The gradients of a run, relative to a run of SGD."""
        return self.mean(row, "gradients") / self.mean("SGD", "gradients")

    def time(self, row: str) -> float | None:
        """The processor time of a run, relative to a run of SGD in the same process."""
        lines = self.rows[row]
        if any("sgd_cpu_seconds" not in line for line in lines):
            return None  # the oldest lines
        return float(
            np.median([x["cpu_seconds"] / x["sgd_cpu_seconds"] for x in lines])
        )

    def gains(self, row: str, other: str) -> list[float]:
        """Differences in accuracy, paired by seed."""
        first, second = (
            {line["seed"]: line["accuracy"] for line in self.rows[name]}
            for name in (row, other)
        )
        return [first[s] - second[s] for s in sorted(first.keys() & second.keys())]

    def minus(self, row: str, other: str) -> tuple[float, float] | None:
        """The mean difference in accuracy, paired by seed, and half of its interval."""
        if row == other or other not in self.rows or row not in self.rows:
            return None
        return interval(self.gains(row, other))


def interval(differences: Any) -> tuple[float, float]:
    """The mean, and half of its 95 % interval (Student's t)."""
    mean, error = tables.mean_and_error(differences)
    return mean, float(stats.t.ppf(0.975, max(len(differences) - 1, 1)) * error)


def found(lines: list[Line]) -> dict[str, dict[int, Found]]:
    """The searches that have tested runs of SGD, by task and by their numbers."""
    made: dict[str, dict[int, Found]] = {}
    for name in {line["task"]: None for line in lines}:
        one = Found(name, lines)
        if "SGD" in one.rows:
            base, number = parted(name)
            made.setdefault(base, {})[number] = one
    return made


def best(searches: dict[int, Found]) -> Found:
    """Each row at the setting that is best on held-out images, of all its searches."""
    merged = copy.copy(next(iter(searches.values())))
    merged.rows, merged.tried = {}, {}
    for row in rows.ROWS:
        having = [one for one in searches.values() if row in one.rows]
        if having:
            seeds = max(len(one.rows[row]) for one in having)
            whole = [one for one in having if len(one.rows[row]) == seeds]
            merged.rows[row] = max(whole, key=lambda one: one.held[row]).rows[row]
            merged.tried[row] = [count for one in having for count in one.tried[row]]
    return merged


def signed(difference: tuple[float, float] | None) -> str:
    """A difference and half of its interval."""
    return "" if difference is None else tables.signed(*difference)


def setting(line: Line) -> str:
    """The chosen values, the method's own first."""
    values = [f"{SHORT.get(k, k)} {v:g}" for k, v in line["values"].items()]
    if "stop" in line:
        values.append(f"{line['stop']} epochs")
    return ", ".join(values)


def table(task: Found) -> str:
    """All rows of a task."""
    header = ["row", "chosen setting", "settings tried"]
    header += ["gradients / SGD", "CPU time / SGD", "test accuracy (%)"]
    header += [f"minus {name}" for name in REFERENCES]
    lines = []
    for row, made in task.rows.items():
        note = rows.ROWS[row].what
        if len(made) < len(task.rows["SGD"]):
            note = f"{len(made)} seeds"
        cells = [row + f" ({note})" * bool(note), setting(made[0])]
        cells.append(" + ".join(map(str, task.tried[row])))
        time = task.time(row)
        cells += [f"{task.gradients(row):.2f}", "" if time is None else f"{time:.2f}"]
        cells.append(f"{task.mean(row, 'accuracy'):.2f}")
        cells += [signed(task.minus(row, other)) for other in REFERENCES]
        lines.append(cells)
    return tables.table(header, lines)


def headline(tasks: dict[str, Found]) -> str:
    """The gain of SAM and of the cheapest rows over tuned SGD, task by task."""
    pairs = {
        "SAM minus SGD": ("SAM", "SGD"),
        "SAM minus SGD 2x, equal compute": ("SAM", "SGD 2x"),
        "SAM minus SGD, early": ("SAM", "SGD, early"),
        "MSAM minus SGD, equal compute": ("MSAM", "SGD"),
        f"{CAPPED} minus SGD": (CAPPED, "SGD"),
    }
    made = [
        [task.settings["title"], f"{len(task.rows['SGD'])}"]
        + [signed(task.minus(*pair)) or "not yet run" for pair in pairs.values()]
        for task in tasks.values()
    ]
    return tables.table(["task", "seeds", *pairs], made)


def control(tasks: dict[str, Found]) -> str:
    """Compares vSAM's control with fixed periods and with a smaller first batch."""
    header = ["task", "row", "gradients / SGD", "minus SAM", f"{CAPPED} minus this row"]
    names = ["vSAM", "vSAM .33", CAPPED, "SAM-3, reuse", "SAM-3", "SAM-5", "LookSAM-5"]
    made = [
        [task.settings["title"], name, f"{task.gradients(name):.2f}"]
        + [signed(task.minus(name, "SAM")), signed(task.minus(CAPPED, name))]
        for task in tasks.values()
        for name in [*names, "quarter-batch SAM"]
        if name in task.rows and CAPPED in task.rows
    ]
    return tables.table(header, made)


def luck(tasks: dict[str, dict[int, Found]]) -> str:
    """The gain over SGD after each search, of the rows that several searches tuned."""
    numbers = sorted({number for of in tasks.values() for number in of})
    pairs = {f"{row} minus SGD": (row, "SGD") for row in rows.ROWS}
    pairs["SAM minus SGD 2x, equal compute"] = "SAM", "SGD 2x"
    made = []
    for of in tasks.values():
        for label, pair in pairs.items():
            gains = {i: signed(task.minus(*pair)) for i, task in of.items()}
            if sum(map(bool, gains.values())) > 1:
                title = next(iter(of.values())).settings["title"]
                made.append([title, label, *(gains.get(i, "") for i in numbers)])
    columns = [f"search {number}" for number in numbers]
    return tables.table(["task", "difference", *columns], made)


def repeated(lines: list[Line], again: list[Line]) -> str:
    """Compares tested runs with the same runs on another machine."""
    identity = lambda x: (x["task"], x["row"], setting(x), x["seed"])
    known = {identity(x): x["accuracy"] for x in lines if x.get("tested")}
    header = ["task", "training runs", "the same accuracy", "a run differs by"]
    header += ["the mean of a row by, at most", "SAM minus SGD 2x, again"]
    made = []
    for searches in found(again).values():
        for one in searches.values():
            differences = []
            for of in one.rows.values():
                pairs = [(x["accuracy"], known.get(identity(x))) for x in of]
                differences.append([x - y for x, y in pairs if y is not None])
            differences = [of for of in differences if of]
            all_of = np.concatenate(differences)
            means = [abs(np.mean(of)) for of in differences]
            cells = [one.settings["title"], f"{all_of.size}", f"{np.sum(all_of == 0)}"]
            cells += [f"{np.sqrt(np.mean(all_of**2)):.2f}", f"{max(means):.2f}"]
            made.append([*cells, signed(one.minus("SAM", "SGD 2x"))])
    return tables.table(header, made)


def markdown(lines: list[Line]) -> dict[str, str]:
    """The tables of docs/results/accuracy.md, by name."""
    searches = found(lines)
    tasks = {name: best(of) for name, of in searches.items()}
    made = {"headline": headline(tasks), "vsam": control(tasks), "luck": luck(searches)}
    return made | {name: table(task) for name, task in tasks.items()}


def draw(lines: list[Line], path: Path) -> None:
    """Draws the gain over tuned SGD against gradients: seeds as dots, intervals."""
    tasks = {name: best(of) for name, of in found(lines).items()}
    columns = min(2, len(tasks))
    size = -(-len(tasks) // columns), columns
    figure = Figure(figsize=(4.2 * columns, 3.0 * size[0]), dpi=120)
    figure.set_layout_engine("constrained", hspace=0.08)
    panels = [*figure.subplots(*size, squeeze=False).flat]
    rng = np.random.default_rng(0)  # dots of equal accuracy are moved apart
    for axes, task in zip(panels, tasks.values(), strict=False):
        shown = [row for row in task.rows if row in METHODS and row != "SGD"]
        halves = {row: interval(task.gains(row, "SGD"))[1] for row in shown}
        # A seed that did not train makes an interval that hides all others.
        wide = [row for row in shown if halves[row] > 8 * np.median([*halves.values()])]
        shown = [row for row in shown if row not in wide]
        axes.set_title(task.settings["title"], fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axhline(0, color=BLACK, linewidth=1)
        given: Any = {"fontsize": 9, "ha": "right", "va": "bottom"}
        axes.text(2.95, 0, "tuned SGD", color=BLACK, **given)
        labels: list[Any] = []
        ends = [0.0]
        for row in shown:
            colour, x = METHODS[row], task.gradients(row)
            x += 0.06 * sum(abs(x - label[0]) < 0.04 for label in labels)
            gains = task.gains(row, "SGD")
            mean, half = interval(gains)
            moved = x + rng.uniform(-0.02, 0.02, len(gains))
            axes.scatter(moved, gains, s=9, color=colour, alpha=0.3, linewidths=0)
            axes.errorbar(x, mean, half, color=colour, fmt="o", ms=5, lw=2, capsize=3)
            labels.append((x, mean, row, colour))
            ends += mean - half, mean + half
        # The intervals set the scale. Dots far away are not drawn.
        low, high = min(ends), max(ends)
        margin = 0.12 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        _label(axes, labels, (high - low) / 11)
        axes.set_xlim(0.9, 2.95)
        if wide:
            told = f"too wide to show: {', '.join(wide)}"
            axes.text(2.95, low - margin, told, color=BLACK, **given)
        axes.set_xticks([1, 1.5, 2, 2.5])
        axes.set_xlabel("Gradient evaluations, relative to SGD", fontsize=9)
        axes.set_ylabel("Points over tuned SGD", fontsize=9.5)
        axes.tick_params(labelsize=8.5)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    study.save(figure, path)


def _label(axes: Any, labels: list[Any], apart: float) -> None:
    """Names beside the means, moved up from names, other means, and the line at 0."""
    placed: list[tuple[float, float]] = []
    means = [(x, mean) for x, mean, *_ in labels]
    for x, mean, row, colour in sorted(labels, key=lambda label: label[1]):
        y, end = mean, x + 0.1 + 0.042 * len(row)
        while (
            abs(y) < 0.5 * apart
            or any(abs(y - b) < apart and abs(a - x) < 0.45 for a, b in placed)
            or any(abs(y - b) < 0.7 * apart and x < a < end for a, b in means)
        ):
            y += apart / 4
        placed.append((x, y))
        axes.plot([x + 0.02, x + 0.05], [mean, y], color=colour, linewidth=0.6)
        given: Any = {"fontsize": 9, "color": colour, "va": "center"}
        given["path_effects"] = [patheffects.withStroke(linewidth=2, foreground=WHITE)]
        axes.text(x + 0.06, y, row, **given)
