"""The figures of the papers, from ``results/published.csv``."""

from __future__ import annotations

import csv

from benchmarks.lib.study import RESULTS


def figures(data: str, model: str) -> dict[str, list[dict[str, str]]]:
    """The figures for a network on a data set, by method."""
    rows: dict[str, list[dict[str, str]]] = {}
    with (RESULTS / "published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["data"], row["model"]) == (data, model):
                rows.setdefault(row["method"], []).append(row)
    return rows
