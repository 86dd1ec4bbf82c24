"""The seams between a method and a user's program: right, or refused with a remedy."""

import functools

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import every_method, every_named

import optax_sam
from optax_sam import ascent, blend, sharpness, when

PARAMS = harness.tree(1)
sgd = optax.sgd(0.1)


def updated(tx, state, params=PARAMS, **extra):
    grad_fn = extra.pop("grad_fn", lambda p: p)
    return tx.update(params, state, params, grad_fn=grad_fn, **extra)


# A state belongs to the method, the rule and the parameters that it was made for.


@every_method
@pytest.mark.parametrize(
    "other",
    [sgd, optax.adam(0.1), optax.chain(sgd, sgd), optax.identity()],
    ids=range(4),
)
def test_the_state_of_another_optimizer(method, other):
    with pytest.raises(
        ValueError, match=r"state of another optimizer.*tx\.init\(params\)"
    ):
        updated(method.build(), other.init(PARAMS))


@pytest.mark.parametrize(
    "tx",
    [
        optax_sam.wsam(sgd, learning_rate=0.1),
        optax_sam.sampa(sgd),
        optax_sam.mesa(),
        optax_sam.saf(5, 2),
    ],
)
def test_the_state_of_another_optimizer_in_what_is_no_product(tx):
    extra = {
        "previous_grad_fn": lambda p: p,
        "logits": jnp.ones((2, 2)),
        "indices": jnp.arange(2),
    }
    with pytest.raises(ValueError, match="state of another optimizer"):
        updated(tx, sgd.init(PARAMS), **extra)
    with pytest.raises(ValueError, match="state of another optimizer"):
        updated(tx, optax_sam.sam().init(PARAMS), **extra)


def test_a_checkpoint_that_was_restored_without_a_target():
    tx = optax_sam.sam(0.1)
    as_dict = tx.init(PARAMS)._asdict()
    with pytest.raises(ValueError, match=r"dict where it needs.*target=tx\.init"):
        updated(tx, as_dict)


OTHER_SETTINGS = {
    "looksam's in sam": (optax_sam.looksam(), optax_sam.sam(), r"state\.when"),
    "sam's in looksam": (optax_sam.sam(), optax_sam.looksam(), r"state\.when"),
    "gsam's in gnp's place, with reuse": (
        optax_sam.gsam(),
        optax_sam.sharpness_aware(ascent.l2(0.1), blend=blend.reuse_normal()),
        r"state\.blend it has EmptyState.*makes ReuseNormalState",
    ),
    "another window": (
        optax_sam.vsam(window=10),
        optax_sam.vsam(window=20),
        r"state\.when\.psf_norms it has.*\(10,\).*\(20,\)",
    ),
    "vsam's in vSAM-A": (
        optax_sam.vsam(),
        optax_sam.vsam(reuse_decay=0.0),
        r"state\.blend",
    ),
    "another rule": (
        optax_sam.sam(when=when.every_k(2)),
        optax_sam.sam(when=when.bernoulli(0.5)),
        r"state\.when it has EveryKState.*makes BernoulliState",
    ),
    "another rule inside after": (
        optax_sam.sam(when=when.after(2, when.every_k(2))),
        optax_sam.sam(when=when.after(2)),
        r"state\.when\.rule it has EveryKState.*makes AlwaysState",
    ),
    "lagged or not": (
        optax_sam.ae_sam(),
        optax_sam.ae_sam(lag=1),
        r"state\.when it has NormTrendState",
    ),
    "another ascent": (
        optax_sam.friendly_sam(),
        optax_sam.sam(),
        r"state\.ascent it has FriendlyState",
    ),
}


@pytest.mark.parametrize("case", OTHER_SETTINGS)
@pytest.mark.parametrize("jit", [False, True])
def test_the_state_of_another_setting(case, jit):
    before, after, message = OTHER_SETTINGS[case]
    run = functools.partial(updated, after)
    with pytest.raises(ValueError, match=message + r"(?s:.*)_replace\("):
        (jax.jit(run) if jit else run)(before.init(PARAMS))


