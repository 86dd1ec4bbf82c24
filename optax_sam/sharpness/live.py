"""Sharpness from the two gradients of one SAM step, without a further gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import schedules
from optax_sam.trees import inner, norm, wide


def sam_metrics(
    loss: ArrayLike,
    loss_perturbed: ArrayLike,
    grads: Any,
    grads_perturbed: Any,
    perturbation: Any,
    *,
    params: Any = None,
    updates: Any = None,
    learning_rate: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    r"""Sharpness from the two passes of one SAM step, as a flat dict for any logger.

    :math:`g` is the gradient at :math:`w` and :math:`g_s` the gradient at
    :math:`w + e`, on one batch:

    ======================== ==================================================
    ``loss``                 :math:`L(w)`
    ``loss_perturbed``       :math:`L(w + e)`
    ``sharpness_gap``        :math:`L(w + e) - L(w)`
    ``grad_norm``            :math:`\|g\|`
    ``perturbed_grad_norm``  :math:`\|g_s\|`
    ``grad_norm_ratio``      :math:`\|g_s\| / \|g\|`
    ``cosine``               :math:`\langle g, g_s \rangle / (\|g\| \|g_s\|)`
    ``psf_norm``             :math:`\|g_s - g\|`; vSAM uses its variance
    ``rho``                  :math:`\|e\|`, before rounding
    ``perturbation_norm``    :math:`\|e\|`, after rounding
    ``rayleigh_quotient``    :math:`\langle e, g_s - g \rangle / \|e\|^2`
    ``rayleigh_from_loss``   :math:`2\, (L(w + e) - L(w) - \langle g, e \rangle)
                             / \|e\|^2`
    ======================== ==================================================

    ``params`` adds ``param_norm`` and ``moved_fraction``, the share of the coordinates
    where :math:`w + e \ne w`. ``updates`` adds ``update_norm``. ``learning_rate`` adds
    itself and two lines to draw beside the largest eigenvalue: ``stability_edge``
    :math:`2 / \eta` and ``stability_edge_sam`` (:func:`sam_stability_edge`). If a norm
    is zero, every quotient with that norm in the denominator is zero.

    Both Rayleigh quotients are the curvature along :math:`e`. On a quadratic they are
    exactly :math:`e^\top H e / \|e\|^2`, a lower bound of the largest eigenvalue, so
    their running maximum is a useful estimate. Elsewhere they are averages along the
    step. ``rayleigh_from_loss`` is of little use in float32 for a small :math:`\rho`.

    :func:`optax_sam.metrics` reads ``gradient_norm``, ``ascended_norm``, ``survival``
    and the counts from the optimizer's state, on skipped steps too. On a mesh they are
    means over all devices. This function adds the losses, the angle, the curvature and
    the moved fraction. Under ``shard_map`` each device gets the numbers of its batch:
    take their ``pmean``.

    Args:
      loss: ``L(w)``, (), from ``value_and_grad``.
      loss_perturbed: ``L(w + e)`` on the same batch, ().
      grads: ``g``, a pytree.
      grads_perturbed: ``g_s``, a pytree like ``grads``.
      perturbation: ``e``, a pytree like ``grads``.
      params: ``w``, in the dtype of the perturbed parameters, to which ``w + e`` is
        rounded here. The methods of this library give ``grad_fn`` float32
        parameters for half-precision leaves (``ascent_dtype``), so cast them:
        ``optax.tree.cast_like(params, perturbed)``.
      updates: a pytree that is added to the parameters.
      learning_rate: ``eta``, (), at least 0.

    Returns:
      Scalars in float32 or wider. It can be jitted.

    Raises:
      ValueError: if a loss is no scalar, a pytree differs from ``grads`` in its
        structure or a shape, or ``learning_rate`` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> f = jax.value_and_grad(lambda w: 0.5 * jnp.vdot(jnp.array([1.0, 5.0]), w**2))
      >>> w = jnp.array([4.0, 0.6])
      >>> loss, g = f(w)
      >>> e = 0.1 * g / jnp.linalg.norm(g)
      >>> loss_perturbed, g_s = f(w + e)
      >>> logged = sharpness.sam_metrics(loss, loss_perturbed, g, g_s, e)
      >>> print(f"{logged['sharpness_gap']:.4f} {logged['rayleigh_quotient']:.2f}")
      0.5122 2.44

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, on the gap; `vSAM
      <https://arxiv.org/abs/2403.08821>`_, 2024, on the PSF
    """
    trees = dict(grads_perturbed=grads_perturbed, perturbation=perturbation)
    trees |= {} if params is None else {"params": params}
    trees |= {} if updates is None else {"updates": updates}
    for name, tree in trees.items():
        _check_like(name, tree, grads)
    for name, value in (("loss", loss), ("loss_perturbed", loss_perturbed)):
        if jnp.shape(value):
            raise ValueError(
                f"{name} must be a scalar, the mean loss of the batch; it has shape"
                f" {jnp.shape(value)}."
            )

    loss, loss_perturbed = wide(jnp.asarray(loss)), wide(jnp.asarray(loss_perturbed))
    e = jax.tree.map(lambda x: wide(jnp.asarray(x)), perturbation)
    rho = norm(e)
    of_params = {}
    if params is not None:
        e, moved = _applied(params, e)
        of_params = {"moved_fraction": moved, "param_norm": norm(params)}
    difference = jax.tree.map(lambda s, g: wide(s) - wide(g), grads_perturbed, grads)
    gap = loss_perturbed - loss
    length, first, second = norm(e), norm(grads), norm(grads_perturbed)
    values = {
        "loss": loss,
        "loss_perturbed": loss_perturbed,
        "sharpness_gap": gap,
        "grad_norm": first,
        "perturbed_grad_norm": second,
        "grad_norm_ratio": _ratio(second, first),
        "cosine": _ratio(_ratio(inner(grads, grads_perturbed), first), second),
        "psf_norm": norm(difference),
        "rho": rho,
        "perturbation_norm": length,
        "rayleigh_quotient": _ratio(inner(e, difference), length**2),
        "rayleigh_from_loss": _ratio(2 * (gap - inner(grads, e)), length**2),
        **of_params,
    }
    if updates is not None:
        values["update_norm"] = norm(updates)
    if learning_rate is not None:
        values["learning_rate"] = jnp.asarray(learning_rate, rho.dtype)
        values["stability_edge"] = sam_stability_edge(first, 0.0, learning_rate)
        values["stability_edge_sam"] = sam_stability_edge(first, rho, learning_rate)
    return values


def sam_stability_edge(
    grad_norm: ArrayLike, rho: ArrayLike, learning_rate: ArrayLike
) -> jax.Array:
    r"""The curvature at which SAM with gradient descent stops being stable.

    The largest :math:`\lambda` with
    :math:`\eta \lambda + \eta \rho \lambda^2 / \|g\| \le 2`,

    .. math::
      \lambda_\text{SAM} = \frac{\|g\|}{2 \rho}
        \left( \sqrt{1 + \frac{8 \rho}{\eta \|g\|}} - 1 \right)
        = \frac{4}{\eta + \sqrt{\eta^2 + 8 \rho \eta / \|g\|}}

    It is computed by the second form, which loses no digits for a small :math:`\rho`.
    It lies below :math:`2 / \eta`, the edge of gradient descent; the two are equal for
    :math:`\rho = 0`. It falls to zero with the gradient. It holds for full-batch steps
    without momentum, in the direction of the gradient.

    Args:
      grad_norm: :math:`\|g\|`, at least 0.
      rho: radius, at least 0.
      learning_rate: :math:`\eta`, at least 0; the edge is infinite if it is 0.

    Returns:
      :math:`\lambda_\text{SAM}`, loss per squared parameter; the arguments broadcast,
      so that whole histories can be given.

    Raises:
      ValueError: if a number is negative.

    Examples:
      >>> from optax_sam import sharpness
      >>> print(sharpness.sam_stability_edge(1.0, 0.0, 0.1))
      20.0
      >>> print(f"{sharpness.sam_stability_edge(1.0, 0.05, 0.1):.4f}")
      12.3607

    References:
      Long and Bartlett, `Sharpness-Aware Minimization and the Edge of Stability
      <https://arxiv.org/abs/2309.12488>`_, 2023; Cohen et al., `Gradient Descent on
      Neural Networks Typically Occurs at the Edge of Stability
      <https://arxiv.org/abs/2103.00065>`_, 2021
    """
    given = dict(grad_norm=grad_norm, rho=rho, learning_rate=learning_rate)
    for name, value in given.items():
        if not jnp.ndim(value):
            schedules.check_number(name, value, 0.0)
    g, rho, eta = (jnp.asarray(x, jnp.result_type(float, x)) for x in given.values())
    # Infinite at g = 0, which makes the edge 0. Nothing is added if rho or eta is 0.
    added = jnp.where(rho * eta > 0, 8 * rho * eta / g, 0)
    return 4 / (eta + jnp.sqrt(eta**2 + added))


def _ratio(value: jax.Array, by: jax.Array) -> jax.Array:
    return jnp.where(by == 0, 0, value / jnp.where(by == 0, 1, by))  # nan stays nan


def _applied(params: Any, e: Any) -> tuple[Any, jax.Array]:
    """The offset after rounding, and the share of the coordinates that it moves."""

    def rounded(w: ArrayLike, e: jax.Array) -> jax.Array:
        w = jnp.asarray(w)
        precision = jnp.finfo(w.dtype)
        # Not by casting there and back, because XLA may leave out such casts.
        reached = jax.lax.reduce_precision(wide(w) + e, precision.nexp, precision.nmant)
        return reached - wide(w)

    left = jax.tree.map(rounded, params, e)
    leaves = jax.tree.leaves(left)
    moved = sum((jnp.sum(x != 0).astype(x.dtype) for x in leaves), jnp.zeros(()))
    return left, moved / max(1, sum(x.size for x in leaves))


def _check_like(name: str, tree: Any, grads: Any) -> None:
    expected: Any = jax.tree.structure(grads)
    given: Any = jax.tree.structure(tree)
    if given != expected:
        raise ValueError(
            f"{name} must be a pytree like grads, {expected}; got {given}."
        )

    def check(path: Any, x: ArrayLike, g: ArrayLike) -> None:
        if jnp.shape(x) != jnp.shape(g):
            raise ValueError(
                f"{name} has shape {jnp.shape(x)} at"
                f" {jax.tree_util.keystr(path) or 'the root'}, and grads"
                f" {jnp.shape(g)}; it must be a pytree like grads."
            )

    jax.tree_util.tree_map_with_path(check, tree, grads)
