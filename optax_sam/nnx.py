"""Flax NNX: a second gradient that mutates nothing and draws the same dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optax_sam.contract import check_loss

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        'optax_sam.nnx needs Flax: pip install "optax_sam[flax]".'
    ) from error

__all__ = ["grad_fn", "value_and_grad"]


def value_and_grad(
    loss_fn: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    """``nnx.value_and_grad``, and the ``grad_fn`` of the same loss, batch and masks.

    The clean pass updates the model, as always: statistics of BatchNorm, counts of
    ``nnx.Rngs``. The perturbed pass starts from what these were *before* the clean
    one, on a copy that is thrown away: it uses the old statistics, draws the same
    dropout masks, and leaves no trace.

    Args:
      loss_fn: function of the model and of anything else, ``loss_fn(model, batch)`` for
        instance, that returns the loss, () float; with ``has_aux``, ``(loss, aux)``.
        What it changes must come as an argument: the model, an ``nnx.Rngs``.
      wrt: filter for the variables to differentiate, that of the ``nnx.Optimizer``.
      has_aux: whether the loss returns ``aux``, a tree of anything, such as metrics.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grads`` and ``grad_fn``
      are for ``nnx.Optimizer.update``.

    Raises:
      ValueError: on the call, if ``loss_fn`` returns a pair without ``has_aux``, or
        none with it, or if the first argument is no module.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(1, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu,
      ...     nnx.Dropout(0.2, rngs=rngs), nnx.Linear(8, 1, rngs=rngs))
      >>> tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     value_and_grad = optax_sam.nnx.value_and_grad(loss_fn)
      ...     loss, grads, grad_fn = value_and_grad(model, x, y)
      ...     optimizer.update(model, grads, grad_fn=grad_fn)
      ...     return loss
      >>> x, y = jnp.linspace(-1, 1, 6)[:, None], jnp.ones((6, 1))
      >>> for _ in range(30):
      ...     loss = train_step(model, optimizer, x, y)
      >>> bool(loss < 0.3), int(optax_sam.metrics(optimizer.opt_state)["ascents"])
      (True, 30)
    """

    def value_and_grads(model: Any, *args: Any) -> Any:
        # First: the clean pass moves on what this captures.
        perturbed = grad_fn(loss_fn, model, *args, has_aux=has_aux)
        loss = lambda *args: check_loss(loss_fn(*args), has_aux)
        value, grads = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, wrt), has_aux=has_aux
        )(model, *args)
        return value, grads, perturbed

    return value_and_grads


def grad_fn(
    loss_fn: Callable[..., Any], model: Any, *args: Any, has_aux: bool = False
) -> Callable[[Any], Any]:
    """The gradients of a loss as a function of the parameters alone.

    The part of :func:`value_and_grad` that is its own, for steps with a clean pass of
    their own. **Call it before the clean pass**: it captures the model as it is now,
    and a later one has other statistics and draws other dropout masks. What
    ``loss_fn`` changes, also in an ``nnx.Rngs`` among the arguments, is changed on
    copies.

    Args:
      loss_fn: as in :func:`value_and_grad`.
      model: the module that ``loss_fn`` gets.
      *args: its further arguments.
      has_aux: whether it returns ``(loss, aux)``.

    Returns:
      A function of a state of parameters, of any ``wrt`` that the optimizer has, which
      returns the gradients in the same structure.

    Raises:
      ValueError: as :func:`value_and_grad`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss_fn = lambda model, x: jnp.sum(model(x) ** 2)
      >>> x = jnp.ones((3, 2))
      >>> grad_fn = optax_sam.nnx.grad_fn(loss_fn, model, x)
      >>> grads = nnx.grad(loss_fn)(model, x)
      >>> _ = optimizer.update(model, grads, grad_fn=grad_fn)
      >>> print(optax_sam.metrics(optimizer.opt_state)["ascents"])
      1
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            "loss_fn takes the module first, as in loss_fn(model, batch), and so does"
            f" this; got {type(model).__name__}. With a graphdef and a state, merge"
            " them before: model = nnx.merge(graphdef, state)."
        )
    # The arguments too: an nnx.Rngs among them also moves on in the clean pass.
    graphdef, state = nnx.split((model, args))
    # New variables, in case those in the state are the live ones.
    state = jax.tree.map(lambda x: x, state)

    def grads_at(params: Any) -> Any:
        def loss(params: Any) -> Any:
            model, args = nnx.merge(graphdef, state, copy=True)
            nnx.update(model, params)
            return check_loss(loss_fn(model, *args), has_aux)

        grads = jax.grad(loss, has_aux=has_aux)(params)
        return grads[0] if has_aux else grads

    return grads_at
