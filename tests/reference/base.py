"""Trees, SGD and two test problems: what the transcriptions share.

SGD is Sutskever et al. 2013 in the form of ``torch.optim.SGD`` (pytorch/pytorch).
"""

import numpy as np


def add(a, b, scale=1.0):
    """a + scale * b."""
    return {leaf: a[leaf] + scale * b[leaf] for leaf in a}


def times(a, b):
    """The elementwise product."""
    return {leaf: a[leaf] * b[leaf] for leaf in a}


def scaled(a, c):
    """c * a."""
    return {leaf: c * a[leaf] for leaf in a}


def norm(a, leaves=None):
    """||a||, over all leaves together or over those named."""
    return np.sqrt(sum(np.sum(a[leaf] ** 2) for leaf in (leaves or a)))


def unit(a, eps=1e-12):
    """a / (||a|| + eps), and 0 where ||a|| = 0."""
    n = norm(a)
    return scaled(a, 1.0 / (n + eps) if n > 0 else 0.0)


def clip(a, max_norm):
    """a scaled back to norm max_norm where it is longer."""
    n = norm(a)
    return a if n < max_norm else scaled(a, max_norm / n)


def descend(w, steps, direction, *, lr, momentum, weight_decay=0.0, nesterov=False):
    """SGD on the directions of a method; returns [w_0, ..., w_steps].

    d = direction(t, w) + weight_decay w
    v <- momentum v + d
    w <- w - lr v                     (Nesterov: w <- w - lr (d + momentum v))
    """
    trajectory, v = [w], scaled(w, 0.0)
    for t in range(steps):
        d = add(direction(t, w), w, weight_decay)
        v = add(d, v, momentum)
        w = add(w, add(d, v, momentum) if nesterov else v, -lr)
        trajectory.append(w)
    return trajectory


def mlp(w, x, y):
    """Loss and gradient of x -> Dense -> tanh -> Dense -> softmax cross-entropy."""
    h = np.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    z = h @ w["layer1/kernel"] + w["layer1/bias"]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    one_hot = np.eye(z.shape[1])[y]
    loss = -np.mean(np.log(np.sum(p * one_hot, axis=1)))
    dz = (p - one_hot) / len(y)
    da = (dz @ w["layer1/kernel"].T) * (1.0 - h**2)
    return loss, {
        "layer0/kernel": x.T @ da,
        "layer0/bias": da.sum(axis=0),
        "layer1/kernel": h.T @ dz,
        "layer1/bias": dz.sum(axis=0),
    }


def quad(w, A, b):
    """Loss and gradient of L(w) = w'Aw / 2 + b'w."""
    w = w["w"]
    return 0.5 * w @ A @ w + b @ w, {"w": A @ w + b}
