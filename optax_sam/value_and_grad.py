"""A loss, its gradients, and the function that computes them at other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_sam.axes import Axes, mapped_axes, mean, mean_of_aux, on_device, varying
from optax_sam.checks import check_loss, is_perturbable
from optax_sam.loss_scale import check_loss_scale, scale_of
from optax_sam.trees import wide


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    axis_name: Any = None,
    loss_scale: Any = None,
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    r"""``jax.value_and_grad``, and the ``grad_fn`` of the same loss, batch and key.

    .. math::
      \text{value}, \; \nabla_w L(w, \text{args}), \;
      w' \mapsto \nabla_w L(w', \text{args})

    The loss, the metrics and the new state of the model come from the pass at ``w``.
    The pass at the perturbed weights gets the same arguments: the *old* running
    statistics and the same dropout key. Its other results are dropped, so XLA does not
    compute them.

    Args:
      loss_fn: function of the parameters and of anything else,
        ``loss_fn(params, model_state, batch, dropout_key)`` for instance, that returns
        the loss, () float; with ``has_aux``, ``(loss, aux)``. It must not average its
        results over the devices. It may average inside, as batch normalization over all
        devices does.
      has_aux: whether there is ``aux``, a pytree of anything: metrics, and the model's
        new state.
      axis_name: name, or tuple of names, of the mapped axis (``pmap``, ``shard_map``)
        over which the batch is split. Both gradients and the loss are then means over
        the devices, and so are the floats of ``aux``: metrics and running statistics.
        Integers, and arrays with one row per example, such as logits, stay local to the
        device. Put running statistics that may be as long as these rows under
        ``"batch_stats"``, so that they are not taken for rows. All devices use one
        perturbation, so the method gets no ``axis_name``.
      loss_scale: factor of the loss in the backward pass: a number > 0, a scalar array,
        or an object with such a ``scale``, such as Flax's ``DynamicScale``; see
        :func:`optax_sam.update_loss_scale`. Both gradients are divided by it
        afterwards. The value is not scaled. Gradients of half precision become float32.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grad_fn`` is for
      ``tx.update(grads, opt_state, params, grad_fn=grad_fn)``.

    Raises:
      ValueError: if ``loss_fn`` is no function or ``loss_scale`` no scale; on the call,
        if ``loss_fn`` returns a pair without ``has_aux``, no pair with it, or a loss
        that is no scalar; if a parameter is not a real float; if ``axis_name`` is no
        mapped axis, or if the parameters differ along it.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> loss_fn = lambda w, x: (jnp.sum((w - x) ** 2), {"mean": w.mean()})
      >>> value_and_grad = optax_sam.value_and_grad(loss_fn, has_aux=True)
      >>> (loss, metrics), grads, grad_fn = value_and_grad(jnp.ones(2), 3.0)
      >>> print(loss, metrics["mean"], grads, grad_fn(jnp.zeros(2)))
      8.0 1.0 [-4. -4.] [-6. -6.]
    """
    check_arguments(loss_fn, loss_scale)

    def value_and_grads(
        params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Callable[[Any], Any]]:
        axes = mapped_axes(axis_name)
        of_params, gradients = with_arguments(
            loss_fn, args, kwargs, has_aux, axes, loss_scale
        )
        grads, (loss, aux) = gradients(params)
        value = mean(loss, axes)
        if has_aux:
            # Inputs that loss_fn takes from outside are constants of its jaxpr.
            outside = lambda: jax.make_jaxpr(lambda p: of_params(p)[0])(params).consts
            value = value, mean_of_aux(aux, [*args, *kwargs.values()], axes, outside)
        return value, grads, lambda params: gradients(params)[0]

    return value_and_grads


# What the helpers of the frameworks share.


def check_arguments(loss_fn: Any, loss_scale: Any) -> None:
    """Raises unless the loss is a function and the scale is valid."""
    if not callable(loss_fn):
        raise ValueError(
            "value_and_grad takes the loss function and returns a function: write"
            " value_and_grad(loss_fn)(params, batch), where loss_fn(params, batch) is"
            f" the loss; got {loss_fn!r}."
        )
    if loss_scale is not None:
        check_loss_scale(loss_scale)


def check_parameters(params: Any, axes: Axes) -> None:
    """Raises unless all leaves are real floats, and the same along the axes."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        where = jax.tree_util.keystr(path) or "the root"
        if not is_perturbable(leaf):
            kind = getattr(leaf, "dtype", None) or f"a {type(leaf).__name__}"
            raise ValueError(
                f"The parameter at {where} is {kind}, but only real floats have a"
                " gradient. Keep the others out of the parameters: pass them to"
                " loss_fn as a further argument. For Equinox models there is"
                " optax_sam.equinox.value_and_grad."
            )
        for name in axes.tracked:
            if name in varying(jnp.asarray(leaf)):
                raise ValueError(
                    f"axis_name={name!r} averages over the devices, but the parameter"
                    f" at {where} varies over that axis. Pass the parameters as they"
                    " come in with in_specs=P() to value_and_grad and to update, not"
                    " the result of jax.lax.pcast. Give axis_name either to"
                    " value_and_grad (one perturbation for all devices) or to the"
                    " method (one per device), not to both. If each device has a part"
                    " of the parameters (FSDP), use optax_sam.value_and_grad without"
                    " axis_name, and in the loss"
                    f" return jax.lax.pmean(loss, {name!r})."
                )


