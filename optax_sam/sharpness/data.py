"""The batches over which a measure averages: stacked on the device, or on the host."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam import axes, schedules
from optax_sam.sharpness.stream import accumulate, check_total, count_examples


class Stacked:
    """Arrays ``(B, m, ...)``; a scan takes one batch after the other."""

    on_host = False

    def __init__(self, batches: Any, weights: Any, axis_name: Any):
        share = _shares(_number_of_batches(batches, weights), weights)
        total = share.sum()
        if axis_name is not None:
            share = axes.vary(share, axis_name)
            total = jax.lax.psum(share.sum(), axis_name)
        self.batches, self.share, self._axis_name = batches, share / total, axis_name
        self.number, self._weights = len(share), weights

    def beside_weights(self) -> Stacked:
        """The same batches, each in a pair with its ``weights``."""
        pairs, given = copy.copy(self), self._weights
        weights = None if given is None else jnp.asarray(given, jnp.result_type(float))
        pairs.batches = (self.batches, weights)
        return pairs

    def mean(self, f: Callable[[Any], Any]) -> Any:
        """The mean of ``f(batch)``, a pytree of arrays, over the batches here."""
        scaled = lambda batch, share: jax.tree.map(
            lambda x: x * share.astype(x.dtype), f(batch)
        )
        first = jax.tree.map(lambda x: x[0], self.batches)
        if self.number == 1:
            # No loop: XLA on CPU is slow at convolutions inside one.
            return scaled(first, self.share[0])

        def add(sum_: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sum_, scaled(*part)), None

        shapes = jax.eval_shape(scaled, first, self.share[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = axes.vary(zeros, self._axis_name)
        return jax.lax.scan(add, start, (self.batches, self.share))[0]

    def each(self, f: Callable[[Any], Any]) -> Any:
        """``f(batch)`` of one batch after the other, stacked along the first axis."""
        if self.number == 1:
            first = jax.tree.map(lambda x: x[0], self.batches)
            return jax.tree.map(lambda x: x[None], f(first))
        return jax.lax.map(f, self.batches)

    def mean_of(self, per_batch: jax.Array) -> jax.Array:
        """The mean over the batches here of what :meth:`each` returned."""
        share = self.share.astype(per_batch.dtype)
        return jnp.tensordot(share, per_batch, axes=1)


class Streamed:
    """Batches ``(m, ...)`` of any iterable, brought to the device one by one.

    Attributes:
      source: a list, a loader, or a function that makes an iterator. An iterator gives
        its batches only once, so they are kept in the memory of the host.
      weights: a number for each batch, or a function from a batch to one.
    """

    on_host = True

    def __init__(self, source: Any, weights: Any = None):
        if not (weights is None or callable(weights) or hasattr(weights, "__iter__")):
            raise ValueError(
                "weights must have a number for each batch, or be a function from a"
                f" batch to its number; got {weights!r}."
            )
        self.source, self._weights = source, weights
        self._share: Any = None  # of each batch, in the order of the last pass
        self._first: int | None = None  # a checksum of the first batch
        if isinstance(source, Iterator):
            self.source = [jax.tree.map(np.asarray, x) for x in source]

    def beside_weights(self) -> Streamed:
        """The same batches, each in a pair with its ``weights``."""
        return Streamed(self._pairs, lambda pair: _count(*pair))

    def _read(self) -> Iterator[Any]:
        source = self.source
        for i, batch in enumerate(source() if callable(source) else source):
            batch = _arrays(batch)
            if i == 0 and not isinstance(source, list):
                self._check_first(batch)
            yield batch

    def _check_first(self, batch: Any) -> None:
        found = _checksum(batch)
        if self._first not in (None, found):
            raise ValueError(
                "batches must be the same in each pass, because a measure reads them"
                " several times; this pass began with another batch than the one"
                " before. Make the loader with shuffle=False and without augmentation,"
                " or keep one pass: batches=list(loader)."
            )
        self._first = found

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        given = self._weights
        if given is None or callable(given):
            of = given or (lambda batch: None)
            yield from ((batch, of(batch)) for batch in self._read())
            return
        number = 0
        for number, batch in enumerate(self._read(), 1):  # noqa: B007
            if number <= len(given):
                yield batch, given[number - 1]
        if number != len(given):
            raise ValueError(
                f"weights has {len(given)} numbers, and there are {number} batches."
                " Give one for each, or a function from a batch to its number:"
                ' weights=lambda batch: batch["mask"].sum().'
            )

    def _weighed(self) -> Iterator[tuple[Any, Any]]:
        return ((batch, _count(batch, weights)) for batch, weights in self._pairs())

    def mean(self, f: Callable[[Any], Any]) -> Any:
        """The mean of ``f(batch)``, a pytree of arrays, weighted by examples."""
        pairs = self._weighed()
        return accumulate(lambda x: f(x[0]), pairs, weight=lambda x: x[1])

    def each(self, f: Callable[[Any], Any]) -> Any:
        """``f(batch)`` of one batch after the other, stacked along the first axis."""
        found, counts = [], []
        for batch, count in self._weighed():
            found.append(jax.block_until_ready(f(batch)))
            counts.append(count)
        if not found:
            accumulate(f, [])  # raises the error for no batch
        check_total(sum(counts))
        self._share = jnp.asarray(np.divide(counts, sum(counts)))
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    def mean_of(self, per_batch: jax.Array) -> jax.Array:
        """The mean of what the last :meth:`each` returned."""
        return jnp.tensordot(self._share.astype(per_batch.dtype), per_batch, axes=1)


Data = Stacked | Streamed


def data_of(batches: Any, weights: Any, axis_name: Any) -> Data:
    """Brings ``batches`` (arrays, a list, a loader, a generator) into one form."""
    if isinstance(batches, Streamed) and weights is not None:
        return Streamed(batches.source, weights)
    if isinstance(batches, (Stacked, Streamed)):
        return batches
    is_stream = is_streamed(batches)
    if not is_stream and not isinstance(batches, list):
        return Stacked(batches, weights, axis_name)
    if not isinstance(jnp.zeros(()), jax.core.Tracer):
        if axis_name is not None:
            raise ValueError(
                f"axis_name={axis_name!r} is for batches of a jax.shard_map; a list or"
                " a loader is read by the host, outside of it. Leave axis_name out."
            )
        return Streamed(batches, weights)
    if is_stream:
        raise ValueError(
            f"batches is a {type(batches).__name__}, which the host reads batch by"
            " batch, so the measure must be called outside of jit. It compiles its"
            " work on one batch by itself."
        )
    shapes = {str(jax.tree.map(jnp.shape, x)) for x in batches}
    if len(shapes) != 1:
        raise ValueError(
            "A list of batches inside jit must have at least one, all of the same"
            f" shapes; these have {', '.join(sorted(shapes)) or 'none'}. Call the"
            " measure outside of jit, which takes batches of any sizes."
        )
    return Stacked(jax.tree.map(lambda *x: jnp.stack(x), *batches), weights, axis_name)


def is_streamed(batches: Any) -> bool:
    """Whether these batches can be seen only by iterating."""
    if isinstance(batches, Iterator):
        return True
    if not jax.tree_util.all_leaves([batches]) or hasattr(batches, "shape"):
        return False
    return callable(batches) or (
        isinstance(batches, Iterable) and not isinstance(batches, (str, bytes))
    )


def scan(on_host: bool, f: Callable[[Any, Any], Any], carry: Any, xs: Any) -> Any:
    """``jax.lax.scan``, or the same loop on the host if the batches are there."""
    if not on_host:
        return jax.lax.scan(f, carry, xs)
    ys = []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, y = f(carry, jax.tree.map(lambda x: x[i], xs))  # noqa: B023
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def each(on_host: bool, f: Callable[[Any], Any], xs: Any) -> Any:
    """``jax.lax.map``, or the same loop on the host."""
    return scan(on_host, lambda _, x: (None, f(x)), None, xs)[1]


def repeat(on_host: bool, number: int, f: Callable[[Any, Any], Any], start: Any) -> Any:
    """``jax.lax.fori_loop`` from zero, or the same loop on the host."""
    if not on_host:
        return jax.lax.fori_loop(0, number, f, start)
    for k in range(number):
        start = f(jnp.asarray(k), start)
    return start


def stack_batches(data: Any, batch_size: int) -> Any:
    """Splits data ``(N, ...)`` into batches ``(N / m, m, ...)``, as measures take them.

    Every measure is a mean over batches, and some measures (worst cases, one SAM step)
    depend on the batch size ``m``. So compare numbers only if they have the same ``m``
    and the same data. A shorter last batch would silently change both; it is refused.

    Args:
      data: a pytree of arrays ``(N, ...)``: the examples, in the order to be used.
      batch_size: ``m``, a divisor of ``N``.

    Returns:
      The pytree with leaves ``(N / m, m, ...)``. If ``data`` is a list, such as
      ``[x, y]``, it is a tuple, because measures take a list for a list of batches.

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
            "data must be a pytree of arrays with the same number of examples along"
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
    data = tuple(data) if isinstance(data, list) else data
    return jax.tree.map(lambda x: jnp.reshape(x, shape + jnp.shape(x)[1:]), data)


