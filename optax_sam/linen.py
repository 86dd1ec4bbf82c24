"""Flax Linen: a train state whose second gradient leaves the model's state alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam.contract import check_loss

try:
    from flax import struct
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        'optax_sam.linen needs Flax: pip install "optax_sam[flax]".'
    ) from error

__all__ = ["TrainState", "value_and_grad"]

_RETURN = (
    "Let the loss return what the clean pass wrote: logits, model_state ="
    ' model.apply({"params": params, **model_state}, x, mutable=list(model_state)),'
    " and hand it on: state.apply_gradients(grads=grads, grad_fn=grad_fn,"
    " model_state=model_state). To keep the old one, hand on state.model_state."
)


def value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Callable[[Any], Any]]]:
    r"""``jax.value_and_grad``, and the ``grad_fn`` of the same loss, batch and key.

    .. math::
      \text{value}, \; \nabla_w L(w, \text{args}), \;
      w' \mapsto \nabla_w L(w', \text{args})

    The loss, the metrics and the new model state are those of the clean pass. The
    perturbed pass gets the very arguments of the clean one, so the *old* running
    statistics and the same dropout key, and what it returns beside the loss is
    dropped; XLA then does not compute it.

    Args:
      loss_fn: function of the parameters and of anything else,
        ``loss_fn(params, model_state, batch, dropout_key)`` for instance, that returns
        the loss, () float; with ``has_aux``, ``(loss, aux)``.
      has_aux: whether there is ``aux``, a tree of anything: metrics, and the model's
        new state.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(value, grads,
      grad_fn)``. ``value`` is the loss, or ``(loss, aux)``; ``grad_fn`` is for
      ``apply_gradients`` or ``tx.update``.

    Raises:
      ValueError: on the call, if ``loss_fn`` returns a pair without ``has_aux``, or
        none with it.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam.linen
      >>> loss_fn = lambda w, x: (jnp.sum((w - x) ** 2), {"mean": w.mean()})
      >>> value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
      >>> (loss, metrics), grads, grad_fn = value_and_grad(jnp.ones(2), 3.0)
      >>> print(loss, metrics["mean"], grads, grad_fn(jnp.zeros(2)))
      8.0 1.0 [-4. -4.] [-6. -6.]
    """

    def value_and_grads(params: Any, *args: Any, **kwargs: Any) -> Any:
        def loss(params: Any) -> Any:
            return check_loss(loss_fn(params, *args, **kwargs), has_aux)

        def grad_fn(params: Any) -> Any:
            grads = jax.grad(loss, has_aux=has_aux)(params)
            return grads[0] if has_aux else grads

        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(params)
        return value, grads, grad_fn

    return value_and_grads


class TrainState(train_state.TrainState):
    """Flax's train state, whose ``apply_gradients`` reaches the optimizer.

    Flax's own takes every keyword for a field to replace, so that ``grad_fn`` never
    arrives. Here those that name a field do that, and all others go to ``tx.update``.
    Made by ``TrainState.create``; under ``jit``, ``scan``, donation, checkpoints and
    :func:`optax_sam.dispatch` it is one tree, as Flax's is.

    Attributes:
      step: number of steps taken, () int32.
      apply_fn: the model's ``apply``.
      params: the parameters.
      tx: the optimizer.
      opt_state: its state, for :func:`optax_sam.metrics` and the other readers (which
        also take the train state).
      model_state: all other collections of the model by name, such as
        ``{"batch_stats": ...}``; empty if there are none.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_sam.linen
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
      ...         x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
      ...         return nn.Dense(1)(x)
      >>> model, x, y = Net(), jnp.linspace(-1, 1, 6)[:, None], jnp.ones((6, 1))
      >>> variables = model.init(jax.random.key(0), x, train=False)
      >>> state = optax_sam.linen.TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=variables.pop("params"),
      ...     tx=optax.chain(optax_sam.sam(0.05), optax.sgd(0.1)),
      ...     model_state=variables,
      ... )
      >>> def loss_fn(params, model_state, x, y, key):
      ...     prediction, model_state = model.apply(
      ...         {"params": params, **model_state}, x, train=True,
      ...         mutable=list(model_state), rngs={"dropout": key})
      ...     return jnp.mean((prediction - y) ** 2), model_state
      >>> @jax.jit
      ... def train_step(state, x, y, key):
      ...     value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
      ...     (loss, model_state), grads, grad_fn = value_and_grad(
      ...         state.params, state.model_state, x, y, key)
      ...     return loss, state.apply_gradients(
      ...         grads=grads, grad_fn=grad_fn, model_state=model_state)
      >>> for i in range(30):
      ...     loss, state = train_step(state, x, y, jax.random.key(i))
      >>> print(bool(loss < 0.3), state.step, optax_sam.metrics(state)["ascents"])
      True 30 30
    """

    model_state: Any = struct.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: Any,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> TrainState:
        """A train state at step 0.

        Args:
          apply_fn: the model's ``apply``.
          params: the parameters, ``model.init(...)["params"]``.
          tx: the optimizer.
          **kwargs: further fields, above all ``model_state``: what ``model.init``
            returned beside the parameters.

        Returns:
          The state, with ``opt_state=tx.init(params)``.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        # Flax starts with a Python number, which is no buffer that can be donated.
        return state.replace(step=jnp.zeros((), jnp.int32))

    def apply_gradients(
        self,
        *,
        grads: Any,
        grad_fn: Callable[[Any], Any] | None = None,
        ascend: bool | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """One step of the optimizer.

        Args:
          grads: the gradients at ``params``.
          grad_fn: the gradients at other parameters on the same batch, from
            :func:`value_and_grad`. An optimizer that knows none ignores it, so that a
            baseline runs in the same loop.
          ascend: which kind of step to compile, for :func:`optax_sam.dispatch`; see
            :func:`optax_sam.sharpness_aware`.
          **kwargs: what names a field (``model_state``, or one of a subclass) replaces
            it; the rest are extra arguments of ``tx.update``.

        Returns:
          The train state after the step.

        Raises:
          ValueError: if the collections of ``model_state`` are not those that the
            train state holds, or if a collection is given as a keyword of its own.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: x for name, x in kwargs.items() if name in names}
        extra = {name: x for name, x in kwargs.items() if name not in names}
        _check_model_state(self.model_state, fields, extra)
        if grad_fn is not None:
            if OVERWRITE_WITH_GRADIENT in grads:
                grad_fn = _without_scales(grad_fn, self.params)
            extra["grad_fn"] = grad_fn
        if ascend is not None:
            extra["ascend"] = ascend
        tx = optax.with_extra_args_support(self.tx)
        update = functools.partial(tx.update, **extra)
        # Flax's method does the rest, since it knows what becomes of fp8 scales.
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **fields)
        return after.replace(tx=self.tx)


def _without_scales(grad_fn: Callable[[Any], Any], params: Any) -> Callable[[Any], Any]:
    """``grad_fn`` of what the optimizer sees: fp8 scales are none of its business."""
    return lambda weights: grad_fn({**params, "params": weights})["params"]


def _check_model_state(
    held: Any, fields: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    if not isinstance(held, Mapping):
        return
    for name in extra:
        if name in held:
            raise ValueError(
                f"{name} is a collection of model_state and no field of its own."
                f" {_RETURN}"
            )
    given = fields.get("model_state", {})
    found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
    if found != sorted(held):
        what = f"a model_state with {found}" if given else "none in model_state"
        raise ValueError(
            f"The train state holds the collections {sorted(held)}, but"
            f" apply_gradients got {what}. {_RETURN}"
        )
