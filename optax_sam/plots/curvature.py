"""The spectrum of the Hessian, and the largest eigenvalue over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.plots.colours import GREY
from optax_sam.plots.style import (
    MARKERS,
    SMALL,
    add_legend,
    as_many_axes,
    axes_or_new,
    by_name,
    finite,
    label_axes,
    log_scale,
    new_figure,
    styled,
    told,
    with_drawn,
    wrapped,
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
    """Draws the density of the Hessian's eigenvalues, with an error band.

    The axis of the density is logarithmic. On a linear axis, outliers of one eigenvalue
    each would not be visible beside the many near zero.

    Args:
      result: what :func:`optax_sam.sharpness.spectral_density` returned, or several by
        name.
      ax: where to draw; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.
      floor: the lowest density shown, as a share of the highest.

    Returns:
      The axes. The band is one standard error over the probes to either side; for a
      single probe there is none.

    Raises:
      ValueError: if ``floor`` is not in ``(0, 1)``, or ``result`` is no density.
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
    named, limits = _densities(result, floor)
    ax = axes_or_new(ax)
    limits = with_drawn(ax, *limits)
    for label, found, style in styled(named, ax):
        _draw_density(ax, label, found, style, limits)
    label_axes(ax, f"Eigenvalue ({unit} per squared weight)", "Density of eigenvalues")
    add_legend(ax)
    return ax


def spectral_panels(
    results: Mapping[str, SpectralDensity],
    *,
    ax: Any = None,
    unit: str = "nats",
    floor: float = 1e-7,
) -> Any:
    """Draws several densities of eigenvalues, one above the other on equal axes.

    Use it for matrices of one network, such as its Hessian and its Gauss-Newton matrix.
    The Gauss-Newton matrix leaves out the curvature of the model. It has no eigenvalues
    left of the thin line at zero; the Hessian's come from that curvature.

    Args:
      results: what :func:`optax_sam.sharpness.spectral_density` returned, by name.
      ax: where to draw, one for each density; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.
      floor: the lowest density shown, as a share of the highest of all.

    Returns:
      The axes, an array.

    Raises:
      ValueError: as :func:`spectral_density` does, and if there are not as many axes.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import plots, sharpness
      >>> loss = lambda z, batch: jnp.mean(z**2)
      >>> model = lambda w, batch: jnp.sin(batch @ w)
      >>> args = jnp.ones(2), jnp.eye(2)[None]
      >>> H = sharpness.hessian(lambda w, batch: loss(model(w, batch), batch), *args)
      >>> G = sharpness.ggn(model, loss, *args)
      >>> found = {"Hessian": H, "GGN": G}
      >>> found = {k: sharpness.spectral_density(A, 0) for k, A in found.items()}
      >>> [ax.get_title() for ax in plots.spectral_panels(found)]
      ['Hessian', 'GGN']
    """
    named, limits = _densities(results, floor)
    number = len(named)
    make = lambda: new_figure(5, 1.5 * number + 0.6).subplots(
        number, 1, squeeze=False, sharex=True, sharey=True
    )[:, 0]
    axes = as_many_axes(ax, number, "densities", make)
    ends = [f(f(found.grid) for found in named.values()) for f in (min, max)]
    across = f"Eigenvalue ({unit} per squared weight)"
    for panel, (label, found, style) in zip(axes, styled(named), strict=True):
        _draw_density(panel, "", found, style | {"linestyle": "-"}, limits)
        panel.axvline(0, color=GREY, lw=0.8, zorder=0)
        panel.set_xlim(*map(float, ends))
        panel.set_title(wrapped(label, 300), fontsize=SMALL + 1)
        label_axes(panel, across if panel is axes[-1] else "", "Density")
    return axes


def _densities(result: Any, floor: float) -> tuple[dict[str, Any], tuple[float, float]]:
    """One or several densities by name, and the limits of the axes."""
    check_number("floor", floor, 0.0, 1.0, open_low=True, open_high=True)
    named = {"": result} if hasattr(result, "density") else result
    if isinstance(named, Mapping) and not named:
        raise ValueError(
            "result has no entries: there is nothing to draw. Pass what"
            " sharpness.spectral_density returned, or a dict of several by name."
        )
    others = dict(named).values() if isinstance(named, Mapping) else [result]
    if wrong := [x for x in others if not hasattr(x, "density")]:
        raise ValueError(
            "A density must be what sharpness.spectral_density returned, or several of"
            f" them a dict by name; got {type(wrong[0]).__name__}. Eigenvalues alone"
            " have no density: draw them with ax.hist(eigenvalues)."
        )
    known = finite("result.density", [found.density for found in named.values()])
    top = float(known.max())
    return dict(named), (floor * top, 2 * top)


