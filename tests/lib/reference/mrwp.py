"""mRWP: a mean of the gradient here and of one at randomly perturbed weights.

T. Li, W. Yan, Z. Lei, Y. Wu, K. Fang, M. Yang, X. Huang: Efficient Generalization
Improvement Guided by Random Weight Perturbation, 2022, arXiv 2211.11489; nblt/RWP,
train_rwp_parallel.py.
"""

from .base import add, scaled
from .random_sam import noise


def mrwp(w, grad, normal, gamma, alpha, second=None):
    """d = (1 - alpha) grad(w) + alpha second(w + e), on a second batch or the same.

    e is R-SAM's noise, gamma ||W[..., u]|| N(0, 1) for every output unit u.
    """
    g = grad(w)
    g_s = (second or grad)(add(w, noise(w, normal, gamma)))
    return add(scaled(g, 1.0 - alpha), g_s, alpha)
