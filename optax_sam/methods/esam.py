"""ESAM: efficient sharpness-aware minimization (Du et al., arXiv 2110.03141)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam.checks import DROPPED, MissingArgument, check_grad_fn, takes
from optax_sam.keys import check_key, raw_key
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Call, Descent, Step, ascent_rule
from optax_sam.schedules import at, check_number, check_schedule, check_static
from optax_sam.trees import norm, rescale

_CALL = (
    "tx.update(grads, opt_state, params,"
    " per_example_loss_fn=lambda params, indices=None: losses), which returns the (B,)"
    " losses of this step's examples, or of the examples at indices"
)


class RandomLeavesState(NamedTuple):
    """State of :func:`random_leaves`.

    Attributes:
      active: the leaves that move on the next perturbed step, (num_leaves,) bool.
      key: raw key data, (2,) uint32; the draw of a step is a function of it and the
        step.
    """

    active: jax.Array
    key: jax.Array


def random_leaves(
    rho: optax.ScalarOrSchedule, beta: ArrayLike = 0.6, key: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    r"""The ascent of :func:`optax_sam.esam`: an l2 ascent on randomly chosen leaves.

    .. math::
      e = \frac{\rho}{\beta}\, \frac{g_S}{\|g_S\| + 10^{-7}}, \qquad
      l \in S \text{ where } u_l \le \beta, \quad u_l \sim U(0, 1)

    The norm is over the chosen leaves. A leaf of stacked layers (``nn.scan``) moves as
    one, because the state holds one draw for each leaf. On the first step all leaves
    are chosen. Each step draws the leaves of the next one.

    Args:
      rho: radius of the ball, at least 0, or a schedule; the offset's norm is
        ``rho / beta``.
      beta: the probability that a leaf moves, in ``(0, 1]``.
      key: an int, a key from ``jax.random.key``, or raw key data, for the leaves. A
        random ``when`` needs another key, because the same draws would go with them.

    Returns:
      A transformation from a gradient to an offset; it needs ``count``. The extra
      argument ``mask_uniforms``, one number per leaf (a pytree like the parameters, or
      an array in the order of ``jax.tree.leaves``), replaces its draw.

    Raises:
      ValueError: if ``rho`` is negative, ``beta`` is not in ``(0, 1]``, or ``key`` is
        no key; on update, if ``mask_uniforms`` has another number of entries.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> rule = optax_sam.ascent.random_leaves(0.3, beta=0.6)
      >>> g = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> e, state = rule.update(g, rule.init(g), count=0, mask_uniforms=[0.2, 0.9])
      >>> print(e["a"], e["b"], state.active)
      [0.3] [0.4] [ True False]
    """
    rho = check_schedule("rho", rho, 0.0)
    beta = check_number("beta", beta, 0.0, 1.0, open_low=True)
    check_key(key)

    def init(params: Any) -> RandomLeavesState:
        leaves = len(jax.tree.leaves(params))
        return RandomLeavesState(jnp.ones(leaves, bool), raw_key(key))

    def update(g: Any, state: Any, params: Any, step: Step, /, **extra: Any) -> Any:
        leaves, structure = jax.tree.flatten(g)
        chosen = [
            jnp.where(active, x, 0)
            for x, active in zip(leaves, state.active, strict=True)
        ]
        radius = at(rho, step.count) / beta
        # The authors' 1e-7, ten thousand times what other methods add to a norm.
        e = rescale(chosen, norm(chosen), radius, eps=1e-7)
        if (given := extra.get("mask_uniforms")) is None:
            uniforms = jax.random.uniform(step.key(state.key), state.active.shape)
        else:
            flat = [jnp.ravel(jnp.asarray(u)) for u in jax.tree.leaves(given)]
            uniforms = jnp.concatenate(flat)
            if uniforms.shape != state.active.shape:
                raise ValueError(
                    f"mask_uniforms must hold one number for each of the"
                    f" {len(leaves)} leaves of the parameters; got {uniforms.size}."
                )
        return jax.tree.unflatten(structure, e), state._replace(active=uniforms <= beta)

    return ascent_rule(update, init)


@method(random_leaves)
def esam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    beta: ArrayLike = 0.6,
    gamma: float = 0.5,
    key: ArrayLike = 0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""ESAM: perturbs random leaves, then uses the examples whose losses rise most.

    Stochastic weight perturbation (SWP) moves each leaf with probability beta.
    Sharpness-sensitive data selection (SDS) keeps the examples whose losses rise most.
    Their number is static, so the perturbed gradient runs on a part of the batch:

    .. math::
      e = \frac{\rho}{\beta}\, \frac{g_S}{\|g_S\|}, \qquad
      s_i = L_i(w + e) - L_i(w), \qquad
      d = \nabla \frac1k \sum_{i \in \text{top-}k(s)} L_i(w + e)

    with :math:`k = \max(1, \lfloor \gamma B \rfloor - 1)` of :math:`B` examples. The
    authors' code also keeps this number, because it compares each loss with the
    :math:`\lfloor \gamma B \rfloor`-th. From ``gamma = 0.99`` on all examples are kept.
    ``beta=1, gamma=1`` is SAM. SWP saves nothing under ``jit``, since a random mask
    cannot skip work.

    ``update`` needs ``per_example_loss_fn(params, indices=None) -> losses`` instead of
    ``grad_fn``. It returns the losses, (B,), of this step's examples. With ``indices``,
    (k,), it must compute the losses of these examples and no others. Add terms such as
    an L2 penalty to the loss of every example. If you have the losses at ``params``
    from the gradient at ``w``, pass them as ``per_example_losses``: in large models XLA
    does not notice that they are computed already. From ``gamma = 0.99`` on ``grad_fn``
    alone is enough.

    If the batch is sharded under ``jit``, place the selected examples again in
    ``per_example_loss_fn``. Otherwise all devices compute all of them. Write
    ``jax.lax.with_sharding_constraint(x[indices], NamedSharding(mesh, P("data")))``
    and set ``gamma=0.5 + 1 / B``. This keeps half of the batch, which the devices can
    divide.

    Cost: 1 gradient, 1 forward pass and a gradient of ``k`` examples per perturbed
    step, which is 1.82 gradients for ``gamma=0.5``; 1 on other steps; one bool for each
    leaf, a key and a few scalars of state.

    Args:
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step; the offset's norm is ``rho / beta``.
      gamma: the share of the examples that the perturbed gradient sees, in ``(0, 1]``,
        at least one example.

    Returns:
      A transformation for the first place in an ``optax.chain``. Its ``update`` needs
      ``per_example_loss_fn``. The extra argument ``mask_uniforms``, one number per
      leaf, replaces the draw of the leaves that move on the next step.

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
    # From here on the authors take all examples.
    takes_all = gamma >= 0.99

    def check(name: str, grad_fn: Any, extra: dict[str, Any]) -> None:
        losses_fn = extra.get("per_example_loss_fn")
        if losses_fn is None:
            if takes_all and grad_fn is not None:
                check_grad_fn(name, grad_fn)
                return
            raise MissingArgument(
                f"esam needs per_example_loss_fn: {_CALL}.{DROPPED}",
                "per_example_loss_fn",
            )
        if not takes_all and not takes(losses_fn, 2):
            raise ValueError(
                "esam: per_example_loss_fn must take indices, the examples whose"
                f" losses it computes. Write {_CALL}."
            )

    def selected_gradient(w_e: Any, call: Call) -> Any:
        """The gradient of the examples whose losses rise most."""
        losses_fn = call.extra.get("per_example_loss_fn")
        if losses_fn is None:
            return call.gradient(w_e)
        losses_at = lambda p, *chosen: losses_fn(call.whole(p), *chosen)

        def mean_loss(p: Any, *chosen: jax.Array) -> jax.Array:
            losses = losses_at(p, *chosen)
            if chosen:
                _check_selection(losses, *chosen)
            return jnp.mean(losses)

        def mean_gradient(w_e: Any) -> Any:
            chosen = () if takes_all else (selected(w_e),)
            return jax.grad(mean_loss)(w_e, *chosen)

        def selected(w_e: Any) -> jax.Array:
            # Both losses in one precision: w_e is wider than half-precision parameters.
            before = call.extra.get("per_example_losses")
            if before is None:
                before = losses_at(optax.tree.cast_like(call.params, w_e))
            return _largest_rises(before, losses_at(w_e), gamma)

        return call.taken(mean_gradient, w_e)

    rule, descent = random_leaves(rho, beta, key), Descent(selected_gradient, check)
    return on_engine("esam", options, ascent=rule, descent=descent)


def _check_selection(losses: jax.Array, chosen: jax.Array) -> None:
    """Refuses losses of other examples than the selected ones."""
    if jnp.shape(losses) != chosen.shape:
        raise ValueError(
            f"esam asked per_example_loss_fn for the losses at {len(chosen)} indices"
            f" and got an array of shape {jnp.shape(losses)}: compute the losses of"
            " these examples alone. Take them from the batch, as in"
            " x if indices is None else x[indices]."
        )


def _largest_rises(before: jax.Array, after: jax.Array, gamma: float) -> jax.Array:
    """The examples whose losses rise most, (k,) int32."""
    for losses in (before, after):
        if jnp.ndim(losses) != 1 or jnp.shape(losses) != jnp.shape(after):
            raise ValueError(
                "esam needs one loss per example, a vector; got losses of shape"
                f" {jnp.shape(before)} at params and {jnp.shape(after)} at the"
                f" perturbed parameters. Write {_CALL}."
            )
    position = int(gamma * len(after))
    if position < 1:
        raise ValueError(
            f"gamma * B must be at least 1: gamma={gamma} keeps no example of"
            f" B={len(after)}. Write esam(gamma={1 / len(after):.3g}) or more, or take"
            " larger batches."
        )
    return jax.lax.top_k(after - before, max(1, position - 1))[1]
