"""What callers may hand over, and what is refused with a remedy, while tracing."""

import functools
import re

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import BY_NAME

import optax_sam
from optax_sam import ascent, blend, when

PARAMS = harness.tree(1)
sgd = optax.sgd(0.1)
# The engine alone, with a rule that asks at several points, and inside a method that
# differentiates by itself.
NAMES = ("sam", "gam", "esam")
some_methods = pytest.mark.parametrize(
    "method", [BY_NAME[name] for name in NAMES], ids=NAMES
)


def updated(tx, state, params=PARAMS, **extra):
    grad_fn = extra.pop("grad_fn", lambda p: p)
    return tx.update(params, state, params, grad_fn=grad_fn, **extra)


# Gradients.


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


@some_methods
def test_another_structure(method):
    params = harness.tree()
    less = {"layer": {"kernel": params["layer"]["kernel"]}, "gain": params["gain"]}
    more = {**params, "shift": params["gain"]}
    for message, wrong in (
        (r"missing: \['layer'\]\['bias'\]", less),
        (r"not in the parameters: \['shift'\]", more),
    ):
        refuse(method, f"the gradient at w.*{message}", wrong, params, lambda p: p)
        refuse(method, f"grad_fn returned.*{message}", params, params, lambda p: wrong)  # noqa: B023
    for aux in ((params, {"accuracy": 1.0}), None):
        message = "what grad_fn returned.*has_aux=True"
        refuse(method, message, params, params, lambda p: aux)  # noqa: B023


@some_methods
def test_another_shape_or_kind_of_number(method):
    params = harness.tree()
    wrong = {**params, "layer": {**params["layer"], "bias": jnp.zeros((1, 2))}}
    message = r"at \['layer'\]\['bias'\] has shape \(1, 2\), its parameter has \(2,\)"
    refuse(method, message, wrong, params, lambda p: p)
    refuse(method, message, params, params, lambda p: wrong)
    for dtype in ("complex64", "int32", "bool"):
        wrong = {**params, "gain": params["gain"].astype(dtype)}
        message = rf"at \['gain'\] has dtype {dtype}"
        refuse(method, message, wrong, params, lambda p: p)
        refuse(method, message, params, params, lambda p: wrong)  # noqa: B023
        # Parameters of that kind, whose gradients are alike.
        refuse(method, message, wrong, wrong, lambda p: p)


@some_methods
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


def test_value_and_grad_for_the_incoming_gradient():
    tx = optax_sam.sam(0.1)
    pairs = (
        ((jnp.ones(()), PARAMS), r".*pair \(value, gradients\)"),
        ((PARAMS, 1), ""),
    )
    for pair, message in pairs:
        with pytest.raises(ValueError, match=f"gradient at w{message}") as caught:
            tx.update(pair, tx.init(PARAMS), PARAMS, grad_fn=lambda p: p)
    assert "grad_fn must return" not in str(caught.value)


def test_a_grad_fn_that_is_none():
    tx, alone = optax_sam.sam(0.1), "parameters alone"
    for grad_fn, message in (
        (lambda p, batch: p, rf"{alone}, but it takes \(p, batch\)"),
        (functools.partial(lambda p, x, y: p, x=1), alone),
        (lambda: PARAMS, alone),
        (
            lambda p: (jnp.ones(()), p),
            r"pair \(value, gradients\).*jax\.grad\(loss_fn\)",
        ),
        (lambda p: (p, {"n": 1}), "has_aux=True"),
        (PARAMS, "grad_fn must be a function"),
    ):
        with pytest.raises(ValueError, match=message):
            updated(tx, tx.init(PARAMS), grad_fn=grad_fn)


