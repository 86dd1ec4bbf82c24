"""VaSSO: the ascent follows an average of the gradients.

B. Li, G. B. Giannakis: Enhancing Sharpness-Aware Optimization Through Variance
Suppression, NeurIPS 2023, arXiv 2309.15639; BingcongLi/VaSSO, solver/vasso.py.
"""

from .base import add, scaled
from .sam import ascend


class VaSSO:
    """direction(w, grad), from m = g in the first step.

    m <- (1 - theta) m + theta g,  d = grad(w + rho m / (||m|| + 1e-7))
    """

    def __init__(self, rho, theta=0.9):
        self.rho, self.theta, self.m = rho, theta, None

    def direction(self, w, grad):
        g = grad(w)
        before = g if self.m is None else self.m
        self.m = add(scaled(before, 1.0 - self.theta), g, self.theta)
        return grad(add(w, ascend(w, self.m, self.rho, 1e-7)))
