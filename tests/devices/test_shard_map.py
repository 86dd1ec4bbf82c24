"""Perturbations of each device under ``shard_map``: what JAX's types and programs show.

That replicas stay one, and are m-sharpness, is in ``test_replicas.py``.
"""

import functools
import re

import harness
import jax
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import METHODS, each

import optax_sam

DEVICES = 8
PROBLEM = problems.mlp((8, 16, 4), batch_size=64)
PARAMS, BATCH = PROBLEM.params(), PROBLEM.batch(0)
VSAM = functools.partial(optax_sam.vsam, 0.1, window=10, num_slices=5)
of_device = functools.partial(jax.lax.pcast, axis_name="data", to="varying")


def mapped(function, results=(), **options):
    """Of parameters, a state and a batch; the results are the same on all devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(*results)}
    return jax.shard_map(function, mesh=mesh, **specs, **options)


def update(tx, params, state, batch, at=of_device, spoil=lambda g: g, ascend=None):
    """An update by each device's gradients, the first one ``at`` its parameters."""
    gradient = lambda p: jax.grad(PROBLEM.loss_fn)(p, batch)
    grad_fn = lambda p: spoil(gradient(p))
    return tx.update(
        gradient(at(params)), state, params, grad_fn=grad_fn, ascend=ascend
    )


def kernels(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


@each(
    *(m for m in METHODS if "axis_name" in m.static and not m.variant),
    # What is kept of gradients: by a rule and a blend, by a rule, by an ascent.
    slow=lambda m: m.name not in ("vsam", "ae_sam", "friendly_sam", "random_sam"),
)
def test_nothing_that_stays_varies_over_devices(method):
    """By JAX's types, for which ``out_specs=P()`` is a proof: nothing is run.

    With the parameters themselves for ``update``, so that their decay is not one of a
    device, and with leaves that are not perturbed.
    """
    member = method.build(axis_name="data", mask=kernels)
    tx = optax.chain(member, optax.add_decayed_weights(0.1))
    state = jax.eval_shape(tx.init, PARAMS)
    for ascend in (None, True, False):
        emitted = mapped(functools.partial(update, tx, ascend=ascend))
        d, after = jax.eval_shape(emitted, PARAMS, state, BATCH)
        assert harness.kinds(d) == harness.kinds(PARAMS)
        assert harness.kinds(after) == harness.kinds(state)


def test_one_bad_device_rejects_the_ascent_for_all():
    tx = optax_sam.sam(0.1, axis_name="data")

    def emitted(params, state, batch):
        # Only device 3 has a second gradient that is not finite.
        bad = jax.numpy.where(jax.lax.axis_index("data") == 3, np.nan, 1.0)
        spoil = lambda g: optax.tree.scale(bad, g)
        g = jax.grad(PROBLEM.loss_fn)(of_device(params), batch)
        return update(tx, params, state, batch, spoil=spoil), jax.lax.pmean(g, "data")

    (d, state), g = jax.jit(mapped(emitted))(PARAMS, tx.init(PARAMS), BATCH)
    assert int(state.num_rejected) == 1
    harness.assert_equal(d, g)


def test_a_gradient_summed_already_is_refused():
    tx = optax_sam.sam(0.1, axis_name="data")
    emitted = mapped(functools.partial(update, tx, at=lambda params: params))
    with pytest.raises(ValueError, match=re.escape("pcast(params, 'data', to=\"var")):
        jax.eval_shape(emitted, PARAMS, tx.init(PARAMS), BATCH)


def test_perturbed_weights_belong_to_a_device_whatever_perturbs_them():
    """Also constants: at weights that do not vary JAX would sum the gradient."""
    nothing = lambda g, state, params=None, **extra: (
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), g),
        state,
    )
    ascent = optax.GradientTransformationExtraArgs(optax.init_empty_state, nothing)
    tx = optax_sam.sharpness_aware(ascent, axis_name="data")
    emitted = jax.jit(mapped(functools.partial(update, tx)))
    d, _ = emitted(PARAMS, tx.init(PARAMS), BATCH)
    harness.assert_close_in_size(d, jax.grad(PROBLEM.loss_fn)(PARAMS, BATCH), 1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_state_of_an_optax_ascent_is_the_mean_over_devices(check_vma):
    """Optax's transformations know no axis: each device would keep another state."""
    rule = optax.chain(optax.scale_by_rms(decay=0.9), optax_sam.ascent.l2(0.1))
    tx = optax_sam.sharpness_aware(rule, axis_name="data")
    at = of_device if check_vma else lambda params: params

    def squares(params, state, batch):
        _, after = update(tx, params, state, batch, at=at)
        g = jax.grad(PROBLEM.loss_fn)(at(params), batch)
        expected = jax.lax.pmean(jax.tree.map(lambda x: 0.1 * x**2, g), "data")
        pair = after.ascent[0].nu, expected
        if check_vma:  # JAX has proved that they are the same on all devices
            return pair
        return jax.tree.map(lambda x: x[None], pair)

    results = () if check_vma else ("data",)
    found = mapped(squares, results, check_vma=check_vma)
    nu, expected = jax.jit(found)(PARAMS, tx.init(PARAMS), BATCH)
    harness.assert_close_in_size(nu, expected, 1e-6)


def all_reduced_elements(compiled):
    """Numbers sent through all-reduces of a compiled program."""
    total = 0
    for line in compiled.as_text().splitlines():
        if match := re.search(r"= (.*?) all-reduce(?:-start)?\(", line):
            for shape in re.findall(r"\[([\d,]*)\]", match[1]):
                total += int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


# m-sharpness averages what is emitted, once, and a cached tree once more.
@pytest.mark.parametrize(
    ("member", "ascend", "trees"),
    [
        (functools.partial(optax_sam.sam, 0.1), True, 1),
        (functools.partial(optax_sam.sam, 0.1), False, 1),
        (VSAM, True, 2),
        (VSAM, False, 1),
    ],
)
def test_communication_is_one_reduction_per_gradient(member, ascend, trees):
    tx = optax.chain(member(axis_name="data"), optax.sgd(0.05))
    step = jax.jit(mapped(functools.partial(update, tx, ascend=ascend)))
    sent = all_reduced_elements(step.lower(PARAMS, tx.init(PARAMS), BATCH).compile())
    size, scalars = sum(x.size for x in jax.tree.leaves(PARAMS)), 20
    assert trees * size <= sent <= trees * size + scalars
