"""StableSAM: the ascended gradient at the length of the plain one.

C. Tan, J. Zhang, J. Liu, Y. Wang, Y. Hao: Stabilizing Sharpness-aware Minimization
Through A Simple Renormalization Strategy, 2024, arXiv 2401.07250. No code was read.
"""

from .base import norm, scaled, unit
from .sam import sam


def renormalized(d, g):
    """(||g|| / ||d||) d, and 0 where d = 0."""
    return scaled(unit(d, 0.0), norm(g))


def stable_sam(w, grad, rho):
    """d = (||g|| / ||g_s||) g_s with the g_s of SAM."""
    return renormalized(sam(w, grad, rho), grad(w))
