"""Trees, SGD and two test problems: what the transcriptions share.

SGD is Sutskever et al. 2013 in the form of ``torch.optim.SGD`` (pytorch/pytorch), AdamW
is Loshchilov, Hutter 2019, arXiv 1711.05101.
"""

import numpy as np


def at(value, t):
    """A hyperparameter in step t: a number, or a function of the step."""
    return value(t) if callable(value) else value


def add(a, b, scale=1.0):
    """a + scale * b."""
    return {leaf: a[leaf] + scale * b[leaf] for leaf in a}


def times(a, b):
    """The elementwise product."""
    return {leaf: a[leaf] * b[leaf] for leaf in a}


def scaled(a, c):
    """c * a."""
    return {leaf: c * a[leaf] for leaf in a}


def dot(a, b):
    """<a, b>, over all leaves together."""
    return sum(np.sum(a[leaf] * b[leaf]) for leaf in a)


def norm(a, leaves=None):
    """||a||, over all leaves together or over those named."""
    return np.sqrt(sum(np.sum(a[leaf] ** 2) for leaf in (leaves or a)))


def unit(a, eps=1e-12):
    """a / (||a|| + eps), and 0 where ||a|| = 0."""
    n = norm(a)
    return scaled(a, 1.0 / (n + eps) if n > 0 else 0.0)


def rejection(a, b):
    """a - (<a, b> / ||b||^2) b, the part of a orthogonal to b; a where b = 0."""
    n = norm(b)
    return add(a, b, -dot(a, b) / n**2 if n > 0 else 0.0)


def only(a, leaves):
    """a with zeros outside the leaves named; a itself where None are."""
    return a if leaves is None else {x: a[x] * float(x in leaves) for x in a}


def clip(a, max_norm):
    """a scaled back to norm max_norm where it is longer."""
    n = norm(a)
    return a if n < max_norm else scaled(a, max_norm / n)


def descend(w, steps, direction, *, lr, momentum, weight_decay=0.0, nesterov=False):
    """SGD on the directions of a method; returns [w_0, ..., w_steps].

    lr is a number, or one per step.
    d = direction(t, w) + weight_decay w
    v <- momentum v + d
    w <- w - lr v                     (Nesterov: w <- w - lr (d + momentum v))
    """
    trajectory, v = [w], scaled(w, 0.0)
    for t, lr_t in enumerate(np.broadcast_to(lr, steps)):
        d = add(direction(t, w), w, weight_decay)
        v = add(d, v, momentum)
        w = add(w, add(d, v, momentum) if nesterov else v, -lr_t)
        trajectory.append(w)
    return trajectory


def sgd(lr, momentum=0.0, weight_decay=0.0):
    """The optimizer U(t, w, d, v) -> (w, v) of a method that wraps one; v = None first.

    d <- d + weight_decay w,  v <- momentum v + d,  w <- w - lr v
    """

    def U(t, w, d, v=None):
        v = add(add(d, w, weight_decay), v or scaled(w, 0.0), momentum)
        return add(w, v, -at(lr, t)), v

    return U


def adamw(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """The optimizer U(t, w, d, (m, u)) -> (w, (m, u)), None first; t counts from 0.

    m <- b1 m + (1 - b1) d,  u <- b2 u + (1 - b2) d^2
    w <- w - lr (m_hat / (sqrt(u_hat) + eps) + weight_decay w), where m_hat and u_hat
    are m / (1 - b1^(t+1)) and u / (1 - b2^(t+1)).
    """

    def U(t, w, d, moments=None):
        m, u = moments or (scaled(w, 0.0), scaled(w, 0.0))
        m = add(scaled(m, b1), d, 1.0 - b1)
        u = add(scaled(u, b2), times(d, d), 1.0 - b2)
        m_hat = scaled(m, 1.0 / (1.0 - b1 ** (t + 1)))
        u_hat = scaled(u, 1.0 / (1.0 - b2 ** (t + 1)))
        step = {leaf: m_hat[leaf] / (np.sqrt(u_hat[leaf]) + eps) for leaf in w}
        return add(w, add(step, w, weight_decay), -at(lr, t)), (m, u)

    return U


def forward(w, x, y):
    """x -> Dense -> tanh -> Dense -> softmax: h, probabilities, one-hot labels."""
    h = np.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    z = h @ w["layer1/kernel"] + w["layer1/bias"]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return h, p, np.eye(z.shape[1])[y]


def mlp_losses(w, x, y):
    """The cross-entropy of each example."""
    _, p, one_hot = forward(w, x, y)
    return -np.log(np.sum(p * one_hot, axis=1))


def mlp(w, x, y):
    """The mean of the examples' losses and its gradient."""
    h, p, one_hot = forward(w, x, y)
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