def with_arguments(
    loss_fn: Callable[..., Any],
    args: Any,
    kwargs: Any,
    has_aux: bool,
    axes: Axes,
    loss_scale: Any,
) -> tuple[Callable[[Any], Any], Callable[[Any], tuple[Any, Any]]]:
    """The function to differentiate and its gradients, of the parameters alone."""
    objective = to_differentiate(loss_fn, has_aux, loss_scale)

    def of_params(params: Any) -> Any:
        return objective(on_device(params, axes), *args, **kwargs)

    def gradients(params: Any) -> tuple[Any, Any]:
        check_parameters(params, axes)
        grads, value = jax.grad(of_params, has_aux=True)(params)
        return averaged(grads, value[0], axes, loss_scale), value

    return of_params, gradients


def to_differentiate(
    loss_fn: Callable[..., Any], has_aux: bool, loss_scale: Any
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, Any]]]:
    """The scaled loss of this device, and beside it the loss and ``aux``."""

    def objective(*args: Any, **kwargs: Any) -> Any:
        value = check_loss(loss_fn(*args, **kwargs), has_aux)
        loss, aux = value if has_aux else (value, None)
        if jnp.shape(loss) != ():
            raise ValueError(
                "The loss must be a scalar, but loss_fn returned an array of shape"
                f" {jnp.shape(loss)}. Return the mean over the examples:"
                " jnp.mean(loss)."
            )
        if loss_scale is None:
            return loss, (loss, aux)
        # Scaled numbers would overflow and underflow in half precision.
        scaled = wide(jnp.asarray(loss))
        return scaled * scale_of(loss_scale).astype(scaled.dtype), (loss, aux)

    return objective


def averaged(grads: Any, loss: jax.Array, axes: Axes, loss_scale: Any) -> Any:
    """The mean over the devices of gradients, without the scale.

    If JAX tracks what varies, the transpose of the cast in ``on_device`` has summed
    over the devices, once for each device with a separate loss.
    """
    summed = [n for n in axes.tracked if n in varying(jnp.asarray(loss))]
    count = math.prod(jax.lax.axis_size(n) for n in summed)

    def one(g: jax.Array) -> jax.Array:
        if loss_scale is not None:
            g = wide(g)
            g = g / scale_of(loss_scale).astype(g.dtype)
        return mean(g / count if summed else g, axes)

    return jax.tree.map(one, grads)
