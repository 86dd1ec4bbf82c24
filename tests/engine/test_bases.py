"""Every method before, and WSAM and SAMPa around, Muon, schedule-free and Prodigy."""

import harness
import jax
import jax.numpy as jnp
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


def some(*quick):
    """All bases, of which the quick tests take some."""
    marks = lambda name: [] if name in quick else pytest.mark.slow
    params = [pytest.param(x, marks=marks(name), id=name) for name, x in BASES.items()]
    return pytest.mark.parametrize("base", params)


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
    *(m for m in OTHERS if m.place == "first"),
    slow=lambda m: m.name != "sam",
)
@some("muon", "schedule_free")
def test_a_method_before_it(method, base):
    """As if what the method emits were given to the optimizer by hand."""
    member, optimizer = method.build(), optax.with_extra_args_support(base())

    def by_hand(grads, state, params, **extra):
        emitted, first = member.update(grads, state[0], params, **extra)
        updates, second = optimizer.update(emitted, state[1], params)
        return updates, (first, second)

    tx, start = method.optimizer(base()), problems.mlp().params()
    chained = trained(tx.update, tx.init(start), method.extra_args)
    state = member.init(start), optimizer.init(start)
    harness.assert_close_in_size(
        chained, trained(by_hand, state, method.extra_args), 1e-5
    )


@some("muon")
def test_wsam_around_it(base):
    """The optimizer's step of the gradient, and the sharpness beside it."""
    optimizer, rate, gamma = optax.with_extra_args_support(base()), 0.02, 0.5

    def by_hand(grads, state, params, *, grad_fn):
        n = optax.tree.norm(grads)
        g_s = grad_fn(jax.tree.map(lambda w, g: w + 0.1 * g / n, params, grads))
        updates, state = optimizer.update(grads, state, params)
        along = rate * gamma / (1 - gamma)
        move = lambda u, g, x: u - along * (x - g)
        return jax.tree.map(move, updates, grads, g_s), state

    tx = optax_sam.wsam(base(), learning_rate=rate, rho=0.1, gamma=gamma)
    start, extra_args = problems.mlp().params(), METHODS[0].extra_args
    around = trained(tx.update, tx.init(start), extra_args)
    harness.assert_close_in_size(
        around, trained(by_hand, optimizer.init(start), extra_args), 1e-5
    )


@some("schedule_free")
def test_sampa_around_it(base):
    """It predicts by the optimizer's own step, which it does not keep."""
    optimizer, share = optax.with_extra_args_support(base()), 0.2

    def by_hand(grads, state, params, *, grad_fn, previous_grad_fn):
        del grads
        count, g_y, inner = state
        n = optax.tree.norm(g_y)
        scale = jnp.where(n > 0, 0.1 / jnp.where(n > 0, n, 1), 0)
        p = previous_grad_fn(jax.tree.map(lambda w, g: w + scale * g, params, g_y))
        step, _ = optimizer.update(g_y, inner, params)
        first = count == 0
        y = jax.tree.map(lambda w, u: w + jnp.where(first, 0, u), params, step)
        g_y = grad_fn(y)
        mixed = jax.tree.map(lambda a, b: (1 - share) * a + share * b, p, g_y)
        updates, inner = optimizer.update(mixed, inner, params)
        return updates, (count + 1, g_y, inner)

    def extra_args(loss_fn, batch):
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        return {"grad_fn": grad_fn, "previous_grad_fn": grad_fn}

    tx = optax_sam.sampa(base(), rho=0.1, interpolation=share)
    start = problems.mlp().params()
    around = trained(tx.update, tx.init(start), extra_args)
    state = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, start)
    by_hand_ = trained(by_hand, (*state, optimizer.init(start)), extra_args)
    harness.assert_close_in_size(around, by_hand_, 1e-5)


@some("prodigy")
def test_mesa_after_it(base):
    """It keeps an average of the weights and leaves the steps as they are."""
    (mesa,) = [m for m in OTHERS if m.place == "last"]
    tx, start = mesa.optimizer(base()), problems.mlp().params()
    alone = optax.with_extra_args_support(base())
    harness.assert_close_in_size(
        trained(tx.update, tx.init(start), mesa.extra_args),
        trained(alone.update, alone.init(start), mesa.extra_args),
        1e-5,
    )


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
