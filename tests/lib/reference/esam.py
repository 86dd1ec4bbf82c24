"""ESAM: SAM that perturbs some of the tensors and descends on some of the examples.

J. Du, H. Yan, J. Feng, J. T. Zhou, L. Zhen, R. S. M. Goh, V. Y. F. Tan: Efficient
Sharpness-aware Minimization for Improved Training of Neural Networks, ICLR 2022,
arXiv 2110.03141; dydjw9/Efficient_SAM, utils/Esam.py.
"""

import numpy as np

from .base import add, scaled, unit


def perturbation(g, active, rho, beta, eps=1e-7):
    """SWP: e = (rho / beta) g_S / (||g_S|| + eps) on the active tensors S, else 0."""
    g_S = {leaf: g[leaf] if leaf in active else 0.0 * g[leaf] for leaf in g}
    return scaled(unit(g_S, eps), rho / beta)


def strictly_above(rise, gamma):
    """SDS: above the k-th largest rise, k = int(gamma n); all from gamma = 0.99 on."""
    if gamma >= 0.99:
        return np.full(len(rise), True)
    return rise > np.sort(rise)[-int(gamma * len(rise))]


def largest(rise, gamma):
    """SDS with exactly max(1, int(gamma n)) examples, the first of equal ones."""
    kept = np.full(len(rise), False)
    kept[np.argsort(-rise, kind="stable")[: max(1, int(gamma * len(rise)))]] = True
    return kept


class ESAM:
    """direction(w, grad, losses, u) with the tensors left active by the step before.

    losses(w) are those of the examples, grad(w, kept) is the gradient of the mean loss
    over the examples kept, u[leaf] is the uniform draw of the step for each tensor.

    e as SWP says,  rise = losses(w + e) - losses(w),  d = grad(w + e, kept)
    and afterwards  S = {leaf: u[leaf] <= beta}.
    """

    def __init__(self, rho=0.05, beta=0.6, gamma=0.5, select=strictly_above):
        self.rho, self.beta, self.gamma, self.select = rho, beta, gamma, select
        self.active, self.rise, self.kept = None, None, None

    def direction(self, w, grad, losses, u):
        """The gradient at w + e of the examples whose loss rises most."""
        active = set(w) if self.active is None else self.active
        g = grad(w, np.full(len(losses(w)), True))
        ascended = add(w, perturbation(g, active, self.rho, self.beta))
        self.rise = losses(ascended) - losses(w)
        self.kept = self.select(self.rise, self.gamma)
        self.active = {leaf for leaf in w if u[leaf] <= self.beta}
        return grad(ascended, self.kept)
