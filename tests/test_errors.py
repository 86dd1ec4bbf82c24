"""What is refused, and that the error says where and what to do."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import every_named

import optax_sam


def refuse(method, message, grads, params, grad_fn):
    """Every form of the step refuses, and does so while tracing."""
    if grads is params and method.needs != "grad_fn":
        return  # it differentiates by itself
    tx = method.build()
    state = tx.init(params)
    for ascend in (None, True):
        update = functools.partial(tx.update, grad_fn=grad_fn, ascend=ascend)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(update, grads, state, params)


@every_named
def test_another_structure(method):
    params = harness.tree()
    less = {"layer": {"kernel": params["layer"]["kernel"]}, "gain": params["gain"]}
    more = {**params, "shift": params["gain"]}
    incoming, returned = "the incoming gradient", "what grad_fn returned"
    missing = r"missing: \['layer'\]\['bias'\]"
    surplus = r"not in the parameters: \['shift'\]"
    back = lambda p: p
    refuse(method, f"{incoming}.*{missing}", less, params, back)
    refuse(method, f"{incoming}.*{surplus}", more, params, back)
    refuse(method, f"{returned}.*{missing}", params, params, lambda p: less)
    refuse(method, f"{returned}.*{surplus}", params, params, lambda p: more)
    aux = lambda p: (params, {"accuracy": 1.0})
    refuse(method, f"{returned}.*has_aux=True", params, params, aux)
    refuse(method, f"{returned}.*has_aux=True", params, params, lambda p: None)


@every_named
def test_another_shape(method):
    params = harness.tree()
    wrong = {**params, "layer": {**params["layer"], "bias": jnp.zeros((1, 2))}}
    message = r"at \['layer'\]\['bias'\] has shape \(1, 2\), its parameter has \(2,\)"
    refuse(method, message, wrong, params, lambda p: p)
    refuse(method, message, params, params, lambda p: wrong)


@every_named
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_another_kind_of_number(method, dtype):
    params = harness.tree()
    wrong = {**params, "gain": params["gain"].astype(dtype)}
    message = rf"at \['gain'\] has dtype {dtype}"
    refuse(method, message, wrong, params, lambda p: p)
    refuse(method, message, params, params, lambda p: wrong)
    # Parameters of that kind, whose gradients are alike.
    refuse(method, message, wrong, wrong, lambda p: p)


@every_named
def test_gradient_of_an_integer_parameter(method):
    """``allow_int=True`` gives a gradient of JAX's empty dtype."""
    params = {"w": jnp.ones(2), "steps": jnp.array(3)}
    grad_fn = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)
    tx = method.build()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['steps'\].*float"):
        tx.update(grad_fn(params), state, params, grad_fn=grad_fn)


def test_a_leaf_at_the_root_has_a_name():
    tx = optax_sam.sam()
    with pytest.raises(ValueError, match="at the root has shape"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(2)), jnp.ones(2), grad_fn=lambda p: p)


# Hyperparameters, at construction.

NUMBERS = {
    "sam rho": optax_sam.sam,
    "asam rho": optax_sam.asam,
    "asam eta": lambda x: optax_sam.asam(eta=x),
    "vsam rho": optax_sam.vsam,
    "vsam sensitivity": lambda x: optax_sam.vsam(sensitivity=x),
    "vsam max_rate": lambda x: optax_sam.vsam(max_rate=x),
    "vsam reuse_decay": lambda x: optax_sam.vsam(reuse_decay=x),
    "l2 rho": optax_sam.ascent.l2,
    "adaptive rho": optax_sam.ascent.adaptive,
    "adaptive eta": lambda x: optax_sam.ascent.adaptive(0.5, eta=x),
    "n_step rho": lambda x: optax_sam.ascent.n_step(x, 2),
    "n_step step_size": lambda x: optax_sam.ascent.n_step(0.1, 2, step_size=x),
    "bernoulli p": optax_sam.when.bernoulli,
    "reuse_difference decay": optax_sam.blend.reuse_difference,
    "gsam rho": optax_sam.gsam,
    "gsam alpha": lambda x: optax_sam.gsam(alpha=x),
    "rho_from_lr rho_min": lambda x: optax_sam.rho_from_lr(0.1, x, 1.0),
    "rho_from_lr rho_max": lambda x: optax_sam.rho_from_lr(0.1, 0.0, x),
    "looksam rho": optax_sam.looksam,
    "looksam alpha": lambda x: optax_sam.looksam(alpha=x),
    "look_layer_sam rho": optax_sam.look_layer_sam,
    "look_layer_sam alpha": lambda x: optax_sam.look_layer_sam(alpha=x),
    "ae_sam rho": optax_sam.ae_sam,
    "ae_sam decay": lambda x: optax_sam.ae_sam(decay=x),
    "ae_looksam rho": optax_sam.ae_looksam,
    "ae_looksam decay": lambda x: optax_sam.ae_looksam(decay=x),
    "ae_looksam alpha": lambda x: optax_sam.ae_looksam(alpha=x),
    "esam rho": optax_sam.esam,
    "esam beta": lambda x: optax_sam.esam(beta=x),
    "esam gamma": lambda x: optax_sam.esam(gamma=x),
    "renyi_sam rho": optax_sam.renyi_sam,
    "renyi_sam alpha": lambda x: optax_sam.renyi_sam(alpha=x),
    "renyi_sam max_offset_norm": lambda x: optax_sam.renyi_sam(max_offset_norm=x),
    "random_sam rho": optax_sam.random_sam,
    "random_sam sigma": lambda x: optax_sam.random_sam(sigma=x),
    "random_sam gradient_weight": lambda x: optax_sam.random_sam(gradient_weight=x),
    "weight_scaled rho": optax_sam.ascent.weight_scaled,
    "surrogate_gap alpha": optax_sam.blend.surrogate_gap,
    "reuse_normal alpha": optax_sam.blend.reuse_normal,
}
# Where ``None`` has a meaning.
OPTIONAL = ("n_step step_size", "renyi_sam max_offset_norm")
BAD_NUMBERS = [-0.1, np.nan, np.inf, -np.inf, None, "large", [0.1, 0.2], 1j]


