"""The loss, the chosen leaves and the data, from which every measure starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam import axes
from optax_sam.masks import Mask
from optax_sam.sharpness.data import Data, Stacked, data_of
from optax_sam.sharpness.loss_check import check_loss
from optax_sam.sharpness.weights import arrays, fill, weights_of, zeros
from optax_sam.trees import wide

LossFn = Callable[[Any, Any], jax.Array]  # (params, batch) -> mean loss of the batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss as a function of the chosen leaves, and the batches to evaluate it on.

    Attributes:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch.
      params: all parameters, as the user gave them.
      w: the chosen leaves, in float32 or wider; ``None`` in the place of the others.
      axis_name: the mapped axis over which the batches are spread, or ``None``.
      data: the batches.
      compiled: the programs for one batch of the host, by function. They live as long
        as the objective, because they keep the values that the loss closes over.
      checked: the loss, once its program was looked at. Another objective looks again,
        because what the loss closes over may have changed.
    """

    loss_fn: LossFn
    params: Any
    w: Any
    axis_name: Any = None
    data: Data = cast(Data, None)
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)
    checked: list[Any] = dataclasses.field(default_factory=list)

    @property
    def on_host(self) -> bool:
        """Whether a pass over the batches is a loop of Python."""
        return self.data.on_host

    def params_at(self, w: Any) -> Any:
        """The parameters with ``w`` in the place of the chosen leaves."""
        return fill(w, self.params)

    def like_params(self, vector: Any) -> Any:
        """A vector of the chosen leaves as a pytree of all, with zeros elsewhere."""
        return fill(vector, jax.tree.map(zeros, self.params))

    def check(self, batch: Any) -> None:
        """Warns about a loss, as :func:`check_loss` does."""
        if not self.checked:
            self.checked.append(self.loss_fn)
            check_loss(self.loss_fn, self.params, batch)

    def loss(self, w: Any, batch: Any) -> jax.Array:
        """The mean loss of one batch, with ``w`` in the place of the chosen leaves."""
        self.check(batch)
        value = self.loss_fn(self.params_at(w), batch)
        if not isinstance(value, (jax.Array, np.ndarray, float)) or jnp.shape(value):
            typed = lambda x: jax.typeof(x) if isinstance(x, jax.Array) else x
            what = jax.tree.map(typed, value)
            if hasattr(value, "shape"):
                what = f"shape {jnp.shape(value)}"
            raise ValueError(
                "loss_fn must return a scalar, the mean loss of the batch, but it"
                f" returned {what}. Write losses.mean(), and drop what else it returns:"
                " lambda params, batch: loss_fn(params, batch)[0]."
            )
        return wide(jnp.asarray(value))

    def loss_here(self, batch: Any, w: Any = None) -> jax.Array:
        """The mean loss of one batch, at ``w`` or where the parameters are."""
        return self.loss(self.w if w is None else w, batch)

    def mean(self, f: Callable[..., Any], *args: Any) -> Any:
        """The mean of ``f(objective, batch, *args)`` over all batches of all devices.

        It takes one batch at a time, so that only one is in memory, with the arrays
        that its gradient keeps. On the host each batch runs through one compiled
        program, which the objective keeps for the next pass with the same ``f``.
        """
        return self.total(self.data.mean(self._bound(f, args)))

    def each(self, f: Callable[..., Any], *args: Any) -> Any:
        """``f(objective, batch, *args)`` of one batch after the other, stacked."""
        return self.data.each(self._bound(f, args))

    def _bound(self, f: Callable[..., Any], args: Any) -> Callable[[Any], Any]:
        if not self.on_host:
            return lambda batch: f(self, batch, *args)
        loss_fn, whole, axis_name = self.loss_fn, self.params, self.axis_name
        # A program takes no functions and names, which a model may hold.
        given = arrays(whole)

        # It is new for each objective, because JAX shares the programs of a function.
        def of_batch(given: Any, w: Any, batch: Any, *args: Any) -> Any:
            params = fill(given, whole)
            return f(Objective(loss_fn, params, w, axis_name), batch, *args)

        run = self.compiled.setdefault(f, jax.jit(of_batch))
        return lambda batch: run(given, self.w, batch, *args)

    def mean_of(self, per_batch: jax.Array) -> jax.Array:
        """The mean over all batches of what ``each`` has returned, ``(B, ...)``."""
        return self.total(self.data.mean_of(per_batch))

    def vary(self, tree: Any) -> Any:
        """Makes a value that is equal on all devices usable together with ``w``."""
        return axes.vary(tree, self.axis_name)

    def total(self, tree: Any) -> Any:
        """The sum over devices, where there are several."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)


def objective(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    *,
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> Objective:
    """Checks the arguments that all measures share, and brings them into one form."""
    if not callable(loss_fn):
        raise ValueError(
            "The first argument must be loss_fn, a function (params, batch) -> scalar;"
            f" got {loss_fn!r}."
        )
    w = weights_of(params, mask)
    data = data_of(batches, weights, axis_name)
    check_axes(w, data, axis_name)
    # The parameters must vary; otherwise jax.grad would sum over devices by itself.
    w = axes.vary(w, axis_name)
    return Objective(loss_fn, params, w, axis_name, data)


def check_axes(w: Any, data: Data, axis_name: Any) -> None:
    """Refuses batches that differ between devices if no axis to average over is given.

    JAX would sum gradients over the devices, so a measure would be too large by the
    number of devices.
    """
    if axis_name is not None or not isinstance(data, Stacked):
        return
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    is_tracked = lambda name: name in axes.varying(jax.lax.axis_index(name))
    untracked = {name for name in manual if not is_tracked(name)}
    over = lambda tree: {
        name
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.Array)
        for name in axes.varying(x)
    }
    names = sorted(untracked | (over(data.batches) - over(w)))
    if names:
        given = names[0] if len(names) == 1 else tuple(names)
        raise ValueError(
            f"Inside jax.shard_map each device has different batches along {given!r}."
            f" To average products and losses, pass axis_name={given!r}."
        )


def chosen_part(name: str, tree: Any, params: Any, w: Any) -> Any:
    """The chosen leaves of a pytree like the parameters, in the dtypes of ``w``."""
    expected: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(tree)
    if given != expected:
        raise ValueError(
            f"{name} must be a pytree like params, {expected}; got {given}."
        )

    def chosen(path: Any, x: ArrayLike, w: jax.Array | None) -> jax.Array | None:
        if w is None:
            return None
        if jnp.shape(x) != w.shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)} at"
                f" {jax.tree_util.keystr(path) or 'the root'}, and the parameter"
                f" {w.shape}; it must be a pytree like params."
            )
        return jnp.asarray(x, w.dtype)

    return jax.tree_util.tree_map_with_path(chosen, tree, w)
