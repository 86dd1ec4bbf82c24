"""What all pictures share: figures, colours and sizes of letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Okabe and Ito's colours, the best to tell apart first, without the yellow: too light.
PALETTE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"
DASHES = "-", (0, (5, 2)), (0, (6, 2, 1.5, 2)), (0, (1.5, 1.5))
MARKERS = "o", "s", "^", "D", "v"
SMALL = 9  # points; axis labels have one more


def new_figure(width: float, height: float) -> Any:
    """A figure that pyplot does not know, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "optax_sam.plots draws with matplotlib: pip install 'optax_sam[plots]'."
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def axes_or_new(ax: Any) -> Any:
    """The axes given, or those of a new figure."""
    return new_figure(5, 3.3).subplots() if ax is None else ax


def by_name(name: str, values: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One or several series as arrays by name, all of this shape."""
    several = values if isinstance(values, Mapping) else {"": values}
    if not several:
        raise ValueError(
            f"{name} has no entries: there is nothing to draw. Pass an array, or a dict"
            " of several by name."
        )
    arrays = {key: np.asarray(value, float) for key, value in several.items()}
    for key, array in arrays.items():
        if array.shape != shape:
            raise ValueError(
                f"{name}{f'[{key!r}]' if key else ''} must have shape {shape}, a value"
                f" for each place where it was taken; got {array.shape}."
            )
    return arrays


def styled(named: Mapping[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Each series with a colour and dashes, so that equal ones do not hide each other.

    The two repeat after different numbers, together after 28 series.
    """
    return [
        (name, series, {"color": PALETTE[i % 7], "ls": DASHES[i % 4], "lw": 1.6})
        for i, (name, series) in enumerate(named.items())
    ]


def label_axes(ax: Any, x: str, y: str, color: str | None = None) -> None:
    """Names the axes; with a colour, the vertical one's."""
    if x:
        ax.set_xlabel(x, fontsize=SMALL + 1)
    ax.set_ylabel(y, fontsize=SMALL + 1)
    ax.tick_params(labelsize=SMALL)
    if color:  # else what the style in use has, which may be white on black
        ax.yaxis.label.set_color(color)
        ax.tick_params(axis="y", colors=color)
    ax.spines[["top", "right"]].set_visible(False)


def add_legend(ax: Any) -> None:
    """Names, if there are any, in rows above the axes, where no curve is."""
    named = [line for line in ax.lines if line.get_label()[:1] not in ("", "_")]
    if named:
        place: Any = dict(loc="lower center", bbox_to_anchor=(0.5, 1), borderpad=0)
        columns = min(4, len(named))
        ax.legend(handles=named, fontsize=SMALL, frameon=False, ncols=columns, **place)