@pytest.mark.parametrize(
    ("what", "bad"),
    [
        (what, bad)
        for what in NUMBERS
        for bad in BAD_NUMBERS
        if bad is not None or what not in OPTIONAL
    ],
    ids=str,
)
def test_numbers_out_of_range(what, bad):
    name = what.split()[1]
    with pytest.raises(ValueError, match=rf"\b{name} must be"):
        NUMBERS[what](bad)


@pytest.mark.parametrize("what", [x for x in NUMBERS if x.endswith(" rho")])
def test_an_optimizer_as_radius(what):
    """As it goes into ``optax.contrib.sam``."""
    with pytest.raises(ValueError, match=r"goes behind the method.*optax\.chain\("):
        NUMBERS[what](optax.sgd(0.1))


SHARES = [
    "vsam max_rate",
    "vsam reuse_decay",
    "bernoulli p",
    "reuse_difference decay",
    "ae_sam decay",
    "ae_looksam decay",
    "esam beta",
    "esam gamma",
]


@pytest.mark.parametrize("what", SHARES)
@pytest.mark.parametrize("bad", [1.001, 2, np.float32(1.5), jnp.float32(3.0)], ids=str)
def test_shares_above_one(what, bad):
    with pytest.raises(ValueError, match=rf"must be a number .*in .*got {float(bad)}"):
        NUMBERS[what](bad)


INTEGERS = {
    "sam num_ascent_steps": lambda x: optax_sam.sam(num_ascent_steps=x),
    "n_step num_steps": lambda x: optax_sam.ascent.n_step(0.1, x),
    "every_k k": optax_sam.when.every_k,
    "vsam window": lambda x: optax_sam.vsam(window=x),
    "vsam num_slices": lambda x: optax_sam.vsam(num_slices=x),
    "looksam k": lambda x: optax_sam.looksam(k=x),
    "look_layer_sam k": lambda x: optax_sam.look_layer_sam(k=x),
}