def test_losses_at_indices():
    x, w = jnp.arange(8.0), jnp.zeros(())
    tx = optax_sam.esam(0.1, beta=1.0, gamma=0.5)
    for losses, message in (
        (lambda w, indices=None: (w - x) ** 2, r"at 3 indices.*\(8,\)"),
        (lambda w: (w - x) ** 2, "must take indices"),
        (
            lambda w, indices=None: (w - x) ** 2 if indices is None else w,
            r"at 3 indices.*\(\)",
        ),
        (
            lambda w, indices=None: (w - (x if indices is None else x[:4])) ** 2,
            r"at 3 indices.*\(4,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(w + 1, tx.init(w), w, per_example_loss_fn=losses)


# A state belongs to the method, the rule and the parameters that it was made for.


@pytest.mark.parametrize("name", [*NAMES, "wsam", "sampa", "mesa", "saf"])
def test_the_state_of_another_optimizer(name):
    tx = BY_NAME[name].build()
    member = tx.init(PARAMS)
    foreign = optax_sam.sam() if not hasattr(member, "when") else optax_sam.mesa()
    others = [sgd, optax.adam(0.1), optax.chain(sgd, sgd), optax.identity(), foreign]
    for other in others:
        with pytest.raises(
            ValueError, match=r"state of another optimizer.*tx\.init\(params\)"
        ):
            updated(tx, other.init(PARAMS))


def test_a_checkpoint_that_was_restored_without_a_target():
    tx = optax_sam.sam(0.1)
    with pytest.raises(ValueError, match=r"dict where it needs.*target=tx\.init"):
        updated(tx, tx.init(PARAMS)._asdict())


_rule = lambda rule: optax_sam.sam(when=rule)
OTHER_SETTINGS = [
    (optax_sam.friendly_sam(), optax_sam.sam(), "ascent it has FriendlyState"),
    (
        optax_sam.gsam(),
        optax_sam.sharpness_aware(ascent.l2(0.1), blend=blend.reuse_normal()),
        "blend it has EmptyState.*makes ReuseNormalState",
    ),
    (
        optax_sam.vsam(window=10),
        optax_sam.vsam(window=20),
        r"when\.psf_norms it has.*\(10,\).*\(20,\)",
    ),
    (
        _rule(when.every_k(2)),
        _rule(when.bernoulli(0.5)),
        "when it has EveryKState.*makes BernoulliState",
    ),
    (
        _rule(when.after(2, when.every_k(2))),
        _rule(when.after(2)),
        r"when\.rule it has EveryKState.*makes AlwaysState",
    ),
]


@pytest.mark.parametrize(("before", "after", "message"), OTHER_SETTINGS)
def test_the_state_of_another_setting(before, after, message):
    run, state = functools.partial(updated, after), before.init(PARAMS)
    for update in (run, functools.partial(jax.eval_shape, run)):
        with pytest.raises(ValueError, match=rf"state\.{message}(?s:.*)_replace\("):
            update(state)


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
def test_a_strange_leaf_among_the_parameters(kind):
    strange = STRANGE[kind]
    params = {"w": jnp.ones(2), "n": strange}
    shape = () if kind in ("text", "function") else jnp.shape(strange)
    g = {"w": jnp.ones(2), "n": jnp.ones(shape)}
    remedy = "imaginary leaf" if kind == "complex" else "eqx.filter"
    for name in NAMES:
        tx = BY_NAME[name].build()
        with pytest.raises(ValueError, match=r"\['n'\]") as caught:
            tx.update(g, tx.init(params), params, grad_fn=lambda q: g)
        assert remedy in str(caught.value)
    g = {"w": jnp.ones(2), "n": jnp.ones(2)}
    for name in ("wsam", "sampa") if kind in ("int", "bool", "function") else ():
        tx = BY_NAME[name].build()
        with pytest.raises(ValueError, match=r"\['n'\]"):
            tx.update(g, tx.init(g), params, grad_fn=lambda q: g)


@pytest.mark.parametrize("name", ["vsam", "gam"])
def test_an_equinox_model_in_place_of_the_parameters(name):
    """Its functions and integers have no gradient and are absent."""
    method, is_float = BY_NAME[name], eqx.is_inexact_array
    model = (eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), jnp.arange(3), "name", None)
    grad_fn = eqx.filter_grad(lambda m: jnp.sum(m[0](jnp.array([1.0, -2.0])) ** 2))
    grads, tx = grad_fn(model), method.build()
    arrays, rest = eqx.partition(model, is_float)
    filtered = lambda p: grad_fn(eqx.combine(p, rest))
    expected, _ = tx.update(
        grads, tx.init(arrays), arrays, grad_fn=filtered, ascend=True
    )
    for start in (arrays, model):
        found, _ = tx.update(grads, tx.init(start), model, grad_fn=grad_fn, ascend=True)
        harness.assert_equal(jax.tree.leaves(found), jax.tree.leaves(expected))
    masked = method.build(
        mask=jax.tree.map(lambda x: is_float(x) and x.ndim == 2, model)
    )
    masked.update(grads, masked.init(model), model, grad_fn=grad_fn, ascend=True)


def test_a_model_whose_gradient_has_another_structure():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    tx = optax_sam.sam(0.1)
    grads = {"layers": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"is_inexact_array"):
        tx.update(grads, tx.init(model), model, grad_fn=lambda m: grads)


# Masks.


def test_masks_that_are_none():
    for mask in (
        "layer",
        {"layer": 1, "gain": True},
        {"layer": True},  # too short
        {"layer": {"kernel": True, "offset": True}, "gain": True},
        {"layer": jnp.array(True), "gain": jnp.array(True)},
        lambda params: jax.tree.map(lambda x: jnp.any(x > 0), params),  # traced
    ):
        for name in NAMES:
            tx = BY_NAME[name].build(mask=mask)
            step = lambda p: updated(tx, tx.init(p), p, ascend=True)  # noqa: B023
            with pytest.raises(ValueError, match="mask must"):
                jax.eval_shape(step, PARAMS)


def test_a_mask_that_leaves_nothing():
    nothing = lambda p: jax.tree.map(lambda x: x.ndim > 7, p)
    for mask in (nothing, nothing(PARAMS)):
        for factory in (optax_sam.sam, optax_sam.random_sam, optax_sam.gam):
            tx = factory(mask=mask)
            with pytest.raises(
                ValueError, match=r"^mask includes none of the 3 leaves"
            ):
                updated(tx, tx.init(PARAMS))
        tx = optax_sam.vsam(norm_mask=mask)
        with pytest.raises(ValueError, match="norm_mask includes none"):
            updated(tx, tx.init(PARAMS), ascend=True)


# Parts.


@pytest.mark.parametrize(
    ("axis", "wrong"),
    [
        *(("ascent", x) for x in (when.every_k(2), blend.take_ascended(), 0.05)),
        ("ascent", ascent.l2),
        *(("when", x) for x in (5, when.every_k, None, ascent.l2(0.1))),
        ("when", blend.take_ascended()),
        *(("blend", x) for x in (5, blend.take_ascended, None, ascent.l2(0.1))),
        ("blend", when.always()),
    ],
    ids=lambda x: re.sub(r" at 0x\w+", "", str(x)),  # the same in all processes
)
def test_a_part_on_the_wrong_axis(axis, wrong):
    example = {"ascent": r"l2\(0.05\)", "when": r"every_k\(5\)"}.get(axis, "take_asc")
    parts = {"ascent": ascent.l2(0.1), axis: wrong}
    with pytest.raises(ValueError, match=rf"own: {axis} must be a .*{example}.*got"):
        optax_sam.sharpness_aware(**parts, name="own")


@pytest.mark.parametrize("wrong", [None, 5, blend.take_ascended(), lambda w, call: w])
def test_a_descent_that_is_none(wrong):
    with pytest.raises(ValueError, match="descent must be an optax_sam.parts.Descent"):
        optax_sam.sharpness_aware(ascent.l2(0.1), descent=wrong)


def test_parts_say_what_they_miss():
    g, grad_fn = jnp.ones(2), {"grad_fn": lambda p: p}
    random = r"random rule needs the step.*count="
    for rule, given, extra, message in (
        (ascent.adaptive(0.1), (), {}, "needs params"),
        (ascent.n_step(0.1, 2), (g,), {}, "needs params and grad_fn"),
        (ascent.weight_scaled(0.1), (), {}, "This ascent needs params: rule"),
        (ascent.trust_ratio(0.1), (), {}, "needs params: rule.update"),
        (ascent.smoothed(0.1), (), {}, "needs params and grad_fn: rule"),
        (ascent.smoothed(0.1), (g,), grad_fn, random),
        (ascent.random_leaves(0.1), (g,), grad_fn, random),
        (ascent.l2(optax.constant_schedule(0.1)), (), {}, "count="),
    ):
        with pytest.raises(ValueError, match=message):
            rule.update(g, rule.init(g), *given, **extra)