def _arrays(batch: Any) -> Any:
    """A batch of a loader, whose arrays may be another library's."""
    return jax.tree.map(
        lambda x: x if isinstance(x, (jax.Array, np.ndarray)) else np.asarray(x), batch
    )


def _checksum(batch: Any) -> int:
    """A number that differs between batches of different values."""
    found = 0
    for x in jax.tree.leaves(batch):
        if getattr(x, "is_fully_addressable", True):  # a part may be on other hosts
            found = zlib.crc32(np.asarray(x).tobytes(), found)
    return found


def _number_of_batches(batches: Any, weights: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    lengths = {jnp.shape(x)[:1] for _, x in leaves}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "batches must be a pytree of arrays (B, m, ...), B batches of m examples,"
            f" with the same B; the first axes here are {sorted(lengths)}. Make them"
            " with optax_sam.sharpness.stack_batches(data, m); one batch alone is"
            " [batch], a list of one."
        )
    for path, x in leaves:
        if 0 in jnp.shape(x):
            raise ValueError(
                f"batches are empty at {jax.tree_util.keystr(path) or 'the root'}: it"
                f" has shape {jnp.shape(x)}. Give at least one batch of one example."
            )
    examples = {jnp.shape(x)[1:2] for _, x in leaves}
    if len(examples) > 1 and weights is None:
        ((number,),) = lengths
        raise ValueError(
            "These look like one batch that was not stacked: leaves should begin with"
            " (B, m), B batches of m examples, and these have shapes"
            f" {[jnp.shape(x) for _, x in leaves]}. For one batch give [batch], a list"
            " of one; to split it, optax_sam.sharpness.stack_batches(batch, m). If"
            f" these are {number} batches, say so by weights=jnp.ones({number})."
        )
    return lengths.pop()[0]


def _shares(number: int, weights: ArrayLike | None) -> jax.Array:
    if weights is None:
        return jnp.ones(number)
    if callable(weights):
        raise ValueError(
            "weights can be a function of a batch for a list or a loader only. For"
            f" stacked batches give an array ({number},)."
        )
    weights = jnp.asarray(weights, jnp.result_type(float))
    if not weights.shape or weights.shape[0] != number:
        raise ValueError(
            f"weights must have shape ({number},), the number of examples in each"
            f" batch, or ({number}, m), a weight for each example, which loss_fn must"
            f" then use in its mean, too; got {weights.shape}."
        )
    shares = weights.reshape(number, -1).sum(1)
    if not isinstance(weights, jax.core.Tracer):
        _check_weights(np.asarray(weights))
        check_total(np.asarray(weights).sum())
    return shares


def _count(batch: Any, weights: Any) -> Any:
    """The examples of a batch that count."""
    if weights is None:
        return count_examples(batch, "weights")
    weights = np.asarray(weights, float)
    _check_weights(weights)
    return weights.sum()


def _check_weights(weights: np.ndarray) -> None:
    if not ((weights >= 0) & np.isfinite(weights)).all():
        raise ValueError(f"weights must be finite and >= 0; got {weights}.")
