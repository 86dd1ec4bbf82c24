"""The gain of each method over tuned SGD, and its cost: one protocol for all tasks.

    python benchmarks/quality/protocol.py --task digits
    python benchmarks/quality/protocol.py --task fashion_mlp --data fashion_mnist.npz
    python benchmarks/quality/protocol.py --repeat [FILE] --task digits fashion_mlp ...
    python benchmarks/quality/protocol.py --report [FILE] [--figure FILE]

For each row (a method) a search chooses the learning rate, the weight decay and the
method's own values, on held-out training images. It may try as many settings as the
search of any other row. Then fresh seeds train at the chosen setting and are tested
once. docs/results/accuracy.md describes the rest.

Each run is a line of JSON in ``--out``, and existing runs are not repeated. After
``--seconds`` the process ends, with status 75 while there is more to do. The same
command continues, also in the middle of a training run. ``--repeat`` trains the tested
runs of a file again, at the settings that its search chose.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.quality import report, rows, tasks
from benchmarks.quality.training import CURVE, OutOfTime, Training

Values = dict[str, float]
UNFINISHED = 75  # exit status: there is more to do
# The search moves every tuned value along this series.
SERIES = 1, 2, 5


def neighbour(value: float, step: int) -> float:
    """The next value of 1, 2, 5, 10, 20, ... above or below."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    place = min(range(3), key=lambda i: abs(SERIES[i] * 10.0**exponent / value - 1))
    moved = exponent * 3 + place + step
    return float(f"{SERIES[moved % 3] * 10.0 ** (moved // 3):.3g}")


def search(begin: Values, score: Callable[[Values], float], budget: int) -> Values:
    """Changes one value at a time while this helps, up to a number of settings.

    Args:
      begin: the first setting; the search changes its values in this order.
      score: the score of a setting; larger is better.
      budget: the number of settings that may be scored.

    Returns:
      The best setting that was scored, or ``begin`` if the budget is 0.
    """
    scores: dict[tuple[float, ...], float] = {}

    def better(new: Values, old: Values) -> bool:
        for values in (old, new):
            if tuple(values.values()) not in scores and len(scores) < budget:
                scores[tuple(values.values())] = score(values)
        low = -np.inf
        return scores.get(tuple(new.values()), low) > scores[tuple(old.values())]

    best, moved = dict(begin), budget > 0
    while moved:
        moved = False
        for name in begin:
            for step in (1, -1):
                new = {**best, name: neighbour(best[name], step)}
                while better(new, best):
                    best, moved = new, True
                    new = {**best, name: neighbour(best[name], step)}
    return best


class Results:
    """The lines of a file, by the run that they describe; it adds new lines at once."""

    def __init__(self, path: Path) -> None:
        """Reads the file, which need not exist."""
        self.path = path
        self.lines = {self.identity(line): line for line in read(path)}

    @staticmethod
    def identity(line: dict[str, Any]) -> str:
        """The key of a run, or of the settings of a task."""
        fields = "task", "row", "values", "seed", "tested", "stop"
        return json.dumps([line.get(field) for field in fields])

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line, also after a line that a killed process left incomplete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as file:
            file.seek(0)
            kept = file.read()
            open_line = kept and not kept.endswith("\n")
            file.write("\n" * bool(open_line) + json.dumps(line) + "\n")
        self.lines[self.identity(line)] = line


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a results file, which need not exist."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: left out a line that is not JSON: {text[:60]}")
    return found


