"""The geometry of pairs of matrices, up to changes that keep their product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam.roles import named_leaves
from optax_sam.sharpness.located import Located

Metric = Literal["mix", "inv"]

# Products in full precision: accelerators would round them to a few digits.
_product = partial(jnp.matmul, precision="highest")


class Geometry(NamedTuple):
    r"""Flat coordinates :math:`u` around :math:`w`, a pytree like the chosen leaves.

    Attributes:
      point: maps ``u`` to the point that a geodesic reaches at time one, to second
        order.
      project: the orthogonal projector to horizontal vectors. They are orthogonal to
        all moves along an orbit.
    """

    point: Callable[[Any], Any]
    project: Callable[[Any], Any]


class Frame(NamedTuple):
    r"""The parts of the flat coordinates of some pairs, with a first axis of pairs.

    Let :math:`U S V'` be the singular value decomposition of the product. At the
    balanced point of the orbit, :math:`G = U S^{1/2}, H = V S^{1/2}`, both Gram
    matrices are :math:`S`. There everything below is diagonal, and does not depend on
    the representative. The weights are
    :math:`G + (u_G - \tfrac12 \gamma_G)\, B_G`, and likewise for :math:`H`.

    Attributes:
      U: ``(n, h)``, orthonormal columns; zero where the product has no rank.
      V: ``(m, h)``.
      cosine: ``(h, h)``, the part of a vertical direction that lies in ``G``.
      sine: ``(h, h)``, the part in ``H``.
      ratio: ``(h,)``, :math:`\sqrt{S / (S + \epsilon)}`; one without ``eps``.
      weight: ``(h,)``, one for ``inv``, and the inverse Gram matrix for ``mix``.
      alive: ``(h,)``, where the product has rank.
      back_G: ``(h, h)``, the map :math:`B_G`.
      back_H: ``(h, h)``.
    """

    U: jax.Array
    V: jax.Array
    cosine: jax.Array
    sine: jax.Array
    ratio: jax.Array
    weight: jax.Array
    alive: jax.Array
    back_G: jax.Array
    back_H: jax.Array


def frame_at(G: jax.Array, H: jax.Array, metric: Metric, eps: float) -> Frame:
    """The frame at pairs ``(..., n, h)`` and ``(..., m, h)``."""
    Q_G, R_G = jnp.linalg.qr(G)
    Q_H, R_H = jnp.linalg.qr(H)
    left, S, right = jnp.linalg.svd(_product(R_G, R_H.mT))
    U, V = _product(Q_G, left), _product(Q_H, right.mT)
    # Fixes the sign, so that a random start is the same on the whole orbit.
    largest = jnp.argmax(jnp.abs(U), axis=-2, keepdims=True)
    sign = jnp.sign(jnp.take_along_axis(U, largest, axis=-2))
    lengths = jnp.linalg.norm(R_G, axis=(-2, -1)) * jnp.linalg.norm(R_H, axis=(-2, -1))
    alive = (10 * jnp.finfo(S.dtype).eps * lengths)[..., None] < S
    U, V = (jnp.where(alive[..., None, :], sign * x, 0) for x in (U, V))

    S = jnp.where(alive, S, 0)
    gram = S + eps * S.mean(-1, keepdims=True)
    inverse = lambda x: jnp.where(alive, 1 / jnp.where(alive, x, 1), 0)
    d, e = jnp.sqrt(S), jnp.sqrt(gram)
    if metric == "mix":
        in_G = d[..., :, None] * e[..., None, :]
        back, weight = inverse(d * e), inverse(gram)
    else:
        in_G = jnp.broadcast_to((d * e)[..., :, None], (*S.shape, S.shape[-1]))
        back, weight = e * inverse(d), jnp.ones_like(S)
    length = jnp.sqrt(in_G**2 + in_G.mT**2)
    cosine = in_G / jnp.where(length > 0, length, 1)
    return Frame(
        U=U,
        V=V,
        cosine=cosine,
        sine=cosine.mT,
        ratio=d * inverse(e),
        weight=weight,
        alive=alive,
        back_G=back[..., :, None] * _product(U.mT, G),
        back_H=back[..., :, None] * _product(V.mT, H),
    )


def horizontal(
    frame: Frame, u_G: jax.Array, u_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""The part of a vector that is orthogonal to all moves along the orbit.

    These moves are :math:`(-U (c \odot Y), V (s \odot Y)')`, with
    :math:`c^2 + s^2 = 1` entry by entry, and have the length of :math:`Y`. This solves
    the Sylvester equation of ``inv``, whose matrix is :math:`S^2` here.
    """
    U, V, c, s = frame.U, frame.V, frame.cosine, frame.sine
    u_G, u_H = (jnp.where(frame.alive[..., None, :], u, 0) for u in (u_G, u_H))
    Y = s * _product(u_H.mT, V) - c * _product(U.mT, u_G)
    return u_G + _product(U, c * Y), u_H - _product(V, (s * Y).mT)


def christoffel(
    frame: Frame, u_G: jax.Array, u_H: jax.Array, metric: Metric
) -> tuple[jax.Array, jax.Array]:
    """Minus the acceleration of a geodesic with this velocity, in coordinates."""
    r, w = frame.ratio[..., None, :], frame.weight[..., None, :]

    def of(X: jax.Array, u: jax.Array, Y: jax.Array, v: jax.Array) -> jax.Array:
        half = r.mT * _product(Y.mT, v) * w
        return _product(u, half + half.mT) - _product(X * r, _product(v.mT, v) * w)

    U, V = frame.U, frame.V
    if metric == "mix":
        return of(U, u_G, V, u_H), of(V, u_H, U, u_G)
    return -of(U, u_G, U, u_G), -of(V, u_H, V, u_H)


def moved(
    frame: Frame, u_G: jax.Array, u_H: jax.Array, metric: Metric
) -> tuple[jax.Array, jax.Array]:
    """The change of a pair along the geodesic, to second order."""
    gamma_G, gamma_H = christoffel(frame, u_G, u_H, metric)
    return (
        _product(u_G - gamma_G / 2, frame.back_G),
        _product(u_H - gamma_H / 2, frame.back_H),
    )


def geometry(w: Any, pairs: list[Located], metric: Metric, eps: float) -> Geometry:
    """Flat coordinates at ``w``: for pairs as above, elsewhere relative changes.

    A vector of coordinates is a pytree like ``w``. The coordinates of a pair are in the
    places of its leaves, so the length of the vector is the global norm.
    """
    leaves, structure = named_leaves(w), jax.tree.structure(w)
    factors = [pair.read(leaves) for pair in pairs]
    frames = [frame_at(G, H, metric, eps) for G, H in factors]

    def point(u: Any) -> Any:
        u = named_leaves(u)
        new = {name: x + jnp.abs(x) * u[name] for name, x in leaves.items()}
        for pair, (G, H), frame in zip(pairs, factors, frames, strict=True):
            change_G, change_H = moved(frame, *pair.read(u), metric)
            new = pair.write(G + change_G, H + change_H, new)
        return jax.tree.unflatten(structure, new.values())

    def project(u: Any) -> Any:
        u = named_leaves(u)
        # Zero weights cannot move, and must not use up the radius.
        new = {name: jnp.where(x != 0, u[name], 0) for name, x in leaves.items()}
        for pair, frame in zip(pairs, frames, strict=True):
            u_G, u_H = horizontal(frame, *pair.read(u))
            new = pair.write(u_G, u_H, new)
        return jax.tree.unflatten(structure, new.values())

    return Geometry(point, project)
