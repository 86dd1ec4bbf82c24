"""When the second gradient is taken: small state machines that decide each step.

A rule is a :class:`When`. It decides at the *end* of a step about the next one and
keeps the decision in its state as the field ``ascends``, so that a loop outside the
compiled step can read it (``optax_sam.ascends_next``). A rule whose draws are known
ahead also gives its state a method ``plan()``.
"""

from optax_sam.step import Step
from optax_sam.when.fixed import (
    BernoulliState,
    EveryKState,
    always,
    bernoulli,
    every_k,
)
from optax_sam.when.rule import When
from optax_sam.when.trend import (
    LaggedNormTrendState,
    NormTrendState,
    norm_above_trend,
)
from optax_sam.when.variance import VarianceControlledState, variance_controlled
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
