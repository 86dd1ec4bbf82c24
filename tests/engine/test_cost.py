"""What a step costs: floating-point operations of the compiled program, and bytes."""

import functools

import harness
import jax
import optax
import problems
import pytest
from harness import each_part
from registry import OTHERS

import optax_sam

# More than 1e5 parameters and 128 examples, so that what is not a gradient is small.
PROBLEM = functools.partial(problems.mlp, (32, 288, 320, 10), batch_size=128)


def flops(tx, **ascend):
    """Of one compiled step; of a program without a conditional, which counts both."""
    problem = PROBLEM()
    params = jax.eval_shape(problem.params)
    step = functools.partial(harness.make_step(tx, problem.loss_fn), **ascend)
    lowered = jax.jit(step).lower(params, jax.eval_shape(tx.init, params), batch())
    return lowered.compile().cost_analysis()["flops"]


def batch():
    return jax.eval_shape(lambda: PROBLEM().batch(0))


def base():
    return optax.sgd(0.1, momentum=0.9)


@functools.cache
def flops_of_base():
    return flops(optax.chain(optax.with_extra_args_support(optax.identity()), base()))


def test_the_model_is_large_enough():
    params = jax.eval_shape(PROBLEM().params)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count >= 1e5
    # Forward and backward: six operations per weight of a kernel and example, less
    # the gradient of the data.
    assert flops_of_base() > 4 * 128 * count


# A weight costs its gradient 750 operations at this batch size. SAM's norms and offset
# cost 4 more, ASAM's up to 12, as the compiler fuses them.
TOLERANCE = 0.01


@each_part(more=[method for method in OTHERS if method.place == "around"])
def test_ascended_step(method):
    ratio = flops(method.optimizer(base()), ascend=True) / flops_of_base()
    if method.factory is optax_sam.random_sam:
        # R-SAM hashes a normal for each weight, in 47 operations (counted on these
        # versions).
        weights = sum(x.size for x in jax.tree.leaves(PROBLEM().params()))
        ratio -= 47 * weights / flops_of_base()
    expected = method.uses_incoming + method.calls
    assert ratio == pytest.approx(expected, rel=TOLERANCE)


def test_random_sam_with_given_noise():
    """Two gradients and not three: the incoming one is dropped."""
    tx = optax.chain(optax_sam.random_sam(0.1), base())
    update = functools.partial(tx.update, noise=PROBLEM().params())
    given = optax.GradientTransformationExtraArgs(tx.init, update)
    assert flops(given) / flops_of_base() == pytest.approx(2, rel=TOLERANCE)


@each_part(quick="vsam looksam ae_sam gsam")
def test_skipped_step(method):
    ratio = flops(method.optimizer(base()), ascend=False) / flops_of_base()
    assert ratio == pytest.approx(1, rel=TOLERANCE)


@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_ascent_of_several_steps(steps):
    tx = optax.chain(optax_sam.sam(num_ascent_steps=steps), base())
    assert flops(tx) / flops_of_base() == pytest.approx(steps + 1, rel=TOLERANCE)
