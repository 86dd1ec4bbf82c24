"""LE-SAM: the loss may rise by sigma along the gradient, within a largest radius.

J. Wang, Q. Liu, Z. Xie, Z. Gao: Fix the Loss, Not the Radius: Rethinking the
Adversarial Perturbation of Sharpness-Aware Minimization, ICML 2026, arXiv 2605.10183.
No code was read.
"""

from .base import norm
from .sam import sam


def le_sam(w, grad, sigma, max_rho):
    """d = grad(w + e) of SAM with rho = min(sigma / ||g||, max_rho)."""
    return sam(w, grad, min(sigma / norm(grad(w)), max_rho))
