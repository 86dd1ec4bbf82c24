"""AMP: ascent by raw gradients inside a ball for each leaf.

Y. Zheng, R. Zhang, Y. Mao: Regularizing Neural Networks via Adversarial Model
Perturbation, CVPR 2021, arXiv 2010.04925; hiyouga/AMP-Regularizer, amp.py.
"""

from .base import add, norm, scaled


def shortened(delta, epsilon):
    """delta, scaled by epsilon / (||delta|| + 1e-12) where it is longer than that."""
    n = norm(delta)
    return scaled(delta, epsilon / (n + 1e-12)) if n > epsilon else delta


def by_leaf(delta, epsilon):
    """Each leaf shortened for itself (the code)."""
    return {leaf: shortened({leaf: delta[leaf]}, epsilon)[leaf] for leaf in delta}


def perturbation(w, grad, epsilon, zeta=1.0, n=1, project=by_leaf):
    """delta_0 = 0,  delta_{i+1} = P(delta_i + zeta grad(w + delta_i));  delta_n."""
    delta = scaled(w, 0.0)
    for _ in range(n):
        delta = project(add(delta, grad(add(w, delta)), zeta), epsilon)
    return delta


def amp(w, grad, epsilon, zeta=1.0, n=1, project=by_leaf):
    """d = grad(w + delta_n); with ``project=shortened`` one ball for all leaves."""
    return grad(add(w, perturbation(w, grad, epsilon, zeta, n, project)))
