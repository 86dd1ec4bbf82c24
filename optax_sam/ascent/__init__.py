"""Where the second gradient is taken: rules from a gradient to an offset ``e``.

A rule is an ordinary ``optax.GradientTransformationExtraArgs`` whose updates are the
offset, uphill. The engine hands it ``grad_fn``, for rules that look more than once,
and ``count``, the step that schedules are read at and draws belong to.
"""

from optax_sam.ascent.ball import adaptive, l2, trust_ratio, weight_scaled
from optax_sam.ascent.entropy import renyi
from optax_sam.ascent.fisher import fisher
from optax_sam.ascent.friendly import FriendlyState, friendly
from optax_sam.ascent.masks import normalization_layers, restrict
from optax_sam.ascent.noise import SmoothedState, smoothed
from optax_sam.ascent.rule import OwnGradient, norm, rescale
from optax_sam.ascent.steps import n_step, raw_steps
from optax_sam.ascent.subset import RandomLeavesState, random_leaves

__all__ = [
    "FriendlyState",
    "OwnGradient",
    "RandomLeavesState",
    "SmoothedState",
    "adaptive",
    "fisher",
    "friendly",
    "l2",
    "n_step",
    "norm",
    "normalization_layers",
    "random_leaves",
    "raw_steps",
    "renyi",
    "rescale",
    "restrict",
    "smoothed",
    "trust_ratio",
    "weight_scaled",
]
