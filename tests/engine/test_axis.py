"""Devices: where means belong, and that all devices keep and emit the same."""

from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from harness import each_part
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import ascent, blend, when
from optax_sam.parts import Blend, When, ascent_rule

MEAN = lambda tree: jax.lax.pmean(tree, "data")
LOCAL = lambda tree: tree


def mapped(tx, on_first, on_second, check_vma=True, advised=True, local_params=True):
    """Traces an update under ``shard_map``, whose results are to be replicated."""
    problem = problems.mlp()

    def update(params, state, batch):
        cast = advised and check_vma
        local = jax.lax.pcast(params, "data", to="varying") if cast else params
        gradient = lambda p: jax.grad(problem.loss_fn)(p, batch)
        return tx.update(
            on_first(gradient(local)),
            state,
            local if local_params else params,
            grad_fn=lambda p: on_second(gradient(p)),
            ascend=True,
        )

    params = problem.params()
    batch = problem.batch(0)
    return traced(update, params, tx.init(params), batch, check_vma=check_vma)


def traced(update, *args, check_vma):
    """The shapes of an update of replicated arguments and a batch, on two devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    return jax.eval_shape(step, *args)


@pytest.mark.parametrize(
    ("on_first", "on_second"), [(MEAN, LOCAL), (LOCAL, MEAN)], ids=["second", "first"]
)
def test_a_mean_forgotten_on_one_gradient(on_first, on_second):
    """JAX's types see it, if nobody asked for one perturbation per device."""
    with pytest.raises(ValueError, match="out_specs"):
        mapped(optax_sam.sam(0.1), on_first, on_second)


@pytest.mark.parametrize(
    ("on_first", "on_second", "what"),
    [
        (MEAN, LOCAL, "the gradient at w"),
        (LOCAL, MEAN, "what grad_fn returned"),
        (MEAN, MEAN, "the gradient at w"),
    ],
    ids=["first", "second", "both"],
)
def test_an_early_mean_is_refused(on_first, on_second, what):
    """One perturbation per device needs the gradient of each."""
    with pytest.raises(ValueError, match=rf"{what}(.|\n)*jax\.lax\.pcast"):
        mapped(optax_sam.sam(0.1, axis_name="data"), on_first, on_second)


@each_part(lambda m: "axis_name" in m.static and m.needs == "grad_fn")
def test_the_advice_about_summed_gradients(method):
    """It is given where it applies, and the program that it names is one."""
    tx = method.build(axis_name="data")
    for check_vma in (True, False):
        mapped(tx, LOCAL, LOCAL, check_vma, local_params=False)
    if method.uses_incoming:
        with pytest.raises(ValueError, match=r"local = jax\.lax\.pcast") as caught:
            mapped(tx, LOCAL, LOCAL, advised=False)
        assert "also inside" not in str(caught.value)


# Every part that holds something, and every kind of gradient.

RISES = {
    "l2": ascent.l2(0.1),
    "friendly": ascent.friendly(0.2),
    "friendly, restricted": ascent.restrict(ascent.friendly(0.2), True),
    "friendly, scheduled": ascent.friendly(optax.linear_schedule(0.1, 0.2, 5)),
    "smoothed": ascent.smoothed(0.1, 0.1, key=3),
    "random_leaves": ascent.random_leaves(0.1, 0.5, key=3),
    "adaptive": ascent.adaptive(0.1),
    "fisher": ascent.fisher(0.1),
    "renyi": ascent.renyi(0.1),
    "n_step": ascent.n_step(0.1, 2),
    "raw_steps": ascent.raw_steps(0.1, num_steps=2),
    "trust_ratio": ascent.trust_ratio(0.1),
    "weight_scaled": ascent.weight_scaled(0.1),
    "averaged": ascent.averaged(0.1),
    "loss_budget": ascent.loss_budget(0.1),
    "centralized": ascent.centralized(0.1),
    "filter_noise": ascent.filter_noise(0.1, key=3),
}
RULES = {
    "always": when.always(),
    "every_k": when.every_k(2),
    "bernoulli": when.bernoulli(0.5),
    "after": when.after(1, when.norm_above_trend(lag=1)),
    "norm_above_trend": when.norm_above_trend(),
    "variance_controlled": when.variance_controlled(4, 2, warmup_steps=3),
}
BLENDS = {
    "take_ascended": blend.take_ascended(),
    "surrogate_gap": blend.surrogate_gap(),
    "interpolate": blend.interpolate(),
    "renormalize": blend.renormalize(blend.reuse_normal()),
    "reuse_normal": blend.reuse_normal(),
    "reuse_difference": blend.reuse_difference(),
}
# Each rise once, and each rule and blend with two of them.
PRODUCTS = [
    (rise, list(RULES)[i % 6], list(BLENDS)[(i + i // 6) % 6])
    for i, rise in enumerate(RISES)
]


def test_every_exported_part_is_tested():
    exported = lambda module: {x for x in module.__all__ if x[0].islower()}
    helpers = {"norm", "rescale", "restrict", "normalization_layers", "roles"}
    helpers |= {"matrices"}
    assert exported(ascent) - helpers <= {name.split(",")[0] for name in RISES}
    assert exported(when) == set(RULES)
    assert exported(blend) == set(BLENDS)


@pytest.mark.parametrize(("rise", "rule", "mix"), PRODUCTS)
def test_replicas_stay_equal(rise, rule, mix):
    """Each device has its own gradient; states, decisions and emissions are one."""
    tx = optax_sam.sharpness_aware(RISES[rise], RULES[rule], BLENDS[mix], axis_name="d")
    w = {"kernel": jnp.array([[1.0, -2.0], [0.5, 0.3]]), "bias": jnp.ones(2)}
    x = jax.random.normal(jax.random.key(0), (5, 2, 4, 2))
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["kernel"] + p["bias"]) ** 2)

    def step(carry, x):
        params, state = carry
        grad_fn = lambda p: jax.grad(loss)(p, x)
        d, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = jax.tree.map(lambda w, d: w - 0.1 * d, params, d)
        return (params, state), d

    run = lambda x: jax.lax.scan(step, (w, tx.init(w)), x)
    run = jax.jit(jax.vmap(run, in_axes=1, axis_name="d"))
    found = run(x)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, jnp.stack([leaf[0]] * len(leaf)))
    if rise not in ("smoothed", "filter_noise"):  # their noise is a device's own
        harness.assert_close(run(x[:, ::-1])[1], found[1], 1e-4, atol=1e-6)


