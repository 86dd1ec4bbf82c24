"""WSAM: sharpness as a weighted term, beside the optimizer or inside of it.

Y. Yue, J. Jiang, Z. Ye, N. Gao, Y. Liu, K. Zhang: Sharpness-Aware Minimization
Revisited: Weighted Sharpness as a Regularization Term, KDD 2023, arXiv 2305.15817;
intelligent-machine-learning/atorch, atorch/optimizers/wsam.py. The weight of the
sharpness is a = gamma / (1 - gamma).
"""

from .base import add, at, norm, scaled
from .sam import ascend


def clipped(g, max_norm):
    """g min(1, max_norm / (||g|| + 1e-6)), as torch.nn.utils.clip_grad_norm_."""
    if max_norm is None:
        return g
    return scaled(g, min(1.0, max_norm / (norm(g) + 1e-6)))


def gradients(w, grad, rho, max_norm=None):
    """g and g_s = grad(w + e); e is that of the g before it is clipped."""
    g = grad(w)
    g_s = grad(add(w, ascend(w, g, rho)))
    return clipped(g, max_norm), clipped(g_s, max_norm)


def coupled(w, grad, rho, gamma, max_norm=None):
    """d = a g_s + (1 - a) g."""
    a = gamma / (1.0 - gamma)
    g, g_s = gradients(w, grad, rho, max_norm)
    return add(scaled(g_s, a), g, 1.0 - a)


def decoupled(w, steps, grad, U, rho, gamma, lr, max_norm=None):
    """Returns [w_0, ..., w_steps]; U is an optimizer of base.

    w <- U(g, w) - lr a (g_s - g): the optimizer never sees the sharpness.
    """
    trajectory, state = [w], None
    for t in range(steps):
        a = at(gamma, t) / (1.0 - at(gamma, t))
        here = lambda p, t=t: grad(t, p)
        g, g_s = gradients(w, here, at(rho, t), at(max_norm, t))
        w, state = U(t, w, g, state)
        w = add(w, add(g_s, g, -1.0), -at(lr, t) * a)
        trajectory.append(w)
    return trajectory
