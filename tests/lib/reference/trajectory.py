"""SAF and MESA: a divergence from past predictions as a term of the loss.

J. Du, D. Zhou, J. Feng, V. Tan, J. T. Zhou: Sharpness-Aware Training for Free, NeurIPS
2022, arXiv 2205.14083; AngusDujw/SAF, SAF_train.py and MESA_train.py. Epochs count
from 0, z are logits of the network of ``base.mlp``, q their softmax at temperature tau.
"""

import numpy as np

from .base import add, scaled


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def network(w, x):
    """Hidden layer and logits."""
    h = np.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    return h, h @ w["layer1/kernel"] + w["layer1/bias"]


def backward(w, x, h, dz):
    """The gradient of a loss whose gradient in the logits is dz."""
    da = (dz @ w["layer1/kernel"].T) * (1.0 - h**2)
    return {
        "layer0/kernel": x.T @ da,
        "layer0/bias": da.sum(axis=0),
        "layer1/kernel": h.T @ dz,
        "layer1/bias": dz.sum(axis=0),
    }


def cross_entropy(z, y):
    """The mean over the batch, and its gradient in z."""
    rows = np.arange(len(y))
    dz = np.exp(log_softmax(z))
    dz[rows, y] -= 1.0
    return -np.mean(log_softmax(z)[rows, y]), dz / len(y)


def trajectory(z, z_past, tau):
    """tau^2 mean_i KL(q(z_past_i) || q(z_i)), and its gradient in z."""
    log_p, log_q = log_softmax(z_past / tau), log_softmax(z / tau)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return tau**2 * np.mean(kl), tau * (np.exp(log_q) - np.exp(log_p)) / len(z)


class SAF:
    """Its table has a slot more than the delay, since it writes before it reads."""

    def __init__(self, num_examples, num_classes, delay, start, end, lam, tau):
        self.table = np.zeros((num_examples, delay + 1, num_classes))
        self.delay, self.start, self.end = delay, start, end
        self.lam, self.tau = lam, tau

    def __call__(self, w, x, y, indices, epoch):
        """The loss of a batch and its gradient."""
        h, z = network(w, x)
        self.table[indices, epoch % (self.delay + 1)] = z
        loss, dz = cross_entropy(z, y)
        if self.start < epoch < self.end:
            past = self.table[indices, (epoch - self.delay) % (self.delay + 1)]
            term, d_term = trajectory(z, past, self.tau)
            loss, dz = loss + self.lam * term, dz + self.lam * d_term
        return loss, backward(w, x, h, dz)


class MESA:
    """v is averaged after the step of the optimizer, by ``stepped``."""

    def __init__(self, w, decay, start, lam, tau):
        self.v, self.decay, self.start = w, decay, start
        self.lam, self.tau = lam, tau

    def __call__(self, w, x, y, indices, epoch):
        """The loss of a batch and its gradient."""
        h, z = network(w, x)
        loss, dz = cross_entropy(z, y)
        if epoch > self.start:
            term, d_term = trajectory(z, network(self.v, x)[1], self.tau)
            loss, dz = loss + self.lam * term, dz + self.lam * d_term
        return loss, backward(w, x, h, dz)

    def stepped(self, w):
        """v <- d v + (1 - d) w."""
        self.v = add(scaled(self.v, self.decay), w, 1.0 - self.decay)


def train(method, w, X, y, orders, batch_size, *, lr, momentum):
    """SGD with momentum over the epochs' orders; losses and the weights at the end."""
    velocity, losses = scaled(w, 0.0), []
    for epoch, order in enumerate(orders):
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            loss, g = method(w, X[indices], y[indices], indices, epoch)
            velocity = add(g, velocity, momentum)
            w = add(w, velocity, -lr)
            if isinstance(method, MESA):
                method.stepped(w)
            losses.append(loss)
    return np.array(losses), w
