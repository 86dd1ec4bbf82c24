"""Worst-case sharpness that does not change with the factors of products of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.masks import Mask
from optax_sam.sharpness.gl_pairs import GLPair
from optax_sam.sharpness.located import locate
from optax_sam.sharpness.objective import LossFn, objective
from optax_sam.sharpness.quotient import Metric, geometry
from optax_sam.sharpness.worst_case import SharpnessResult, worst_cases


def geodesic_sharpness(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    rho: ArrayLike,
    gl_pairs: Sequence[GLPair],
    key: ArrayLike | None = None,
    *,
    metric: Metric = "mix",
    eps: float = 0.0,
    num_steps: int = 20,
    num_restarts: int = 1,
    metric_fn: Callable[[Any, Any], Any] | None = None,
    mask: Mask = None,
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> SharpnessResult:
    r"""Worst-case sharpness of transformers that ignores how products are factored.

    In each head, attention uses only the product :math:`G H'` of its query and key
    matrices, and of its value and output matrices. The pair
    :math:`(G A^{-1}, H A')` has the same product for any invertible :math:`A`, but
    other weights, and any other sharpness differs there. This measure takes the
    distance between products, along horizontal geodesics of their pairs,

    .. math::
      S = \operatorname{mean}_S \max_{\xi \text{ horizontal}, \; \|\xi\| \le \rho}
      L_S(w + \xi - \tfrac12 \Gamma(\xi, \xi)) - L_S(w)

    to second order, with Christoffel terms :math:`\Gamma` and, for each pair, one of
    the metrics (:math:`P = G'G`, :math:`Q = H'H`)

    .. math::
      \texttt{mix:} \operatorname{tr}(Q\, \eta_G' \zeta_G)
      + \operatorname{tr}(P\, \eta_H' \zeta_H), \qquad
      \texttt{inv:} \operatorname{tr}(P^{-1} \eta_G' \zeta_G)
      + \operatorname{tr}(Q^{-1} \eta_H' \zeta_H)

    Leaves in no pair move on straight lines, with the length :math:`\|\xi / |w|\|`.
    So without pairs this is exactly the adaptive l2 :func:`worst_case_sharpness`.

    **Do not compare radii of the two metrics.** Let both factors grow by a share
    :math:`b`. Then :math:`\|\xi\|^2` is :math:`2 h b^2` in ``inv``, which is relative
    as for the other leaves. In ``mix`` it is :math:`2 b^2 \|G H'\|_F^2`, in units of
    the product, so large products move relatively less than the leaves with which they
    share the radius. We do not know the radii of the paper. For adaptive sharpness of
    vision transformers, 0.5 to 4 has been used. In the paper, larger values went with a
    larger generalization gap on some tasks and with a smaller one on others.

    If the rank of a product is below :math:`h`, up to rounding, the product keeps this
    rank, as zero weights stay zero. A LoRA pair with a factor of zeros does not move at
    all. ``mix`` moves small singular values far; ``eps`` damps this. In addition to the
    cost of :func:`worst_case_sharpness`, each step costs two QR decompositions of each
    pair and a few products of its size.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples, with
        a maximum for each.
      rho: radius, above 0, in units of the metric.
      gl_pairs: a list of what :func:`attention_gl_pairs` and :func:`gl_pair` return.
        No leaf may be in two pairs. They are static: close over them in ``jax.jit``.
      key: an int, typed key or raw key data, for random starts. ``None``: one start at
        ``w``, which finds nothing if the gradient there is 0.
      metric: ``"mix"`` or ``"inv"``, the norm of all pairs.
      eps: at least 0. The metric adds :math:`\epsilon \operatorname{tr}(P) / h`, this
        share of the mean eigenvalue, to both Gram matrices. It does so at the point of
        the orbit where both are equal: at factors of the product's singular vectors.
      num_steps: steps of each ascent, at least 1.
      num_restarts: the number of random starts; the best one counts.
      metric_fn: ``metric_fn(params, batch)``, an array or a pytree of arrays, whose
        mean change at the worst points is reported.
      mask: the leaves that move, as in :func:`hvp`. Pairs that it leaves out as a whole
        are ignored.
      weights: ``(B,)``, the examples that count in each batch; ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread; ``per_batch``
        is then each device's own.

    Returns:
      The sharpness, as a :class:`SharpnessResult`. It is the same for all factors of
      the products, up to rounding, which grows with the condition of :math:`A`. Its
      ``perturbation`` includes the second-order term.

    Raises:
      ValueError: if a pair names no leaf, its shapes do not match or have more columns
        than rows, the mask cuts a pair, a leaf is in two pairs, ``rho`` is not above 0,
        the metric is unknown, ``eps`` is negative, or as :func:`hvp` does.

    Examples:
      The product of two numbers is 3, and its target is 2.9. The result does not depend
      on the factors:

      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: jnp.mean((w["G"] @ w["H"].T * batch - 2.9) ** 2)
      >>> pairs = [sharpness.gl_pair("G", "H")]
      >>> for G, H in ((2.0, 1.5), (20.0, 0.15)):
      ...     params = {"G": jnp.full((1, 1), G), "H": jnp.full((1, 1), H)}
      ...     result = sharpness.geodesic_sharpness(
      ...         loss, params, jnp.ones((1, 1)), 0.1, pairs, metric="inv")
      ...     print(f"{result.value:.4f}")
      0.2984
      0.2984

    Differs from the paper in: the Sylvester equation of ``inv`` is
    :math:`A X + X A = B`, because otherwise vectors are not horizontal; ``eps`` is
    relative, which keeps the invariance. We know of no code by the authors.

    References:
      da Silva, Dangel, Oore, `Hide & Seek: Transformer Symmetries Obscure Sharpness &
      Riemannian Geometry Finds It <https://arxiv.org/abs/2505.05409>`_, 2025
    """
    o = objective(
        loss_fn, params, batches, mask=mask, weights=weights, axis_name=axis_name
    )
    if metric not in ("mix", "inv"):
        raise ValueError(f'metric must be "mix" or "inv"; got {metric!r}.')
    schedules.check_number("eps", eps, 0)
    schedules.check_integer("num_restarts", num_restarts, 1)
    if key is None and num_restarts > 1:
        raise ValueError(
            f"num_restarts={num_restarts} needs random starts: pass key=0, another"
            " integer or jax.random.key(0)."
        )
    space = geometry(o.w, locate(gl_pairs, o.params, o.w), metric, eps)
    return worst_cases(
        o,
        space.point,
        o.w,
        rho,
        key,
        norm="l2",
        project=space.project,
        num_steps=num_steps,
        num_restarts=num_restarts,
        random_init=key is not None,
        metric_fn=metric_fn,
    )
