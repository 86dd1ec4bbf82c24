"""SAMPa: perturbed by the gradient of the step before, so that two run in parallel.

W. Xie, T. Pethick, V. Cevher: SAMPa: Sharpness-aware Minimization Parallelized,
NeurIPS 2024, arXiv 2410.10683; LIONS-EPFL/SAMPa, train.py. B_t is the batch of step t,
grad(b, w) the gradient on batch B_b, and B_{-1} = B_0.
"""

from .base import add, at, scaled
from .sam import ascend


def sampa(w, steps, grad, U, rho, lam, predict="optimizer", lr=None):
    """Returns [w_0, ..., w_steps]; U is an optimizer of base, and g_y = 0 first.

    x~ = w + rho g_y / (||g_y|| + 1e-12)
    y = U(g_y, w), or y = w - lr g_y with predict="gradient" (the paper); w in step 0
    p = grad(t - 1, x~)
    g_y = grad(t, y)
    w <- U((1 - lam) p + lam g_y, w)
    """
    trajectory, state, g_y = [w], None, scaled(w, 0.0)
    for t in range(steps):
        x = add(w, ascend(w, g_y, at(rho, t)))
        y = w
        if t > 0 and predict == "gradient":
            y = add(w, g_y, -at(lr, t))
        elif t > 0:
            y, _ = U(t, w, g_y, state)
        p = grad(max(t - 1, 0), x)
        g_y = grad(t, y)
        share = at(lam, t)
        w, state = U(t, w, add(scaled(p, 1.0 - share), g_y, share), state)
        trajectory.append(w)
    return trajectory
