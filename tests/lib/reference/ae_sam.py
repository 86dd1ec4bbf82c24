"""AE-SAM and AE-LookSAM: a SAM step where the gradient is long for its recent past.

W. Jiang, H. Yang, Y. Zhang, J. Kwok: An Adaptive Policy to Employ Sharpness-Aware
Minimization, ICLR 2023, arXiv 2304.14647. The authors published no code.
"""

import numpy as np

from .base import add, norm, rejection
from .looksam import reuse
from .sam import ascend


def threshold(t, total_steps, lambda1=-1.0, lambda2=1.0):
    """c_t = (t / T) lambda1 + (1 - t / T) lambda2, and lambda1 from T on."""
    progress = np.minimum(t / total_steps, 1.0)
    return progress * lambda1 + (1.0 - progress) * lambda2


class Statistics:
    """The running mean and variance of x = ||g||^2.

    mu_0 = x_0, var_0 = 0, then
    mu <- delta mu + (1 - delta) x
    var <- delta var + (1 - delta) (x - mu)^2, with the new mu.
    """

    def __init__(self, delta=0.9):
        self.delta, self.mu, self.var, self.x = delta, None, 0.0, None

    def observe(self, x):
        """Take in the x of a step."""
        self.mu = x if self.mu is None else self.mu
        self.mu = self.delta * self.mu + (1.0 - self.delta) * x
        self.var = self.delta * self.var + (1.0 - self.delta) * (x - self.mu) ** 2
        self.x = x

    def above(self, c):
        """Whether the x last taken in is at least mu + c sigma."""
        return bool(self.x >= self.mu + c * np.sqrt(self.var))


class Controller:
    """decide(x, c): with lag = 0 on the x of the step, with lag = 1 on the one before.

    lag = 0:  x_t >= mu_t + c_t sigma_t
    lag = 1:  x_{t-1} >= mu_{t-1} + c_t sigma_{t-1}; the first step ascends.
    """

    def __init__(self, delta=0.9, lag=0):
        self.statistics, self.lag = Statistics(delta), lag

    def decide(self, x, c):
        """Whether the step with this x and threshold c ascends."""
        before = self.statistics.x is None or self.statistics.above(c)
        self.statistics.observe(x)
        return before if self.lag else self.statistics.above(c)


class AESAM:
    """direction(w, grad, c): d = g_s where the controller ascends, else g.

    With alpha > 0 it is AE-LookSAM: g_v is reused in the other steps as in LookSAM.
    """

    def __init__(self, rho=0.05, delta=0.9, lag=0, alpha=0.0):
        self.rho, self.alpha, self.g_v = rho, alpha, None
        self.controller = Controller(delta, lag)

    def direction(self, w, grad, c):
        """Whichever of the two the step calls for; c is its threshold."""
        g = grad(w)
        if not self.controller.decide(norm(g) ** 2, c):
            return reuse(g, self.g_v, self.alpha)
        g_s = grad(add(w, ascend(w, g, self.rho)))
        self.g_v = rejection(g_s, g)
        return g_s


def simulate(x, c, delta=0.9, lag=0):
    """The controller alone, on given series of x and c; returns the decisions."""
    control = Controller(delta, lag)
    return np.array([control.decide(*pair) for pair in zip(x, c, strict=True)])
