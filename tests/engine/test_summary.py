"""The price before training: that of the registry, of real states, in all forms."""

import functools
import inspect

import harness
import jax
import jax.numpy as jnp
import optax
import pytest
from registry import METHODS, every_one

import optax_sam


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def real(method):
    """Its own function, without what the tests wrap around it."""
    factory = inspect.unwrap(method.factory)
    settings = dict(method.settings)
    if method.place == "around":
        settings["inner"] = optax.sgd(0.1, momentum=0.9)
    return factory(**settings)


@every_one
def test_every_method(method):
    tx, params = real(method), harness.tree()
    price = optax_sam.summary(tx, params)
    by_example = method.needs == "per_example_loss_fn"
    # Of 128 examples the second gradient sees 63.
    calls = 63 / 128 if by_example else method.calls
    assert price.gradients == method.uses_incoming + calls
    assert price.gradients_when_skipped == (1 if method.skips else None)
    assert price.forward_passes == (by_example or method.name == "mesa")

    state = tx.init(params)
    inner = size(optax.sgd(0.1, momentum=0.9).init(params))
    assert price.parameter_bytes == size(params)
    assert price.optimizer_bytes == (inner if method.place == "around" else 0)
    assert price.state_bytes == size(state) - price.optimizer_bytes
    if method.name != "saf":  # its table is as large as the data set
        small = price.state_bytes - method.trees * size(params)
        assert 0 < small < method.small_bytes


@every_one
def test_what_it_needs_is_what_it_takes(method):
    """Without any of the arguments it refuses, naming it; the others are not asked."""
    tx, params = real(method), harness.tree()
    needs = optax_sam.summary(tx, params).needs
    assert (method.needs in needs) == bool(method.calls)
    row = functools.partial(tx.update, params, tx.init(params), params)
    given = {
        "grad_fn": lambda p: p,
        "previous_grad_fn": lambda p: p,
        "per_example_loss_fn": lambda p, i=None: (
            p["gain"] * jnp.ones(8 if i is None else len(i))
        ),
        "logits": jnp.zeros((2, 2)),
        "indices": jnp.arange(2),
    }
    given = {name: given[name] for name in needs}
    row(**given)
    title = method.factory.__name__
    title = title if hasattr(optax_sam, title) else "sharpness_aware"
    for name in needs:
        with pytest.raises(ValueError, match=rf"{title} needs {name}\b"):
            row(**{other: x for other, x in given.items() if other != name})
    if method in METHODS:
        with pytest.raises(
            ValueError, match=rf"{title} needs the parameters.*tx\.update"
        ):
            tx.update(params, tx.init(params), **given)


def test_one_price_in_all_forms():
    params = harness.tree()
    forms = (
        "looksam",
        optax_sam.looksam,
        functools.partial(optax_sam.looksam, k=3),
        functools.partial(optax_sam.looksam, 0.1),
        optax_sam.looksam(),
        optax.chain(optax_sam.looksam(), optax.sgd(0.1)),
    )
    prices = {optax_sam.summary(form, params) for form in forms}
    assert len(prices) == 1


@pytest.mark.parametrize(
    ("tx", "gradients", "skipped"),
    [
        (optax.adam(1e-3), 1, None),
        # Beyond eight steps they are a loop in the program.
        (optax_sam.sam(num_ascent_steps=12), 13, None),
        (optax_sam.sam(when=optax_sam.when.after(5)), 2, 1),
        (optax_sam.esam(gamma=1.0), 2, None),
        (optax_sam.random_sam(), 2, None),
        # The guard looks at the incoming gradient, which R-SAM alone does not.
        (optax.apply_if_finite(optax_sam.random_sam(), 3), 3, None),
        # On every micro-step.
        (optax.MultiSteps(optax.chain(optax_sam.sam(), optax.sgd(0.1)), 4), 2, None),
        (
            optax.inject_hyperparams(
                optax_sam.vsam, static_args=optax_sam.static_args(optax_sam.vsam)
            )(rho=0.1),
            2,
            1,
        ),
        (optax.chain(optax_sam.sam(), optax_sam.gam(), optax.sgd(0.1)), 5, None),
    ],
    ids=[
        *("adam", "12 steps", "after", "esam", "random_sam"),
        *("guarded", "micro-steps", "injected", "two members"),
    ],
)
def test_whole_optimizers(tx, gradients, skipped):
    price = optax_sam.summary(tx, harness.tree())
    assert price[:2] == (gradients, skipped)


def test_further_extra_arguments():
    plateau = optax.contrib.reduce_on_plateau()
    tx = optax.chain(optax_sam.sam(), optax.sgd(0.1), plateau)
    assert optax_sam.summary(tx, harness.tree(), value=0.0).gradients == 2


def test_nothing_is_allocated():
    """Four terabytes of parameters."""
    params = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    tx = optax.chain(optax_sam.vsam(), optax.adam(1e-3))
    price = optax_sam.summary(tx, params)
    assert price.parameter_bytes == 4 * 10**12
    assert price.optimizer_bytes == 8 * 10**12 + 4
    lines = str(price).splitlines()
    assert "8,000,000,000,004 bytes, 2.00 x the parameters" in lines[4]
    assert lines[-1].split() == ["update", "needs", "grad_fn"]
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("vsm", "no method called 'vsm'; write one of .*vsam"),
        ("metrics", "no method called 'metrics'"),
        (optax_sam.saf, r"saf has no default for num_examples, num_classes.*saf\(50"),
        (None, r"optimizer, such as optax\.chain.*got None"),
        (optax_sam.sam(axis_name="i"), "found an axis_name.*without axis_name"),
        (
            optax_sam.micro_sharpness(optax_sam.sam(axis_name="shards"), 4),
            "found micro_sharpness.*without axis_name",
        ),
    ],
    ids=["name", "no method", "arguments", "nothing", "axis", "shards"],
)
def test_what_has_no_price(method, advice):
    with pytest.raises(ValueError, match=advice):
        optax_sam.summary(method, harness.tree())


def test_what_was_dropped_is_said():
    """A chain hands nothing on to what, by its type, takes no extra arguments."""
    steps = optax.MultiSteps(optax.chain(optax_sam.sam(), optax.sgd(0.1)), 4)
    tx = optax.chain(optax.identity(), steps.gradient_transformation())
    with pytest.raises(ValueError, match="dropped it"):
        optax_sam.summary(tx, harness.tree())
