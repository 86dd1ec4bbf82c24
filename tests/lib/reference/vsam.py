"""vSAM: SAM on a variance-controlled share of the steps, its correction reused between.

J. Deng, J. Pang, B. Zhang, T. Wang: Effective Gradient Sample Size via Variation
Estimation for Accelerating Sharpness aware Minimization, 2024, arXiv 2403.08821;
ajiaaa/vSAM, vsam/vsam.py. PSF is grad(w + e) - grad(w), x its norm, g the gradient.
"""

import numpy as np

from .base import add, norm, unit


def mean_change(ring):
    """Eqs. 9-10, 12-13: the mean of y_i / y_{i-1} - 1, oldest first, clipped to 1."""
    before, after = ring[:-1], ring[1:]
    change = np.where(before > 0, after / np.where(before > 0, before, 1.0) - 1.0, 0.0)
    return np.clip(np.mean(change), -1.0, 1.0)


def slice_variance(ring, m):
    """Eq. 8: the mean variance of m consecutive slices of the sorted ring."""
    return np.mean(np.var(np.sort(ring).reshape(m, -1), axis=1, ddof=1))


class Controller:
    """When to sample: decide(u) in each step, observe(x, ||g||) after a sample."""

    def __init__(
        self,
        K=50,
        m=5,
        a=0.13,
        max_rate=0.8,
        warmup=100,
        force_quota=True,
        initial_rate=None,
    ):
        self.K, self.m, self.a, self.max_rate = K, m, a, max_rate
        self.warmup, self.force_quota = warmup, force_quota
        self.x, self.r, self.v = np.zeros(K), np.zeros(K), np.zeros(K)
        self.s, self.f, self.used, self.t, self.samples = 1.0, 1, 1, 0, 0
        if initial_rate is not None:  # ours: another start of the same controller
            self.s = np.clip(K * initial_rate, 1.0, int(K * max_rate))

    def decide(self, u):
        """Whether this step samples; u is its uniform draw."""
        if self.t < self.warmup:
            take, self.used = True, 1
        else:
            position = self.f % self.K
            if position == 0:  # Eq. 14, at the start of a window
                growth = 1.0 + self.a * (mean_change(self.r) + mean_change(self.v))
                self.s = np.clip(self.s * growth, 1.0, int(self.K * self.max_rate))
                self.used = 0
            quota, left = int(self.s), self.K - position
            take = self.used < quota and u < self.s / self.K  # Eq. 15
            take |= self.force_quota and left <= quota - self.used
            self.used += take
            self.f += 1
        self.t += 1
        self.samples += take
        return bool(take)

    def observe(self, x, g_norm):
        """Push x, r = x / ||g|| (Eq. 11) and v (Eq. 8), dropping the oldest."""
        self.x = np.append(self.x[1:], x)
        self.r = np.append(self.r[1:], x / g_norm)
        self.v = np.append(self.v[1:], slice_variance(self.x, self.m))


class VSAM:
    """direction(w, grad, u): Eq. 16 on sampled steps, Eq. 17 on the others."""

    def __init__(self, rho=0.05, beta=0.8, max_reuse=6, tail=None, **controller):
        self.rho, self.beta, self.max_reuse, self.tail = rho, beta, max_reuse, tail
        self.controller = Controller(**controller)
        self.psf, self.j = None, 0

    def direction(self, w, grad, u):
        """d = grad(w + e) = g + PSF, or g + beta^j PSF in the j-th step after it."""
        g = grad(w)
        if self.controller.decide(u):
            g_s = grad(add(w, unit(g), self.rho))
            self.psf, self.j = add(g_s, g, -1.0), 0
            x = norm(self.psf, self.tail)
            self.controller.observe(x, norm(g, self.tail))
            return g_s
        self.j += 1
        if self.psf is None or self.j > self.max_reuse:
            return g
        return add(g, self.psf, self.beta**self.j)


def simulate(g_norms, x, uniforms, **controller):
    """The controller alone, on given series of ||g|| and x; returns (sampled, s)."""
    control = Controller(**controller)
    sampled, s = [], []
    for g_norm_t, x_t, u_t in zip(g_norms, x, uniforms, strict=True):
        sampled.append(control.decide(u_t))
        s.append(control.s)
        if sampled[-1]:
            control.observe(x_t, g_norm_t)
    return np.array(sampled), np.array(s)