def test_the_state_of_other_parameters():
    tx = optax_sam.vsam(window=4, num_slices=2)
    wide = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    with pytest.raises(ValueError, match=r"state\.blend\.psf it has arrays of shapes"):
        updated(tx, tx.init(wide))


def test_a_part_is_started_again_as_the_error_says():
    before, after = optax_sam.vsam(window=10), optax_sam.vsam(window=20)
    state = updated(before, before.init(PARAMS))[1]
    state = state._replace(when=after.init(PARAMS).when)
    _, state = updated(after, state)
    assert int(state.num_ascents) == 2


def test_the_bounds_of_saf_are_those_of_the_method_as_it_is():
    given = {"logits": jnp.ones((1, 2)), "indices": jnp.zeros(1, jnp.int32)}
    state = optax_sam.saf(3, 2, delay=1, start=50).init(PARAMS)
    tx = optax_sam.saf(3, 2, delay=1, start=0)
    _, state = tx.update(PARAMS, state, PARAMS, **given)
    assert optax_sam.saf_past_logits(state, jnp.array([0]))[1].all()


# Parameters.

STRANGE = {
    "int": jnp.array([100, -50]),
    "bool": jnp.array([True, False]),
    "complex": jnp.array([1j, 2.0]),
    "key": jax.random.key(0),
    "text": "relu",
    "function": jnp.sin,
    "float0": np.zeros(2, jax.dtypes.float0),
}


@pytest.mark.parametrize("kind", STRANGE)
@every_named
def test_a_strange_leaf_among_the_parameters(method, kind):
    params = {"w": jnp.ones(2), "n": STRANGE[kind]}
    g = {
        "w": jnp.ones(2),
        "n": jnp.ones(
            jnp.shape(params["n"]) if kind != "text" and kind != "function" else ()
        ),
    }
    tx = method.build()
    with pytest.raises(ValueError, match=r"\['n'\]") as caught:
        tx.update(g, tx.init(params), params, grad_fn=lambda q: g)
    remedy = "imaginary leaf" if kind == "complex" else "eqx.filter"
    assert remedy in str(caught.value)


