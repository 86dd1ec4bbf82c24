"""Random programs: a method in a chain, in a wrapper, around any optimizer.

Each runs as plain ``jit`` and dispatched, through faults and restores: the decisions
must be the same on every step and the weights equal to rounding, or both are refused.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import BY_NAME, METHODS
from wrapped import PROGRAMS, RULES, WRAPPERS, compare, rolled_back, wrap

import optax_sam

CHUNKS, STEPS = 40, 10

# By functions of Optax at a rate of 0.01, by the rest in full.
NAMED = (
    "adam adabelief adafactor adagrad adamax adan amsgrad fromage lamb lars nadam"
    " novograd radam rmsprop sm3 yogi"
)
OPTIMIZERS = {
    name: functools.partial(getattr(optax, name), 0.01) for name in NAMED.split()
} | {
    "sgd": lambda: optax.sgd(0.02),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.01),
    "adamw, scheduled": lambda: optax.adamw(optax.cosine_decay_schedule(0.01, 20)),
    "adadelta": lambda: optax.adadelta(0.1),
    "lion": lambda: optax.lion(0.003),
    "noisy_sgd": lambda: optax.noisy_sgd(0.02),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.01),
    "rmsprop, momentum": lambda: optax.rmsprop(0.01, momentum=0.9),
    "sign_sgd": lambda: optax.sign_sgd(0.003),
    "muon": lambda: optax.contrib.muon(0.01),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "ademamix": lambda: optax.contrib.ademamix(0.01),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.02),
    "dog": lambda: optax.contrib.dog(1.0),
    "partition": lambda: optax.partition(
        {"a": optax.sgd(0.02, momentum=0.9), "b": optax.adam(0.01)},
        {"kernel": "a", "bias": "b"},
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.01),
    "lookahead inside": lambda: optax.chain(optax.trace(0.9), optax.scale(-0.02)),
}
BETWEEN = {
    "nothing": lambda: optax.identity(),
    "clip": lambda: optax.clip_by_global_norm(1.0),
    "decay": lambda: optax.add_decayed_weights(1e-3),
    "centralize": lambda: (
        optax.contrib.centralize()
        if hasattr(optax.contrib, "centralize")
        else optax.centralize()
    ),
    "agc": lambda: optax.adaptive_grad_clip(0.1),
    "nan to zero": lambda: optax.zero_nans(),
}
DTYPES = {  # of the kernel and of the bias
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "mixed": ("bfloat16", "float32"),
}
# Half precision rounds the norm that these decide by differently in two programs.
BY_GRADIENT = ("trend", "lagged_trend", "variance")
AROUND = ("wsam", "msam", "sampa")


def drawn(number):
    """The settings of one program."""
    rng = np.random.default_rng((20261128, number))
    pick = lambda options: options[rng.integers(len(options))]
    method = pick([*METHODS, *(BY_NAME[name] for name in AROUND)])
    dtype = pick(["float32", "float32", *DTYPES])
    rules = sorted(RULES)
    if dtype != "float32":
        rules = [rule for rule in rules if rule not in BY_GRADIENT]
    return {
        "method": method,
        "rule": pick(rules) if "when" in method.static else None,
        "between": pick(sorted(BETWEEN)),
        "optimizer": pick(sorted(OPTIMIZERS)),
        "wrapper": pick(["alone", *sorted(WRAPPERS)]),
        "dtype": dtype,
        "finish": pick([None, None, rolled_back]),
        "bad": set(rng.integers(STEPS, size=rng.integers(3)).tolist()),
        "restored": set(rng.integers(STEPS, size=rng.integers(2)).tolist()),
    }


def loss_fn(w, x):
    kernel, bias = (w[k].astype(jnp.float32) for k in ("kernel", "bias"))
    return jnp.sum(jnp.tanh(x @ kernel + bias - 0.3) ** 2)


def program(settings):
    """The optimizer, the weights and the step."""
    method = settings["method"]
    rule = {} if settings["rule"] is None else {"when": RULES[settings["rule"]]()}
    base = OPTIMIZERS[settings["optimizer"]]()
    between = BETWEEN[settings["between"]]()
    if method.place == "around":
        tx = optax.chain(between, method.optimizer(base, **rule))
    else:
        tx = optax.chain(method.build(**rule), between, base)
    tx = wrap(settings["wrapper"], tx)
    of_kernel, of_bias = DTYPES[settings["dtype"]]
    w = {
        "kernel": jnp.array([[0.3, -0.7], [0.5, 0.2], [-0.4, 0.1]], of_kernel),
        "bias": jnp.array([0.1, -0.2], of_bias),
    }
    finish = settings["finish"] or (lambda old, new: new)

    def step(w, state, x, ascend=None):
        extra = method.extra_args(loss_fn, x)
        updates, after = tx.update(
            jax.grad(loss_fn)(w, x), state, w, ascend=ascend, **extra
        )
        return finish((w, state), (optax.apply_updates(w, updates), after))

    return tx, w, step


def batches(bad):
    rng = np.random.default_rng(0)
    found = rng.normal(size=(STEPS, 4, 3)).astype(np.float32)
    found[list(bad)] = np.nan
    return found


def dispatched_once(settings):
    tx, w, step = program(settings)
    return optax_sam.dispatch(step)(w, tx.init(w), batches(())[0])


def check(settings):
    """Whether the program was refused; fails where its two forms differ."""
    try:
        tx, w, step = program(settings)
        state = tx.init(w)
        plain = jax.jit(step)
        plain(w, state, batches(())[0])
    except (ValueError, TypeError) as error:
        # Refused in words: nothing silent. The dispatched form must refuse as well.
        with pytest.raises((ValueError, TypeError)):
            dispatched_once(settings)
        return str(error)
    if optax_sam.readers.members(state):  # else there is nothing to dispatch
        xs, restored = batches(settings["bad"]), settings["restored"]
        compare(plain, optax_sam.dispatch(step), (w, state), xs, restored)
    return None


# Without `make sweep`; the others take half an hour on two cores.
IN_THE_FULL_TIER = 4
EACH = [
    pytest.param(
        i, marks=[pytest.mark.slow, *[pytest.mark.sweep] * (i >= IN_THE_FULL_TIER)]
    )
    for i in range(CHUNKS)
]


@pytest.mark.parametrize("chunk", EACH)
def test_random_programs(chunk):
    refused = []
    for number in range(chunk, PROGRAMS, CHUNKS):
        settings = drawn(number)
        with warnings.catch_warnings():
            # Optax's own, about dtypes and deprecated names.
            warnings.filterwarnings("ignore", module="optax")
            try:
                reason = check(settings)
            except AssertionError as error:
                raise AssertionError(f"program {number}: {settings}") from error
        refused += [] if reason is None else [reason]
        if number % (10 * CHUNKS) == chunk:  # programs would fill the memory
            jax.clear_caches()
    assert len(refused) < 0.3 * PROGRAMS / CHUNKS, refused
