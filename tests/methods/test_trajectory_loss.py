"""The loss of SAF and MESA: how far the outputs are from past ones."""

import functools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
from reference import trajectory
from trajectory_runs import rows

import optax_sam

loss = jax.jit(optax_sam.trajectory_loss)
loss_and_gradient = jax.jit(jax.value_and_grad(optax_sam.trajectory_loss))


@pytest.mark.parametrize("name", ["loss_saf", "loss_mesa"])
@pytest.mark.parametrize("case", range(4))
def test_loss_of_the_authors(name, case, x64):
    h = recorded.RUNS[name]["cases"][case]
    wanted = {
        key.removeprefix(f"case{case}/"): value
        for key, value in recorded.arrays(name).items()
        if key.startswith(f"case{case}/")
    }

    def term(z, past, coefficient=1.0):
        settings = {"temperature": h["temperature"], "coefficient": coefficient}
        return optax_sam.trajectory_loss(z, past, **settings)

    def total(z, past):
        picked = jax.nn.log_softmax(z)[jnp.arange(h["B"]), wanted["labels"]]
        return term(z, past, h["coefficient"]) - jnp.mean(picked)

    of_both = functools.partial(jax.value_and_grad, argnums=(0, 1))
    both = jax.jit(lambda *args: [of_both(f)(*args) for f in (term, total)])
    found = both(*(jnp.asarray(wanted[key]) for key in ("logits", "old_logits")))
    names = ("kl_loss", "grad_kl"), ("total", "grad_total")
    for (value, (gradient, of_past)), name in zip(found, names, strict=True):
        np.testing.assert_allclose(value, wanted[name[0]], rtol=0, atol=1e-12)
        np.testing.assert_allclose(gradient, wanted[name[1]], rtol=0, atol=1e-12)
        for ours, key in zip((value, gradient), name, strict=True):
            conformance.hold("AngusDujw/SAF", ours, wanted[key])
        assert not np.any(of_past)  # nothing flows into the past


def test_identities_of_the_loss(x64):
    z, past, known = rows(0, 6), rows(1, 6), np.arange(6) % 3 > 0
    wanted = 0.3 * trajectory.trajectory(z, past, 5.0)[0]  # the defaults
    # A constant added to all logits of an example is not seen.
    shift = rows(2, 6)[:, :1]
    for pair in ((z, past), (z + shift, past), (z, past + shift)):
        assert loss(*pair) == pytest.approx(wanted, rel=1e-12)
    # Leading axes are one mean.
    stacked = [x.reshape(2, 3, 3) for x in (z, past)]
    found = loss(*stacked, where=known.reshape(2, 3))
    assert found == pytest.approx(float(loss(z, past, where=known)), rel=1e-14)
    # Equal logits have no loss and no gradient.
    value, gradient = loss_and_gradient(z, z)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_loss_at_high_temperature(x64):
    z, past = rows(0, 4), rows(1, 4)
    centred = lambda x: x - x.mean(axis=1, keepdims=True)
    limit = np.mean(np.sum((centred(z) - centred(past)) ** 2, axis=1)) / 6
    term = functools.partial(optax_sam.trajectory_loss, z, past, coefficient=1.0)
    error = lambda tau: abs(float(term(temperature=tau)) - limit)
    assert error(1e3) < 1e-3 * limit
    # The next term of the expansion falls with the temperature.
    assert error(1e3) == pytest.approx(error(1e2) / 10, rel=0.1)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_an_example_without_a_past_contributes_zero(garbage, x64):
    z, past = jnp.asarray(rows(0, 4)), jnp.asarray(rows(1, 4))
    known = jnp.array([True, False, True, False])
    wanted = loss_and_gradient(z[::2], past[::2])
    past = jnp.where(known[:, None], past, garbage)
    for logits in (z, jnp.where(known[:, None], z, garbage)):
        value, gradient = loss_and_gradient(logits, past, where=known)
        # The mean is over all four.
        np.testing.assert_allclose(value, wanted[0] / 2, rtol=1e-14)
        np.testing.assert_allclose(gradient[::2], wanted[1] / 2, rtol=1e-14)
        assert not np.any(gradient[1::2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loss_is_computed_in_float32(dtype):
    z, past = jnp.asarray(rows(0), dtype), jnp.asarray(rows(1), dtype)
    value, gradient = loss_and_gradient(z, past)
    wide = loss_and_gradient(*(x.astype("float32") for x in (z, past)))[0]
    assert value.dtype == jnp.float32
    assert value == wide
    assert gradient.dtype == z.dtype


def test_traced_settings_of_the_loss():
    z, past = rows(0), rows(1)
    found = jax.jit(
        lambda step, tau: optax_sam.trajectory_loss(
            z, past, coefficient=jnp.where(step > 3, 0.8, 0.0), temperature=tau
        )
    )
    assert found(3, 5.0) == 0
    wanted = optax_sam.trajectory_loss(z, past, coefficient=0.8, temperature=2.0)
    assert found(4, 2.0) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("message", "past", "options"),
    [
        (r"logits \(2, 3\) and past_logits \(3, 3\).*saf_past_logits", rows(1, 3), {}),
        (r"where must.*\(2,\).*got bool \(2, 1\)", rows(1), {"where": [[True]] * 2}),
        (r"coefficient must be.*-0\.1", rows(1), {"coefficient": -0.1}),
        (r"temperature must be.*\(0\.0, inf\); got 0", rows(1), {"temperature": 0}),
    ],
)
def test_refused_by_the_loss(message, past, options):
    with pytest.raises(ValueError, match=message):
        optax_sam.trajectory_loss(rows(0), past, **options)
