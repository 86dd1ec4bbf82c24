"""MSAM: SGD and AdamW with their own momentum as perturbation.

M. Becker, F. Altrock, B. Risse: Momentum-SAM: Sharpness Aware Minimization without
Computational Overhead, 2024, arXiv 2401.12033, Algorithm 1; MarlonBecker/MSAM,
optimizer/msam.py and optimizer/adamW_msam.py, from which the places of the decay and
the constant in the norm are. w' are the weights that the authors' optimizer keeps.
"""

import numpy as np

from .base import add, norm, scaled


def scale(v, rho):
    """c = rho / (||v|| + 1e-12)."""
    return rho / (norm(v) + 1e-12)


def sgd(w, steps, grad, rho, *, lr, momentum, weight_decay=0.0):
    """Returns [(w'_0, w_0), ..., (w'_steps, w_steps)], with v = 0, c = 0, w' = w first.

    g = grad(t, w') + weight_decay w'
    w = w' + c v
    v <- momentum v + g
    w <- w - lr v
    c <- rho(t) / (||v|| + 1e-12)
    w' = w - c v
    """
    live, v, c = w, scaled(w, 0.0), 0.0
    trajectory = [(live, w)]
    for t in range(steps):
        g = add(grad(t, live), live, weight_decay)
        w = add(live, v, c)
        v = add(g, v, momentum)
        w = add(w, v, -lr)
        c = scale(v, rho(t) if callable(rho) else rho)
        live = add(w, v, -c)
        trajectory.append((live, w))
    return trajectory


def adamw(w, steps, grad, rho, *, lr, b1, b2, eps, weight_decay=0.0):
    """Returns [(w'_0, w_0), ..., (w'_steps, w_steps)], with m = u = 0, c = 0 first.

    g = grad(t, w')
    w = w' + c m
    m <- b1 m + (1 - b1) g,  u <- b2 u + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) m / (sqrt(u) / sqrt(1 - b2^t) + eps),  t from 1
    w <- (1 - lr weight_decay) w
    c <- rho / (||m|| + 1e-12)
    w' = w - c m
    """
    live, m, u, c = w, scaled(w, 0.0), scaled(w, 0.0), 0.0
    trajectory = [(live, w)]
    for t in range(steps):
        g = grad(t, live)
        w = add(live, m, c)
        m = add(scaled(m, b1), g, 1 - b1)
        u = {leaf: b2 * u[leaf] + (1 - b2) * g[leaf] ** 2 for leaf in u}
        correction1, correction2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        for leaf in w:
            root = np.sqrt(u[leaf]) / np.sqrt(correction2) + eps
            stepped = w[leaf] - lr / correction1 * m[leaf] / root
            w[leaf] = (1 - lr * weight_decay) * stepped
        c = scale(m, rho)
        live = add(w, m, -c)
        trajectory.append((live, w))
    return trajectory
