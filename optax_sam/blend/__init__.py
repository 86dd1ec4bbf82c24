"""How the two gradients are combined, and what is emitted on unperturbed steps.

A rule is a :class:`Blend`. The engine averages the emitted gradient over ``axis_name``
and casts it to the dtype of the gradient at ``w``. If only one method uses a rule, the
rule is in the file of that method.
"""

from optax_sam.methods.gnp import interpolate
from optax_sam.methods.gsam import surrogate_gap
from optax_sam.methods.looksam import ReuseNormalState, reuse_normal
from optax_sam.methods.stable_sam import renormalize
from optax_sam.methods.vsam import ReuseDifferenceState, reuse_difference
from optax_sam.parts import Blend

__all__ = [
    "Blend",
    "ReuseDifferenceState",
    "ReuseNormalState",
    "interpolate",
    "renormalize",
    "reuse_difference",
    "reuse_normal",
    "surrogate_gap",
    "take_ascended",
]


def take_ascended() -> Blend:
    """The blend of SAM: the perturbed gradient, or else the gradient at ``w``.

    Returns:
      A rule for ``blend=``.

    Examples:
      >>> import optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05), blend=optax_sam.blend.take_ascended())
    """
    return Blend(call="blend.take_ascended()")
