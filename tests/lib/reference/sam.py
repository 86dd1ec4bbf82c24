"""SAM, its n-step forms, and SAM on random steps.

P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur: Sharpness-Aware Minimization for
Efficiently Improving Generalization, ICLR 2021, arXiv 2010.01412;
google-research/sam, sam_jax/training_utils/flax_training.py.
Projected n-step ascent: M. Andriushchenko, N. Flammarion: Towards Understanding
Sharpness-Aware Minimization, ICML 2022; tml-epfl/understanding-sam, deep_nets/sam.py.
Random steps: Y. Zhao, H. Zhang, X. Hu: SS-SAM / Randomized Sharpness-Aware Training,
arXiv 2203.09962; zhaoyang-0204/gnp, training/training_core.py.
"""

from .base import add, norm, scaled, unit


def ascend(w, g, rho, eps=1e-12):
    """e = rho g / (||g|| + eps)."""
    return scaled(unit(g, eps), rho)


def sam(w, grad, rho, eps=1e-12):
    """d = grad(w + e)."""
    return grad(add(w, ascend(w, grad(w), rho, eps)))


def n_step(w, grad, rho, n, step_size, project=True):
    """n normalized ascent steps, each followed by the projection on the ball.

    delta_0 = 0
    delta_{i+1} = P(delta_i + step_size grad(w + delta_i) / ||grad(w + delta_i)||)
    d = grad(w + delta_n)
    P(delta) = delta min(1, rho / ||delta||), or the identity when not projected.
    """
    delta = scaled(w, 0.0)
    for _ in range(n):
        delta = add(delta, unit(grad(add(w, delta))), step_size)
        if project and norm(delta) > rho:
            delta = scaled(delta, rho / norm(delta))
    return grad(add(w, delta))


def bernoulli(u, w, grad, rho, p):
    """SAM where the uniform draw u of the step is below p, else the plain gradient."""
    return sam(w, grad, rho) if u < p else grad(w)
