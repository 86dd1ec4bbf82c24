"""Pictures of what :mod:`optax_sam.sharpness` measures, and of how vSAM samples.

They need matplotlib (``pip install matplotlib``), take arrays, and draw on the
given ``ax``. Without one they make a figure that pyplot does not know, so no figures
pile up in a long run: ``plots.loss_line(...).figure.savefig("line.png")``. The colours
come from Okabe and Ito; colour-blind readers can tell them apart. A series with the
name of a method (``"SGD"``, ``"SAM"``, ``"vSAM"``) has the same colour in all pictures,
see :func:`method_colour`. The legend marks a series without a finite value. If no
series has one, that is an error.
"""

from optax_sam.plots.colours import method_colour
from optax_sam.plots.curvature import (
    sharpness_history,
    spectral_density,
    spectral_panels,
)
from optax_sam.plots.landscape import loss_along_eigenvectors, loss_line, loss_surface
from optax_sam.plots.sampling import sampling_rate

__all__ = [
    "loss_along_eigenvectors",
    "loss_line",
    "loss_surface",
    "method_colour",
    "sampling_rate",
    "sharpness_history",
    "spectral_density",
    "spectral_panels",
]
