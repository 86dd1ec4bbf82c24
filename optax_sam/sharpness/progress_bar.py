"""A progress bar on the host for measures that run on the device."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax

from optax_sam import schedules
from optax_sam.sharpness.objective import LossFn


class CountedLoss:
    """A loss function that counts how often a batch is evaluated; see :func:`progress`.

    Attributes:
      count: evaluations so far, an int; reading it waits for the device.
    """

    def __init__(self, loss_fn: LossFn, show: Callable[[int], None]):
        self._loss_fn, self._show = loss_fn, show
        self._count, self._lock = 0, threading.Lock()

    def __call__(self, params: Any, batch: Any) -> Any:
        """The loss of the batch."""
        jax.debug.callback(self._tick)
        return self._loss_fn(params, batch)

    @property
    def count(self) -> int:
        """Evaluations so far."""
        jax.effects_barrier()
        return self._count

    def _tick(self) -> None:
        with self._lock:  # each device calls from another thread
            self._count += 1
            self._show(self._count)


@contextlib.contextmanager
def progress(
    loss_fn: LossFn,
    *,
    total: int | None = None,
    description: str = "sharpness",
    file: TextIO | None = None,
) -> Iterator[CountedLoss]:
    """A progress bar for any measure: the loss tells the host of each evaluation.

    Give the yielded function to measures, jitted or not, in place of ``loss_fn``. The
    bar advances by one for each batch whose loss is evaluated, with or without its
    gradient. So ``total`` is, with ``B`` batches:

    ============================================ ======================================
    measure                                      evaluations
    ============================================ ======================================
    any with Hessian-vector products             ``B`` times their number
    worst-case sharpness                         ``B * (starts * (num_steps + 1) + 1)``
    average-case sharpness                       ``B * (2 * num_samples + 1)``
    one-step SAM sharpness                       ``2 * B``
    loss surface                                 ``B`` times the points of its grid
    ============================================ ======================================

    Under ``shard_map`` the evaluations of all devices count. The yielded loss is a new
    function, so measures compile again. Each evaluation takes some 30 microseconds
    more, so use it for long measurements. Inside ``jax.checkpoint`` evaluations for the
    backward pass count, too.

    The bar comes from `rich <https://rich.readthedocs.io>`_ if it is installed, else it
    is a line of text. It is shown if standard error is a terminal, or in a notebook
    (with rich), by the first of several processes. Otherwise nothing is written.

    Args:
      loss_fn: ``loss_fn(params, batch)``.
      total: the number of evaluations; ``None``: not known.
      description: the text before the bar.
      file: a text stream to write to in any case, instead of standard error.

    Yields:
      The counting loss, a :class:`CountedLoss`. After the block it still computes the
      loss, and no longer moves the bar.

    Raises:
      ValueError: if ``loss_fn`` is no function or ``total`` no integer above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss_fn = lambda w, batch: jnp.sum((w - batch) ** 2)
      >>> w, batches = jnp.ones(2), jnp.zeros((3, 2))
      >>> with sharpness.progress(loss_fn, total=3) as counted:
      ...     Hv = sharpness.hvp(counted, w, batches, w)
      ...     print(counted.count)
      3
    """
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a function (params, batch); got {loss_fn!r}."
        )
    if total is not None:
        schedules.check_integer("total", total, 1)
    with contextlib.ExitStack() as stack:
        show: Callable[[int], None] = lambda count: None
        if jax.process_index() == 0:
            show = stack.enter_context(_bar(total, description, file))
        counted = CountedLoss(loss_fn, show)
        try:
            yield counted
        finally:
            jax.effects_barrier()
            counted._show = lambda count: None


@contextlib.contextmanager
def _bar(
    total: int | None, description: str, file: TextIO | None
) -> Iterator[Callable[[int], None]]:
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        with _line(total, description, file) as show:
            yield show
        return
    console = Console(file=file, stderr=file is None)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    shown = file is not None or console.is_terminal or console.is_jupyter
    with rich_progress.Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.update(task, completed=count)


@contextlib.contextmanager
def _line(
    total: int | None, description: str, file: TextIO | None
) -> Iterator[Callable[[int], None]]:
    if file is None and not sys.stderr.isatty():
        yield lambda count: None
        return
    stream = sys.stderr if file is None else file
    of = "" if total is None else f"/{total}"
    last_count, last_time = 0, -1.0

    def show(count: int) -> None:
        nonlocal last_count, last_time
        last_count = count
        if time.monotonic() - last_time >= 0.1:
            last_time = time.monotonic()
            print(f"\r{description} {count}{of}", end="", file=stream, flush=True)

    try:
        yield show
    finally:
        print(f"\r{description} {last_count}{of}", file=stream, flush=True)
