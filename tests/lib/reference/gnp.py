"""GNP: a penalty on the gradient's norm; G-RST: GNP on random steps.

Y. Zhao, H. Zhang, X. Hu: Penalizing Gradient Norm for Efficiently Improving
Generalization in Deep Learning, ICML 2022, arXiv 2202.03599; zhaoyang-0204/gnp,
training/training_core.py. G-RST: the same authors' SS-SAM / Randomized Sharpness-Aware
Training, arXiv 2203.09962.
"""

from .base import add, scaled, unit
from .sam import ascend


def gnp(w, grad, r, alpha, unit_gradient=False):
    """d = (1 - alpha) g + alpha grad(w + r g / ||g||), alpha = lambda / r.

    To first order in r it is the gradient of L + lambda ||grad L||. With unit_gradient,
    the default of the authors' configuration, g / ||g|| stands for the first g.
    """
    g = grad(w)
    g_s = grad(add(w, ascend(w, g, r)))
    clean = unit(g, 0.0) if unit_gradient else g
    return add(scaled(clean, 1.0 - alpha), g_s, alpha)


def g_rst(u, w, grad, r, gamma, p):
    """GNP with alpha = gamma where the uniform draw u of the step is below p, else g.

    gamma = 1 is RST. For gamma p = 1 the mean over u is the gradient of SAM.
    """
    return gnp(w, grad, r, gamma) if u < p else grad(w)
