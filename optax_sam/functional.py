"""Functional-SAM: SAM that keeps the loss's gradient by the outputs at ``w``.

It is SAM's step with another ``grad_fn`` (Singh et al., arXiv 2502.02407, ICML 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from optax_sam.axes import mapped_axes, mean, mean_of_aux, on_device
from optax_sam.checks import is_perturbable
from optax_sam.loss_scale import check_loss_scale
from optax_sam.value_and_grad import averaged, check_parameters, to_differentiate


def functional_value_and_grad(
    apply_fn: Callable[..., Any],
    loss_of_outputs: Callable[..., Any],
    has_aux: bool = False,
    *,
    axis_name: Any = None,
    loss_scale: Any = None,
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    r"""Functional-SAM: the loss, its gradient, and a ``grad_fn`` for any method.

    The loss is :math:`L(w) = \ell(f(w))`. The network :math:`f` gives outputs, the
    logits, and :math:`\ell` is a loss of these. :math:`J(w)` is the Jacobian of
    :math:`f`. The gradient at ``w`` is the ordinary one. The perturbed gradient uses
    the gradient of the loss with respect to the outputs at ``w``:

    .. math::
      c = \nabla \ell(f(w)), \qquad g = J(w)^T c, \qquad
      g_s = J(w + e)^T c

    SAM uses :math:`J(w + e)^T \nabla \ell(f(w + e))`, so it also changes :math:`c`.
    This change lowers the measured sharpness through the size of the logits and not
    through the function. In language models it dominates, and SAM alone harms them.

    Use it like :func:`optax_sam.value_and_grad`, with any method that takes
    ``grad_fn``. ``grad_fn(p)`` is :math:`J(p)^T c` at all points ``p``, also between
    several ascent steps. Both passes get the same arguments: the *old* running
    statistics and the same dropout key. The ``aux`` of the perturbed pass is dropped.
    m-SAM calls it on each shard, under ``jax.vmap`` or ``shard_map`` with the
    ``axis_name`` of the method.

    A perturbed gradient costs as much as in SAM, less the loss and the forward pass of
    the last layer. :math:`c`, an array like the outputs, is kept until then.

    Args:
      apply_fn: function of the parameters and of anything else,
        ``apply_fn(params, model_state, batch, dropout_key)`` for instance, that returns
        the outputs, a pytree of floats; with ``has_aux``, ``(outputs, aux)``.
      loss_of_outputs: function of the outputs and of the same other arguments that
        returns the loss, () float.
      has_aux: whether there is ``aux``, a pytree of anything: the model's new state.
      axis_name: see :func:`optax_sam.value_and_grad`.
      loss_scale: see :func:`optax_sam.value_and_grad`; :math:`c` is scaled, too.

    Returns:
      A function with the arguments of ``apply_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grad_fn`` is for
      ``tx.update(grads, opt_state, params, grad_fn=grad_fn)``.

    Raises:
      ValueError: if ``apply_fn`` or ``loss_of_outputs`` is no function; on the call, if
        an output is not a real float; otherwise as :func:`optax_sam.value_and_grad`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> apply_fn = lambda w, x: jnp.tanh(x @ w)
      >>> loss_of_outputs = lambda z, x: jnp.mean((z - 1.0) ** 2)
      >>> both = optax_sam.functional_value_and_grad(apply_fn, loss_of_outputs)
      >>> tx = optax.chain(optax_sam.sam(0.1), optax.sgd(0.1))
      >>> w, x = jnp.zeros(3), jnp.eye(3)
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     loss, grads, grad_fn = both(w, x)
      ...     updates, state = tx.update(grads, state, w, grad_fn=grad_fn)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss < 0.3)
      True

    Differs from the authors' code in:
      1. Their code is not public. The formula is the paper's.

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, 2025
    """
    if not (callable(apply_fn) and callable(loss_of_outputs)):
        raise ValueError(
            "functional_value_and_grad takes two functions, the network's and the"
            " loss's: write functional_value_and_grad(apply_fn, loss_of_outputs)"
            "(params, batch), where loss_of_outputs(apply_fn(params, batch), batch) is"
            f" the loss; got {apply_fn!r} and {loss_of_outputs!r}."
        )
    if loss_scale is not None:
        check_loss_scale(loss_scale)

    def value_and_grads(
        params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Callable[[Any], Any]]:
        axes = mapped_axes(axis_name)
        objective = to_differentiate(loss_of_outputs, False, loss_scale)

        def network(params: Any) -> tuple[Any, Any]:
            found = apply_fn(on_device(params, axes), *args, **kwargs)
            return _checked(found, has_aux)

        def linearized(params: Any) -> tuple[Any, Callable[[Any], Any], Any]:
            check_parameters(params, axes)
            return jax.vjp(network, params, has_aux=True)

        def gradients(outputs: Any, pull_back: Callable[[Any], Any]) -> Any:
            # Perturbed weights may have a wider dtype than w, and so may the outputs.
            (grads,) = pull_back(optax.tree.cast_like(cotangent, outputs))
            return averaged(grads, loss, axes, loss_scale)

        outputs, pull_back, aux = linearized(params)
        cotangent, (loss, _) = jax.grad(objective, has_aux=True)(
            outputs, *args, **kwargs
        )
        value = mean(loss, axes)
        if has_aux:
            outside = lambda: jax.make_jaxpr(network)(params).consts
            value = value, mean_of_aux(aux, [*args, *kwargs.values()], axes, outside)
        grads = gradients(outputs, pull_back)
        return value, grads, lambda params: gradients(*linearized(params)[:2])

    return value_and_grads


def _checked(found: Any, has_aux: bool) -> tuple[Any, Any]:
    """The outputs, real floats alone, and ``aux``."""
    if has_aux and not (isinstance(found, (tuple, list)) and len(found) == 2):
        raise ValueError(
            "With has_aux=True apply_fn must return (outputs, aux); got a"
            f" {type(found).__name__}."
        )
    outputs, aux = found if has_aux else (found, None)
    for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
        if not is_perturbable(leaf):
            kind = getattr(leaf, "dtype", None) or f"a {type(leaf).__name__}"
            raise ValueError(
                "apply_fn must return the inputs of the loss, real floats such as"
                f" logits, but {jax.tree_util.keystr(path) or 'its output'} is"
                f" {kind}. Return (outputs, aux) and set has_aux=True."
            )
    return outputs, aux
