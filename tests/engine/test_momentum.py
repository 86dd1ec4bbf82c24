"""MSAM around any momentum: where it is found, which way it points, what is refused."""

import functools
import inspect
from typing import Any, NamedTuple

import harness
import jax
import numpy as np
import optax
import optax.contrib
import problems
import pytest

import optax_sam
from optax_sam import momentum

SGD = optax.sgd(0.1, momentum=0.9)
RATE = 0.02


class Base(NamedTuple):
    """An optimizer with a momentum.

    Attributes:
      optimizer: built in the precision of the test.
      field: the name of the fields of its state that hold the momentum.
      sign: 1 if that is one of gradients, -1 if it is one of steps.
      extra: of the loss and the value at hand, the extra arguments that it needs.
      descends: whether twenty steps lower the loss by a tenth, too.
    """

    optimizer: Any
    field: str
    sign: int = 1
    extra: Any = lambda loss, value: {}
    descends: bool = True


def optimizer(name, *args, **kwargs):
    """An optimizer of Optax, under the name by which the tests count what they have."""
    module = optax if hasattr(optax, name) else optax.contrib
    return lambda: getattr(module, name)(*args, **kwargs)


def split(first, second):
    """A partition: the kernels' and the biases' optimizer."""
    by_rank = lambda p: jax.tree.map(lambda x: "ab"[x.ndim < 2], p)
    return optax.partition({"a": first, "b": second}, by_rank)


with_value = lambda loss, value: {"value": value}
with_loss = lambda loss, value: {"obj_fn": loss}
# By the names that Optax has for them.
OF_GRADIENTS = (
    "adabelief adam adamax adamaxw adamw adopt amsgrad lamb lion muon nadam nadamw"
    " novograd optimistic_adam_v2 radam yogi"
)
TAKEN = {name: Base(optimizer(name, RATE), "mu") for name in OF_GRADIENTS.split()} | {
    "sgd": Base(optimizer("sgd", 0.1, momentum=0.9), "trace"),
    "signum": Base(optimizer("signum", RATE), "ema"),
    "adan": Base(optimizer("adan", RATE), "m"),
    "lars": Base(optimizer("lars", 10.0), "trace", -1),
    "sm3": Base(optimizer("sm3", 0.1), "nu"),
    "dadapt_adamw": Base(optimizer("dadapt_adamw", estim_lr0=0.01), "exp_avg"),
    "momo": Base(optimizer("momo", 0.5), "exp_avg", extra=with_value),
    "momo_adam": Base(optimizer("momo_adam", RATE), "exp_avg", extra=with_value),
    "prodigy": Base(optimizer("prodigy", estim_lr0=0.01), "exp_avg"),
    "simplified_ademamix": Base(optimizer("simplified_ademamix", 0.001), "m"),
    "sophia": Base(optimizer("sophia", RATE), "mu", extra=with_loss),
    "mechanize": Base(optimizer("mechanize", SGD, s_init=0.1), "trace"),
    # Others with a momentum only where one is asked for.
    "rmsprop": Base(optimizer("rmsprop", RATE, momentum=0.9), "trace", -1),
    "adafactor": Base(optimizer("adafactor", 0.1, momentum=0.9), "ema"),
    "schedule_free": Base(
        optimizer("schedule_free", SGD, learning_rate=0.1), "trace"
    ),
}  # fmt: skip
# Not by a name of Optax.
chain, trace = optax.chain, optax.trace
rms = functools.partial(optax.rmsprop, momentum=0.9)
MORE = {
    "centered": Base(lambda: rms(RATE, centered=True), "trace", -1),
    "LaProp": Base(
        lambda: chain(optax.scale_by_rms(), trace(0.9), optax.scale(-RATE)), "trace"
    ),
    "steps and a bound": Base(
        lambda: chain(rms(RATE), optax.keep_params_nonnegative()), "trace", -1,
        descends=False,
    ),
    "steps and a decay": Base(
        lambda: chain(
            optax.scale_by_learning_rate(0.1),
            *(trace(0.9), optax.add_decayed_weights(-1e-3)),
        ),
        "trace", -1,
    ),
    "steps on a schedule from zero": Base(
        lambda: rms(harness.linear(0.0, RATE, 5)), "trace", -1
    ),
    "no rate yet": Base(optimizer("sgd", 0.0, momentum=0.9), "trace", descends=False),
    "between": Base(
        lambda: chain(
            *(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(1e-3)),
            *(SGD, optax.zero_nans()),
        ),
        "trace",
    ),
    "parts": Base(lambda: split(SGD, optax.sgd(0.05, momentum=0.5)), "trace"),
    "parts of steps": Base(lambda: split(rms(RATE), optax.lars(10.0)), "trace", -1),
    "parts in parts": Base(
        lambda: split(split(optax.adam(RATE), SGD), optax.contrib.muon(RATE)), "mu"
    ),
    "injected": Base(
        lambda: optax.inject_hyperparams(optax.rmsprop)(RATE, momentum=0.9), "trace", -1
    ),
    "SAM inside": Base(
        lambda: chain(optax_sam.sam(0.05), SGD), "trace",
        extra=lambda loss, value: {"grad_fn": jax.grad(loss)},
    ),
}  # fmt: skip
# A momentum of steps; several states; parts. One of gradients is in the tests of MSAM.
QUICK = ("rmsprop", "muon", "parts of steps")


