"""Which loss, of which leaves, on which data: what every measure starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam import axes, schedules
from optax_sam.masks import Mask, resolve_mask
from optax_sam.trees import wide

LossFn = Callable[[Any, Any], jax.Array]  # (params, batch) -> mean loss of the batch


class Objective(NamedTuple):
    """A loss as a function of the chosen leaves, and the batches that it is meant on.

    Attributes:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch.
      params: all parameters, as the user gave them.
      w: the chosen leaves, in float32 or wider; ``None`` in the place of the others.
      batches: a tree of arrays ``(B, m, ...)``.
      share: the part ``(B,)`` of each batch in the mean; they sum to one over all
        batches of all devices.
      axis_name: the mapped axis over which the batches are spread, or ``None``.
    """

    loss_fn: LossFn
    params: Any
    w: Any
    batches: Any
    share: jax.Array
    axis_name: Any

    def params_at(self, w: Any) -> Any:
        """The parameters with ``w`` in the place of the chosen leaves."""
        return _fill(w, self.params)

    def like_params(self, vector: Any) -> Any:
        """A vector of the chosen leaves as a tree of all, with zeros elsewhere."""
        return _fill(vector, jax.tree.map(jnp.zeros_like, self.params))

    def loss(self, w: Any, batch: Any) -> jax.Array:
        """The mean loss of one batch, with ``w`` in the place of the chosen leaves."""
        value = self.loss_fn(self.params_at(w), batch)
        if not isinstance(value, (jax.Array, np.ndarray, float)) or jnp.shape(value):
            what = f"shape {jnp.shape(value)}" if hasattr(value, "shape") else value
            raise ValueError(
                "loss_fn must return a scalar, the mean loss of the batch, but it"
                f" returned {what}. Write losses.mean(), and drop what else it returns:"
                " lambda params, batch: loss_fn(params, batch)[0]."
            )
        return wide(jnp.asarray(value))

    def mean(self, f: Callable[[Any], Any]) -> Any:
        """The mean of ``f(batch)``, a tree of arrays, over all batches.

        One batch at a time, so that no more than one lives in memory with what its
        gradient keeps.
        """
        scaled = lambda batch, share: jax.tree.map(
            lambda x: x * share.astype(x.dtype), f(batch)
        )
        first = jax.tree.map(lambda x: x[0], self.batches)
        if len(self.share) == 1:
            # No loop: XLA on CPU is slow at convolutions inside one.
            return self.total(scaled(first, self.share[0]))

        def add(sum_: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sum_, scaled(*part)), None

        shapes = jax.eval_shape(scaled, first, self.share[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = axes.vary(zeros, self.axis_name)
        return self.total(jax.lax.scan(add, start, (self.batches, self.share))[0])

    def each(self, f: Callable[[Any], Any]) -> Any:
        """``f(batch)`` of one batch after the other, stacked along the first axis."""
        if len(self.share) == 1:
            first = jax.tree.map(lambda x: x[0], self.batches)
            return jax.tree.map(lambda x: x[None], f(first))
        return jax.lax.map(f, self.batches)

    def mean_of(self, per_batch: jax.Array) -> jax.Array:
        """The mean over all batches of what ``each`` has returned, ``(B, ...)``."""
        share = self.share.astype(per_batch.dtype)
        return self.total(jnp.tensordot(share, per_batch, axes=1))

    def vary(self, tree: Any) -> Any:
        """What is the same on all devices, as ``w`` is taken: to be used with it."""
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
    weights: ArrayLike | None = None,
    axis_name: Any = None,
) -> Objective:
    """Checks what all measures are given, and brings it into one form."""
    if not callable(loss_fn):
        raise ValueError(
            "The first argument must be loss_fn, a function (params, batch) -> scalar;"
            f" got {loss_fn!r}."
        )
    chosen = resolve_mask(mask, params)

    def widen(path: Any, x: ArrayLike, kept: bool) -> jax.Array | None:
        if not kept:
            return None
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"The parameter at {jax.tree_util.keystr(path) or 'the root'} has dtype"
                f" {dtype}, and sharpness is about real ones. Leave it out with"
                " mask=lambda params: jax.tree.map(lambda x: jnp.issubdtype(x.dtype,"
                " jnp.floating), params)."
            )
        # A half-precision weight would round the offsets away that are measured here.
        return wide(jnp.asarray(x))

    w = jax.tree_util.tree_map_with_path(widen, params, chosen)
    if not sum(x.size for x in jax.tree.leaves(w)):
        raise ValueError(
            "There is no parameter to look at: "
            + (
                "params is empty."
                if mask is None
                else "the mask selects nothing. To"
                " look at all of them, leave out mask=."
            )
        )
    share = _shares(_number_of_batches(batches), weights)
    total = share.sum()
    if axis_name is not None:
        # Parameters that vary, else jax.grad would sum over devices of its own accord.
        w, share = axes.vary((w, share), axis_name)
        total = jax.lax.psum(share.sum(), axis_name)
    return Objective(loss_fn, params, w, batches, share / total, axis_name)


def stack_batches(data: Any, batch_size: int) -> Any:
    """Data of shape ``(N, ...)`` as batches ``(N / m, m, ...)``, as measures take them.

    Every measure is a mean over batches, and some (worst cases, one SAM step) depend on
    the batch size ``m``, so a number is only comparable with one of the same ``m`` and
    the same data. A shorter last batch would change both in silence; it is refused.

    Args:
      data: a tree of arrays ``(N, ...)``: the examples, in the order to be used.
      batch_size: ``m``, a divisor of ``N``.

    Returns:
      The tree with leaves ``(N / m, m, ...)``.

    Raises:
      ValueError: if the arrays differ in ``N``, or ``m`` does not divide it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> x, y = jnp.ones((12, 3)), jnp.ones(12)
      >>> [a.shape for a in sharpness.stack_batches((x, y), 4)]
      [(3, 4, 3), (3, 4)]
    """
    schedules.check_integer("batch_size", batch_size, 1)
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "data must be a tree of arrays with the same number of examples along"
            f" their first axis; these have {sorted(sizes)}."
        )
    ((number,),) = sizes
    if number == 0 or number % batch_size:
        raise ValueError(
            f"{number} examples cannot be split into batches of {batch_size}. Take"
            f" {number - number % batch_size} of them (x[:n]), or choose batch_size"
            " among the divisors of their number."
            if number >= batch_size
            else f"{number} examples do not fill one batch of {batch_size}."
        )
    shape = (number // batch_size, batch_size)
    return jax.tree.map(lambda x: jnp.reshape(x, shape + jnp.shape(x)[1:]), data)


def chosen_part(name: str, tree: Any, params: Any, w: Any) -> Any:
    """Of a tree like the parameters, the part that is like ``w``, in its dtypes."""
    expected: Any = jax.tree.structure(params)
    given: Any = jax.tree.structure(tree)
    if given != expected:
        raise ValueError(f"{name} must be a tree like params, {expected}; got {given}.")

    def chosen(path: Any, x: ArrayLike, w: jax.Array | None) -> jax.Array | None:
        if w is None:
            return None
        if jnp.shape(x) != w.shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)} at"
                f" {jax.tree_util.keystr(path) or 'the root'}, and the parameter"
                f" {w.shape}; it must be a tree like params."
            )
        return jnp.asarray(x, w.dtype)

    return jax.tree_util.tree_map_with_path(chosen, tree, w)


def _fill(chosen: Any, others: Any) -> Any:
    pick = lambda other, x: other if x is None else x
    return jax.tree.map(pick, others, chosen)


def _number_of_batches(batches: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    lengths = {jnp.shape(x)[:1] for _, x in leaves}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "batches must be a tree of arrays (B, m, ...), B batches of m examples,"
            f" with the same B; the first axes here are {sorted(lengths)}. Make them"
            " with optax_sam.sharpness.stack_batches(data, m); one batch alone is"
            " jax.tree.map(lambda x: x[None], batch)."
        )
    for path, x in leaves:
        if 0 in jnp.shape(x):
            raise ValueError(
                f"batches are empty at {jax.tree_util.keystr(path) or 'the root'}: it"
                f" has shape {jnp.shape(x)}. Give at least one batch of one example."
            )
    return lengths.pop()[0]


def _shares(number: int, weights: ArrayLike | None) -> jax.Array:
    if weights is None:
        return jnp.ones(number)
    weights = jnp.asarray(weights, jnp.result_type(float))
    if not weights.shape or weights.shape[0] != number:
        raise ValueError(
            f"weights must have shape ({number},), the number of examples in each"
            f" batch, or ({number}, m), a weight for each example, which loss_fn must"
            f" then use in its mean, too; got {weights.shape}."
        )
    shares = weights.reshape(number, -1).sum(1)
    if not isinstance(shares, jax.core.Tracer) and not (
        bool((shares >= 0).all()) and bool(shares.sum() > 0)
    ):
        raise ValueError(f"weights must be >= 0 and not all zero; got {weights}.")
    return shares