def _draw_density(ax: Any, label: str, found: Any, style: Any, limits: Any) -> None:
    ax.set_yscale("log")
    grid, density = np.asarray(found.grid), np.asarray(found.density)
    ax.plot(grid, density, label=label, **style)
    error = np.asarray(found.stderr)
    if np.isfinite(error).all():
        low, high = (np.maximum(density + k * error, limits[0]) for k in (-1, 1))
        ax.fill_between(grid, low, high, color=style["color"], alpha=0.25, lw=0)
    ax.set_ylim(*limits)


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
    r"""Draws the largest eigenvalue over training, and the edge of stability.

    Gradient descent on a quadratic diverges above :math:`2 / \eta`, and with heavy-ball
    momentum :math:`\beta` above :math:`2 (1 + \beta) / \eta`. In full-batch training
    runs the eigenvalue hovers about that line. With small batches, and with SAM, it
    stays below. The axis is logarithmic; if an eigenvalue is zero or negative, the axis
    is linear around zero.

    Args:
      steps: ``(T,)``, the steps of the measurements.
      lambda_max: ``(T,)``, or several by name.
      learning_rate: :math:`\eta`, a number, one for each of ``steps``, or a schedule;
        ``None`` draws no line. Where the rate is 0 there is no line.
      momentum: :math:`\beta`, in ``[0, 1)``.
      sam_edge: ``(T,)``, the edge of SAM, as from
        ``optax_sam.sharpness.sam_stability_edge``, or several by the names of
        ``lambda_max``; they get the colours of the same names.
      ax: where to draw; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.

    Returns:
      The axes.

    Raises:
      ValueError: if an argument differs from ``steps`` in shape, ``momentum`` is out of
        range, ``sam_edge`` has a name that ``lambda_max`` lacks, or no eigenvalue
        is finite.
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
            f"sam_edge has {', '.join(map(repr, unknown))}, which lambda_max lacks; its"
            f" names are {', '.join(map(repr, named))}. Use the same names in both."
        )
    finite("lambda_max", named.values())
    drawn = finite("lambda_max", [*named.values(), *edges.values()])
    ax = axes_or_new(ax)
    _, before = with_drawn(ax, 0, 0)
    log_scale(ax, drawn)
    # The markers tell them apart, and dashes are for edges.
    styles = styled(named, ax, "marker", MARKERS)
    for name, (label, values, style) in zip(named, styles, strict=True):
        ax.plot(x, values, "-", ms=4, label=label, **style)
        if name in edges:
            label = f"{name}'s edge" if name else "SAM's edge"
            label = told(label, edges[name])
            ax.plot(x, edges[name], ":", label=label, color=style["color"], lw=1.4)
    if learning_rate is not None:
        rate = learning_rate
        if callable(rate):
            rate = [rate(step) for step in x]  # one-cycle schedules take no vector
        rate = np.asarray(rate, float)
        if rate.shape not in ((), x.shape):
            raise ValueError(
                f"learning_rate must be a number, a schedule or of shape {x.shape};"
                f" got shape {rate.shape}."
            )
        rate = np.broadcast_to(rate, x.shape)
        edge = 2 * (1 + momentum) / np.where(rate > 0, rate, np.nan)
        label = r"$2 (1 + \beta) / \eta$" if momentum else r"$2 / \eta$"
        if np.isfinite(edge).any():
            ax.plot(x, edge, "--", color=GREY, lw=1.4, label=label)
            # With a decaying rate the line leaves the axes; the eigenvalues stay.
            ax.set_ylim(top=max(before, 2 * max(drawn.max(), np.nanmin(edge))))
    label_axes(ax, "Step", rf"$\lambda_{{\max}}$ ({unit} per squared weight)")
    add_legend(ax)
    return ax
