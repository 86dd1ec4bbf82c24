"""ESAM: efficient sharpness-aware minimization (Du et al., arXiv 2110.03141)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.contract import (
    DROPPED,
    MissingArgument,
    check_number,
    check_static,
    takes,
    with_gradients,
)
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always

_CALL = (
    "tx.update(grads, opt_state, params,"
    " per_example_loss_fn=lambda params, indices=None: losses), which returns the (B,)"
    " losses of this step's examples, or those of the given ones"
)


def esam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    beta: ArrayLike = 0.6,
    gamma: float = 0.5,
    key: ArrayLike = 0,
    when: When = always(),
    mask: Mask = None,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ESAM: perturbs random leaves and descends on the examples that mind most.

    Stochastic weight perturbation (SWP) moves each leaf with probability beta;
    sharpness-sensitive data selection (SDS) keeps the examples whose loss rises most,
    a static number of them, so that the second gradient runs on a part of the batch:

    .. math::
      e = \frac{\rho}{\beta}\, \frac{g_S}{\|g_S\|}, \qquad
      s_i = L_i(w + e) - L_i(w), \qquad
      d = \nabla \frac1k \sum_{i \in \text{top-}k(s)} L_i(w + e)

    with :math:`k = \max(1, \lfloor \gamma B \rfloor - 1)` of :math:`B` examples, as
    the authors' comparison with the :math:`\lfloor \gamma B \rfloor`-th leaves them,
    and all from ``gamma = 0.99`` on. ``beta=1, gamma=1`` is SAM. SWP saves nothing
    under ``jit``, since a random mask cannot skip work.

    ``update`` needs ``per_example_loss_fn(params, indices=None) -> losses`` instead of
    ``grad_fn``: the losses, (B,), of this step's examples, or of those at ``indices``,
    (k,), of which it must compute no others. Terms such as an L2 penalty belong into
    every example's loss. Give the losses at ``params`` that the incoming gradient came
    from as ``per_example_losses``; XLA may find that they are there already, but in
    large models it does not. From ``gamma = 0.99`` on ``grad_fn`` alone will do.

    Of a batch that is sharded under ``jit``, the selected examples must be placed
    again, or all devices compute them all: in ``per_example_loss_fn``
    ``jax.lax.with_sharding_constraint(x[indices], NamedSharding(mesh, P("data")))``,
    with ``gamma=0.5 + 1 / B``, so that half of the batch is kept, which the devices
    divide.

    Cost: 1 gradient, 1 forward pass and a gradient of ``k`` examples per ascended step,
    1.82 gradients for ``gamma=0.5``; 1 on other steps; one bool for each leaf, a key
    and a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step; the offset's norm is ``rho / beta``.
      beta: the probability of a leaf to move, in ``(0, 1]``.
      gamma: the share of the examples that the second gradient sees, in ``(0, 1]``,
        at least one example.
      key: an int, a key from ``jax.random.key``, or raw key data, for the leaves.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, see :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``per_example_loss_fn``.
      The extra argument ``mask_uniforms``, one number per leaf, replaces the draw of
      the leaves that move on the next step.

    Raises:
      ValueError: if ``rho`` is negative, ``beta`` or ``gamma`` is not in ``(0, 1]`` or
        ``key`` is no key; on ``update``, if ``per_example_loss_fn`` is missing, its
        losses are not a vector, or ``gamma * B`` is below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.esam(rho=0.05), optax.sgd(0.1))
      >>> x = jnp.linspace(0.0, 2.0, 8)
      >>> def losses(w, indices=None):
      ...     return (w - (x if indices is None else x[indices])) ** 2
      >>> w = jnp.zeros(())
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     g = jax.grad(lambda w: losses(w).mean())(w)
      ...     updates, state = tx.update(g, state, w, per_example_loss_fn=losses)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(abs(w - 1.0) < 0.3)
      True

    Differs from the authors' code in:
      1. Ties are broken by the examples' order and at least one example is kept; there
         all examples at the threshold are dropped, in the worst case the whole batch.
      2. The offset is zero if no leaf was drawn; there that step fails.
      3. With ``gamma >= 0.99`` the extra forward pass is not made.
      4. With ``axis_name`` devices select from their own examples and share the drawn
         leaves.

    References:
      Du et al., `Efficient Sharpness-aware Minimization for Improved Training of
      Neural Networks <https://arxiv.org/abs/2110.03141>`_, 2022; code:
      dydjw9/Efficient_SAM
    """
    gamma = check_number("gamma", gamma, 0.0, 1.0, open_low=True)
    check_static("gamma", gamma, "a Python number")
    engine = sharpness_aware(
        ascent.random_leaves(rho, beta, key),
        when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="esam",
    )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        per_example_loss_fn: Any = None,
        per_example_losses: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        params, whole = with_gradients(updates, params)
        losses_at = lambda p, *chosen: per_example_loss_fn(whole(p), *chosen)

        def selected_gradient(w_e: Any) -> Any:
            if gamma >= 0.99:
                return jax.grad(lambda p: jnp.mean(losses_at(p)))(w_e)
            chosen = selected(w_e)

            def mean_loss(p: Any) -> jax.Array:
                losses = losses_at(p, chosen)
                _check_selection(losses, chosen)
                return jnp.mean(losses)

            return jax.grad(mean_loss)(w_e)

        def selected(w_e: Any) -> jax.Array:
            # Both losses in one precision: of half-precision parameters w_e is wider.
            before = (
                losses_at(optax.tree.cast_like(params, w_e))
                if per_example_losses is None
                else per_example_losses
            )
            return _largest_rises(before, losses_at(w_e), gamma)

        if per_example_loss_fn is not None:
            if gamma < 0.99 and not takes(per_example_loss_fn, 2):
                raise ValueError(
                    "esam: per_example_loss_fn must take indices, the examples whose"
                    f" losses it computes. Write {_CALL}."
                )
            extra["grad_fn"] = selected_gradient
        elif gamma < 0.99 or extra.get("grad_fn") is None:
            raise MissingArgument(
                f"esam needs per_example_loss_fn: {_CALL}.{DROPPED}",
                "per_example_loss_fn",
            )
        return engine.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(engine.init, update)


def _check_selection(losses: jax.Array, chosen: jax.Array) -> None:
    """Refuses losses of other examples than the selected ones."""
    if jnp.shape(losses) != chosen.shape:
        raise ValueError(
            f"esam asked per_example_loss_fn for the losses at {len(chosen)} indices"
            f" and got an array of shape {jnp.shape(losses)}: it must compute those"
            " examples alone. Take them from the batch, as in"
            " x if indices is None else x[indices]."
        )


def _largest_rises(before: jax.Array, after: jax.Array, gamma: float) -> jax.Array:
    """The examples whose losses rise most, (k,) int32."""
    for losses in (before, after):
        if jnp.ndim(losses) != 1 or jnp.shape(losses) != jnp.shape(after):
            raise ValueError(
                "esam needs one loss per example, a vector; got losses of shape"
                f" {jnp.shape(before)} at params and {jnp.shape(after)} at the"
                f" perturbed ones. Write {_CALL}."
            )
    position = int(gamma * len(after))
    if position < 1:
        raise ValueError(
            f"gamma * B must be at least 1: gamma={gamma} keeps no example of"
            f" B={len(after)}. Write esam(gamma={1 / len(after):.3g}) or more, or take"
            " larger batches."
        )
    return jax.lax.top_k(after - before, max(1, position - 1))[1]
