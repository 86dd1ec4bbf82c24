"""F-SAM: the ascent follows what the average of the gradients leaves of one of them.

T. Li, P. Zhou, Z. He, X. Cheng, X. Huang: Friendly Sharpness-Aware Minimization, CVPR
2024, arXiv 2403.12350; nblt/F-SAM, utils.py.
"""

from .base import add, scaled
from .sam import ascend


class FriendlySAM:
    """direction(w, grad), from m = g and a = g in the first step.

    order="code":   a = g - sigma m,  then m <- lam m + (1 - lam) g
    order="paper":  m <- lam m + (1 - lam) g,  then a = g - sigma m

    and d = grad(w + rho a / ||a||) with either.
    """

    def __init__(self, rho=0.2, sigma=1.0, lam=0.6, order="code"):
        self.rho, self.sigma, self.lam, self.order = rho, sigma, lam, order
        self.m = None

    def noise(self, g):
        """The a of a step, which moves m."""
        if self.m is None:
            self.m = g
            return g
        before, self.m = self.m, add(scaled(self.m, self.lam), g, 1.0 - self.lam)
        return add(g, before if self.order == "code" else self.m, -self.sigma)

    def direction(self, w, grad):
        """The gradient at w + e."""
        return grad(add(w, ascend(w, self.noise(grad(w)), self.rho)))
