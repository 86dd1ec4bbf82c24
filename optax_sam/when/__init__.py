"""On which steps the perturbed gradient is taken: small state machines.

A rule is a :class:`When`. Most rules decide at the *end* of a step about the next one.
They keep the decision in the field ``ascends`` of their state, so a loop outside the
compiled step can read it (``optax_sam.ascends_next``). If the draws are known ahead,
the state also has a method ``plan()``. If only one method uses a rule, the rule is in
the file of that method.
"""

from optax_sam.methods.vsam import VarianceControlledState, variance_controlled
from optax_sam.parts import Step, When, always
from optax_sam.when.fixed import BernoulliState, EveryKState, bernoulli, every_k
from optax_sam.when.trend import LaggedNormTrendState, NormTrendState, norm_above_trend
from optax_sam.when.warmup import AfterState, after

__all__ = [
    "AfterState",
    "BernoulliState",
    "EveryKState",
    "LaggedNormTrendState",
    "NormTrendState",
    "Step",
    "VarianceControlledState",
    "When",
    "after",
    "always",
    "bernoulli",
    "every_k",
    "norm_above_trend",
    "variance_controlled",
]
