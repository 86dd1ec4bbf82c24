"""Flax NNX: a perturbed pass that mutates nothing and uses the same dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optax_sam.axes import Axes, mapped_axes, mean, mean_of_aux, on_device
from optax_sam.checks import is_perturbable
from optax_sam.value_and_grad import (
    averaged,
    check_arguments,
    check_parameters,
    to_differentiate,
)

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("optax_sam.nnx needs Flax: pip install flax.") from error

__all__ = ["grad_fn", "value_and_grad"]


# Variables of a module that are not statistics, or that may differ between devices.
_OTHERS = (nnx.Param, nnx.RngState, nnx.Intermediate)


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    wrt: Any = nnx.Param,
    axis_name: Any = None,
    loss_scale: Any = None,
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    """``nnx.value_and_grad``, and the ``grad_fn`` of the same loss, batch and masks.

    It is :func:`optax_sam.value_and_grad` for modules. The pass at the weights updates
    the model as always: statistics of BatchNorm, counts of ``nnx.Rngs``. The perturbed
    pass runs on a copy of the model from *before* that pass. It uses the old statistics
    and the same dropout masks, and does not change the model.

    Args:
      loss_fn: function of the model and of anything else, ``loss_fn(model, batch)`` for
        instance, that returns the loss, () float; with ``has_aux``, ``(loss, aux)``.
        Everything that it changes must be an argument: the model, an ``nnx.Rngs``.
      has_aux: whether the loss returns ``aux``, a pytree of anything, such as metrics.
      wrt: filter for the variables to differentiate, the one of ``nnx.Optimizer``.
      axis_name: as in :func:`optax_sam.value_and_grad`, for steps inside ``nnx.pmap``,
        ``nnx.shard_map``, ``jax.pmap`` or ``jax.shard_map``. The model's statistics are
        averaged over the devices too.
      loss_scale: as in :func:`optax_sam.value_and_grad`.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grads`` and ``grad_fn``
      are for ``nnx.Optimizer.update``.

    Raises:
      ValueError: as :func:`optax_sam.value_and_grad`; on the call, if the first
        argument is no module.

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
    check_arguments(loss_fn, loss_scale)

    def value_and_grads(model: Any, *args: Any, **kwargs: Any) -> Any:
        axes = mapped_axes(axis_name)
        # First, because the pass at the weights changes what this captures.
        perturbed = _gradients(loss_fn, model, args, kwargs, has_aux, axes, loss_scale)
        of_model_itself = {id(x) for x in jax.tree.leaves(nnx.state(model))}
        params = jax.tree.map(lambda x: x, nnx.state(model, wrt))  # not the live ones

        def outside() -> list[Any]:
            """The arrays that loss_fn takes from outside: constants of its jaxpr."""
            found = jax.make_jaxpr(perturbed)(params).consts
            return [x for x in found if id(x) not in of_model_itself]

        check_parameters(params, axes)
        objective = to_differentiate(loss_fn, has_aux, loss_scale)

        def of_model(model: Any, args: Any, kwargs: Any) -> Any:
            if axes.tracked:
                nnx.update(model, on_device(nnx.state(model, wrt), axes))
            return objective(model, *args, **kwargs)

        of_params = nnx.value_and_grad(
            of_model, argnums=nnx.DiffState(0, wrt), has_aux=True
        )
        (_, (loss, aux)), grads = of_params(model, args, kwargs)
        if axes.tracked:
            nnx.update(model, params)  # not those of one device
        value = mean(loss, axes)
        if axes.names:
            statistics = nnx.state(model, nnx.Not(nnx.Any(wrt, *_OTHERS)))
            average = lambda x: mean(x, axes) if is_perturbable(x) else x
            nnx.update(model, jax.tree.map(average, statistics))
        if has_aux:
            given = [*args, *kwargs.values()]
            value = value, mean_of_aux(aux, given, axes, outside)
        return value, averaged(grads, loss, axes, loss_scale), perturbed

    return value_and_grads


def grad_fn(
    loss_fn: Callable[..., Any],
    model: Any,
    *args: Any,
    has_aux: bool = False,
    axis_name: Any = None,
    loss_scale: Any = None,
    **kwargs: Any,
) -> Callable[[Any], Any]:
    """The gradients of a loss as a function of the parameters alone.

    Use it instead of :func:`value_and_grad` in steps that write the pass at the weights
    themselves. **Call it before that pass.** It captures the model as it is now; a
    later model has other statistics and draws other dropout masks. ``loss_fn`` changes
    only copies, also of an ``nnx.Rngs`` among the arguments.

    Args:
      loss_fn: as in :func:`value_and_grad`.
      model: the module that ``loss_fn`` gets.
      *args: the further arguments of ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: as in :func:`value_and_grad`.
      loss_scale: as in :func:`value_and_grad`.
      **kwargs: the keyword arguments of ``loss_fn``.

    Returns:
      A function of a state of parameters, for any ``wrt`` of the optimizer. It returns
      the gradients in the same structure.

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
    check_arguments(loss_fn, loss_scale)
    axes = mapped_axes(axis_name)
    return _gradients(loss_fn, model, args, kwargs, has_aux, axes, loss_scale)


def _gradients(
    loss_fn: Callable[..., Any],
    model: Any,
    args: Any,
    kwargs: Any,
    has_aux: bool,
    axes: Axes,
    loss_scale: Any,
) -> Callable[[Any], Any]:
    if not isinstance(model, nnx.Module):
        raise ValueError(
            "The first argument must be the module, as in loss_fn(model, batch); got"
            f" {type(model).__name__}. With a graphdef and a state, merge"
            " them before: model = nnx.merge(graphdef, state)."
        )
    # The arguments too: the pass at the weights also changes an nnx.Rngs among them.
    graphdef, state = nnx.split((model, args, kwargs))
    # New variables, in case those in the state are the live ones.
    state = jax.tree.map(lambda x: x, state)
    objective = to_differentiate(loss_fn, has_aux, loss_scale)

    def of_params(params: Any) -> Any:
        model, args, kwargs = nnx.merge(graphdef, state, copy=True)
        nnx.update(model, on_device(params, axes))
        return objective(model, *args, **kwargs)

    def grads_at(params: Any) -> Any:
        check_parameters(params, axes)
        grads, (loss, _) = jax.grad(of_params, has_aux=True)(params)
        return averaged(grads, loss, axes, loss_scale)

    return grads_at
