"""Flax Linen: a train state that gives ``grad_fn`` to its optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import axes
from optax_sam.checks import with_extra_args
from optax_sam.value_and_grad import value_and_grad

try:
    from flax import struct
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError("optax_sam.linen needs Flax: pip install flax.") from error

__all__ = ["TrainState", "value_and_grad"]

# Collections of a model that each training step updates.
_COLLECTIONS = ("batch_stats",)
# The names of the running statistics in normalization layers.
_STATISTICS = {"mean", "var"}

_RETURN = (
    "Let the loss return the collections after the pass at w: logits, model_state ="
    ' model.apply({"params": params, **model_state}, x, mutable=list(model_state)),'
    " and pass it on: state.apply_gradients(grads=grads, grad_fn=grad_fn,"
    " model_state=model_state). To keep the old one, pass"
    " model_state=state.model_state."
)


class TrainState(train_state.TrainState):
    """Flax's train state with an ``apply_gradients`` that passes on ``grad_fn``.

    In Flax's class every keyword of ``apply_gradients`` replaces a field, so
    ``grad_fn`` never reaches the optimizer. Here a keyword replaces a field if it names
    one. All other keywords go to ``tx.update``. Make the state by
    ``TrainState.create``. It is one pytree, like Flax's, and works with ``jit``,
    ``scan``, donation, checkpoints and :func:`optax_sam.dispatch`.

    A subclass adds fields as usual, with or without a default: ``class
    TrainState(optax_sam.linen.TrainState): batch_stats: Any``. A step that forgets to
    update the running statistics raises an error.

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

    # Keyword-only, so that a subclass may have fields without a default.
    model_state: Any = struct.field(default_factory=dict, kw_only=True)

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
        # Flax starts with a Python number, which cannot be donated.
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
          grads: the gradients at ``params``; ``None`` for
            :func:`optax_sam.micro_sharpness`, which does not use them.
          grad_fn: the gradients at other parameters on the same batch, from
            :func:`value_and_grad`. An optimizer that does not use it ignores it, so a
            baseline runs in the same loop.
          ascend: which kind of step to compile, for :func:`optax_sam.dispatch`; see
            :func:`optax_sam.sharpness_aware`.
          **kwargs: a keyword that names a field (``model_state``, or a field of a
            subclass) replaces it. The rest are extra arguments of ``tx.update``.

        Returns:
          The train state after the step.

        Raises:
          ValueError: if a field with the model's state is missing among the keywords,
            or has other collections than before. Such fields are ``model_state``,
            ``batch_stats``, and one of the fields with running statistics under another
            name. To keep the old ones, pass them: ``batch_stats=state.batch_stats``.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: x for name, x in kwargs.items() if name in names}
        extra = {name: x for name, x in kwargs.items() if name not in names}
        _check_model_state(self.model_state, fields, extra)
        _check_statistics(self, fields)
        if grad_fn is not None:
            if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
                grad_fn = _without_scales(grad_fn, self.params)
            extra["grad_fn"] = grad_fn
        if ascend is not None:
            extra["ascend"] = ascend
        tx = with_extra_args(self.tx)
        update = functools.partial(tx.update, **extra)
        # Flax looks for fp8 scales in a bare array, too, or in None.
        if not isinstance(grads, Mapping):
            updates, opt_state = update(grads, self.opt_state, self.params)
            params = optax.apply_updates(self.params, updates)
            new: Any = dict(params=params, opt_state=opt_state, step=self.step + 1)
            return self.replace(**new, **fields)
        # Flax's method does the rest, because it knows how to update fp8 scales.
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **fields)
        return after.replace(tx=self.tx)


def _without_scales(grad_fn: Callable[[Any], Any], params: Any) -> Callable[[Any], Any]:
    """``grad_fn`` of the parameters that the optimizer gets, without fp8 scales."""
    return lambda weights: grad_fn({**params, "params": weights})["params"]


def _check_model_state(
    held: Any, fields: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    if not isinstance(held, Mapping):
        return
    for name in extra:
        if name in held:
            raise ValueError(
                f"{name} is a collection of model_state and not a field. {_RETURN}"
            )
    given = fields.get("model_state", {})
    found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
    if found != sorted(held):
        what = f"a model_state with {found}" if given else "none in model_state"
        raise ValueError(
            f"The train state holds the collections {sorted(held)}, but"
            f" apply_gradients got {what}. {_RETURN}"
        )


def _check_statistics(state: TrainState, given: Mapping[str, Any]) -> None:
    """Raises if the step updates no running statistics that a subclass holds.

    Several fields may hold statistics, for instance of an averaged model. Then the step
    must update ``batch_stats``, or else one of the fields.
    """
    base = {field.name for field in dataclasses.fields(TrainState)}
    own = [x.name for x in dataclasses.fields(state) if x.name not in base]
    held = {name: getattr(state, name) for name in own}
    held = {name: x for name, x in held.items() if _has_statistics(name, x)}
    wanted = [name for name in _COLLECTIONS if name in held] or list(held)
    for name in wanted:
        if name in given:
            _check_field(name, held[name], given[name])
    if wanted and not any(name in given for name in wanted):
        name = wanted[0]
        raise ValueError(
            f"The train state holds the running statistics {name}, but apply_gradients"
            f" got none, and would keep the old ones for ever. {_return(name)}"
        )


def _check_field(name: str, held: Any, given: Any) -> None:
    top = lambda x: sorted(x) if isinstance(x, Mapping) else type(x).__name__
    if top(given) != top(held):
        raise ValueError(
            f"{name} holds {top(held)}, but apply_gradients got {name} with"
            f" {top(given)}; give it the same fields. {_return(name)}"
        )


def _return(name: str) -> str:
    return (
        "Let the loss return the statistics after the pass at w: logits, updates ="
        f' model.apply({{"params": params, "{name}": state.{name}}}, x,'
        f' mutable=["{name}"]), and pass it on: state.apply_gradients(grads=grads,'
        f' grad_fn=grad_fn, {name}=updates["{name}"]), in place of a later'
        f" state.replace. To keep the old ones, pass {name}=state.{name}."
    )


def _has_statistics(name: str, x: Any) -> bool:
    """Whether a field holds what training mode updates: BatchNorm's mean and var."""
    if not jax.tree.leaves(x) or not (name in _COLLECTIONS or isinstance(x, Mapping)):
        return False
    if name in _COLLECTIONS or any(key in x for key in _COLLECTIONS):
        return True
    paths = [axes.names(path) for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]]
    return all(path and path[-1] in _STATISTICS for path in paths)
