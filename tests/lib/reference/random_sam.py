"""R-SAM: the ascent follows the gradient at randomly moved weights, and the move.

Y. Liu, S. Mai, M. Cheng, X. Chen, C.-J. Hsieh, Y. You: Random Sharpness-Aware
Minimization, NeurIPS 2022; RSAM-Optimizer/R-SAM, vit_jax/train.py. The radius may
follow the learning rate as in GSAM.
"""

import numpy as np

from .base import add, scaled, unit


def sigma(t, total_steps, sigma0=5e-4, growth=5.0):
    """From sigma0 to growth sigma0 along half a cosine; the authors' t starts at 1."""
    rise = (1.0 - np.cos(np.pi * t / total_steps)) / 2.0
    return sigma0 * (1.0 + (growth - 1.0) * rise)


def noise(w, normal, sigma):
    """Delta[..., u] = sigma ||W[..., u]|| N(0, 1) for every output unit u.

    A leaf of at most one dimension is a unit: Delta = sigma (||b|| + 1e-16) N(0, 1).
    """
    delta = {}
    for leaf, W in w.items():
        if W.ndim >= 2:
            scale = np.sqrt(np.sum(W**2, axis=tuple(range(W.ndim - 1))))
        else:
            scale = np.sqrt(np.sum(W**2)) + 1e-16
        delta[leaf] = sigma * scale * normal[leaf]
    return delta


def perturbation(w, grad, delta, rho, lam=2.0):
    """g1 = grad(w + Delta),  d1 = lam g1 + Delta,  e = rho d1 / (||d1|| + eps)."""
    g1 = grad(add(w, delta))
    return scaled(unit(add(delta, g1, lam)), rho)


def random_sam(w, grad, delta, rho, lam=2.0):
    """d = grad(w + e), around w and not around w + Delta."""
    return grad(add(w, perturbation(w, grad, delta, rho, lam)))
