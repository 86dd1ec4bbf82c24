"""SAM-ON: SAM or ASAM that moves the normalization layers only.

M. Mueller, T. Vlaar, D. Rolnick, M. Hein: Normalization Layers Are All That
Sharpness-Aware Minimization Needs, NeurIPS 2023, arXiv 2306.04226;
mueller-mp/SAM-ON, sam_on.py.
"""

from .asam import operator
from .base import add, only, scaled, times, unit


def perturbation(w, g, rho, N, adapted=(), eta=0.01, eps=1e-12):
    """e = rho T^2 g_N / (||T g_N|| + eps): on the leaves N, and 0 on the others.

    T = |w| + eta on the adapted leaves, 1 on the others; the norm is that of N alone.
    """
    T = operator(w, adapted, eta)
    return times(T, scaled(unit(times(T, only(g, N)), eps), rho))


def sam_on(w, grad, rho, N, adapted=(), eta=0.01):
    """d = grad(w + e), of all leaves."""
    return grad(add(w, perturbation(w, grad(w), rho, N, adapted, eta)))
