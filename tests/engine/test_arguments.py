"""What hyperparameters may be: numbers in ranges, integers, schedules, dtypes, keys."""

import functools
import operator
import re
import warnings

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import blend, when

PARAMS = harness.tree(1)
sgd = optax.sgd(0.1)

# Factory, arguments, and their range.
NUMBERS = """
    sam: rho [0, inf)                     ascent.l2: rho [0, inf)
    asam: rho eta [0, inf)                ascent.adaptive: rho eta [0, inf)
    vsam: rho sensitivity [0, inf)        vsam: reuse_decay [0, 1]
    vsam: max_rate (0, 1]                 ascent.n_step: rho step_size [0, inf)
    gsam: rho alpha [0, inf)              rho_from_lr: rho_min rho_max [0, inf)
    looksam: rho alpha [0, inf)           look_layer_sam: rho alpha [0, inf)
    ae_sam: rho [0, inf)                  ae_sam: decay [0, 1)
    ae_looksam: rho alpha [0, inf)        ae_looksam: decay [0, 1)
    esam: rho [0, inf)                    esam: beta gamma (0, 1]
    renyi_sam: rho [0, inf)               renyi_sam: alpha max_offset_norm (0, inf)
    random_sam: rho sigma [0, inf)        random_sam: gradient_weight [0, inf)
    gam: grad_rho norm_rho [0, inf)       ascent.weight_scaled: rho [0, inf)
    wsam: learning_rate [0, inf)          wsam: gamma [0, 1)
    sampa: rho [0, inf)                   sampa: interpolation [0, 1]
    vasso: rho [0, inf)                   vasso: theta [0, 1]
    le_sam: sigma max_rho [0, inf)        gcsam: rho [0, inf)
    awp: gamma [0, inf)                   mrwp: gamma alpha [0, inf)
    when.bernoulli: p [0, 1]              blend.reuse_difference: decay [0, 1]
    blend.surrogate_gap: alpha [0, inf)   blend.reuse_normal: alpha [0, inf)
"""
INTEGERS = """
    sam: num_ascent_steps 1     ascent.n_step: num_steps 1      when.every_k: k 1
    when.every_k: phase 0       when.after: num_steps 0         vsam: window 2
    vsam: num_slices 1          vsam: warmup_steps max_reuse 0  looksam: k 1
    look_layer_sam: k 1         renyi_sam: warmup_steps 0
"""
# Where ``None`` has a meaning.
OPTIONAL = (
    "ascent.n_step step_size",
    "renyi_sam max_offset_norm",
    "vsam max_reuse",
    "vsam warmup_steps",
)
GIVEN = {
    "ascent.adaptive": {"rho": 0.5},
    "ascent.n_step": {"rho": 0.1, "num_steps": 2},
    "rho_from_lr": {"lr_schedule": 0.1, "rho_min": 0.0, "rho_max": 0.0},
    "wsam": {"inner": sgd, "learning_rate": 0.1},
    "sampa": {"inner": sgd},
    "when.every_k": {"k": 3},
}


def rows(table, span):
    """Factories with one argument, and the range."""
    found = re.findall(rf"([\w.]+): ([a-z_ ]+) {span}", table)
    return [(f"{path} {x}", end) for path, names, end in found for x in names.split()]


def factory(row):
    """What builds a method or a part with one argument of a row."""
    path, name = row.split()
    build = operator.attrgetter(path)(optax_sam)
    return name, lambda value: build(**{**GIVEN.get(path, {}), name: value})


