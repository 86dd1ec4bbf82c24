"""How both gradients become one, and what stands in where the second is not taken.

A rule is a :class:`Blend`. The engine averages what it emits over ``axis_name`` and
casts it to the incoming gradient's dtype.
"""

from optax_sam.blend.gap import surrogate_gap
from optax_sam.blend.mix import interpolate, renormalize
from optax_sam.blend.reuse import (
    ReuseDifferenceState,
    ReuseNormalState,
    reuse_difference,
    reuse_normal,
)
from optax_sam.blend.rule import Blend, take_ascended

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
