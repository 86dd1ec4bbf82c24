"""Tables and the figure of the quality benchmark, from its lines of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.lib import study, tables
from benchmarks.lib.study import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from benchmarks.quality import presets

Row = dict[str, Any]
TITLES = {
    "digits": "digits",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mlp": "MLP",
    "cnn": "CNN",
    "vit": "small ViT",
    "resnet18": "ResNet-18",
    "wrn28-10": "WideResNet-28-10",
    "pyramidnet110": "PyramidNet-110",
    "tiny-resnet": "tiny ResNet",
}
# What all runs of a table have in common, beside the data set and the network.
SHARED = (
    *("epochs", "batch_size", "learning_rate", "weight_decay", "momentum"),
    *("smoothing", "augmentation", "label_noise", "limit", "dtype", "device"),
)
HEADER = [
    *("method", "seeds", "test accuracy (%)", "last epochs (%)", "minus SAM"),
    *("train loss", "ascents", "gradients per step", "AIS", "AIS / SAM's"),
    *("of what its gradients allow", "published (%)", "published ascents"),
    "published AIS / SAM's",
]
TIMED = "AIS", "AIS / SAM's", "of what its gradients allow", "published AIS / SAM's"


def groups(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """By what they share, then by method in the order of the presets."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: presets.METHODS.index(row["method"])):
        shared = ", ".join(
            f"{key.replace('_', ' ')} {row[key]:g}"
            if isinstance(row[key], float | int)
            else str(row[key])
            for key in SHARED
        )
        title = f"{TITLES[row['data']]}, {TITLES[row['model']]}: {shared}"
        found.setdefault(title, {}).setdefault(name(row, rows), []).append(row)
    return found


def name(row: Row, rows: list[Row]) -> str:
    """The method, and its hyperparameters where the file has several choices."""
    alike = [r for r in rows if all(r[k] == row[k] for k in ("method", *SHARED))]
    alike = [r for r in alike if (r["data"], r["model"]) == (row["data"], row["model"])]
    if all(r["hyperparameters"] == row["hyperparameters"] for r in alike):
        return row["method"]
    values = ", ".join(f"{k} {v:g}" for k, v in row["hyperparameters"].items())
    return f"{row['method']} ({values})"


def paired(rows: list[Row], others: list[Row]) -> list[float]:
    """Differences of accuracy between runs with equal seeds."""
    by_seed = {row["seed"]: row["accuracy"] for row in others}
    return [
        row["accuracy"] - by_seed[row["seed"]] for row in rows if row["seed"] in by_seed
    ]


def median(rows: list[Row], key: str) -> float | None:
    """Over the runs that have it."""
    values = [row[key] for row in rows if row[key] is not None]
    return float(np.median(values)) if values else None


def markdown(rows: list[Row], times: bool = True) -> dict[str, str]:
    """A table for each setting, by what its runs share."""
    return {title: table(family, times) for title, family in groups(rows).items()}


def table(family: dict[str, list[Row]], times: bool = True) -> str:
    """The runs of one setting, with what was published beside them.

    Args:
      family: runs by method.
      times: whether the columns that were timed are shown, next to what was counted.
    """
    first = next(iter(family.values()))[0]
    published = presets.published(first["data"], first["model"])
    sam, sgd = family.get("SAM"), family.get("SGD")
    lines = []
    for label, rows in family.items():
        method = rows[0]["method"]
        steps, ascents = rows[0]["steps"], median(rows, "ascents") or 0
        losses = [row["train_loss"] for row in rows if row["train_loss"] is not None]
        cost = float(np.mean([row["gradients_per_step"] for row in rows]))
        ais, of_sam, allowed = median(rows, "ais"), "", ""
        if ais and sam and median(sam, "ais"):
            of_sam = f"{100 * ais / median(sam, 'ais'):.0f} %"
        if ais and sgd and median(sgd, "ais"):
            allowed = f"{100 * ais * cost / median(sgd, 'ais'):.0f} %"
        difference = paired(rows, sam) if sam and rows is not sam else []
        share = f"{ascents:.0f} ({100 * ascents / steps:.0f} %)" if ascents else ""
        cells = [
            *(
                label,
                str(len(rows)),
                tables.with_error([row["accuracy"] for row in rows]),
            ),
            tables.with_error([row["accuracy_last_epochs"] for row in rows]),
            tables.with_error(difference, "+") if difference else "",
            f"{np.mean(losses):.3f}" if len(losses) == len(rows) else "not finite",
            *(share, f"{cost:.3f}", f"{ais:,.0f}" if ais else "", of_sam, allowed),
        ]
        theirs = published.get(method, [])
        both = lambda text: "; ".join(filter(None, map(text, theirs)))  # noqa: B023
        cells.append(
            both(lambda x: f"{x['accuracy']} ± {x['deviation'] or '?'} ({x['source']})")
        )
        count = lambda x: x["ascents"] and f"{x['ascents']}"
        cells.append(both(count))
        cells.append(both(lambda x: x["ais_percent"] and f"{x['ais_percent']} %"))
        lines.append(cells)
    # Without published figures their columns would be empty.
    shown = [i for i in range(len(HEADER)) if published or i < len(HEADER) - 3]
    if not times:
        shown = [i for i in shown if HEADER[i] not in TIMED]
    cut = lambda line: [line[i] for i in shown]
    return tables.table(cut(HEADER), [cut(line) for line in lines])


# Each with the shapes.
COLOURS = BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK
SHAPES = "o", "s", "^"


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy against gradients per step, a panel for each setting."""
    found = groups(rows)
    figure = Figure(figsize=(5.6 * len(found), 4.8), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, family in zip(panels, found.values(), strict=True):
        first = next(iter(family.values()))[0]
        axes.set_title(
            f"{TITLES[first['data']]}, {TITLES[first['model']]},"
            f" {first['epochs']} epochs",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)
        for label, runs in family.items():
            place = presets.METHODS.index(runs[0]["method"])
            mean, error = tables.mean_and_error([row["accuracy"] for row in runs])
            axes.errorbar(
                np.mean([row["gradients_per_step"] for row in runs]),
                mean,
                0 if np.isnan(error) else error,
                color=COLOURS[place % len(COLOURS)],
                marker=SHAPES[place // len(COLOURS)],
                linestyle="",
                label=label,
                elinewidth=0.8,
            )
        axes.set_xlabel("Gradients per step (a forward pass is a third of one)")
        axes.set_ylabel("Test accuracy, last epoch (%)")
    handles = {}  # a panel may lack methods that another one has
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=8,
        ncols=4 * len(found),
        loc="outside lower center",
    )
    study.save(figure, path)
