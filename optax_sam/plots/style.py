"""Shared by all pictures: figures, styles of lines, scales and font sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_sam.plots.colours import BLACK, METHODS, PALETTE

DASHES = "-", "--", "-.", ":"  # matplotlib's names, which a line tells again
MARKERS = "o", "s", "^", "D", "v"
SMALL = 9  # points; axis labels have one more
OWN = "optax_sam.plots"  # the label of figures that are made here


def new_figure(width: float, height: float) -> Any:
    """A figure that pyplot does not know, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "optax_sam.plots draws with matplotlib: pip install matplotlib."
        ) from error
    size: Any = dict(figsize=(width, height), dpi=150, layout="constrained")
    return Figure(label=OWN, **size)


def axes_or_new(ax: Any) -> Any:
    """The given axes, or the axes of a new figure."""
    return new_figure(5, 3.3).subplots() if ax is None else ax


def as_many_axes(ax: Any, number: int, what: str, make: Any) -> Any:
    """The given axes, which must be as many; or new ones from ``make()``."""
    if ax is None:
        return make()
    axes = np.ravel(np.asarray(ax, object))
    if len(axes) != number:
        raise ValueError(
            f"{number} {what} need as many axes; got {len(axes)}. Write"
            f" ax=figure.subplots(1, {number}), or ax=None for a new figure."
        )
    return axes


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
                f"{name}{f'[{key!r}]' if key else ''} must have shape {shape}, with one"
                f" value for each point; got {array.shape}."
            )
    return arrays


def finite(name: str, series: Any) -> np.ndarray:
    """All finite values of several arrays; an error if there is none to draw."""
    values = np.concatenate([np.ravel(np.asarray(x, float)) for x in series])
    values = values[np.isfinite(values)]
    if not values.size:
        raise ValueError(
            f"{name} has no finite value, so there is nothing to draw. Did the training"
            " run diverge? If the weights are finite, look at a smaller region."
        )
    return values


def styled(
    named: Mapping[str, Any],
    ax: Any = None,
    kind: str = "linestyle",
    choices: tuple[str, ...] = DASHES,
) -> list[tuple[str, Any, dict[str, Any]]]:
    """Each series with its label and style, so that none hides another or is like it.

    A method has a fixed colour. Others take the colour of the palette that the fewest
    lines have, on the axes and among the series. Neighbours have different dashes (or
    another ``kind``), and series of one colour do, while there are enough ``choices``.
    """
    from matplotlib import rcParams
    from matplotlib.artist import getp
    from matplotlib.colors import to_hex

    # The text colour of the current style, such as black on white.
    shown = lambda colour: rcParams["text.color"] if colour == BLACK else colour
    there = [] if ax is None else ax.lines
    used = [(to_hex(line.get_color()), getp(line, kind)) for line in there]
    taken = {METHODS.get(name) for name in named}
    free = [colour for colour in PALETTE if colour not in taken] or list(PALETTE)
    found = []
    for i, (name, series) in enumerate(named.items()):
        number = {c: sum(x == to_hex(shown(c)) for x, _ in used) for c in free}
        colour = shown(METHODS.get(name) or min(free, key=number.__getitem__))
        start = i % len(choices)
        in_turn = choices[start:] + choices[:start]
        unused = [x for x in in_turn if (to_hex(colour), x) not in used]
        style = {"color": colour, kind: (unused or in_turn)[0], "lw": 1.6}
        used.append((to_hex(colour), style[kind]))
        found.append((told(name, series), series, style))
    return found


def told(name: str, series: Any) -> str:
    """The name of a series, with a note if no value of it can be drawn."""
    values = getattr(series, "density", series)
    return name if np.isfinite(values).any() else f"{name} (no finite value)"


def label_axes(ax: Any, x: str, y: str, color: str | None = None) -> None:
    """Names the axes; ``color`` is for the vertical one."""
    if x:
        ax.set_xlabel(x, fontsize=SMALL + 1)
    ax.set_ylabel(y, fontsize=SMALL + 1)
    ax.tick_params(labelsize=SMALL)
    if color:  # else the colour of the current style, which may be white on black
        ax.yaxis.label.set_color(color)
        ax.tick_params(axis="y", colors=color)
    ax.spines[["top", "right"]].set_visible(False)


def with_drawn(ax: Any, low: float, high: float) -> tuple[float, float]:
    """Limits of the vertical axis, which keep in view what is on the axes already."""
    bottom, top = ax.get_ylim() if ax.lines else (low, high)
    return min(low, bottom), max(high, top)


def log_scale(ax: Any, values: np.ndarray) -> None:
    """A logarithmic vertical axis, linear around zero if not all are positive.

    What is on the axes already counts, but not lines at a share of the axes.
    """
    there = [x.get_ydata() for x in ax.lines if x.get_transform() == ax.transData]
    values = np.concatenate([values, *(np.asarray(y, float) for y in there)])
    values = values[np.isfinite(values)]
    if (values > 0).all():
        ax.set_yscale("log")
        return
    sizes = np.abs(values[values != 0])
    largest = sizes.max(initial=1e-300)
    ax.set_yscale("symlog", linthresh=max(sizes.min(initial=1.0), 1e-3 * largest))
    ax.axhline(0, color="0.5", lw=0.8, zorder=0)


def numerals(values: Any) -> list[str]:
    """Numbers with as few digits as tell them apart."""
    texts = []
    for digits in range(2, 17):
        texts = [_numeral(float(f"{value:.{digits}g}")) for value in values]
        if len({*texts}) == len(np.unique(values)):
            break
    return texts


def _numeral(value: float) -> str:
    if not np.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return np.format_float_positional(value, trim="-")
    mantissa, exponent = np.format_float_scientific(value, trim="-").split("e")
    return rf"${mantissa} \times 10^{{{int(exponent)}}}$"


def wrapped(name: str, width: float) -> str:
    """A name in lines of at most so many points."""
    if "$" in name:
        return name
    return textwrap.fill(name, max(8, int(width / (0.55 * SMALL))))


def add_legend(ax: Any) -> None:
    """Names, if there are any, in rows above the axes, where no curve is.

    Long names get fewer columns, and then more lines. A figure that was made here grows
    by the rows beyond two. Given axes do not grow, so the legend moves to the place
    where it hides least.
    """
    named = [line for line in ax.lines if line.get_label()[:1] not in ("", "_")]
    if not named:
        return
    figure, style = ax.figure, {"fontsize": SMALL, "frameon": False}
    above: Any = dict(loc="lower center", bbox_to_anchor=(0.5, 1), borderpad=0)
    columns = min(4, len(named))
    draw = lambda: ax.legend(handles=named, ncols=columns, **style, **above)
    width = lambda: draw().get_window_extent().width
    while width() > ax.bbox.width and columns > 1:
        columns -= 1
    if width() > ax.bbox.width:
        points = 72 * ax.bbox.width / figure.dpi
        for line in named:
            line.set_label(wrapped(line.get_label(), points - 5 * SMALL))
    height = draw().get_window_extent().height
    if figure.get_label() == OWN:
        beyond = max(0, height / figure.dpi - 0.4)
        figure.set_figheight(figure.get_figheight() + beyond)
    elif height > 0.5 * ax.bbox.height or (
        figure.get_layout_engine() is None and ax.bbox.y1 + height > figure.bbox.y1
    ):
        ax.legend(handles=named, fontsize=SMALL, framealpha=0.8)
