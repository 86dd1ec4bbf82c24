"""Equinox: gradients of a model's floats; its state and other leaves stay as is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optax_sam.axes import mapped_axes
from optax_sam.value_and_grad import check_arguments, with_arguments
from optax_sam.value_and_grad import value_and_grad as of_pytrees

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "optax_sam.equinox needs Equinox: pip install equinox."
    ) from error

__all__ = ["grad_fn", "value_and_grad"]


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = eqx.is_inexact_array,
    axis_name: Any = None,
    loss_scale: Any = None,
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    """``eqx.filter_value_and_grad``, and the ``grad_fn`` of the same loss and batch.

    It is :func:`optax_sam.value_and_grad` for models with leaves that have no gradient:
    functions, strings, integers, arrays of integers. They stay as they are, and the
    gradients have ``None`` there. The state of a model (``eqx.nn.State``, such as of
    BatchNorm) is an argument of the loss and a part of ``aux``. The perturbed pass gets
    the *old* state, and the new state comes from the pass at the weights.

    Args:
      loss_fn: function of the model and of anything else, ``loss_fn(model, state, x, y,
        key)`` for instance, that returns the loss, () float; with ``has_aux``,
        ``(loss, aux)``, such as ``(loss, state)``.
      has_aux: whether there is ``aux``, a pytree of anything.
      wrt: which leaves have a gradient: a function of a leaf, or a pytree of bools, as
        in ``eqx.partition``. Make the optimizer's state for the same leaves.
      axis_name: as in :func:`optax_sam.value_and_grad`.
      loss_scale: as in :func:`optax_sam.value_and_grad`.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grads`` and ``grad_fn``
      are for ``tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array),
      grad_fn=grad_fn)``.

    Raises:
      ValueError: as :func:`optax_sam.value_and_grad`; on the call, if ``wrt`` selects
        no leaf.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, optax_sam
      >>> model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
      ...     2, axis_name="batch", mode="batch")
      >>> tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))
      >>> opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
      >>> def loss_fn(model, state, x):
      ...     normalize = jax.vmap(
      ...         model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
      ...     y, state = normalize(x, state)
      ...     return jnp.mean((y - x) ** 2), state
      >>> @eqx.filter_jit
      ... def train_step(model, state, opt_state, x):
      ...     value_and_grad = optax_sam.equinox.value_and_grad(loss_fn, has_aux=True)
      ...     (loss, state), grads, grad_fn = value_and_grad(model, state, x)
      ...     params = eqx.filter(model, eqx.is_inexact_array)
      ...     updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
      ...     return eqx.apply_updates(model, updates), state, opt_state, loss
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> for _ in range(30):
      ...     model, state, opt_state, loss = train_step(model, state, opt_state, x)
      >>> print(bool(loss < 0.1), optax_sam.metrics(opt_state)["ascents"])
      True 30
    """
    check_arguments(loss_fn, loss_scale)

    def value_and_grads(model: Any, *args: Any, **kwargs: Any) -> Any:
        params, of_params = _of_params(loss_fn, model, wrt)
        with_gradients = of_pytrees(
            of_params, has_aux, axis_name=axis_name, loss_scale=loss_scale
        )
        value, grads, gradients = with_gradients(params, *args, **kwargs)
        return value, grads, lambda model: gradients(_like(params, model))

    return value_and_grads


def grad_fn(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    has_aux: bool = False,
    wrt: Any = eqx.is_inexact_array,
    axis_name: Any = None,
    loss_scale: Any = None,
    **kwargs: Any,
) -> Callable[[Any], Any]:
    """The gradients of a loss as a function of the parameters alone.

    Use it instead of :func:`value_and_grad` in steps that compute the gradient at the
    weights by ``eqx.filter_value_and_grad``.

    Args:
      loss_fn: as in :func:`value_and_grad`.
      model: the model that ``loss_fn`` gets; its leaves without a gradient are used.
      *args: the further arguments of ``loss_fn``, with the *old* state of the model.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      wrt: as in :func:`value_and_grad`.
      axis_name: as in :func:`value_and_grad`.
      loss_scale: as in :func:`value_and_grad`.
      **kwargs: the keyword arguments of ``loss_fn``.

    Returns:
      A function of a model, or of its filtered leaves. It returns the gradients, with
      ``None`` for leaves without one.

    Raises:
      ValueError: as :func:`value_and_grad`.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, optax_sam
      >>> model = eqx.nn.MLP(2, "scalar", 8, 1, key=jax.random.key(0))
      >>> params = eqx.filter(model, eqx.is_inexact_array)
      >>> tx = optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))
      >>> loss_fn = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
      >>> x = jnp.ones((3, 2))
      >>> grads = eqx.filter_grad(loss_fn)(model, x)
      >>> grad_fn = optax_sam.equinox.grad_fn(loss_fn, model, x)
      >>> updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates.activation)
      None
    """
    check_arguments(loss_fn, loss_scale)
    # A state of a model is valid until it is set.
    args, kwargs = _copied(args), _copied(kwargs)
    params, of_params = _of_params(loss_fn, model, wrt)
    axes = mapped_axes(axis_name)
    _, gradients = with_arguments(of_params, args, kwargs, has_aux, axes, loss_scale)
    return lambda model: gradients(_like(params, model))[0]


def _of_params(
    loss_fn: Callable[..., Any], model: Any, wrt: Any
) -> tuple[Any, Callable[..., Any]]:
    """The leaves with a gradient, and the loss as a function of them."""
    params, rest = eqx.partition(model, wrt)
    if not jax.tree.leaves(params):
        raise ValueError(
            "wrt leaves no leaf of the model that has a gradient. Give the model as the"
            " first argument, loss_fn(model, batch), and wrt=eqx.is_inexact_array or a"
            f" pytree of bools like the model; got {type(model).__name__} and"
            f" wrt={wrt!r}."
        )

    def of_params(params: Any, *args: Any, **kwargs: Any) -> Any:
        model = eqx.combine(params, rest)
        return loss_fn(model, *_copied(args), **_copied(kwargs))

    return params, of_params


def _copied(tree: Any) -> Any:
    """A copy with the same leaves: ``eqx.nn.State.set`` invalidates its object."""
    return jax.tree.map(lambda x: x, tree)


def _like(params: Any, model: Any) -> Any:
    """The leaves with a gradient of a model, whose other leaves may be ``None``."""
    is_none = lambda x: x is None
    keep = lambda like, x: None if like is None else x
    return jax.tree.map(keep, params, model, is_leaf=is_none)