@pytest.mark.parametrize("kind", ["int", "bool", "function"])
@pytest.mark.parametrize("name", ["wsam", "sampa"])
def test_a_strange_leaf_in_what_wraps(name, kind):
    params = {"w": jnp.ones(2), "n": STRANGE[kind]}
    g = {"w": jnp.ones(2), "n": jnp.ones(2)}
    tx = (
        optax_sam.sampa(sgd)
        if name == "sampa"
        else optax_sam.wsam(sgd, learning_rate=1)
    )
    state = tx.init({"w": params["w"], "n": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\['n'\]"):
        tx.update(g, state, params, grad_fn=lambda q: g, previous_grad_fn=lambda q: g)


def loss_of_model(model):
    return jnp.sum(model(jnp.array([1.0, -2.0])) ** 2)


@every_named
def test_an_equinox_model_in_place_of_the_parameters(method):
    """Its functions and integers have no gradient and are absent."""
    if method.needs != "grad_fn":
        pytest.skip("it differentiates by itself")
    model = (eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), jnp.arange(3), "name", None)
    whole = lambda m: loss_of_model(m[0])
    grad_fn = eqx.filter_grad(whole)
    grads = grad_fn(model)
    tx = method.build()
    arrays = eqx.filter(model, eqx.is_inexact_array)

    def filtered(p):
        return grad_fn(
            eqx.combine(p, eqx.filter(model, eqx.is_inexact_array, inverse=True))
        )

    expected, _ = tx.update(
        grads, tx.init(arrays), arrays, grad_fn=filtered, ascend=True
    )
    for start in (arrays, model):
        found, _ = tx.update(grads, tx.init(start), model, grad_fn=grad_fn, ascend=True)
        harness.assert_equal(jax.tree.leaves(found), jax.tree.leaves(expected))
    mask = jax.tree.map(lambda x: eqx.is_inexact_array(x) and x.ndim == 2, model)
    if "mask" in method.static:
        masked = method.build(mask=mask)
        masked.update(grads, masked.init(model), model, grad_fn=grad_fn, ascend=True)


def test_a_model_whose_gradient_has_another_structure():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = optax_sam.sam(0.1)
    grads = {"layers": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"is_inexact_array"):
        tx.update(grads, tx.init(model), model, grad_fn=lambda m: grads)


# What users hand over.


def quadratic(w, x):
    return jnp.mean((w - x) ** 2)


def grad_fn_of_two(p, batch):
    return p


GRAD_FNS = {
    "two arguments": (grad_fn_of_two, r"parameters alone, but it takes \(p, batch\)"),
    "a bound keyword too many": (
        functools.partial(lambda p, x, y: p, x=1),
        "parameters alone",
    ),
    "none": (lambda: PARAMS, "parameters alone"),
    "value_and_grad": (
        lambda p: (jnp.ones(()), p),
        r"pair \(value, gradients\).*jax\.grad\(loss_fn\)",
    ),
    "a loss with aux": (lambda p: (p, {"n": 1}), "has_aux=True"),
    "no function": (PARAMS, "must be a function"),
}


@pytest.mark.parametrize("case", GRAD_FNS)
def test_a_grad_fn_that_is_none(case):
    grad_fn, message = GRAD_FNS[case]
    tx = optax_sam.sam(0.1)
    with pytest.raises(ValueError, match=message):
        updated(tx, tx.init(PARAMS), grad_fn=grad_fn)


def test_value_and_grad_for_the_incoming_gradient():
    tx = optax_sam.sam(0.1)
    with pytest.raises(
        ValueError, match=r"incoming gradient.*pair \(value, gradients\)"
    ):
        tx.update((jnp.ones(()), PARAMS), tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="incoming gradient") as caught:
        tx.update((PARAMS, 1.0), tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)
    assert "grad_fn must return" not in str(caught.value)


X = jnp.arange(8.0)
LOSSES = {
    "ignores them": (lambda w, indices=None: (w - X) ** 2, r"at 3 indices.*\(8,\)"),
    "takes none": (lambda w: (w - X) ** 2, "must take indices"),
    "returns their mean": (
        lambda w, indices=None: (w - X) ** 2 if indices is None else jnp.zeros(()),
        r"at 3 indices.*\(\)",
    ),
    "returns one more": (
        lambda w, indices=None: (w - (X if indices is None else X[:4])) ** 2,
        r"at 3 indices.*\(4,\)",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_at_indices(case):
    losses, message = LOSSES[case]
    tx, w = optax_sam.esam(0.1, beta=1.0, gamma=0.5), jnp.zeros(())
    with pytest.raises(ValueError, match=message):
        tx.update(w + 1, tx.init(w), w, per_example_loss_fn=losses)


@pytest.mark.parametrize(
    "grad_fn",
    [
        lambda w, x=X: jax.grad(quadratic)(w, x),
        lambda w, batch=(X, X), i=0: w,
        functools.partial(lambda w, x: w, x=X),
    ],
    ids=["bound", "bound with a shard behind", "bound by partial"],
)
def test_a_batch_in_the_place_of_the_shard(grad_fn):
    w = jnp.zeros(())
    tx = optax_sam.micro_sharpness(optax_sam.sam(0.1, axis_name="shards"), 2)
    with pytest.raises(ValueError, match="shard"):
        tx.update(None, tx.init(w), w, grad_fn=grad_fn)


@pytest.mark.parametrize("default", [0, None])
def test_a_shard_with_a_default(default):
    w = jnp.zeros(())
    shards = X.reshape(2, 4)
    grad_fn = lambda w, i=default: jax.grad(quadratic)(w, shards[i])
    tx = optax_sam.micro_sharpness(optax_sam.sam(0.1, axis_name="shards"), 2)
    d, _ = tx.update(None, tx.init(w), w, grad_fn=grad_fn)
    assert jnp.isfinite(d)


# Arguments.

FACTORIES = {
    "rho": optax_sam.sam,
    "alpha": lambda alpha: optax_sam.gsam(alpha=alpha),
    "sigma": lambda sigma: optax_sam.random_sam(sigma=sigma),
    "decay": lambda decay: optax_sam.ae_sam(decay=decay),
    "reuse_decay": lambda reuse_decay: optax_sam.vsam(reuse_decay=reuse_decay),
    "sensitivity": lambda sensitivity: optax_sam.vsam(sensitivity=sensitivity),
    "gamma": lambda gamma: optax_sam.wsam(sgd, learning_rate=0.1, gamma=gamma),
    "learning_rate": lambda x: optax_sam.wsam(sgd, learning_rate=x),
    "interpolation": lambda x: optax_sam.sampa(sgd, interpolation=x),
    "p": lambda p: when.bernoulli(p),
    "eta": lambda eta: optax_sam.asam(eta=eta),
    "grad_rho": lambda x: optax_sam.gam(x),
    "threshold": lambda x: optax_sam.ae_sam(threshold=x),
}


@pytest.mark.parametrize(
    "value", ["0.05", True, np.bool_(False), b"1", [0.1, 0.2], None, 1j]
)
@pytest.mark.parametrize("name", FACTORIES)
def test_what_is_no_number(name, value):
    names = {"grad_rho": "rho"}.get(name, name)
    with pytest.raises(ValueError, match=f"{names} must be"):
        FACTORIES[name](value)


@pytest.mark.parametrize("value", [np.ones(1) * 0.1, jnp.full((2, 1), 0.1)])
@pytest.mark.parametrize("name", FACTORIES)
def test_arrays_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=r"must be one real number.*shape"):
        FACTORIES[name](value)


SCHEDULES = {
    "a shape": lambda count: jnp.ones((4, 1)),
    "integers of a shape": lambda count: jnp.arange(2),
    "a flag": lambda count: count > 3,
    "complex": lambda count: 1j * count,
    "text": lambda count: "0.1",
    "a pair": lambda count: (0.1, 0.2),
}


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("jit", [False, True])
def test_schedules_of_no_number(case, jit):
    for name in ("rho", "alpha"):
        tx = optax_sam.gsam(**{name: SCHEDULES[case]})
        state = tx.init(PARAMS)
        run = functools.partial(updated, tx)
        with pytest.raises(ValueError, match=f"{name} must be"):
            (jax.jit(run) if jit else run)(state)


@pytest.mark.parametrize("jit", [False, True])
def test_a_schedule_that_starts_outside_its_range(jit):
    for tx, message in (
        (optax_sam.sam(lambda count: -0.1 + 0 * count), r"rho must be in \[0"),
        (optax_sam.sam(when=when.bernoulli(lambda count: 1.5)), r"p must be in"),
        (
            optax_sam.wsam(sgd, learning_rate=0.1, gamma=lambda count: 1.0),
            r"gamma must be in \[0\.0, 1\.0\)",
        ),
    ):

        def run(tx=tx):
            return updated(tx, tx.init(PARAMS))

        with pytest.raises(ValueError, match=message):
            (jax.jit(run) if jit else run)()


def test_a_schedule_that_leaves_its_range_later_is_held_at_its_end():
    dip = lambda count: jnp.where(count == 1, -0.2, 0.1)
    tx = optax_sam.sam(dip)
    state = tx.init(PARAMS)
    points = []
    for _ in range(2):
        grad_fn = lambda p: points.append(p) or p
        _, state = updated(tx, state, grad_fn=grad_fn)
    assert not np.allclose(points[0]["gain"], PARAMS["gain"])
    harness.assert_equal(points[1], PARAMS)


def test_a_schedule_is_not_read_before_it_is_used():
    """A factory may be called before ``jax.distributed`` is initialized."""
    read = []
    optax_sam.gsam(lambda count: read.append(count) or 0.1, alpha=lambda count: 0.3)
    assert not read


def test_schedules_are_checked_under_every_transformation():
    rho = optax.cosine_decay_schedule(0.1, 10)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    for run in (
        lambda f: f,
        jax.jit,
        lambda f: lambda w: jax.vmap(f)(jnp.stack([w, w]))[0],
        lambda f: jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P()),
        lambda f: lambda w: jax.lax.scan(lambda c, _: (f(c), 0.0), w, None, 2)[0],
    ):
        tx = optax_sam.sam(rho)
        step = lambda w, tx=tx: tx.update(w, tx.init(w), w, grad_fn=lambda p: p)[0]
        assert jnp.isfinite(run(step)(jnp.ones(2))).all()
        bad = optax_sam.sam(lambda count: jnp.ones(3))
        step = lambda w, tx=bad: tx.update(w, tx.init(w), w, grad_fn=lambda p: p)[0]
        with pytest.raises(ValueError, match="rho must be one real number"):
            run(step)(jnp.ones(2))


def test_ends_of_rho_from_lr_in_the_wrong_order():
    lr = optax.linear_schedule(0.1, 0.01, 10)
    with pytest.raises(ValueError, match="lr_min <= lr_max"):
        optax_sam.rho_from_lr(lr, 0.1, 0.2, lr_min=0.1, lr_max=0.01)(0)
    with pytest.raises(ValueError, match="lr_min <= lr_max"):
        optax_sam.rho_from_lr(lr, 0.1, 0.2, lr_min=0.5)(0)
    with pytest.raises(ValueError, match="rho_max must be at least"):
        optax_sam.rho_from_lr(lr, 0.2, 0.1)


@pytest.mark.parametrize(
    "mask",
    [
        jax.tree.map(lambda x: False, PARAMS),
        lambda p: jax.tree.map(lambda x: x.ndim > 7, p),
    ],
    ids=["tree", "function"],
)
def test_a_mask_that_leaves_nothing(mask):
    for tx in (
        optax_sam.sam(mask=mask),
        optax_sam.random_sam(mask=mask),
        optax_sam.gam(mask=mask),
    ):
        with pytest.raises(ValueError, match="mask includes none of the 3 leaves"):
            updated(tx, tx.init(PARAMS))
    tx = optax_sam.vsam(norm_mask=mask)
    with pytest.raises(ValueError, match="norm_mask includes none"):
        updated(tx, tx.init(PARAMS), ascend=True)


@pytest.mark.parametrize("dtype", ["bogus", jnp.int32, bool, "complex64", 3.5])
def test_an_ascent_dtype_that_is_none(dtype):
    for factory in (optax_sam.sam, optax_sam.vsam, optax_sam.esam):
        with pytest.raises(ValueError, match="ascent_dtype must be"):
            factory(ascent_dtype=dtype)


@pytest.mark.parametrize(
    "parts",
    [
        {"ascent": when.every_k(2)},
        {"ascent": blend.take_ascended()},
        {"ascent": 0.05},
        {"ascent": ascent.l2},
        {"ascent": ascent.l2(0.1), "when": blend.take_ascended()},
        {"ascent": ascent.l2(0.1), "when": ascent.l2(0.1)},
        {"ascent": ascent.l2(0.1), "blend": when.always()},
        {"ascent": ascent.l2(0.1), "blend": ascent.l2(0.1)},
    ],
    ids=range(8),
)
def test_a_part_on_the_wrong_axis(parts):
    with pytest.raises(ValueError, match="(ascent|when|blend) must be a"):
        optax_sam.sharpness_aware(**parts)


# Numbers in half precision, as inject_hyperparams makes them of the parameters' dtype.

HALF = {
    "decay of the trend": (optax_sam.ae_sam, {"decay": 0.999}),
    "decay of the trend, lagged": (optax_sam.ae_sam, {"decay": 0.9999, "lag": 1}),
    "largest rate": (optax_sam.vsam, {"max_rate": 0.999, "window": 4, "num_slices": 2}),
    "reuse": (optax_sam.vsam, {"reuse_decay": 0.999, "window": 4, "num_slices": 2}),
    "average": (optax_sam.friendly_sam, {"decay": 0.999}),
}


def injected_run(factory, settings, **options):
    half = harness.tree(1, dtype=jnp.bfloat16)
    static = optax_sam.static_args(factory)
    tx = optax.inject_hyperparams(factory, static_args=static, **options)(**settings)
    state = tx.init(half)

    @jax.jit
    def step(state, scale):
        g = jax.tree.map(lambda x: scale * x, half)
        return tx.update(g, state, half, grad_fn=lambda p: p)[1]

    for t in range(12):
        state = step(state, jnp.bfloat16(1 + t % 3))
    return state


@pytest.mark.filterwarnings("always:.*arrived in bfloat16")
@pytest.mark.parametrize("case", HALF)
def test_hyperparameters_in_half_precision(case):
    factory, settings = HALF[case]
    with pytest.warns(UserWarning, match=r"arrived in bfloat16.*hyperparam_dtype"):
        state = injected_run(factory, settings)
    for value in jax.tree.leaves(optax_sam.metrics(state)):
        assert jnp.isfinite(value)
    if "trend" in case:  # a memory of one would never move
        assert optax_sam.metrics(state)["squared_norm_deviation"] > 0


@pytest.mark.parametrize("case", HALF)
def test_hyperparameters_of_a_dtype_are_the_numbers_written(case):
    factory, settings = HALF[case]
    state = injected_run(factory, settings, hyperparam_dtype=jnp.float32)
    for name, value in settings.items():
        if name in state.hyperparams:
            assert state.hyperparams[name] == np.float32(value)


# Devices: every part that holds something, and every kind of gradient.

STATEFUL = {
    "friendly": ascent.friendly(0.2),
    "friendly, restricted": ascent.restrict(ascent.friendly(0.2), True),
    "friendly, scheduled": ascent.friendly(optax.linear_schedule(0.1, 0.2, 5)),
    "smoothed": ascent.smoothed(0.1, 0.1, key=3),
    "random_leaves": ascent.random_leaves(0.1, 0.5, key=3),
    "l2": ascent.l2(0.1),
    "adaptive": ascent.adaptive(0.1),
    "fisher": ascent.fisher(0.1),
    "renyi": ascent.renyi(0.1),
    "n_step": ascent.n_step(0.1, 2),
    "raw_steps": ascent.raw_steps(0.1, num_steps=2),
    "trust_ratio": ascent.trust_ratio(0.1),
    "weight_scaled": ascent.weight_scaled(0.1),
}
RULES = {
    "always": when.always(),
    "every_k": when.every_k(2),
    "bernoulli": when.bernoulli(0.5),
    "after": when.after(1, when.norm_above_trend(lag=1)),
    "trend": when.norm_above_trend(),
    "variance": when.variance_controlled(4, 2, warmup_steps=3),
}
BLENDS = {
    "take": blend.take_ascended(),
    "gap": blend.surrogate_gap(),
    "interpolate": blend.interpolate(),
    "renormalize": blend.renormalize(blend.reuse_normal()),
    "reuse_normal": blend.reuse_normal(),
    "reuse_difference": blend.reuse_difference(),
}


def test_every_exported_part_is_tested():
    taken = {name.split(",")[0] for name in STATEFUL}
    helpers = {"norm", "rescale", "restrict", "normalization_layers"}
    parts = {x for x in ascent.__all__ if x[0].islower()} - helpers
    assert parts <= taken | {"roles"}
    states = {x for x in when.__all__ if x[0].islower()}
    assert states == {"always", "every_k", "bernoulli", "after"} | {
        "norm_above_trend",
        "variance_controlled",
    }
    assert {x for x in blend.__all__ if x[0].islower()} == {
        "take_ascended",
        "surrogate_gap",
        "interpolate",
        "renormalize",
        "reuse_normal",
        "reuse_difference",
    }


PRODUCTS = [
    *((a, "always", "take") for a in STATEFUL),
    *(("friendly", rule, "take") for rule in RULES),
    *(("friendly", "every_k", mix) for mix in BLENDS),
]


@pytest.mark.parametrize(("rise", "rule", "mix"), PRODUCTS)
def test_replicas_stay_equal(rise, rule, mix):
    """Each device has its own gradient; states, decisions and emissions are one."""
    tx = optax_sam.sharpness_aware(
        STATEFUL[rise], RULES[rule], BLENDS[mix], axis_name="d"
    )
    w = {"kernel": jnp.array([[1.0, -2.0], [0.5, 0.3]]), "bias": jnp.ones(2)}
    x = jax.random.normal(jax.random.key(0), (5, 2, 4, 2))
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["kernel"] + p["bias"]) ** 2)

    def run(x):
        state, params, emitted = tx.init(w), w, []
        for t in range(5):
            grad_fn = lambda p: jax.grad(loss)(p, x[t])  # noqa: B023
            d, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, jax.tree.map(lambda d: -0.1 * d, d))
            emitted.append(d)
        return state, emitted

    found = jax.vmap(run, in_axes=1, axis_name="d")(x)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, jnp.stack([leaf[0]] * len(leaf)))
    if rise != "smoothed":  # whose noise is a device's own
        swapped = jax.vmap(run, in_axes=1, axis_name="d")(x[:, ::-1])
        for a, b in zip(*map(jax.tree.leaves, (found[1], swapped[1])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@every_named
def test_the_advice_about_summed_gradients(method, check_vma):
    """It is given where it applies, and the program that it names runs."""
    if "axis_name" not in method.static or method.needs != "grad_fn":
        pytest.skip("it has no axis_name")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    tx = method.build(axis_name="d")
    w, x = jnp.array([1.0, -2.0]), jax.random.normal(jax.random.key(0), (4, 2))

    def step(w, state, x, advised):
        grad = jax.grad(lambda p: jnp.mean(jnp.tanh(x @ p)))
        local = jax.lax.pcast(w, "d", to="varying") if advised and check_vma else w
        return tx.update(grad(local), state, w, grad_fn=grad, ascend=True)[0]

    def run(advised):
        mapped = jax.shard_map(
            functools.partial(step, advised=advised),
            mesh=mesh,
            in_specs=(P(), P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(w, tx.init(w), x)

    assert jnp.isfinite(run(advised=True)).all()
    if check_vma and method.uses_incoming:
        with pytest.raises(ValueError, match=r"local = jax\.lax\.pcast") as caught:
            run(advised=False)
        assert "also inside" not in str(caught.value)


# Measures of a loss without a forward derivative.


@jax.custom_vjp
def _backward(x):
    return jnp.cos(x)


_backward.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-jnp.sin(x) * g,))


@jax.custom_vjp
def _kernel(x):
    return jnp.sin(x)


_kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (_backward(x) * g,))

MEASURES = {
    "hessian_trace": lambda **kw: sharpness.hessian_trace(*_POINT, 0, **kw).estimate,
    "hessian_eigenvalues": lambda **kw: jnp.sum(
        sharpness.hessian_eigenvalues(*_POINT, 0, k=3, num_matvecs=3, **kw).eigenvalues
    ),
    "hessian_diagonal": lambda **kw: jnp.sum(
        sharpness.hessian_diagonal(*_POINT, 0, **kw).estimate
    ),
    "hessian_frobenius_norm": lambda **kw: (
        sharpness.hessian_frobenius_norm(*_POINT, 0, num_matvecs=400, **kw).estimate
    ),
    "spectral_sum": lambda **kw: (
        sharpness.spectral_sum(
            lambda x: x, *_POINT, 0, num_eigs=3, num_top_matvecs=3, num_lanczos=3, **kw
        ).estimate
    ),
}
_W = jnp.array([0.3, 1.0, -0.5])
_POINT = (
    lambda w, b: jnp.sum(_kernel(w * jnp.mean(b, 0))),
    _W,
    jnp.array([[[1.0, 2.0, 3.0]]]),
)
_DIAGONAL = -np.sin(np.asarray(_W) * [1, 2, 3]) * [1, 4, 9]


@pytest.mark.parametrize("name", MEASURES)
def test_a_loss_without_forward_derivative(name):
    measure = MEASURES[name]
    wanted = _DIAGONAL.sum()
    if "norm" in name:
        wanted = np.linalg.norm(_DIAGONAL)
    np.testing.assert_allclose(measure(mode="rev_rev"), wanted, rtol=1e-3)


@pytest.mark.parametrize("mode", ["rev_rev", "fwd_rev"])
def test_densities_and_entropies_take_a_mode(mode):
    loss = lambda w, b: 0.5 * jnp.sum(jnp.mean(b, 0) * w**2)
    args = (loss, jnp.ones(3), jnp.array([[[5.0, -5.0, 0.0]]]), 0)
    entropy = sharpness.renyi_entropy(*args, alpha=2, mode=mode)
    np.testing.assert_allclose(entropy.value, np.log(2), rtol=1e-4)
    assert sharpness.spectral_density(*args, mode=mode).density.shape
    assert sharpness.renyi_sharpness(*args, mode=mode) is not None
