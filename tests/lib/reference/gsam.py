"""GSAM: SAM without the part of the clean gradient that widens the surrogate gap.

J. Zhuang, B. Gong, L. Yuan, Y. Cui, H. Adam, N. C. Dvornek, S. Tatikonda, J. Duncan,
T. Liu: Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022,
arXiv 2203.08065; juntang-zhuang/GSAM, gsam/gsam.py;
google-research/big_vision, big_vision/trainers/proj/gsam/gsam.py.
"""

import numpy as np

from .asam import operator
from .base import add, rejection, times
from .sam import ascend


def weight_scaled(w, g, rho):
    """e = rho |w| g / (||g|| + eps), with |w| once (big_vision)."""
    return times({leaf: np.abs(w[leaf]) for leaf in w}, ascend(w, g, rho))


def adaptive(w, g, rho):
    """e = rho w^2 g / (|| |w| g || + eps), ASAM's on every leaf (juntang-zhuang)."""
    T = operator(w, set(w), eta=0.0)
    return times(T, ascend(w, times(T, g), rho))


def tied_radius(lr, lr_max, lr_min, rho_max, rho_min):
    """rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)."""
    if lr_max == lr_min:
        return rho_max
    return rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)


def gsam(w, grad, rho, alpha, minimize="perturbed", ascend=ascend):
    """d from g = grad(w) and g_p = grad(w + e).

    minimize="perturbed":  d = g_p - alpha (g - <g, g_p> / ||g_p||^2 g_p)
    minimize="clean":      d = g + alpha (g_p - <g_p, g> / ||g||^2 g)
    """
    g = grad(w)
    g_p = grad(add(w, ascend(w, g, rho)))
    if minimize == "clean":
        return add(g, rejection(g_p, g), alpha)
    return add(g_p, rejection(g, g_p), -alpha)
