"""Fisher SAM: SAM in a ball that the diagonal Fisher information measures.

M. Kim, D. Li, S. X. Hu, T. Hospedales: Fisher SAM: Information Geometry and Sharpness
Aware Minimisation, ICML 2022, arXiv 2206.04920. The authors published no code;
johnjaejunlee95/torch-unified-SAM-optimization, src/sam_optim/FisherSAM.py;
QiaozheZhang/RSAM, utils/sam.py. Both take the squared gradient of the batch for F.
"""

import numpy as np

from .base import add, dot, scaled, times


def metric(g, eta):
    """F = 1 + eta g^2, the diagonal."""
    return {leaf: 1.0 + eta * g[leaf] ** 2 for leaf in g}


def perturbation(g, rho, eta=1.0, eps=1e-12):
    """e = rho F^-1 g / (sqrt(<g, F^-1 g>) + eps); then sqrt(<e, F e>) = rho."""
    F_inverse = {leaf: 1.0 / f for leaf, f in metric(g, eta).items()}
    F_inverse_g = times(F_inverse, g)
    return scaled(F_inverse_g, rho / (np.sqrt(dot(g, F_inverse_g)) + eps))


def fisher_sam(w, grad, rho, eta=1.0):
    """d = grad(w + e)."""
    return grad(add(w, perturbation(grad(w), rho, eta)))
