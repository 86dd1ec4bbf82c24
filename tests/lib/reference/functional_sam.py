"""Functional-SAM: the network's Jacobian at the perturbed weights, the loss's here.

S. P. Singh, H. Mobahi, A. Agarwala, Y. Dauphin: Avoiding spurious sharpness
minimization broadens applicability of SAM, ICML 2025, arXiv 2502.02407. No code is
public.
"""

import numpy as np

from .base import add, forward, mlp
from .sam import ascend


def pulled_back(w, x, dz):
    """J(w)^T dz for the logits of the network of base.py."""
    h = np.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    da = (dz @ w["layer1/kernel"].T) * (1.0 - h**2)
    return {
        "layer0/kernel": x.T @ da,
        "layer0/bias": da.sum(axis=0),
        "layer1/kernel": h.T @ dz,
        "layer1/bias": dz.sum(axis=0),
    }


def functional_sam(w, x, y, rho, along=None):
    """c = grad l(f(w)),  e = rho a / ||a|| with a = g,  d = J(w + e)^T c."""
    _, p, one_hot = forward(w, x, y)
    e = ascend(w, along or mlp(w, x, y)[1], rho)
    return pulled_back(add(w, e), x, (p - one_hot) / len(y))
