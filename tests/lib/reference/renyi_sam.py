"""Renyi RSAM: a step along the gradient that adds a Renyi entropy to the loss.

Zhang, Sun, Zhang, Liu: Renyi Sharpness, 2025, arXiv 2510.07758;
QiaozheZhang/RSAM, utils/sam.py (class NEWRSAM; RSAM sums over tensors).
"""

import numpy as np

from .base import add, norm


def elementwise(g, a):
    """sum_j |g_j|^(2a)."""
    return sum(np.sum(np.abs(g[leaf]) ** (2 * a)) for leaf in g)


def layerwise(g, a):
    """sum_l ||g_l||^(2a)."""
    return sum(norm(g, [leaf]) ** (2 * a) for leaf in g)


def renyi_sam(w, grad, rho, a, power_sum=elementwise, eps=1e-16):
    """S = (sum_j |g_j|^(2a) + eps) / n^a,  n = ||g||^2 + eps.

    e = -sign(1 - a) rho (S / n) g,  d = grad(w + e): to first order the loss at w + e
    is L(w) - sign(1 - a) rho S.
    """
    g = grad(w)
    n = norm(g) ** 2 + eps
    S = (power_sum(g, a) + eps) / n**a
    return grad(add(w, g, -np.sign(1.0 - a) * rho * S / n))
