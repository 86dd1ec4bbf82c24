"""GCSAM: the ascent follows the gradient without the mean of each output unit.

M. Hassan, A. Vakanski, B. Zhang, M. Xian: GCSAM: Gradient Centralized Sharpness Aware
Minimization, 2025, arXiv 2501.11584; Mohamed-Hassan22/GCSAM,
cifar10_gcsam_resnet50.py.
"""

import numpy as np

from .base import add, norm, scaled


def centralized(g):
    """g[..., u] - mean(g[..., u]) for every output unit u of a leaf of two axes."""
    less = lambda x: x - np.mean(x, axis=0) if x.ndim == 2 else x
    return {leaf: less(x) for leaf, x in g.items()}


def gcsam(w, grad, rho):
    """d = grad(w + rho GC(g) / ||g||)."""
    g = grad(w)
    return grad(add(w, scaled(centralized(g), rho / (norm(g) + 1e-12))))
