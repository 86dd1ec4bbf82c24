"""Measures of a loss without a forward derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import sharpness


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