class Protocol:
    """The search and the test of all rows of one task.

    Args:
      name: the name of the task.
      source: its images.
      results: the runs.
      late: whether the process must end.
    """

    def __init__(
        self,
        name: str,
        source: tasks.Source,
        results: Results,
        late: Callable[[], bool] = lambda: False,
    ) -> None:
        """Refuses a file with runs of this task under other settings."""
        self.name, self.source, self.results, self.late = name, source, results, late
        self.task = source.task
        settings = json.loads(json.dumps(dataclasses.asdict(self.task)))
        del settings["seeds"]
        line = {"task": name, "settings": settings}
        known = results.lines.get(results.identity(line))
        if known is None:
            results.add(line | {"versions": study.environment()})
        elif known["settings"] != settings:
            raise SystemExit(f"{results.path} holds {name} with other settings")
        self.trainings: dict[str, Training] = {}

    def run(self, row: str, values: Values, seed: int, **how: Any) -> dict[str, Any]:
        """The line of a run, from the file or from a new run."""
        line = {"task": self.name, "row": row, "values": values, "seed": seed, **how}
        name = self.results.identity(line)
        if name not in self.results.lines:
            if self.late():
                raise OutOfTime
            if row not in self.trainings:
                self.trainings[row] = Training(self.source, row)
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            saved = self.results.path.with_suffix(".partial") / digest
            how = {"late": self.late, "saved": saved, **how}
            result = self.trainings[row].run(values, seed, **how)
            found = {k: v for k, v in result._asdict().items() if v is not None}
            self.results.add(line | found)
            print(f"{self.name}, {row}, {values}, {seed}: {result.accuracy:.2f} %")
        return self.results.lines[name]

    def chosen(self, name: str) -> tuple[Values, int | None]:
        """The setting that the search finds for a row, and the last epoch."""
        row, task = rows.ROWS[name], self.task
        scores: dict[str, tuple[Values, list[Any]]] = {}

        def score(values: Values) -> float:
            of = "SGD" if row.early else name
            lines = [self.run(of, values, s, tested=False) for s in task.search_seeds]
            scores[json.dumps(values)] = values, lines
            return float(np.mean([line["accuracy"] for line in lines]))

        begin = rows.start(row, dict(task.starts))
        best = search(begin, score, task.budget)
        if not row.early or not scores:
            return best, None
        every = max(1, task.epochs // CURVE)
        curves = [
            (float(mean), values, (i + 1) * every)
            for values, lines in scores.values()
            for i, mean in enumerate(np.mean([line["curve"] for line in lines], axis=0))
        ]
        _, best, epoch = max(curves, key=lambda x: x[0])
        return best, epoch

    def test(self, name: str, seed: int) -> dict[str, Any]:
        """The tested run of a row and a seed, after the row's search."""
        values, stop = self.chosen(name)
        how = {"tested": True} | ({"stop": stop} if stop else {})
        return self.run(name, values, seed, **how)

    def complete(self, names: list[str]) -> list[dict[str, Any]]:
        """The tested runs of these rows, row by row; seed by seed without a search."""
        pairs = [(name, seed) for name in names for seed in self.task.seeds]
        if not self.task.budget:
            pairs.sort(key=lambda pair: pair[1])
        return [self.test(*pair) for pair in pairs]

    def repeat(self, lines: list[dict[str, Any]], names: list[str]) -> list[float]:
        """Trains the tested runs of another file again, without a search.

        The runs of the search are copied, because a report chooses by them.

        Returns:
          The differences in accuracy of each run, in points.
        """
        of = [x for x in lines if x["task"] == self.name and x.get("row") in names]
        for line in of:
            if (
                not line["tested"]
                and self.results.identity(line) not in self.results.lines
            ):
                self.results.add(line)
        wanted = [line for line in of if line["tested"]]
        differences = []
        for line in wanted:
            how = {key: line[key] for key in ("tested", "stop") if key in line}
            made = self.run(line["row"], line["values"], line["seed"], **how)
            differences.append(made["accuracy"] - line["accuracy"])
        return differences


def run_task(name: str, options: argparse.Namespace, late: Callable[[], bool]) -> None:
    """The search and the tests of a task, or its tests again."""
    task = tasks.TASKS[name]
    if options.seeds:
        task = dataclasses.replace(task, seeds=tuple(range(options.seeds)))

    def of(number: int) -> Protocol:
        searched, settings = tasks.searched(name, task, number)
        source = tasks.Source(settings, options.data)
        return Protocol(searched, source, Results(options.out), late)

    if not options.repeat:
        of(options.search).complete(options.rows)
        return
    known = read(options.repeat)
    if options.seeds:
        known = [x for x in known if not x.get("tested") or x["seed"] in task.seeds]
    searches = {tasks.parted(line["task"]) for line in known}
    numbers = sorted(number for base, number in searches if base == name)
    found = [of(number).repeat(known, options.rows) for number in numbers]
    if not any(found):
        raise SystemExit(f"{options.repeat} has no such runs of {name}")
    runs = [abs(difference) for some in found for difference in some]
    print(f"{name}: {len(runs)} runs differ by {max(runs):.2f} at most")


def main() -> None:
    """Trains and reports."""
    results = study.RESULTS / "protocol.jsonl"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=tasks.TASKS, default=["digits"])
    parser.add_argument("--data", type=Path, help=".npz, or a folder of the archive")
    parser.add_argument("--rows", nargs="+", choices=rows.ROWS, default=list(rows.ROWS))
    parser.add_argument("--seeds", type=int, help="how many, if not the task's")
    told = "the number of the search; each has other seeds (1)"
    parser.add_argument("--search", type=int, default=1, help=told)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    out = Path("out/protocol.jsonl")
    parser.add_argument("--out", type=Path, default=out, help=f"added to ({out})")
    told = f"train the tested runs of a file again ({results.name})"
    parser.add_argument("--repeat", type=Path, nargs="?", const=results, help=told)
    parser.add_argument("--report", type=Path, nargs="?", const=results)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    for name in () if options.report else options.task:
        try:
            run_task(name, options, lambda: time.perf_counter() > end)
        except OutOfTime:
            raise SystemExit(UNFINISHED) from None
    study.show(options, report.markdown, report.draw, read)


if __name__ == "__main__":
    main()