def the_base(name):
    base = {**TAKEN, **MORE}[name]
    try:
        return base, optax.with_extra_args_support(base.optimizer())
    except AttributeError:
        pytest.skip(f"this Optax has no {name}")


def momentum_of(state, field):
    """The fields of this name, those of parts put together, by hand."""
    found = [tree for _, tree in optax.tree.get_all_with_path(state, field)]
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    both = lambda a, b: b if is_masked(a) else a
    whole = found[0]
    for more in found[1:]:
        whole = jax.tree.map(both, whole, more, is_leaf=is_masked)
    return whole


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow)
        for n in (*TAKEN, *MORE)
    ],
)
def test_sign_length_and_evaluation_point(name, x64):
    """``w`` takes the optimizer's steps, with gradients further along the last one."""
    base, inner = the_base(name)
    problem, rho = problems.mlp(), 0.3
    tx = optax_sam.msam(inner, rho=rho)
    # Functions among the extra arguments cannot be compiled.
    compiled = jax.jit if name not in ("sophia", "SAM inside") else (lambda f: f)
    update, plain = compiled(tx.update), compiled(inner.update)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    params = w = point = problem.params()
    state, inner_state = tx.init(params), inner.init(w)
    start, has_moved = problem.loss_fn(w, problem.batch(0)), False
    for t in range(20):
        loss = lambda p, t=t: problem.loss_fn(p, problem.batch(t))
        value, g = gradient(point, problem.batch(t))
        extra = base.extra(loss, value)
        updates, state = update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
        u, inner_state = plain(g, inner_state, w, **extra)
        w = optax.apply_updates(w, u)
        v = momentum_of(inner_state, base.field)
        scale = base.sign * rho / (optax.tree.norm(v) + 1e-12)
        point = jax.tree.map(lambda x, y, c=scale: x - c * y, w, v)
        # Sums of weights and offsets, which may cancel.
        found = optax_sam.msam_eval_params(state, params)
        harness.assert_close_in_size((params, found), (point, w), 1e-8)
        offset = optax.tree.sub(params, w)
        moved = bool(optax.tree.norm(v) > 0)
        assert float(optax.tree.norm(offset)) == pytest.approx(rho * moved, rel=1e-4)
        if moved and not has_moved:
            # Downhill, whatever the momentum is of: against its only gradient.
            cosine = optax.tree.vdot(offset, g) / (rho * optax.tree.norm(g))
            assert cosine < -0.1
        has_moved |= moved
        assert np.sign(state.scale) == base.sign * moved
        metric = optax_sam.metrics(state)["perturbation_scale"]
        np.testing.assert_allclose(metric, abs(scale) if moved else 0, rtol=1e-4)
    assert has_moved
    if base.descends:
        assert problem.loss_fn(w, problem.batch(0)) < 0.9 * start


def kernel(seed=0):
    """A kernel and a bias; SM3 takes no scalars."""
    return harness.tree(seed)["layer"]


# What is refused, by the names of Optax.

