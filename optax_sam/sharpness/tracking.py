"""Costly measures at intervals during a training run, on a fixed subset."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam import keys, schedules
from optax_sam.sharpness.data import Streamed, is_streamed
from optax_sam.sharpness.eigen import eigenvalues
from optax_sam.sharpness.objective import LossFn
from optax_sam.sharpness.probes import typed_key
from optax_sam.sharpness.scalars import small, to_scalars
from optax_sam.trees import cache


class ProbeState(NamedTuple):
    """The state of a :class:`Probe`, a pytree of arrays; save it in checkpoints.

    Attributes:
      starts: for each measure that can start from its last result, the sum of the
        eigenvectors that it found, a pytree like the parameters; zero at first.
    """

    starts: dict[str, Any]


class Probe:
    """Measures at intervals, and returns numbers for any logger.

    All measures are compiled together on the first call. Parameters and batches are
    arguments of that program. What the loss closes over is a part of it, so each
    measurement traces the measures again, and compiles them again if the program has
    changed. To compile once, put what changes, such as running statistics, into
    ``params``, and leave it out by the ``mask=`` of the measures. With a list or a
    loader, the product with a batch is compiled in each measurement.

    The probe keeps the eigenvectors, and Lanczos starts near the last ones. This saves
    a part of the products (half of them, in the tests). The key is folded with the
    step, so the result at a step does not depend on when the training run was resumed.

    Give it a fixed subset without augmentation, and a loss in evaluation mode. A few
    thousand examples of the training data are enough (Cohen et al. 2021 took 5,000), in
    batches of one fixed size. Another subset or batch size gives another number.

    Every ``every`` steps it costs what the measures cost on the subset. By default this
    is 20 Hessian-vector products, about 50 gradients of the subset. It takes as much
    memory as :func:`eigenvalues`: 24 vectors, and 11 for large models.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic.
      batches: a pytree of arrays ``(B, m, ...)``, as from :func:`stack_batches`; or a
        list or a loader, which the host reads for each product.
      key: for the random parts of measures: an int or a key.
      every: number of steps from one measurement to the next, at least 1.
      measures: functions by name, called as ``measure(loss_fn, params, batches)``, with
        ``key=`` and ``init=`` if they have arguments of these names. You can give the
        measures of this package as they are, or with options by ``functools.partial``,
        whose ``key`` and ``init`` stay as they are.
        They may return anything that :func:`to_scalars` takes. A measure with ``init``
        must return an :class:`EigenResult`, or another result with ``eigenvalues``
        ``(k,)`` and ``eigenvectors``; the next time it gets their sum. ``None``: the
        largest eigenvalue of the Hessian, ``{"lambda_max": hessian_eigenvalues}``.
      prefix: the start of all names.

    Raises:
      ValueError: if ``every`` is no integer above 0, ``measures`` is no dict of
        functions, or a measure takes ``init`` and returns no eigenvectors; and as the
        measures do on the first call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss_fn = lambda w, batch: jnp.mean(batch @ w**4)
      >>> probe = sharpness.Probe(loss_fn, jnp.eye(2)[None], every=10)
      >>> w = jnp.array([1.0, 0.5])
      >>> state = probe.init(w)
      >>> for step in range(20):
      ...     scalars, state = probe(step, w, state)
      ...     if scalars:
      ...         print(step, f"{scalars['sharpness/lambda_max/eigenvalues/0']:.3f}")
      ...     w = 0.9 * w
      0 6.000
      10 0.729

    References:
      Cohen et al., `Gradient Descent on Neural Networks Typically Occurs at the Edge of
      Stability <https://arxiv.org/abs/2103.00065>`_, 2021
    """

    def __init__(
        self,
        loss_fn: LossFn,
        batches: Any,
        key: ArrayLike = 0,
        *,
        every: int,
        measures: Mapping[str, Callable[..., Any]] | None = None,
        prefix: str = "sharpness/",
    ):
        schedules.check_integer("every", every, 1)
        keys.check_key(key)
        measures = {"lambda_max": eigenvalues} if measures is None else measures
        if not (
            isinstance(measures, Mapping)
            and measures
            and all(map(callable, measures.values()))
        ):
            raise ValueError(
                "measures must be a dict of functions (loss_fn, params, batches), such"
                ' as {"lambda_max": sharpness.hessian_eigenvalues, "sam": functools'
                f".partial(sharpness.sam_sharpness, rho=0.05)}}; got {measures!r}."
            )
        takes = {name: _arguments(f) for name, f in measures.items()}
        self._warm = [name for name in measures if "init" in takes[name]]
        self._every, self._prefix = every, prefix
        self._key = key
        on_host = isinstance(batches, list) or is_streamed(batches)
        # An iterator is read once, for all measurements.
        self._batches = Streamed(batches) if on_host else batches

        def run(params: Any, batches: Any, key: jax.Array, state: ProbeState) -> Any:
            values, starts = {}, {}
            for i, (name, measure) in enumerate(measures.items()):
                options: dict[str, Any] = {}
                if "key" in takes[name]:
                    options["key"] = jax.random.fold_in(key, i)
                if name in self._warm:
                    options["init"] = state.starts[name]
                result = measure(loss_fn, params, batches, **options)
                for path, x in small(result).items():
                    values["/".join(filter(None, [name, path]))] = x
                if name in self._warm:
                    starts[name] = _next_start(name, result, state.starts[name])
            return values, ProbeState(starts)

        # A measure whose batches the host reads cannot run inside jit. It then compiles
        # its programs itself.
        self._run = run if on_host else _Current(run)

    def init(self, params: Any) -> ProbeState:
        """The state before the first measurement."""
        return ProbeState({name: cache(params) for name in self._warm})

    def __call__(
        self, step: int, params: Any, state: ProbeState
    ) -> tuple[dict[str, float], ProbeState]:
        """Measures if ``step`` is a multiple of ``every``.

        Args:
          step: the number of the step, from 0.
          params: the current parameters.
          state: from :meth:`init` or the last call.

        Returns:
          Names and floats (an empty dict on steps in between), and the new state.
        """
        if int(step) % self._every:
            return {}, state
        key = jax.random.fold_in(typed_key(self._key), int(step))
        values, state = self._run(params, self._batches, key, state)
        return to_scalars(values, self._prefix), state


class _Current:
    """A compiled function that sees the current values of what it closes over."""

    def __init__(self, f: Callable[..., Any]):
        self._f, self._program, self._compiled = f, 0, f

    def __call__(self, *args: Any) -> Any:
        # A new function each time, because JAX would not trace an equal one again.
        now = jax.jit(lambda *args: self._f(*args))
        program = hash(now.lower(*args).as_text())
        if program != self._program:
            self._program, self._compiled = program, now
        return self._compiled(*args)


def _arguments(measure: Callable[..., Any]) -> set[str]:
    """Those of key and init that a measure takes, and that no partial has fixed."""
    fixed = measure.keywords if isinstance(measure, functools.partial) else {}
    return (set(inspect.signature(measure).parameters) & {"key", "init"}) - {*fixed}


def _next_start(name: str, result: Any, start: Any) -> Any:
    if not (hasattr(result, "eigenvalues") and hasattr(result, "eigenvectors")):
        raise ValueError(
            f"The measure {name!r} takes init, so it must return a result with"
            " eigenvalues and eigenvectors, from which the next one starts. Drop the"
            " argument, or give it another name."
        )
    # Only finite ones: one measurement with NaN must not spoil the later ones.
    found = jnp.isfinite(result.eigenvalues)

    def sum_(v: jax.Array, old: jax.Array) -> jax.Array:
        kept = jnp.where(jnp.expand_dims(found, range(1, v.ndim)), v, 0)
        # The sum of all, because Lanczos finds nothing in directions without a start.
        return jnp.where(found.any(), kept.sum(0).astype(old.dtype), old)

    return jax.tree.map(sum_, result.eigenvectors, start)
