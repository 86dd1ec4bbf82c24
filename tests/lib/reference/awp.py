"""AWP: each matrix is perturbed by a share of its norm.

D. Wu, S.-T. Xia, Y. Wang: Adversarial Weight Perturbation Helps Robust Generalization,
NeurIPS 2020, arXiv 2004.05884; csdongxian/AWP, AT_AWP/utils_awp.py.
"""

import numpy as np

from .base import add


def awp(w, grad, gamma):
    """d = grad(w + e),  e = gamma ||W|| G / ||G|| of matrices, 0 of other leaves."""
    norm = np.linalg.norm
    perturb = lambda W, G: gamma * norm(W) / norm(G) * G if W.ndim > 1 else 0.0 * W
    g = grad(w)
    return grad(add(w, {leaf: perturb(w[leaf], g[leaf]) for leaf in w}))
