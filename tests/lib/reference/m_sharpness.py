"""m-sharpness: every shard of the batch, or device, has a perturbation of its own.

P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur: Sharpness-Aware Minimization for
Efficiently Improving Generalization, ICLR 2021, arXiv 2010.01412, section 4.1, for SAM.
For the other methods: what is emitted is the mean of what the shards would emit, and so
is what is kept of their gradients; what decides is the mean of their norms.

Here ``grads`` is a list, the gradient on each shard.
"""

import numpy as np

from . import esam, vsam
from .base import add, norm, rejection, scaled, sgd, unit
from .looksam import reuse
from .sam import ascend


def mean(trees):
    """The mean over the shards."""
    return {leaf: sum(tree[leaf] for tree in trees) / len(trees) for leaf in trees[0]}


class Looking:
    """LookSAM and AE-SAM: g_v is one for all, ||g|| each one's own.

    ascends(t, x) with x the mean of ||g||^2.
    """

    def __init__(self, rho, ascends, alpha=0.0, ascend=ascend):
        self.rho, self.ascends, self.alpha, self.ascend = rho, ascends, alpha, ascend
        self.g_v = None

    def direction(self, t, w, grads):
        """The mean of g_s, or of g + alpha (||g|| / ||g_v||) g_v."""
        gs = [grad(w) for grad in grads]
        if not self.ascends(t, np.mean([norm(g) ** 2 for g in gs])):
            return mean([reuse(g, self.g_v, self.alpha) for g in gs])
        ascended = [
            grad(add(w, self.ascend(w, g, self.rho)))
            for g, grad in zip(gs, grads, strict=True)
        ]
        self.g_v = mean([rejection(*pair) for pair in zip(ascended, gs, strict=True)])
        return mean(ascended)


class VSAM:
    """vSAM: one PSF and one controller, which sees the means of ||PSF|| and ||g||."""

    def __init__(self, rho, u, beta=0.8, max_reuse=6, **controller):
        self.rho, self.u, self.beta, self.max_reuse = rho, u, beta, max_reuse
        self.controller = vsam.Controller(**controller)
        self.psf, self.j = None, 0

    def direction(self, t, w, grads):
        """The mean of g_s, or of g + beta^j PSF."""
        gs = [grad(w) for grad in grads]
        g = mean(gs)
        if self.controller.decide(self.u[t]):
            ascended = [
                grad(add(w, unit(g), self.rho))
                for g, grad in zip(gs, grads, strict=True)
            ]
            psfs = [add(*pair, -1.0) for pair in zip(ascended, gs, strict=True)]
            self.controller.observe(
                np.mean([norm(psf) for psf in psfs]), np.mean([norm(g) for g in gs])
            )
            self.psf, self.j = mean(psfs), 0
            return mean(ascended)
        self.j += 1
        if self.psf is None or self.j > self.max_reuse:
            return g
        return add(g, self.psf, self.beta**self.j)


class FriendlySAM:
    """F-SAM: m is the average of the mean gradients, g each one's own."""

    def __init__(self, rho, sigma, lam):
        self.rho, self.sigma, self.lam, self.m = rho, sigma, lam, None

    def direction(self, t, w, grads):
        """The mean of grad(w + rho a / ||a||), a = g - sigma m."""
        gs = [grad(w) for grad in grads]
        noise = [g if self.m is None else add(g, self.m, -self.sigma) for g in gs]
        lam = 0.0 if self.m is None else self.lam
        self.m = add(scaled(self.m or gs[0], lam), mean(gs), 1.0 - lam)
        return mean(
            [
                grad(add(w, ascend(w, a, self.rho)))
                for a, grad in zip(noise, grads, strict=True)
            ]
        )


class VaSSO:
    """VaSSO: m is the average of the mean gradients; each one adds its own to it."""

    def __init__(self, rho, theta):
        self.rho, self.theta, self.m = rho, theta, None

    def direction(self, t, w, grads):
        """The mean of grad(w + rho a / ||a||), a = (1 - theta) m + theta g."""
        gs = [grad(w) for grad in grads]
        theta = 1.0 if self.m is None else self.theta
        m = [add(scaled(self.m or g, 1.0 - theta), g, theta) for g in gs]
        self.m = mean(m)
        pairs = zip(m, grads, strict=True)
        return mean([grad(add(w, ascend(w, a, self.rho, 1e-7))) for a, grad in pairs])


class ESAM:
    """ESAM: the tensors drawn are the same for all, the examples each one's own.

    grads are pairs, grad(w, kept) and losses(w).
    """

    def __init__(self, u, shards, **settings):
        self.u, self.methods = u, [esam.ESAM(**settings) for _ in range(shards)]

    def direction(self, t, w, grads):
        """The mean of the gradients at w + e of the examples kept."""
        return mean(
            [
                method.direction(w, *pair, self.u[t])
                for method, pair in zip(self.methods, grads, strict=True)
            ]
        )


def wsam(w, steps, grads, rho, gamma, lr, momentum):
    """WSAM, decoupled, around SGD: returns [w_0, ..., w_steps]; grads(t) is the list.

    w <- SGD(mean of g) - lr gamma / (1 - gamma) (mean of g_s - mean of g)
    """
    trajectory, state, U = [w], None, sgd(lr, momentum)
    for t in range(steps):
        here = trajectory[-1]
        gs = [grad(here) for grad in grads(t)]
        g_s = mean(
            [
                grad(add(here, ascend(here, g, rho)))
                for g, grad in zip(gs, grads(t), strict=True)
            ]
        )
        w, state = U(t, here, mean(gs), state)
        sharpness = add(g_s, mean(gs), -1.0)
        trajectory.append(add(w, sharpness, -lr * gamma / (1.0 - gamma)))
    return trajectory