@pytest.mark.parametrize(("row", "span"), rows(NUMBERS, r"(\S+, \w+\S)"))
def test_numbers_have_ranges(row, span):
    name, build = factory(row)
    said = {"grad_rho": "rho"}.get(name, name)
    low, high = (float(x) for x in span[1:-1].split(","))
    bad = [low - 0.1, -np.inf, np.inf, np.nan, "large", 1j]
    bad += [None] if row not in OPTIONAL else []
    edges = [(low, span[0] == "[")]
    if high < np.inf:
        edges += [(high, span[-1] == "]"), (high + 0.001, False)]
    for value, allowed in [*((value, False) for value in bad), *edges]:
        if allowed:
            build(value)
            continue
        with pytest.raises(ValueError, match=rf"\b{said} must be"):
            build(value)
    with pytest.raises(ValueError, match=rf"{said} must be one real.*\(1,\)"):
        build(np.ones(1) * 0.1)
    if name == "rho":  # as it goes into optax.contrib.sam
        with pytest.raises(ValueError, match=r"goes after the method.*optax\.chain\("):
            build(sgd)


def test_what_is_no_number():
    for value in ("0.05", b"1", True, np.bool_(False), [0.1, 0.2], None, 1j):
        with pytest.raises(ValueError, match="rho must be"):
            optax_sam.sam(value)
    for value in (np.ones(1) * 0.1, jnp.full((2, 1), 0.1), np.array(True)):
        with pytest.raises(ValueError, match=r"must be one real number.*shape"):
            optax_sam.sam(value)
    for value in (0, np.float32(0.1), jnp.float32(0.1), np.int64(0)):
        optax_sam.sam(value)


@pytest.mark.parametrize(("row", "low"), rows(INTEGERS, r"(\d)"))
def test_integers_have_least_values(row, low):
    name, build = factory(row)
    bad = [int(low) - 1, -5, 2.0, "2", True, [2]]
    for value in bad if row in OPTIONAL else [*bad, None]:
        with pytest.raises(ValueError, match=rf"\b{name} must be an integer >= {low}"):
            build(value)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (when.every_k, {"k": 3, "phase": 3}, "phase must be below k = 3"),
        (optax_sam.vsam, {"window": 12, "num_slices": 5}, "divisible by num_slices"),
        (optax_sam.vsam, {"window": 5, "num_slices": 5}, "two values per slice"),
        (
            optax_sam.vsam,
            {"window": 10, "max_rate": 0.09},
            "at least one perturbed step",
        ),
        (optax_sam.vsam, {"max_rate": lambda t: 0.5}, "max_rate must be a number"),
        (optax_sam.renyi_sam, {"alpha": 1.0}, "alpha must not be 1"),
        (optax_sam.ae_sam, {"lag": 2}, "lag must be 0 .* or 1 .*got 2"),
        (optax_sam.ae_sam, {"threshold": np.nan}, "threshold must be a number"),
        (
            optax_sam.rho_from_lr,
            {"lr_schedule": 0.1, "rho_min": 0.3, "rho_max": 0.2},
            "rho_max must be at least rho_min = 0.3; got 0.2",
        ),
        (
            blend.surrogate_gap,
            {"minimize": "x"},
            """minimize must be "perturbed" or "clean"; got 'x'""",
        ),
    ],
)
def test_combinations_out_of_range(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_the_edges_of_combinations_are_allowed():
    optax_sam.sam(num_ascent_steps=np.int64(2))
    optax_sam.vsam(warmup_steps=0, max_reuse=None, sensitivity=0)
    optax_sam.vsam(max_rate=1, reuse_decay=1, max_reuse=0)
    optax_sam.vsam(window=100, max_rate=0.01)
    optax_sam.ae_sam(threshold=-np.inf, lag=np.int64(1))
    optax_sam.ae_looksam(threshold=np.inf)
    optax_sam.renyi_sam(0, alpha=1e-3)
    optax_sam.looksam(k=1)
    when.after(0)


@pytest.mark.parametrize("dtype", ["bogus", jnp.int32, bool, "complex64", 3.5])
def test_an_ascent_dtype_that_is_none(dtype):
    for factory in (optax_sam.sam, optax_sam.vsam, optax_sam.esam):
        with pytest.raises(ValueError, match="ascent_dtype must be"):
            factory(ascent_dtype=dtype)


# Schedules.


def updated(tx, state):
    return tx.update(PARAMS, state, PARAMS, grad_fn=lambda p: p)


IN_TURN = (lambda run, *args: run(*args), jax.eval_shape)


def test_schedules_of_no_number():
    for value in (
        lambda count: jnp.arange(2),
        lambda count: count > 3,
        lambda count: 1j * count,
        lambda count: "0.1",
        lambda count: (0.1, 0.2),
    ):
        for name in ("rho", "alpha"):
            tx = optax_sam.gsam(**{name: value})
            for call in IN_TURN:
                with pytest.raises(ValueError, match=f"{name} must be"):
                    call(functools.partial(updated, tx), tx.init(PARAMS))


def test_a_schedule_that_starts_outside_its_range():
    for tx, message in (
        (optax_sam.sam(lambda count: -0.1 + 0 * count), r"rho must be in \[0"),
        (optax_sam.sam(when=when.bernoulli(lambda count: 1.5)), r"p must be in"),
        (
            optax_sam.wsam(sgd, learning_rate=0.1, gamma=lambda count: 1.0),
            r"gamma must be in \[0\.0, 1\.0\)",
        ),
    ):
        for call in IN_TURN:
            with pytest.raises(ValueError, match=message):
                call(lambda tx=tx: updated(tx, tx.init(PARAMS)))


def test_a_schedule_that_leaves_its_range_later_is_held_at_its_end():
    dip = lambda count: jnp.where(count == 1, -0.2, 0.1)
    tx = optax_sam.sam(dip)
    state, points = tx.init(PARAMS), []
    grad_fn = lambda p: points.append(p) or p
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS, grad_fn=grad_fn)
    assert not np.allclose(points[0]["gain"], PARAMS["gain"])
    harness.assert_equal(points[1], PARAMS)


