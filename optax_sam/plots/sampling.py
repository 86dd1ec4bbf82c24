"""How often vSAM perturbs, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from optax_sam.plots.colours import GREY, method_colour
from optax_sam.plots.style import SMALL, axes_or_new, by_name, label_axes
from optax_sam.schedules import check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sampling_rate(
    steps: ArrayLike,
    records: Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]],
    *,
    window: int,
    ax: Axes | None = None,
    unit: str = "nats",
) -> Axes:
    """Draws how often vSAM perturbs, and the norm of its PSF, over training.

    Args:
      steps: ``(T,)``, the steps of the records.
      records: what ``optax_sam.metrics(opt_state)`` returned at each step, or one
        dictionary of arrays ``(T,)``.
      window: ``K``, the window of vSAM; the rate is ``samples_per_window / K``. As long
        as every step was perturbed, as in the warm-up, the rate is 100 %. Before the
        first perturbed step nothing is drawn.
      ax: where to draw; ``None`` makes a figure.
      unit: the unit of the loss; nats for a cross-entropy.

    Returns:
      The axes of the rate. The axes of the norm, on the right, are the figure's last.

    Raises:
      ValueError: if the records are not vSAM's, or not as many as ``steps``.
      ImportError: if there is no matplotlib.

    Examples:
      >>> import optax_sam
      >>> from optax_sam import plots
      >>> method, records = optax_sam.vsam(window=10), []
      >>> state = method.init({"w": 1.0})
      >>> for _ in range(3):  # of training
      ...     records.append(optax_sam.metrics(state))
      >>> ax = plots.sampling_rate([100, 200, 300], records, window=10)
      >>> ax.get_ylabel()
      'Perturbed steps (%)'
    """
    check_integer("window", window, 2)
    x, each = np.asarray(steps), [records] if isinstance(records, Mapping) else records
    needed = "samples_per_window", "psf_norm", "ascent_rate"
    if absent := [name for name in needed if any(name not in one for one in each)]:
        raise ValueError(
            f"records have no {', '.join(absent)}; pass what"
            " optax_sam.metrics(opt_state) gave for vsam (with several methods, only"
            " the metrics of vsam, without the path in their names)."
        )
    columns = [np.ravel([np.asarray(one[name]) for one in each]) for name in needed]
    samples, psf, ascended = (
        by_name(name, values, x.shape)[""]
        for name, values in zip(needed, columns, strict=True)
    )
    rate = np.where(ascended == 1, 100, 100 * samples / window)
    rate, psf = (np.where(ascended > 0, values, np.nan) for values in (rate, psf))
    ax = axes_or_new(ax)
    right = ax.twinx()
    # A record describes the steps before it.
    colour = method_colour("vSAM")
    ax.plot(x, rate, color=colour, lw=1.6, drawstyle="steps-pre")
    right.plot(x, psf, color=GREY, lw=1)
    label_axes(ax, "Step", "Perturbed steps (%)", color=colour)
    label_axes(right, "", f"PSF norm ({unit} per weight)", color=GREY)
    if not np.isfinite(rate).any():
        center: Any = dict(transform=ax.transAxes, ha="center", fontsize=SMALL)
        ax.text(0.5, 0.5, "No perturbed step yet", **center)
    ax.set_ylim(0, 105)
    right.set_ylim(bottom=0)
    right.spines[["top", "left"]].set_visible(False)
    right.spines["right"].set_visible(True)
    return ax
