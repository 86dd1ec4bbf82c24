"""Losses along lines and on planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from optax_sam.plots.colours import GREY
from optax_sam.plots.style import (
    SMALL,
    add_legend,
    as_many_axes,
    axes_or_new,
    by_name,
    finite,
    label_axes,
    new_figure,
    numerals,
    styled,
    told,
    with_drawn,
    wrapped,
)
from optax_sam.schedules import check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from optax_sam.sharpness import EigenLines, PathProjection


def loss_line(
    alphas: ArrayLike,
    losses: ArrayLike | Mapping[str, ArrayLike],
    *,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Axes:
    """Draws losses along a line, as from :func:`optax_sam.sharpness.loss_line`.

    Args:
      alphas: ``(A,)``, the steps along the direction.
      losses: ``(A,)``, or several by name: ``{"SGD": losses, "SAM": losses}``.
      ax: where to draw; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.

    Returns:
      The axes.

    Raises:
      ValueError: if the losses do not have the shape of the steps, or none is finite.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import numpy as np
      >>> from optax_sam import plots
      >>> x = np.linspace(-1, 1, 21)
      >>> ax = plots.loss_line(x, {"SGD": 9 * x**2, "SAM": x**2})
      >>> ax.get_ylabel()
      'Loss (nats)'
    """
    x, named = np.asarray(alphas), by_name("losses", losses, np.shape(alphas))
    finite("losses", named.values())
    ax = axes_or_new(ax)
    for label, values, style in styled(named, ax):
        ax.plot(x, values, label=label, **style)
    label_axes(ax, "Offset (lengths of the direction)", f"Loss ({unit})")
    add_legend(ax)
    return ax


def loss_along_eigenvectors(
    result: EigenLines, *, ax: Axes | None = None, unit: str = "nats"
) -> Axes:
    r"""Draws losses along eigenvectors, and dotted parabolas of the eigenvalues.

    The axes end a little above the highest loss, so steep parabolas leave them.

    Args:
      result: what :func:`optax_sam.sharpness.loss_along_eigenvectors` returned.
      ax: where to draw; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.

    Returns:
      The axes.

    Raises:
      ValueError: if no loss is finite.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import numpy as np
      >>> from optax_sam import plots, sharpness
      >>> x = np.linspace(-1, 1, 21)
      >>> result = sharpness.EigenLines(
      ...     x, losses=1 - np.cos(3 * x[None]), parabolas=4.5 * x[None]**2,
      ...     eigenvalues=np.array([9.0]))
      >>> plots.loss_along_eigenvectors(result).lines[0].get_label()
      '$\\lambda_{1} = 9$'
    """
    x, losses = np.asarray(result.alphas), np.asarray(result.losses)
    known = finite("result.losses", losses)
    texts = numerals(np.asarray(result.eigenvalues))
    names = [
        rf"$\lambda_{{{i}}} = {text.strip('$')}$" for i, text in enumerate(texts, 1)
    ]
    ax = axes_or_new(ax)
    low, high = known.min(), known.max()
    room = max(high - low, 1e-6 * max(1.0, abs(low)))
    limits = with_drawn(ax, low - 0.1 * room, high + 0.25 * room)
    parabolas = np.asarray(result.parabolas)
    for i, (label, values, style) in enumerate(
        styled(dict(zip(names, losses, strict=True)), ax)
    ):
        ax.plot(x, values, label=label, **style)
        ax.plot(x, parabolas[i], ls=":", lw=1.2, color=style["color"])
    ax.plot([], [], ls=":", lw=1.2, color=GREY, label="parabola")
    ax.set_ylim(*limits)
    label_axes(ax, "Offset along the eigenvector", f"Loss ({unit})")
    add_legend(ax)
    return ax


def loss_surface(
    alphas: ArrayLike,
    betas: ArrayLike,
    losses: ArrayLike | Mapping[str, ArrayLike],
    *,
    path: PathProjection | None = None,
    ax: Any = None,
    unit: str = "nats",
    num_levels: int = 14,
) -> Any:
    """Draws losses on a plane; several side by side with one colour scale.

    The levels are logarithmic if all losses are positive and the highest is five times
    the lowest. Where a loss is not finite, the plane stays white. A cross marks the
    weights themselves, if they are on the surface. The path of a training run has a dot
    for each checkpoint; the first dot is white.

    Args:
      alphas: ``(A,)``, the steps along the first direction, drawn to the right.
      betas: ``(B,)``, the steps along the second one, drawn upwards.
      losses: ``(A, B)``, as from :func:`optax_sam.sharpness.loss_surface`, or several
        by name.
      path: what :func:`optax_sam.sharpness.project_path` returned for the same
        directions. The labels of the axes then show the shares of the variance. A path
        with the name of a surface is drawn on that surface only, other paths on all.
      ax: where to draw, one for each surface; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.
      num_levels: the number of contours.

    Returns:
      The axes; an array of them for several by name.

    Raises:
      ValueError: if the losses are not of shape ``(A, B)``, ``A`` or ``B`` is 1, there
        are more surfaces than axes, or nothing is finite.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import numpy as np
      >>> from optax_sam import plots
      >>> x, y = np.linspace(-1, 1, 11), np.linspace(-2, 2, 21)
      >>> bowl = 0.1 + x[:, None] ** 2 + y**2
      >>> axes = plots.loss_surface(x, y, {"SGD": 9 * bowl, "SAM": bowl})
      >>> [ax.get_title() for ax in axes]
      ['SGD', 'SAM']
    """
    check_integer("num_levels", num_levels, 2)
    x, y = np.asarray(alphas), np.asarray(betas)
    if min(x.size, y.size) < 2:
        raise ValueError(
            f"A surface needs two or more alphas and betas; got {x.size} and {y.size}."
            " To draw the loss along one direction, write loss_line(alphas, losses)."
        )
    named = by_name("losses", losses, x.shape + y.shape)
    shown = {name: np.ma.masked_invalid(values) for name, values in named.items()}
    known = finite("losses", named.values())
    axes = as_many_axes(ax, len(named), "surfaces", lambda: _side_by_side(len(named)))
    levels, norm = _levels(known, num_levels)
    for panel, (name, values) in zip(axes, shown.items(), strict=True):
        style: Any = dict(levels=levels, norm=norm)
        filled = panel.contourf(x, y, values.T, cmap="viridis", **style)
        panel.contour(x, y, values.T, colors="w", linewidths=0.5, alpha=0.6, **style)
        if x.min() <= 0 <= x.max() and y.min() <= 0 <= y.max():
            panel.plot(0, 0, "+", color="w", markersize=9, markeredgewidth=1.5)
        right, up = "Offset along $d$", "Offset along $d'$"
        if path is not None:
            _draw_path(panel, path, name, set(shown))
            right, up = (
                f"{text}\n({100 * share:.0f} % of the path's variance)"
                for text, share in zip((right, up), path.share, strict=True)
            )
        label_axes(panel, right, up if panel is axes[0] else "")
        panel.set_title(
            wrapped(told(name, values.filled(np.nan)), 130), fontsize=SMALL + 1
        )
        panel.locator_params(nbins=4)
    bar = axes[0].figure.colorbar(filled, ax=list(axes), label=f"Loss ({unit})")
    ticks = levels[:: max(1, num_levels // 7)]
    bar.set_ticks(ticks, labels=numerals(ticks), minor=False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL)
    return axes if isinstance(losses, Mapping) else axes[0]


def _side_by_side(number: int) -> np.ndarray:
    figure = new_figure(max(4.8, 2 * number + 0.9), 2.6 if number > 1 else 3.6)
    return figure.subplots(1, number, squeeze=False, sharex=True, sharey=True)[0]


def _draw_path(panel: Any, path: PathProjection, name: str, panels: set[str]) -> None:
    """The paths that belong on this panel, with their names where they end."""
    from matplotlib.patheffects import withStroke

    several = isinstance(path.coordinates, Mapping)
    paths = path.coordinates if several else {"": path.coordinates}
    paths = {k: v for k, v in paths.items() if k == name or k not in panels - {""}}
    seen: Any = dict(path_effects=[withStroke(linewidth=3, foreground="w")])
    for label, points, style in styled(paths):
        x, y = np.asarray(points).T
        colour = style["color"]
        panel.plot(x, y, "o-", color=colour, markersize=2.5, lw=1.2, **seen)
        panel.plot(x[0], y[0], "o", color="w", markeredgecolor=colour, markersize=5)
        if label:
            # Ahead of the path, where it does not hide it.
            up = y[-1] >= y[0]
            place: Any = dict(xytext=(0, 6 if up else -6), textcoords="offset points")
            place |= dict(ha="center", va="bottom" if up else "top")
            end = {"color": colour, "fontsize": SMALL} | place | seen
            panel.annotate(label, (x[-1], y[-1]), **end)


def _levels(finite: np.ndarray, number: int) -> tuple[np.ndarray, Any]:
    """Levels that all surfaces share, and the scale of their colours."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = finite.min(), finite.max()
    if low > 0 and high > 5 * low:
        return np.geomspace(low, high, number), LogNorm(low, high)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))  # a plane has no levels
    return np.linspace(low, high, number), Normalize(low, high)
