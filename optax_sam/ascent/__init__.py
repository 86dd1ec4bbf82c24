"""Where the perturbed gradient is taken: rules from a gradient to an offset ``e``.

A rule is an ordinary ``optax.GradientTransformationExtraArgs``. Its updates are the
offset, which points uphill. The engine passes it ``grad_fn``, for rules that compute
more gradients, and ``step``, for its schedules and random draws. If only one method
uses a rule, the rule is in the file of that method.
"""

from optax_sam.ascent.ball import l2, weight_scaled
from optax_sam.ascent.noise import FilterNoiseState, filter_noise
from optax_sam.ascent.steps import n_step
from optax_sam.masks import restrict
from optax_sam.methods.amp import raw_steps
from optax_sam.methods.asam import adaptive
from optax_sam.methods.awp import matrices
from optax_sam.methods.esam import RandomLeavesState, random_leaves
from optax_sam.methods.fisher_sam import fisher
from optax_sam.methods.friendly_sam import FriendlyState, friendly
from optax_sam.methods.gcsam import centralized
from optax_sam.methods.le_sam import loss_budget
from optax_sam.methods.look_layer_sam import trust_ratio
from optax_sam.methods.random_sam import SmoothedState, smoothed
from optax_sam.methods.renyi_sam import renyi
from optax_sam.methods.sam_on import normalization_layers
from optax_sam.methods.vasso import averaged
from optax_sam.parts import OwnGradient
from optax_sam.trees import norm, rescale

__all__ = [
    "FilterNoiseState",
    "FriendlyState",
    "OwnGradient",
    "RandomLeavesState",
    "SmoothedState",
    "adaptive",
    "averaged",
    "centralized",
    "filter_noise",
    "fisher",
    "friendly",
    "l2",
    "loss_budget",
    "matrices",
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
