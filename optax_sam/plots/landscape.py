"""Losses along lines and on planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from optax_sam.plots.style import (
    SMALL,
    add_legend,
    axes_or_new,
    by_name,
    label_axes,
    new_figure,
    styled,
)
from optax_sam.schedules import check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
      unit: of the loss; nats for a cross-entropy.

    Returns:
      The axes.

    Raises:
      ValueError: if the losses have another shape than the steps.
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
    ax = axes_or_new(ax)
    for name, values, style in styled(named):
        ax.plot(x, values, label=name, **style)
    label_axes(ax, "Offset (lengths of the direction)", f"Loss ({unit})")
    add_legend(ax)
    return ax


def loss_surface(
    alphas: ArrayLike,
    betas: ArrayLike,
    losses: ArrayLike | Mapping[str, ArrayLike],
    *,
    ax: Any = None,
    unit: str = "nats",
    num_levels: int = 14,
) -> Any:
    """Draws losses on a plane, several side by side on one scale of colours.

    The levels are logarithmic if all losses are positive and span a decade; where a
    loss is not finite the plane is left white. A cross marks the weights themselves.

    Args:
      alphas: ``(A,)``, the steps along the first direction, drawn to the right.
      betas: ``(B,)``, those along the second one, drawn upwards.
      losses: ``(A, B)``, as from :func:`optax_sam.sharpness.loss_surface`, or several
        by name.
      ax: where to draw, one for each surface; ``None`` makes a figure.
      unit: of the loss; nats for a cross-entropy.
      num_levels: of the contours.

    Returns:
      The axes; an array of them for several by name.

    Raises:
      ValueError: if the losses have not the shape ``(A, B)``, there are more surfaces
        than axes, or nothing is finite.
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
    named = by_name("losses", losses, x.shape + y.shape)
    axes = _side_by_side(ax, len(named))
    shown = {name: np.ma.masked_invalid(values) for name, values in named.items()}
    levels, norm = _levels(list(shown.values()), num_levels)
    for panel, (name, values) in zip(axes, shown.items(), strict=True):
        style: Any = dict(levels=levels, norm=norm)
        filled = panel.contourf(x, y, values.T, cmap="viridis", **style)
        panel.contour(x, y, values.T, colors="w", linewidths=0.5, alpha=0.6, **style)
        panel.plot(0, 0, "+", color="w", markersize=9, markeredgewidth=1.5)
        label_axes(
            panel, "Offset along $d$", "Offset along $d'$" if panel is axes[0] else ""
        )
        panel.set_title(name, fontsize=SMALL + 1)
        panel.locator_params(nbins=4)
    bar = axes[0].figure.colorbar(filled, ax=list(axes), label=f"Loss ({unit})")
    bar.set_ticks(levels[:: max(1, num_levels // 7)], minor=False)
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    bar.ax.tick_params(labelsize=SMALL)
    return axes if isinstance(losses, Mapping) else axes[0]


def _side_by_side(ax: Any, number: int) -> np.ndarray:
    if ax is None:
        figure = new_figure(2.4 * number + 1.2, 2.9)
        return figure.subplots(1, number, squeeze=False, sharex=True, sharey=True)[0]
    axes = np.ravel(np.asarray(ax, object))
    if len(axes) != number:
        raise ValueError(
            f"{number} surfaces need as many axes; got {len(axes)}. Write"
            f" ax=figure.subplots(1, {number}), or ax=None for a new figure."
        )
    return axes


def _levels(surfaces: list[Any], number: int) -> tuple[np.ndarray, Any]:
    """Levels that all surfaces share, and the scale of their colours."""
    from matplotlib.colors import LogNorm, Normalize

    finite = np.concatenate([surface.compressed() for surface in surfaces])
    if not finite.size:
        raise ValueError("No loss on the surface is finite; look at a smaller part.")
    low, high = finite.min(), finite.max()
    if low > 0 and high > 10 * low:
        return np.geomspace(low, high, number), LogNorm(low, high)
    high = max(high, low + 1e-6 * max(1.0, abs(low)))  # a plane has no levels
    return np.linspace(low, high, number), Normalize(low, high)
