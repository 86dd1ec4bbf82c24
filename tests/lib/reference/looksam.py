"""LookSAM and Look-LayerSAM: a SAM step every k steps, one part of it kept in between.

Y. Liu, S. Mai, X. Chen, C.-J. Hsieh, Y. You: Towards Efficient and Scalable
Sharpness-Aware Minimization, CVPR 2022, arXiv 2203.02714. The authors published no
code; MarlonBecker/MSAM, optimizer/looksam.py. All norms are over all leaves together.
"""

from .base import add, norm, rejection, unit
from .sam import ascend


def layerwise(w, g, rho):
    """Look-LayerSAM: e_l = rho (||w_l|| / ||g_l||) g_l; ratio 1 where a norm is 0."""
    e = {}
    for leaf in w:
        w_norm, g_norm = norm(w, [leaf]), norm(g, [leaf])
        ratio = w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
        e[leaf] = rho * ratio * g[leaf]
    return e


def reuse(g, g_v, alpha):
    """g + alpha (||g|| / ||g_v||) g_v, and g where g_v = 0 or before there is one."""
    return g if g_v is None else add(g, unit(g_v, 0.0), alpha * norm(g))


class LookSAM:
    """direction(t, w, grad): d = g_s where t mod k = 0, else the reuse of g_v.

    g_s = grad(w + e),  g_v = g_s - (<g, g_s> / ||g||^2) g, where the recorded code
    divides by ||g||^2 + 1e-12.
    """

    def __init__(self, rho=0.1, alpha=0.3, k=5, ascend=ascend):
        self.rho, self.alpha, self.k, self.ascend = rho, alpha, k, ascend
        self.g_v = None

    def direction(self, t, w, grad):
        """Whichever of the two the step calls for."""
        g = grad(w)
        if t % self.k:
            return reuse(g, self.g_v, self.alpha)
        g_s = grad(add(w, self.ascend(w, g, self.rho)))
        self.g_v = rejection(g_s, g)
        return g_s
