"""ASAM: SAM in a space rescaled by the size of the weights.

J. Kwon, J. Kim, H. Park, I. K. Choi: ASAM: Adaptive Sharpness-Aware Minimization for
Scale-Invariant Learning of Deep Neural Networks, ICML 2021, arXiv 2102.11600;
SamsungLabs/ASAM, asam.py. With every leaf adapted and eta = 0 it is the other
published flavour: davda54/sam, sam.py.
"""

import numpy as np

from .base import add, scaled, times, unit


def operator(w, adapted, eta):
    """T = |w| + eta on the adapted leaves, 1 on the others."""
    return {
        leaf: np.abs(w[leaf]) + eta if leaf in adapted else np.ones_like(w[leaf])
        for leaf in w
    }


def asam(w, grad, rho, adapted, eta=0.01, eps=1e-12):
    """e = rho T^2 g / (||T g|| + eps),  d = grad(w + e);  ||e / T|| = rho."""
    T = operator(w, adapted, eta)
    e = times(T, scaled(unit(times(T, grad(w)), eps), rho))
    return grad(add(w, e))
