"""Every method before, and others around, Muon, schedule-free and Prodigy."""

import harness
import jax
import numpy as np
import optax
import optax.contrib
import problems
import pytest
from registry import METHODS, OTHERS, each

import optax_sam

BASES = {
    "muon": lambda: optax.contrib.muon(0.02),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.3),
    "prodigy": lambda: optax.contrib.prodigy(estim_lr0=0.01),
}


some_bases = pytest.mark.parametrize(
    "base",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (name == "prodigy"), id=name)
        for name, x in BASES.items()
    ],
)


STEPS = 8


def evaluated(state, params):
    """The weights that count: schedule-free's are averages."""
    is_free = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)
    free = [x for x in jax.tree.leaves(state, is_leaf=is_free) if is_free(x)]
    if not free:
        return params
    return optax.contrib.schedule_free_eval_params(free[0], params)


def trained(update, state, extra_args):
    """The parameters after a few steps; all steps are finite, and the loss falls."""
    problem = problems.mlp()  # with kernels and biases
    params = problem.params()

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(problem.loss_fn)(params, batch)
        extra = extra_args(problem.loss_fn, batch)
        updates, state = update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for t in range(STEPS):
        params, state = step(params, state, problem.batch(t))
        assert harness.is_finite((params, state))
    loss = lambda w: np.mean([problem.loss_fn(w, problem.batch(t)) for t in range(4)])
    assert loss(evaluated(state, params)) < loss(problem.params()) - 0.01
    return params


@each(
    *METHODS,
    *(m for m in OTHERS if m.name in ("wsam", "sampa", "saf")),
    slow=lambda m: m.name not in ("sam", "wsam"),
)
@some_bases
def test_a_method_before_or_around_it_trains(method, base):
    """Step by step it is what it is with others, in the tests of the method."""
    tx = method.optimizer(base())
    trained(tx.update, tx.init(problems.mlp().params()), method.extra_args)


def test_schedule_free_inside_and_outside():
    """``chain(sam, schedule_free(sgd))`` is ``schedule_free(chain(sam, sgd))``."""
    sam, sgd = optax_sam.sam(0.1), optax.sgd(0.3)
    free = lambda base: optax.contrib.schedule_free(base, learning_rate=0.3)
    start, extra_args = problems.mlp().params(), METHODS[0].extra_args
    ends = [
        trained(tx.update, tx.init(start), extra_args)
        for tx in (optax.chain(sam, free(sgd)), free(optax.chain(sam, sgd)))
    ]
    harness.assert_close_in_size(*ends, 1e-6)
