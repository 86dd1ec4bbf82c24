"""GAM: lowers the largest gradient norm nearby together with the loss.

X. Zhang, R. Xu, H. Yu, H. Zou, P. Cui: Gradient Norm Aware Minimization Seeks
First-Order Flatness and Improves Generalization, CVPR 2023, arXiv 2303.03108, in its
accelerated form without Hessian-vector products; xxgege/GAM, gam/gam.py. rho2 is rho'.
"""

from .base import add, only, rejection, scaled, unit


def gam(w, grad, rho, rho2, alpha, beta, gamma, h_minus="paper", xi=1e-12, leaves=None):
    """The emitted gradient, from four.

    g0 = grad(w)
    g1 = grad(w + rho2 g0 / (||g0|| + xi)),  h = g1 - g0
    w2 = w + rho h / (||h|| + xi),  g2 = grad(w2)
    g3 = grad(w2 + rho2 g2 / (||g2|| + xi))
    h+ = alpha g1 + (1 - alpha) g3
    h- = beta g0 + (1 - beta) g2, in the code g0 + (1 - beta) g2
    d = h+ - gamma (h- - (<h-, h+> / ||h+||^2) h+)

    With ``leaves`` only these are moved, along directions of theirs alone.
    """
    along = lambda h: unit(only(h, leaves), xi)
    g0 = grad(w)
    g1 = grad(add(w, along(g0), rho2))
    h = add(g1, g0, -1.0)
    w2 = add(w, along(h), rho)
    g2 = grad(w2)
    g3 = grad(add(w2, along(g2), rho2))
    h_plus = add(scaled(g1, alpha), g3, 1.0 - alpha)
    share = {"paper": beta, "code": 1.0}[h_minus]
    h_less = add(scaled(g0, share), g2, 1.0 - beta)
    return add(h_plus, rejection(h_less, h_plus), -gamma)