NONE = "keeps none"
SAM = r"optax.chain\(optax_sam.sam\(0.05\), optimizer\)"
REFUSED = {
    "adadelta": (optimizer("adadelta", 0.1), f"e_g, .*e_x.*{SAM}"),
    "adagrad": (optimizer("adagrad", 0.1), f"sum_of_squares does not .*{SAM}"),
    "fromage": (optimizer("fromage", 0.1), f"{NONE}.*{SAM}"),
    "lbfgs": (optimizer("lbfgs", 0.1), f"LBFGSState.*{SAM}"),
    "noisy_sgd": (optimizer("noisy_sgd", 0.1, key=0), f"{NONE}.*{SAM}"),
    "optimistic_gradient_descent": (
        optimizer("optimistic_gradient_descent", 0.1),
        f"previous_gradient leads uphill.*{SAM}",
    ),
    "rprop": (optimizer("rprop", 0.1), f"prev_updates.*{SAM}"),
    "sign_sgd": (optimizer("sign_sgd", 0.1), f"{NONE}.*{SAM}"),
    "polyak_sgd": (optimizer("polyak_sgd", 0.1), f"{NONE}.*{SAM}"),
    "acprop": (optimizer("acprop", 0.1), f"mu does not move the weights.*{SAM}"),
    "ademamix": (
        optimizer("ademamix", 0.1),
        rf"several: ScaleByAdemamixState.m1, .*m2.*msam\(.*simplified_adem.*{SAM}",
    ),
    "cocob": (optimizer("cocob"), f"COCOBState.*{SAM}"),
    "dog": (optimizer("dog", 0.1), f"DoGState.*{SAM}"),
    "dowg": (optimizer("dowg", 0.1), f"DoWGState.*{SAM}"),
    "galore": (optimizer("galore", 0.1, rank=1), f"GaLoreState.*{SAM}"),
    "madgrad": (optimizer("madgrad", 0.1), f"MadgradState.s.*{SAM}"),
    **{
        name: (
            optimizer(name, 0.1),
            rf"ScheduleFreeState.z.*optax.chain\(optax_sam.sam.*{name}",
        )
        for name in ("schedule_free_sgd", "schedule_free_adamw")
    },
}
ALSO_REFUSED = {
    "no momentum": (optax.sgd(0.1), rf"{NONE}. Write for .*momentum=0.9.*{SAM}"),
    "centered, without": (
        optax.rmsprop(0.1, centered=True), rf"ScaleByRStdDevState.mu.*{SAM}"
    ),
    "a momentum that is not used": (
        optax.contrib.schedule_free(optax.adam(0.1, b1=0.0), learning_rate=0.1),
        "ScaleByAdamState.mu does not move.*ScheduleFreeState.z.*optax.chain",
    ),
    "several": (
        optax.chain(SGD, optax.trace(0.5)),
        "keeps several: TraceState.trace, TraceState.trace. Leave one",
    ),
    "a part without": (
        optax.partition({"a": SGD, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}),
        r"none for \['bias'\].*TraceState.trace.*each part.*set_to_zero",
    ),
    "a part for nothing": (
        optax.masked(SGD, {"kernel": True, "bias": False}),
        r"none for \['bias'\].*set_to_zero",
    ),
    "gradients and steps": (
        split(SGD, rms(0.1)),
        r"gradients for \['kernel'\].*steps.*for \['bias'\].*after the momentum",
    ),
    "flatten": (optax.flatten(SGD), "TraceState.trace is kept in another.*flatten"),
    "no learning rate": (optax.trace(0.9), "up the gradient. It lacks its learning"),
    "maximizes": (optax.chain(optax.scale(-1.0), SGD), "minimize the negative"),
    "no rate before": (
        optax.rmsprop(0.0, momentum=0.9), "stays zero.*optax.scale_by_learning_rate"
    ),
    "an optimizer that fails": (
        optax.chain(SGD, optax.stateless(lambda u, p: 1 / 0)),
        rf"TraceState.trace.*ZeroDivisionError: .*{SAM}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, *ALSO_REFUSED])
def test_refused(name):
    inner, message = {**REFUSED, **ALSO_REFUSED}[name]
    if name in REFUSED:
        try:
            inner = inner()
        except AttributeError:
            pytest.skip(f"this Optax has no {name}")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optax_sam.msam(inner).init, kernel())


def test_all_of_optax_is_in_a_table():
    """All that takes a learning rate."""
    apart = {"dpsgd", "optimistic_adam"}  # gradients of examples; deprecated
    for module in (optax, optax.contrib):
        for name in dir(module):
            function, part = getattr(module, name), name.startswith(("_", "scale_by_"))
            if part or not inspect.isfunction(function):
                continue
            arguments = set(inspect.signature(function).parameters)
            if "learning_rate" in arguments:
                assert name in {*TAKEN, *REFUSED, *apart}, name


def test_a_state_shows_its_momentum():
    """Without the optimizer: as it is after a file, and in NNX's variables."""
    for name in ("muon", "rmsprop", "parts in parts", "centered"):
        base, inner = the_base(name)
        state = inner.init(kernel())
        numbered = iter(range(100))
        state = jax.tree.map(lambda x, n=numbered: x + next(n), state)
        where = momentum.locate(state, kernel())
        found = momentum.take(state, where, kernel())
        if name != "parts in parts":  # which has two names
            harness.assert_equal(found, momentum_of(state, base.field))