# What users write, without the mean.


class Kept(NamedTuple):
    size: jax.Array


def store(g, *rest):
    return Kept(ascent.norm(g))


def not_averaged():
    start = lambda params: Kept(jnp.zeros(()))
    along = lambda g, state, params, step, **extra: (g, store(g))
    seen = lambda state, g, g_s, step: store(g_s)
    some = when.every_k(2)
    return {
        "the decision": {"when": When(start, lambda s, g, step: (g["b"][0] > 0, s))},
        "state.when.size": {"when": When(start, lambda s, g, step: (True, store(g)))},
        "state.when.size, late": {
            "when": When(start, lambda s, g, step: (True, s), seen)
        },
        "state.ascent.size": {"ascent": ascent_rule(along, start)},
        "state.blend.size": {
            "blend": Blend(start, lambda g, g_s, *rest: (g, store(g)))
        },
        "state.blend.size, skipped": {
            "when": some,
            "blend": Blend(start, stale=lambda g, *rest: (g, store(g))),
        },
    }


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("what", not_averaged())
def test_rules_that_differ_between_devices_are_refused(what, check_vma):
    """Devices in different branches wait for ever; others drift apart in silence."""
    parts = {"ascent": ascent.l2(0.1)} | not_averaged()[what]
    tx = optax_sam.sharpness_aware(**parts, axis_name="data")
    ours = what == "the decision" or not check_vma
    words = f"{what.split(',')[0]} would differ .*step.mean" if ours else "out_specs"
    with pytest.raises(ValueError, match=words):
        over_two(tx, check_vma)


def over_two(tx, check_vma, of_state=LOCAL):
    def update(params, state, x):
        gradient = lambda p: {"b": x * p["b"]}
        state = jax.tree.map(of_state, state)
        d, after = tx.update(gradient(params), state, params, grad_fn=gradient)
        return d, after if of_state is LOCAL else ()

    params = {"b": jnp.ones(3)}
    batch = jnp.arange(2.0)
    return traced(update, params, tx.init(params), batch, check_vma=check_vma)


def test_rules_with_a_mean_of_their_own_or_callbacks_are_not_refused():
    start = lambda params: Kept(jnp.zeros(()))

    def now(state, g, step):
        size = jax.lax.pmax(ascent.norm(g), "data")
        return jax.lax.pmean(size, "data") > state.size, Kept(size)

    def called(g, *rest):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return g, Kept(step_mean(jax.pure_callback(np.sum, like, g["b"])))

    step_mean = lambda x: jax.lax.pmean(x, "data")
    for parts in ({"when": When(start, now)}, {"blend": Blend(start, called)}):
        tx = optax_sam.sharpness_aware(ascent.l2(0.1), **parts, axis_name="data")
        over_two(tx, check_vma=False)


def test_a_state_that_came_in_as_one_per_device_is_not_refused():
    tx = optax_sam.vsam(0.1, window=4, num_slices=2, axis_name="data")
    over_two(tx, True, lambda x: jax.lax.pcast(x, "data", to="varying"))