@pytest.mark.parametrize("what", INTEGERS)
@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", None, True, [2]], ids=repr)
def test_integers_out_of_range(what, bad):
    name = what.split()[1]
    with pytest.raises(ValueError, match=rf"\b{name} must be an integer"):
        INTEGERS[what](bad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optax_sam.when.every_k(3, phase=3), "phase must be below k = 3"),
        (lambda: optax_sam.when.every_k(3, phase=-1), "phase must be"),
        (lambda: optax_sam.vsam(window=12, num_slices=5), "divisible by num_slices"),
        (lambda: optax_sam.vsam(window=5, num_slices=5), "two values per slice"),
        (lambda: optax_sam.vsam(window=1, num_slices=1), "window must be"),
        (lambda: optax_sam.vsam(max_rate=0.0), r"max_rate must be .*\(0"),
        (lambda: optax_sam.vsam(window=10, max_rate=0.09), "at least one ascent"),
        (lambda: optax_sam.vsam(warmup_steps=-1), "warmup_steps must be"),
        (lambda: optax_sam.vsam(max_reuse=-1), "max_reuse must be"),
        (lambda: optax_sam.vsam(max_reuse=1.5), "max_reuse must be"),
        (lambda: optax_sam.renyi_sam(alpha=1.0), "alpha must not be 1"),
        (lambda: optax_sam.renyi_sam(alpha=jnp.asarray(1)), "alpha must not be 1"),
        (lambda: optax_sam.renyi_sam(alpha=0.0), r"alpha must be .*\(0.0, inf\)"),
        (lambda: optax_sam.renyi_sam(max_offset_norm=0), r"max_offset_norm .*\(0.0"),
        (lambda: optax_sam.renyi_sam(warmup_steps=-1), "warmup_steps must be .* >= 0"),
        (lambda: optax_sam.renyi_sam(warmup_steps=1.5), "warmup_steps must be an int"),
        (lambda: optax_sam.when.after(-1), "num_steps must be an integer >= 0"),
        (lambda: optax_sam.ae_sam(lag=2), "lag must be 0 .* or 1 .*got 2"),
        (lambda: optax_sam.ae_looksam(lag=-1), "lag must be 0 .* or 1 .*got -1"),
        (lambda: optax_sam.ae_sam(decay=1), r"decay must be .*\[0.0, 1.0\).*got 1.0"),
        (lambda: optax_sam.ae_looksam(decay=1.0), r"decay must be .*\[0.0, 1.0\)"),
        (lambda: optax_sam.ae_sam(threshold=np.nan), "threshold must be a number"),
        (lambda: optax_sam.ae_sam(threshold="high"), "threshold must be a number"),
        (lambda: optax_sam.ae_sam(threshold=None), "threshold must be a number"),
        (lambda: optax_sam.esam(gamma=0), r"gamma must be .*\(0.0, 1.0\].*got 0.0"),
        (lambda: optax_sam.esam(beta=0), r"beta must be .*\(0.0, 1.0\].*got 0.0"),
        (
            lambda: optax_sam.rho_from_lr(0.1, 0.3, 0.2),
            "rho_max must be at least rho_min = 0.3; got 0.2",
        ),
        (
            lambda: optax_sam.blend.surrogate_gap(minimize="x"),
            """minimize must be "perturbed" or "clean"; got 'x'""",
        ),
    ],
)
def test_combinations_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax_sam.sam(0),
        lambda: optax_sam.sam(np.float32(0.1)),
        lambda: optax_sam.sam(jnp.float32(0.1)),
        lambda: optax_sam.sam(num_ascent_steps=np.int64(2)),
        lambda: optax_sam.asam(eta=0),
        lambda: optax_sam.when.bernoulli(0),
        lambda: optax_sam.when.bernoulli(1),
        lambda: optax_sam.vsam(max_rate=1, reuse_decay=1, max_reuse=0),
        lambda: optax_sam.vsam(warmup_steps=0, max_reuse=None, sensitivity=0),
        lambda: optax_sam.vsam(window=100, max_rate=0.01),
        lambda: optax_sam.gsam(0, alpha=0),
        lambda: optax_sam.gsam(alpha=3),
        lambda: optax_sam.rho_from_lr(0.1, 0, 0),
        lambda: optax_sam.looksam(0, k=1, alpha=0),
        lambda: optax_sam.ae_sam(decay=0, threshold=-np.inf, lag=np.int64(1)),
        lambda: optax_sam.ae_looksam(threshold=np.inf),
        lambda: optax_sam.esam(beta=1, gamma=1),
        lambda: optax_sam.renyi_sam(0, alpha=1e-3),
        lambda: optax_sam.random_sam(0, sigma=0, gradient_weight=0),
        lambda: optax_sam.when.after(0),
    ],
)
def test_the_edges_of_the_ranges_are_allowed(build):
    build()


# Masks.


@every_named
@pytest.mark.parametrize(
    "mask",
    [
        "layer",
        {"layer": 1, "gain": True},
        {"layer": True},
        {"layer": {"kernel": True, "offset": True}, "gain": True},
        {"layer": jnp.array(True), "gain": jnp.array(True)},
        lambda params: jax.tree.map(lambda x: jnp.any(x > 0), params),
    ],
    ids=["name", "number", "too short", "other names", "arrays", "traced"],
)
def test_masks_that_are_none(method, mask):
    params = harness.tree()
    tx = method.build(mask=mask)
    update = lambda g: tx.update(
        g, tx.init(params), params, grad_fn=lambda p: p, ascend=True
    )
    with pytest.raises(ValueError, match="mask must"):
        jax.eval_shape(update, params)


def test_parts_say_what_they_miss():
    g = jnp.ones(2)
    adaptive, steps = optax_sam.ascent.adaptive(0.1), optax_sam.ascent.n_step(0.1, 2)
    with pytest.raises(ValueError, match="needs params"):
        adaptive.update(g, adaptive.init(g))
    with pytest.raises(ValueError, match="needs params and grad_fn"):
        steps.update(g, steps.init(g), g)
    for rule, message in (
        (optax_sam.ascent.weight_scaled(0.1), "weight-scaled ascent needs params"),
        (optax_sam.ascent.trust_ratio(0.1), "layer-wise ascent needs params"),
        (optax_sam.ascent.smoothed(0.1), "smoothed ascent needs params and grad_fn"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.update(g, rule.init(g))
    for rule in (optax_sam.ascent.smoothed(0.1), optax_sam.ascent.random_leaves(0.1)):
        with pytest.raises(ValueError, match=r"random rule needs the step.*count="):
            rule.update(g, rule.init(g), g, grad_fn=lambda p: p)
    schedule = optax_sam.ascent.l2(optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="count="):
        schedule.update(g, schedule.init(g), g)
