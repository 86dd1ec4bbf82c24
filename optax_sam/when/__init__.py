"""When the second gradient is taken: small state machines that decide each step.

A rule is a :class:`When`. It decides at the *end* of a step about the next one and
keeps the decision in its state as the field ``ascends``, so that a loop outside the
compiled step can read it (``optax_sam.ascends_next``). A rule whose draws are known
ahead also gives its state a method ``plan()``.
"""

from optax_sam.when.fixed import (
    BernoulliState,
    EveryKState,
    always,
    bernoulli,
    every_k,
)
from optax_sam.when.rule import Step, When
from optax_sam.when.variance import VarianceControlledState, variance_controlled

__all__ = [
    "BernoulliState",
    "EveryKState",
    "Step",
    "VarianceControlledState",
    "When",
    "always",
    "bernoulli",
    "every_k",
    "variance_controlled",
]
