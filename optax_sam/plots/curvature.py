"""The spectrum of the Hessian, and its edge over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.plots.style import (
    MARKERS,
    add_legend,
    axes_or_new,
    by_name,
    label_axes,
    styled,
)
from optax_sam.schedules import check_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from optax_sam.sharpness import SpectralDensity


def spectral_density(
    result: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    ax: Axes | None = None,
    unit: str = "nats",
    floor: float = 1e-7,
) -> Axes:
    """Draws the density of the Hessian's eigenvalues, with a band of its error.

    The density is on a logarithmic axis, or the outliers, one eigenvalue each, would
    not be seen beside the many near zero.

    Args:
      result: of :func:`optax_sam.sharpness.spectral_density`, or several by name.
      ax: where to draw; ``None`` makes a figure.
      unit: of the loss; nats for a cross-entropy.
      floor: the lowest density shown, as a share of the highest.

    Returns:
      The axes. The band is one standard error over the probes to either side; of a
      single probe there is none.

    Raises:
      ValueError: if ``floor`` is not in ``(0, 1)``, or nothing was given.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import numpy as np
      >>> from optax_sam import plots, sharpness
      >>> grid = np.linspace(-1, 5, 100)
      >>> density = np.exp(-((grid / 0.1) ** 2))  # sharpness.spectral_density has it
      >>> result = sharpness.SpectralDensity(
      ...     grid, density, stderr=density / 10, nodes=None, weights=None, sigma=0.1)
      >>> plots.spectral_density(result).get_yscale()
      'log'
    """
    check_number("floor", floor, 0.0, 1.0, open_low=True, open_high=True)
    named = {"": result} if hasattr(result, "density") else dict(result)
    if not named:
        raise ValueError(
            "result has no entries: there is nothing to draw. Pass what"
            " sharpness.spectral_density returned, or a dict of several by name."
        )
    lowest = floor * max(float(np.max(found.density)) for found in named.values())
    ax = axes_or_new(ax)
    ax.set_yscale("log")
    for name, found, style in styled(named):
        grid, density = np.asarray(found.grid), np.asarray(found.density)
        ax.plot(grid, density, label=name, **style)
        error = np.asarray(found.stderr)
        if np.isfinite(error).all():
            low, high = (np.maximum(density + k * error, lowest) for k in (-1, 1))
            ax.fill_between(grid, low, high, color=style["color"], alpha=0.25, lw=0)
    ax.set_ylim(bottom=lowest)
    label_axes(ax, f"Eigenvalue ({unit} per squared weight)", "Density of eigenvalues")
    add_legend(ax)
    return ax


def sharpness_history(
    steps: ArrayLike,
    lambda_max: ArrayLike | Mapping[str, ArrayLike],
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: float = 0.0,
    sam_edge: ArrayLike | Mapping[str, ArrayLike] | None = None,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Axes:
    r"""Draws the largest eigenvalue over training, and where training gets unstable.

    Gradient descent on a quadratic diverges above :math:`2 / \eta`, and with heavy-ball
    momentum :math:`\beta` above :math:`2 (1 + \beta) / \eta`; full-batch training
    hovers about that line. With small batches, and with SAM, it stays below.

    Args:
      steps: ``(T,)``, when it was measured.
      lambda_max: ``(T,)``, or several by name.
      learning_rate: :math:`\eta`, a number, one for each of ``steps``, or a schedule;
        ``None`` draws no line, and where it is 0 there is none.
      momentum: :math:`\beta`, in ``[0, 1)``.
      sam_edge: ``(T,)``, the corresponding edge of SAM, as from
        ``optax_sam.sharpness.sam_stability_edge``; several by the names of
        ``lambda_max``, whose colours they take.
      ax: where to draw; ``None`` makes a figure.
      unit: of the loss; nats for a cross-entropy.

    Returns:
      The axes.

    Raises:
      ValueError: if an argument has another shape than ``steps``, ``momentum`` is out
        of range, or ``sam_edge`` has a name that ``lambda_max`` has not.
      ImportError: if there is no matplotlib.

    Examples:
      >>> from optax_sam import plots
      >>> ax = plots.sharpness_history(
      ...     [0, 10, 20], {"SGD": [5.0, 12.0, 20.5]}, learning_rate=0.1)
      >>> [line.get_label() for line in ax.lines]
      ['SGD', '$2 / \\eta$']

    References:
      Cohen et al., `Gradient Descent on Neural Networks Typically Occurs at the Edge of
      Stability <https://arxiv.org/abs/2103.00065>`_, 2021; Long and Bartlett,
      `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, 2023
    """
    check_number("momentum", momentum, 0.0, 1.0, open_high=True)
    x = np.asarray(steps)
    named = by_name("lambda_max", lambda_max, x.shape)
    edges = {} if sam_edge is None else by_name("sam_edge", sam_edge, x.shape)
    if unknown := sorted(edges.keys() - named.keys()):
        raise ValueError(
            f"sam_edge has {', '.join(map(repr, unknown))}, which lambda_max has not;"
            f" its names are {', '.join(map(repr, named))}. Give both the same ones."
        )
    ax = axes_or_new(ax)
    ax.set_yscale("log")
    for i, (name, values, style) in enumerate(styled(named)):
        # Without dashes: the markers tell them apart, and dashes are for edges.
        style = style | {"ls": "-", "marker": MARKERS[i % len(MARKERS)], "ms": 4}
        ax.plot(x, values, label=name, **style)
        if name in edges:
            label = f"{name}'s edge" if name else "SAM's edge"
            ax.plot(x, edges[name], ":", label=label, color=style["color"], lw=1.4)
    top = max(np.nanmax(values) for values in (*named.values(), *edges.values()))
    if learning_rate is not None:
        rate = learning_rate(x) if callable(learning_rate) else learning_rate
        rate = np.asarray(rate, float)
        if rate.shape not in ((), x.shape):
            raise ValueError(
                f"learning_rate must be a number, a schedule or of shape {x.shape};"
                f" got shape {rate.shape}."
            )
        rate = np.broadcast_to(rate, x.shape)
        edge = 2 * (1 + momentum) / np.where(rate > 0, rate, np.nan)
        label = r"$2 (1 + \beta) / \eta$" if momentum else r"$2 / \eta$"
        ax.plot(x, edge, "--", color="#555555", lw=1.4, label=label)
        # A decaying rate sends the line away; what it is compared with stays in sight.
        ax.set_ylim(top=2 * max(top, np.nanmin(edge)))
    label_axes(ax, "Step", rf"$\lambda_{{\max}}$ ({unit} per squared weight)")
    add_legend(ax)
    return ax
