"""The figures of label_noise.py: learning curves or, of many methods, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from benchmarks.lib import study
from benchmarks.lib.study import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY

PALETTE = GREY, BLUE, ORANGE, GREEN, RED, PINK, SKY


def average(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the seeds, and the standard deviation; of one seed, zero."""
    return values.mean(0), values.std(0, ddof=min(1, len(values) - 1))


def draw_curve(axes: Axes, values: np.ndarray, color: str, label: str = "") -> None:
    """The mean over the seeds by epoch, in a band of one standard deviation."""
    epochs, (mean, sd) = np.arange(1, values.shape[1] + 1), average(values)
    axes.plot(epochs, mean, label=label, color=color, linewidth=1.6)
    low, high = mean - sd, mean + sd
    axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="Epoch", xlim=(0, len(mean)))
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_costs(axes: Axes, rows: dict[str, Any]) -> None:
    """The last accuracies, a line for each method, the cheapest ones at the top."""
    costs = np.array([np.mean(row["gradients_per_step"]) for row in rows.values()])
    last = np.array([np.array(row["accuracy"])[:, -1] for row in rows.values()])
    means, sds = average(last.T)
    order = np.lexsort((-means, costs.round(2)))
    names, costs = np.array(list(rows))[order], costs[order]
    places = np.arange(len(order))
    style: Any = {"fmt": "o", "markersize": 4, "elinewidth": 1.2, "color": PALETTE[1]}
    axes.errorbar(means[order], places, xerr=sds[order], **style)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -0.6)
    # As the errors' logarithm, since most methods stand close together at the top.
    spread = lambda x: -np.log(np.maximum(101 - x, 0.1))
    axes.set_xscale("function", functions=(spread, lambda z: 101 - np.exp(-z)))
    axes.xaxis.set_major_locator(FixedLocator([*range(0, 90, 20), 70, 90, 94, 96, 98]))
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    # Lines between groups of about one cost.
    changes = np.flatnonzero(np.diff(costs) > 0.1) + 0.5
    line: Any = {"color": "#bbbbbb", "linewidth": 0.6}
    axes.hlines(changes, 0, 1, transform=axes.get_yaxis_transform(), **line)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, [f"{cost:.2f}" for cost in costs], fontsize=8)
    right.set_ylabel("Gradients per step")
    right.spines["right"].set_visible(False)
    for side in (axes, right):
        side.tick_params(axis="y", length=0)


def draw(rows: dict[str, Any], path: Path) -> None:
    """Learning curves, or costs if they are many; and how vSAM chose its rate."""
    few = len(rows) <= len(PALETTE)
    height = 4 if few else max(4, 0.2 * len(rows) + 0.9)
    figure = Figure(figsize=(8, height), dpi=200, layout="constrained")
    layout = "AAB;AAC" if few else "AAAB;AAAC"
    panels = figure.subplot_mosaic(layout if "vSAM" in rows else "A")
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    colors = dict(zip(rows, PALETTE, strict=False))
    if "vSAM" in rows:
        vsam, color = rows["vSAM"], colors.get("vSAM", PALETTE[1])
        # Nothing is drawn of its warm-up: None becomes nan.
        sampling = 100 * np.array(vsam["sampling_rate"], float)
        draw_curve(panels["B"], sampling, color)
        panels["B"].set(title="vSAM's sampling rate", ylabel="Steps (%)")
        draw_curve(panels["C"], np.array(vsam["psf_norm"]), color)
        panels["C"].set(title="vSAM's PSF norm", ylabel="Nats per weight")
        for panel in "BC":
            panels[panel].set_ylim(0, None)
    main = panels["A"]
    main.set_title("Trained with 40 % of the labels replaced (mean ± sd)")
    accuracy = "Test accuracy, clean labels (%)"
    if not few:
        main.set_xlabel(accuracy)
        draw_costs(main, rows)
    else:
        main.set_ylabel(accuracy)
        for name, color in colors.items():
            draw_curve(main, np.array(rows[name]["accuracy"]), color, label=name)
        main.set_ylim(68, 100)
        figure.legend(
            frameon=False,
            ncols=4,
            loc="outside lower center",
        )
    study.save(figure, path)
