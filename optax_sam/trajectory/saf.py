"""SAF: keeps past predictions in a table (Du et al., arXiv 2205.14083)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_sam.checks import DROPPED, MissingArgument
from optax_sam.method import method
from optax_sam.schedules import check_integer
from optax_sam.states import check_state, registered, the_state
from optax_sam.trees import wide

_CALL = "tx.update(grads, opt_state, params, logits=logits, indices=indices)"
_CHAIN = "optax.chain(optax_sam.saf(num_examples, num_classes), optax.sgd(0.1))"
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_NEVER = np.iinfo(np.int32).max


@registered
class SAFState(NamedTuple):
    """State of :func:`saf`.

    Attributes:
      logits: the last logits of every example, (num_examples, delay, num_classes);
        the slot ``visits % delay`` holds the oldest and is written next.
      visits: how often an example was recorded, (num_examples,) int32.
      start: visits after which the past is used, () int32.
      end: visits from which on the past is not used, () int32.
      num_dropped: rows that were not recorded, because their index is outside the data
        set or their logits are not finite, () int32.
    """

    logits: jax.Array
    visits: jax.Array
    start: jax.Array
    end: jax.Array
    num_dropped: jax.Array

    def metrics(self) -> dict[str, jax.Array]:
        """The number of rows that were not recorded."""
        return {"dropped_examples": self.num_dropped}


@method()
def saf(
    num_examples: int,
    num_classes: int,
    *,
    delay: int = 3,
    start: int = 5,
    end: int | None = None,
    dtype: DTypeLike = "float32",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAF: keeps predictions near the predictions of ``delay`` epochs ago.

    SAF does not perturb the weights. A term in the loss compares the logits of each
    example with its logits of ``delay`` epochs before:

    .. math::
      L(w) = \frac{1}{n} \sum_i \mathrm{CE}_i(w) + \lambda \tau^2 \,
        \frac{1}{n} \sum_{i \text{ known}} \mathrm{KL}\big(
        \mathrm{softmax}(z^\text{past}_i / \tau) \,\big\|\,
        \mathrm{softmax}(z_i(w) / \tau) \big)

    This transformation keeps the table of past logits and does not change the gradient.
    :func:`saf_past_logits` reads the table and :func:`optax_sam.trajectory_loss` is the
    term. The epoch of an example is the number of times that it was recorded, so an
    incomplete last batch or a restart does no harm. An example is known on visits
    ``start < visits < end``, counted from 0, once ``delay`` visits are recorded.

    Cost: 1 gradient per step, no further forward pass. The table takes
    ``num_examples * delay * num_classes`` numbers: 6 MB for CIFAR-10 and 60 MB for
    CIFAR-100 in float32; for ImageNet 15.4 GB in float32, 7.7 GB in float16, and 5.1 GB
    in float16 with ``delay=2``. Donate the state to the step; otherwise every step
    copies the table. The table can be sharded over its first axis. On a mesh with
    explicit axes, replicate the rows first:
    ``jax.sharding.reshard((logits, indices), P())``.

    Put it before ``optax.MultiSteps``. Inside, it would see only the last micro-batch:
    ``optax.chain(saf, optax.MultiSteps(...).gradient_transformation())``.

    Args:
      num_examples: size of the data set, at least 1.
      num_classes: number of logits, at least 1.
      delay: age of the past in epochs, at least 1; 3 in the paper, 2 on ImageNet.
      start: the last epoch without the term, at least 0; the authors also advise 30 %
        of the epochs. The first ``delay`` epochs never have it.
      end: the first epoch without the term again, or ``None``; at least one epoch must
        have the term.
      dtype: the dtype of the table: float32, float16, bfloat16, or float64.
      axis_name: a mapped axis (``shard_map``, ``pmap``) over which each device has
        its own rows. Every device records the rows of all devices, so the tables stay
        equal. Not needed under plain ``jit``.

    Returns:
      A transformation for any place in a chain. Its ``update`` needs ``logits``
      (B, num_classes), from the forward pass of the gradient, and ``indices`` (B,),
      integers in ``[0, num_examples)`` that name the examples in the data set. If an
      index is repeated, its last row counts, once. Its state is a :class:`SAFState`.

    Raises:
      ValueError: if an argument is out of its range or traced; on ``update``, if
        ``logits`` or ``indices`` is missing or of another shape or kind, or an index
        is out of range. Under ``jit`` the indices are unknown: such rows are dropped
        and counted, and so are rows that are not finite in the table's dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.saf(num_examples=4, num_classes=2, delay=1, start=0),
      ...     optax.sgd(0.5))
      >>> x, y = jnp.eye(4), jnp.array([0, 1, 1, 0])
      >>> def loss_fn(w, opt_state, indices):
      ...     logits = x[indices] @ w
      ...     ce = optax.softmax_cross_entropy_with_integer_labels(logits, y[indices])
      ...     past, known = optax_sam.saf_past_logits(opt_state, indices)
      ...     term = optax_sam.trajectory_loss(
      ...         logits, past, coefficient=0.3, where=known)
      ...     return ce.mean() + term, logits
      >>> @jax.jit
      ... def train_step(w, opt_state, indices):
      ...     grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
      ...     (loss, logits), grads = grad_fn(w, opt_state, indices)
      ...     updates, opt_state = tx.update(
      ...         grads, opt_state, w, logits=logits, indices=indices)
      ...     return optax.apply_updates(w, updates), opt_state, loss
      >>> w = jnp.zeros((4, 2))
      >>> opt_state = tx.init(w)
      >>> for epoch in range(20):
      ...     for indices in (jnp.array([0, 1]), jnp.array([2, 3])):
      ...         w, opt_state, loss = train_step(w, opt_state, indices)
      >>> bool(loss < 0.2)
      True
      >>> print(opt_state[0].visits)
      [20 20 20 20]

    Differs from the authors' code in:
      1. The epoch is counted for each example, not for all. The two are the same
         where every epoch shows every example once.
      2. The table has ``delay`` slots and not ``delay + 1``, because the loss reads it
         before the update writes.
      3. An example without a past of the right age has no term; there it is compared
         with zeros or with a past of another age.
      4. Logits that are not finite are not recorded.

    References:
      Du et al., `Sharpness-Aware Training for Free
      <https://arxiv.org/abs/2205.14083>`_, 2022; code: AngusDujw/SAF
    """
    check_integer("num_examples", num_examples, 1)
    check_integer("num_classes", num_classes, 1)
    check_integer("delay", delay, 1)
    check_integer("start", start, 0)
    if end is not None:  # some visit must lie strictly between
        check_integer("end", end, max(start + 1, delay) + 1)
    if getattr(dtype, "__name__", str(dtype)) not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}.")

    def bounds() -> dict[str, jax.Array]:
        """The current settings of the method that the loss reads from the state."""
        return {
            "start": jnp.full((), min(start, _NEVER), jnp.int32),
            "end": jnp.full((), _NEVER if end is None else min(end, _NEVER), jnp.int32),
        }

    def init(params: Any) -> SAFState:
        del params
        return SAFState(
            logits=jnp.zeros((num_examples, delay, num_classes), dtype),
            visits=jnp.zeros((num_examples,), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
            **bounds(),
        )

    def update(
        updates: Any,
        state: SAFState,
        params: Any = None,
        *,
        logits: Any = None,
        indices: Any = None,
        **extra: Any,
    ) -> tuple[Any, SAFState]:
        del params, extra
        _check_rows(logits, indices, num_examples, num_classes)
        check_state("saf", SAFState, state, jax.eval_shape(init, None))
        rows = jnp.asarray(logits).astype(state.logits.dtype)
        examples = _in_range(indices, num_examples)
        if axis_name is not None:
            rows = _of_all_devices(rows, axis_name)
            examples = _of_all_devices(examples, axis_name)
        valid = (examples < num_examples) & jnp.all(jnp.isfinite(rows), axis=-1)
        # If an example is repeated, only its last row is written: a scatter with equal
        # targets has no order, and replicas must not differ. Dropped rows sort last.
        examples = jnp.where(valid, examples, num_examples)
        order = jnp.argsort(examples, stable=True)
        rows, examples = rows[order], examples[order]
        is_last = examples != jnp.append(examples[1:], num_examples)
        # Indices beyond the table, all different, because the scatter assumes that.
        nowhere = num_examples + jnp.arange(len(examples), dtype=jnp.int32)
        examples = jnp.where(is_last, examples, nowhere)
        slots = state.visits.at[examples].get(mode="fill", fill_value=0) % delay
        return updates, state._replace(
            logits=state.logits.at[examples, slots].set(
                rows, mode="drop", unique_indices=True
            ),
            visits=state.visits.at[examples].add(1, mode="drop", unique_indices=True),
            num_dropped=state.num_dropped + jnp.sum(~valid, dtype=jnp.int32),
            **bounds(),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def saf_past_logits(
    opt_state: optax.OptState, indices: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The logits of some examples ``delay`` epochs ago, for the loss.

    It only reads, so give the loss the state from before the update.

    Args:
      opt_state: state of an optimizer with one :func:`saf`.
      indices: which examples of the data set, integers of any shape.

    Returns:
      Their past logits, (..., num_classes) in float32 or better, and whether they are
      known, (...) bool. An example is unknown if it has no past yet, is outside
      ``start`` and ``end``, or is not in the data set.

    Raises:
      ValueError: if there is not one :func:`saf`, or an index is no integer.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.saf(num_examples=3, num_classes=2, delay=1, start=0),
      ...     optax.sgd(0.1))
      >>> w = jnp.zeros(2)
      >>> _, opt_state = tx.update(
      ...     w, tx.init(w), w, logits=jnp.array([[1.0, 2.0]]), indices=jnp.array([2]))
      >>> past, known = optax_sam.saf_past_logits(opt_state, jnp.array([2, 0]))
      >>> print(past[0], known)
      [1. 2.] [ True False]
    """
    state = the_state(SAFState, "saf", opt_state, _CHAIN)
    num_examples, delay, _ = state.logits.shape
    examples = _in_range(indices, num_examples)
    visits = state.visits.at[examples].get(mode="fill", fill_value=0)
    past = state.logits.at[examples, visits % delay].get(mode="fill", fill_value=0)
    known = (state.start < visits) & (visits < state.end) & (visits >= delay)
    return wide(past), known


def _in_range(indices: ArrayLike, num_examples: int) -> jax.Array:
    """The indices as int32, with ``num_examples`` for those outside the data set."""
    array = jnp.asarray(indices)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            "saf: indices must be integers that name the examples in the data set; got"
            f" {array.dtype} {array.shape}. Write {_CALL}."
        )
    # The largest index may not fit into a narrow dtype.
    largest = min(num_examples - 1, int(jnp.iinfo(array.dtype).max))
    inside = (array >= 0) & (array <= largest)
    return jnp.where(inside, array.astype(jnp.int32), num_examples)


def _check_rows(logits: Any, indices: Any, num_examples: int, num_classes: int) -> None:
    """Raises unless ``update`` got a row of logits and an index for each example."""
    for name, value in (("logits", logits), ("indices", indices)):
        if value is None:
            raise MissingArgument(
                f"saf needs {name}: the model's outputs (B, num_classes) and the"
                f" examples' indices in the data set (B,). Write {_CALL}.{DROPPED}",
                name,
            )
    shape, found = jnp.shape(logits), jnp.shape(indices)
    if len(shape) != 2 or shape[1] != num_classes or found != shape[:1]:
        raise ValueError(
            f"saf: logits must be (B, {num_classes}) and indices (B,); got logits"
            f" {shape} and indices {found}. Write {_CALL}."
        )
    if not jnp.issubdtype(jnp.result_type(logits), jnp.floating):
        raise ValueError(
            f"saf: logits must be real floats; got {jnp.result_type(logits)}."
        )
    # Traced values are unknown, and so are those on another host.
    known = not isinstance(indices, jax.core.Tracer)
    if known and getattr(indices, "is_fully_addressable", True):
        outside = (np.asarray(indices) < 0) | (np.asarray(indices) >= num_examples)
        if np.any(outside):
            raise ValueError(
                f"saf: indices must lie in [0, {num_examples}), the data set's size as"
                f" num_examples says; got {np.asarray(indices)[outside][:3].tolist()}."
            )


def _of_all_devices(x: jax.Array, axis_name: Any) -> jax.Array:
    """The rows of all devices, one device after another.

    It uses a sum, because JAX then knows that all devices hold the same rows.
    """
    places = jnp.zeros((jax.lax.axis_size(axis_name), *x.shape), x.dtype)
    placed = places.at[jax.lax.axis_index(axis_name)].set(x)
    return jax.lax.psum(placed, axis_name).reshape(-1, *x.shape[1:])
