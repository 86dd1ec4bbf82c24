"""The measures of gallery.py, each in one compiled program."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from gallery_training import cross_entropy, loss_fn, model_fn

from optax_sam import sharpness


# Parameters and data are arguments: closed over, they would be compiled in.
@jax.jit
def top_eigenpair(params: Any, data: Any, init: Any) -> tuple[jax.Array, Any]:
    """The largest eigenvalue; from the last eigenvector, few products find it."""
    options: Any = dict(num_matvecs=10, init=init)
    found = sharpness.hessian_eigenvalues(loss_fn, params, data, 0, **options)
    return found.eigenvalues[0], jax.tree.map(lambda v: v[0], found.eigenvectors)


@jax.jit
def plane(params: Any, data: Any, pair: Any, alphas: Any, betas: Any) -> jax.Array:
    """The loss on the plane of two directions."""
    return sharpness.loss_surface(loss_fn, params, data, pair, alphas, betas)


def surface(params: Any, data: Any, pair: Any, rows: Any, betas: Any) -> np.ndarray:
    """The same, row by row in one compiled program, so that a progress bar can move."""
    return np.stack([plane(params, data, pair, a[None], betas)[0] for a in rows])


@jax.jit
def along_eigenvectors(params: Any, data: Any, alphas: Any) -> sharpness.EigenLines:
    """The loss along the eigenvectors of the three largest eigenvalues."""
    top = sharpness.hessian_eigenvalues(loss_fn, params, data, 0, k=3)
    return sharpness.loss_along_eigenvectors(loss_fn, params, data, top, alphas)


@jax.jit
def spectra(params: Any, data: Any) -> dict[str, sharpness.SpectralDensity]:
    """The densities of the eigenvalues of two matrices, smoothed alike."""
    options: Any = dict(num_lanczos=60, num_probes=4, sigma=0.05)
    matrices = {
        "Hessian": sharpness.hessian(loss_fn, params, data),
        "GGN": sharpness.ggn(model_fn, cross_entropy, params, data),
    }
    return {
        name: sharpness.spectral_density(matrix, 0, **options)
        for name, matrix in matrices.items()
    }
