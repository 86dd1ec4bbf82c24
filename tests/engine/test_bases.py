"""Every method with the optimizers of today: Muon, schedule-free, Prodigy, AdEMAMix."""

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
    "ademamix": lambda: optax.contrib.ademamix(0.01),
}
LATER = "prodigy", "ademamix"

some_bases = pytest.mark.parametrize(
    "base",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (name in LATER), id=name)
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


every_method = each(
    *METHODS,
    *(m for m in OTHERS if m.name in ("wsam", "sampa", "saf")),
    slow=lambda m: m.name not in ("sam", "wsam"),
)


@every_method
@pytest.mark.parametrize("base", BASES)
def test_the_base_is_fed_what_the_method_makes(method, base):
    """A chain to the bit; what wraps is by hand, of gradients that are given."""
    inner = optax.with_extra_args_support(BASES[base]())
    tx, member = (
        method.optimizer(inner),
        None if method.place == "around" else method.build(),
    )
    params, rtol = harness.tree(), 0.0 if member else 1e-4
    state, base_state = tx.init(params), inner.init(params)
    alone = member.init(params) if member else None
    for t in range(4):
        g, g_s = harness.tree(t + 1), harness.tree(t + 20)
        extra = {"grad_fn": lambda p, g_s=g_s: g_s}
        found, state = tx.update(g, state, params, **extra)
        fed = {"wsam": g, "sampa": g_s}.get(method.name)
        if member:
            fed, alone = member.update(g, alone, params, **extra)
        wanted, base_state = inner.update(fed, base_state, params)
        if method.name == "wsam":  # of weight 1/2, and the rate of the registry
            step = lambda u, x, x_s: u - 0.1 * (x_s - x)
            wanted = jax.tree.map(step, wanted, g, g_s)
        harness.assert_close_in_size(found, wanted, rtol)
        params = optax.apply_updates(params, found)


@every_method
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
