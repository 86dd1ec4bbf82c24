"""The figure of digits_label_noise.py: learning curves or, of many methods, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as Line
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox

# Grey for SGD, and Okabe and Ito's colours.
PALETTE = "#666666", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


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


def draw_costs(axes: Axes, measured: dict[str, Any]) -> None:
    """The last accuracies against the gradients per step, as points with labels."""
    last = lambda name: np.array([v[name][:, -1] for v in measured.values()]).T
    x, (y, sd) = last("gradients").mean(0), average(last("accuracy"))
    order = np.lexsort((-y, x.round(1)))
    for cost in set(x.round(2)):  # equal costs side by side
        same = np.flatnonzero(x.round(2) == cost)
        x[same] += 0.02 * (np.arange(len(same)) - (len(same) - 1) / 2)
    colors = np.empty(len(x), object)  # they only tell neighbours apart
    colors[order] = np.resize(PALETTE[1:2] + PALETTE[3:6], len(x))
    axes.errorbar(x, y, sd, fmt="none", ecolor=colors, elinewidth=0.8)
    axes.scatter(x, y, s=16, c=colors)
    axes.margins(0.12)
    # As the errors' logarithm, since most methods stand close together at the top.
    spread = lambda y: -np.log(np.maximum(101 - y, 0.1))
    axes.set_yscale("function", functions=(spread, lambda z: 101 - np.exp(-z)))
    axes.yaxis.set_major_locator(FixedLocator([*range(0, 90, 10), *range(90, 100, 2)]))
    axes.set_xlabel("Gradients per step")

    # A label takes the nearest place where it hides no point and no other label, and
    # where no leader runs through a label.
    axes.figure.draw_without_rendering()
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    ends = (axes.transData.transform(np.c_[x, end]) for end in (y - sd, y + sd))
    taken = [Bbox([low - 6, high + 6]) for low, high in zip(*ends, strict=True)]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.c_[2 * np.cos(angles), np.sin(angles)]
    places = [radius * direction for radius in range(6, 90, 2) for direction in ring]
    style: Any = {"textcoords": "offset points", "fontsize": 8}
    style |= {"ha": "center", "va": "center"}
    line = {"arrowstyle": "-", "linewidth": 0.5, "shrinkB": 3}
    labels, leaders = [], []
    for i in order:
        name, point = list(measured)[i], (x[i], y[i])
        style |= {"color": colors[i], "arrowprops": line | {"color": colors[i]}}
        label = axes.annotate(name, point, (0, 0), **style)
        label.set_in_layout(False)
        for place in places:
            label.set_position(place)
            label.update_positions(renderer)
            box = Text.get_window_extent(label).padded(4)
            leader = Line([axes.transData.transform(point), (box.p0 + box.p1) / 2])
            inside = axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1)
            crossed = any(leader.intersects_bbox(other) for other in labels)
            hides = any(other.intersects_bbox(box) for other in leaders)
            if inside and not (crossed or hides or box.count_overlaps(taken + labels)):
                break
        labels.append(box)
        leaders.append(leader)


def draw(measured: dict[str, Any], window: int, path: Path) -> None:
    """Learning curves, or costs if they are many; and how vSAM chose its rate."""
    few = len(measured) <= len(PALETTE)
    figure = Figure(figsize=(8, 4 if few else 5), dpi=200, layout="constrained")
    layout = "AAB;AAC" if few else "AAAB;AAAC"
    panels = figure.subplot_mosaic(layout if "vSAM" in measured else "A")
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    colors = dict(zip(measured, PALETTE, strict=False))
    if "vSAM" in measured:
        vsam, color = measured["vSAM"], colors.get("vSAM", PALETTE[1])
        # While it warms up, every step is sampled and the rate is not used.
        warm = vsam["ascent_rate"] == 1
        sampling = np.where(warm, np.nan, 100 * vsam["samples_per_window"] / window)
        draw_curve(panels["B"], sampling, color)
        panels["B"].set(title="vSAM's sampling rate", ylabel="Steps (%)")
        draw_curve(panels["C"], vsam["psf_norm"], color)
        panels["C"].set(title="vSAM's PSF norm", ylabel="Nats per weight")
        for panel in "BC":
            panels[panel].set_ylim(0, None)
    main = panels["A"]
    main.set_title("Trained with 40 % of the labels replaced (mean ± sd)")
    main.set_ylabel("Test accuracy, clean labels (%)")
    if not few:
        draw_costs(main, measured)
    else:
        for name, color in colors.items():
            draw_curve(main, measured[name]["accuracy"], color, label=name)
        main.set_ylim(68, 100)
        figure.legend(
            frameon=False,
            ncols=5 if len(measured) == 5 else 4,
            loc="outside lower center",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
