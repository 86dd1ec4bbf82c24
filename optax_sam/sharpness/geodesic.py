"""Worst-case sharpness that symmetries of products of weights do not change."""

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

    Attention sees queries and keys, and values and outputs, of a head only as products
    :math:`G H'`, the same for :math:`(G A^{-1}, H A')` with any invertible :math:`A`,
    however far that moves the weights and every other sharpness with them. So distance
    is taken between products here: along horizontal geodesics of their pairs,

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

    Leaves in no pair move on straight lines at the length :math:`\|\xi / |w|\|`, so
    that without pairs this is adaptive l2 :func:`worst_case_sharpness` exactly.

    **Radii of the two metrics cannot be compared.** If both factors grow by a share
    :math:`b`, then :math:`\|\xi\|^2` is :math:`2 h b^2` in ``inv``, relative as the
    other leaves' is, and :math:`2 b^2 \|G H'\|_F^2` in ``mix``, in units of the
    product: there large products move relatively less than the leaves they share the
    radius with. The paper's values are not known to us; adaptive sharpness has been
    taken at 0.5 to 4 for vision transformers. Whether larger values go with a larger
    or a smaller generalization gap depended on the task in the paper.

    A product of rank below :math:`h`, to rounding, is taken as one of that rank, so it
    stays where it has none, as zero weights do: a LoRA pair with a factor of zeros does
    not move at all. Small singular values, which ``mix`` moves far, are damped by
    ``eps``. The cost beyond :func:`worst_case_sharpness` is two QR decompositions of
    each pair and a few products of its size in every step.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples, with
        a maximum for each.
      rho: radius, above 0, in units of the metric.
      gl_pairs: what :func:`attention_gl_pairs` and :func:`gl_pair` return, in a list;
        no leaf in two of them. They are static: close over them in ``jax.jit``.
      key: an int, typed key or raw key data, for random starts. ``None``: one start at
        ``w``, which finds nothing where the gradient is 0.
      metric: ``"mix"`` or ``"inv"``, the norm of all pairs.
      eps: at least 0; what is added to the Gram matrices in the metric, as a share of
        the mean of their eigenvalues, :math:`\epsilon \operatorname{tr}(P) / h`, where
        both are equal on the orbit: at factors of the product's singular vectors.
      num_steps: steps of each ascent, at least 1.
      num_restarts: the number of random starts, of which the best counts.
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
        than rows, the mask cuts it, a leaf is in two, ``rho`` is not above 0, the
        metric is unknown, ``eps`` is negative, or as :func:`hvp` does.

    Examples:
      A product of two numbers, at 3 where 2.9 is asked for, however it is factored:

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
    :math:`A X + X A = B`, without which vectors are not horizontal; ``eps`` is relative
    and keeps the invariance. No code of the authors' is known.

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