def test_a_schedule_that_is_undefined_after_its_end_ends_at_its_bound():
    ended = lambda count: 0.1 * (1 - count / 2) ** 0.9
    tx, w = optax_sam.gnp(0.1, alpha=ended), jnp.array([1.0, 2.0])
    state = tx.init(w)
    for _ in range(4):
        d, state = tx.update(2 * w, state, w, grad_fn=lambda p: 2 * p)
    np.testing.assert_array_equal(d, 2 * w)  # SGD, because alpha is 0


def test_a_schedule_is_not_read_before_it_is_used():
    """A factory may be called before ``jax.distributed`` is initialized."""
    read = []
    optax_sam.gsam(lambda count: read.append(count) or 0.1, alpha=lambda count: 0.3)
    assert not read


def test_schedules_are_checked_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    tx = optax_sam.sam(lambda count: jnp.ones(3))
    update = lambda w: tx.update(w, tx.init(w), w, grad_fn=lambda p: p)[0]
    mapped = jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="rho must be one real number"):
        jax.eval_shape(mapped, jnp.ones(2))


def test_ends_of_rho_from_lr_in_the_wrong_order():
    lr = optax.linear_schedule(0.1, 0.01, 10)
    for ends in ({"lr_min": 0.1, "lr_max": 0.01}, {"lr_min": 0.5}):
        with pytest.raises(ValueError, match="lr_min <= lr_max"):
            optax_sam.rho_from_lr(lr, 0.1, 0.2, **ends)(0)


# Numbers in half precision, as inject_hyperparams makes them of the parameters' dtype.

_SMALL = {"window": 4, "num_slices": 2}
HALF = {
    "decay of the trend": (optax_sam.ae_sam, {"decay": 0.999}),
    "reuse": (optax_sam.vsam, {"reuse_decay": 0.999, **_SMALL}),
    "average": (optax_sam.friendly_sam, {"decay": 0.999}),
}


