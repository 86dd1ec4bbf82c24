"""Pictures of what :mod:`optax_sam.sharpness` measures, and of how vSAM samples.

They need matplotlib (``pip install 'optax_sam[plots]'``), take arrays, and draw on the
``ax`` that they are given. Without one they make a figure that pyplot does not know, so
that none piles up in a long run: ``plots.loss_line(...).figure.savefig("line.png")``.
The colours are those of Okabe and Ito, which colour-blind readers can tell apart. A
series with the name of a method (``"SGD"``, ``"SAM"``, ``"vSAM"``) has its colour in
all pictures, see :func:`method_colour`. A series without a finite value says so in the
legend; if no series has one, that is an error.
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