def test_a_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="arrived in bfloat16") as caught:
        optax_sam.gsam(jnp.bfloat16(0.125))
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("always:.*arrived in bfloat16")
@pytest.mark.parametrize("case", HALF)
def test_hyperparameters_in_half_precision(case):
    factory, settings = HALF[case]
    half = harness.tree(1, dtype=jnp.bfloat16)
    static = optax_sam.static_args(factory)
    inject = functools.partial(optax.inject_hyperparams, factory, static_args=static)
    tx = inject()(**settings)

    def step(state, scale):
        g = jax.tree.map(lambda x: scale * x, half)
        return tx.update(g, state, half, grad_fn=lambda p: p)[1], None

    def trained():
        scales = jnp.tile(jnp.array([1, 2, 3], jnp.bfloat16), 4)
        return jax.lax.scan(step, tx.init(half), scales)[0]

    with pytest.warns(UserWarning, match=r"arrived in bfloat16.*hyperparam_dtype"):
        state = jax.jit(trained)()
    for value in jax.tree.leaves(optax_sam.metrics(state)):
        assert jnp.isfinite(value)
    if "trend" in case:  # a memory of one would never move
        assert optax_sam.metrics(state)["squared_norm_deviation"] > 0

    # Written as the warning says, there is none, and the numbers are those given.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = inject(hyperparam_dtype=jnp.float32)(**settings).init(half).hyperparams
    assert {name: kept[name] for name in settings if name in kept} == {
        name: np.float32(x) for name, x in settings.items() if name in kept
    }


# Keys of random rules.

with_key = pytest.mark.parametrize(
    "rule",
    [
        when.bernoulli,
        functools.partial(when.variance_controlled, window=20, warmup_steps=0),
    ],
    ids=["bernoulli", "variance_controlled"],
)


def drawn(when, state, steps):
    """The decisions of some steps whose gradients teach the rule nothing."""
    body = lambda s, _: (when.advance(s, s.ascends), s.ascends)
    return jax.jit(lambda s: jax.lax.scan(body, s, length=steps))(state)[1]


@with_key
def test_keys_of_all_kinds_draw_alike(rule):
    typed = jax.random.key(7, impl="threefry2x32")
    kinds = [7, np.int64(7), jnp.uint32(7), typed, jax.random.key_data(typed)]
    kinds += [np.asarray(jax.random.key_data(typed))]
    states = [rule(key=key).init(None) for key in kinds]
    for state in states:
        harness.assert_equal(state, states[0])
        assert state.key.dtype == jnp.uint32
    plans = [drawn(rule(key=7), s, 100) for s in (states[0], rule(key=8).init(None))]
    assert 0 < np.sum(plans[0] != plans[1]) < 100
    # Of another generator, and under vmap.
    other = rule(key=jax.random.key(7, impl="rbg")).init(None)
    assert harness.kinds(other) == harness.kinds(states[0])
    several = jax.vmap(lambda key: rule(key=key).init(None))(jnp.arange(6, 8))
    one = jax.tree.map(lambda x: x[1], several)
    harness.assert_close(one, states[0], 1e-6)


@with_key
def test_a_key_can_be_used_again_after_a_donated_step(rule):
    key = jax.random.key(7, impl="threefry2x32")
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 0, s), donate_argnums=0)
    donate(rule(key=key).init(None))
    assert not jax.random.key_data(key).is_deleted()


@with_key
def test_no_key(rule):
    for key in (jnp.zeros(3, jnp.uint32), np.zeros(2), 1.5, None):
        with pytest.raises(ValueError, match="key must be"):
            rule(key=key).init(None)


def test_bernoulli_frequency():
    """As often as promised, by the binomial's own standard deviation."""
    p, steps = 0.3, 2000
    rule = when.bernoulli(p, key=1)
    decisions = drawn(rule, rule.init(None), steps)
    assert abs(decisions.mean() - p) < 4 * np.sqrt(p * (1 - p) / steps)
    assert abs(decisions[1:] @ (1.0 * decisions[:-1]) / steps - p**2) < 0.05
