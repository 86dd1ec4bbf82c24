"""What an optimizer costs, counted in its traced update, before anything is trained."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam.checks import MissingArgument, with_extra_args
from optax_sam.method import METHODS
from optax_sam.parts import AlwaysState
from optax_sam.readers import members
from optax_sam.states import OURS, nodes
from optax_sam.trajectory.mesa import MESAState
from optax_sam.trajectory.saf import SAFState

_BATCH = 128  # examples in the stand-in for a batch; a method may use a part of them
_EXAMPLE = "optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))"
# Arguments that do not change the cost of a method: its inner optimizer, and the length
# of its steps.
_UNPRICED = {"inner": optax.sgd(0.1, momentum=0.9), "learning_rate": 0.1}


class Summary(NamedTuple):
    """The result of :func:`summary`; it prints as a table.

    Attributes:
      gradients: gradient evaluations of the whole batch on a perturbed step, float. The
        gradient at ``w`` counts, unless nothing uses it.
      gradients_when_skipped: gradient evaluations on any other step; ``None`` if all
        steps are perturbed.
      forward_passes: forward passes in addition to the gradients, on a perturbed step.
      state_bytes: size of the state of the sharpness-aware methods.
      optimizer_bytes: size of all other state, such as the momentum.
      parameter_bytes: size of the parameters.
      needs: the extra arguments that ``update`` needs.
    """

    gradients: float
    gradients_when_skipped: float | None
    forward_passes: float
    state_bytes: int
    optimizer_bytes: int
    parameter_bytes: int
    needs: tuple[str, ...]

    def __str__(self) -> str:
        """The table, in less than 80 columns."""

        def size(count: int) -> str:
            trees = count / max(self.parameter_bytes, 1)
            ratio = f", {trees:.2f} x the parameters" if trees > 0.005 else ""
            return f"{count:,} bytes{ratio}"

        each = "per step" if self.gradients_when_skipped is None else "when perturbed"
        rows = [(f"gradients {each}", f"{self.gradients:.3g}")]
        if self.gradients_when_skipped is not None:
            rows += [("gradients otherwise", f"{self.gradients_when_skipped:.3g}")]
        rows += [
            ("extra forward passes", f"{self.forward_passes:.3g}"),
            ("state of the method", size(self.state_bytes)),
            ("state of the optimizer", size(self.optimizer_bytes)),
            ("update needs", ", ".join(self.needs) or "no extra arguments"),
        ]
        return "\n".join(f"{name:<26}{value}" for name, value in rows)


def summary(
    method: str | Callable[..., Any] | optax.GradientTransformation,
    params: optax.Params,
    **extra: Any,
) -> Summary:
    """The cost of a method or of a whole optimizer, counted before training.

    There is no table of costs. ``update`` is traced on the shapes of the parameters,
    with stand-ins for the functions that it needs, and the calls of these are counted
    in the program. Nothing is computed or allocated.

    The share of perturbed steps is known only during training, as ``ascent_rate`` of
    :func:`optax_sam.metrics`. ESAM is counted with ``per_example_losses`` given, and
    MESA with the forward pass of its term in the loss.

    Args:
      method: the name of a method, such as ``"vsam"``; a function that makes one, such
        as ``optax_sam.vsam``, which is called with its defaults; or a transformation,
        alone or in a whole optimizer.
      params: the parameters, or ``jax.ShapeDtypeStruct`` in their place, such as
        ``jax.eval_shape(model.init, ...)`` returns.
      **extra: further extra arguments that other parts of the optimizer need, such as
        ``value=0.0`` for ``optax.contrib.reduce_on_plateau``.

    Returns:
      A :class:`Summary`.

    Raises:
      ValueError: if there is no method of this name, ``method`` makes no optimizer or
        has arguments without a default, or each device or shard takes gradients at
        another point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
      >>> tx = optax.chain(optax_sam.looksam(0.05, k=5), optax.adam(1e-3))
      >>> print(optax_sam.summary(tx, params))
      gradients when perturbed  2
      gradients otherwise       1
      extra forward passes      0
      state of the method       4,000,033 bytes, 1.00 x the parameters
      state of the optimizer    8,000,004 bytes, 2.00 x the parameters
      update needs              grad_fn
      >>> optax_sam.summary("random_sam", params).gradients
      2.0
    """
    tx = _built(method)
    params = jax.eval_shape(lambda tree: tree, params)
    state = jax.eval_shape(tx.init, params)
    stand_ins = _stand_ins(state)
    needs: list[str] = []

    def counted(ascend: bool) -> Counter[str]:
        given = functools.reduce(operator.or_, (stand_ins[x] for x in needs), extra)
        return _calls(lambda *x: tx.update(*x, ascend=ascend, **given), params, state)

    while True:  # each error names one more missing argument
        try:
            found = counted(ascend=True)
            break
        except MissingArgument as error:
            if error.name not in stand_ins or error.name in needs:
                raise
            needs.append(error.name)
        except NameError as error:  # a mapped axis that is not there
            raise ValueError(f"summary found an axis_name. {_ONE_POINT}") from error
    skips = any(not isinstance(x.when, AlwaysState) for x in members(state))
    own = sum(_bytes(x) - _bytes(getattr(x, "inner", ())) for x in nodes(state, *OURS))
    return Summary(
        gradients=float(found["gradient"]),
        gradients_when_skipped=(
            float(counted(ascend=False)["gradient"]) if skips else None
        ),
        forward_passes=float(found["forward"] + len(nodes(state, MESAState))),
        state_bytes=own,
        optimizer_bytes=_bytes(state) - own,
        parameter_bytes=_bytes(params),
        needs=tuple(needs),
    )


_ONE_POINT = (
    "In micro_sharpness or with axis_name= each shard or device has its own gradients."
    " Together they cost as much as the method on the whole batch. Give summary the"
    " method without axis_name, as in optax_sam.summary(optax_sam.sam(0.05), params)."
)


def _built(method: Any) -> Any:
    """The transformation for a name, a function or a transformation."""
    if isinstance(method, str):
        method = _named(method)
    if callable(method):
        arguments = inspect.signature(method).parameters.values()
        missing = [
            x.name
            for x in arguments
            if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
        ]
        unknown = [name for name in missing if name not in _UNPRICED]
        if unknown:
            raise ValueError(
                f"{getattr(method, '__name__', method)} has no default for"
                f" {', '.join(unknown)}. Call it and give summary the result, as in"
                " optax_sam.summary(optax_sam.saf(50_000, 10), params)."
            )
        method = method(**{name: _UNPRICED[name] for name in missing})
    if not (hasattr(method, "init") and hasattr(method, "update")):
        raise ValueError(
            "summary needs the name of a method, such as 'vsam', a function that makes"
            f" one, or an optimizer, such as {_EXAMPLE}; got {method!r}."
        )
    return with_extra_args(method)


def _named(name: str) -> Callable[..., Any]:
    """The method of this name."""
    if name not in METHODS:
        raise ValueError(
            f"There is no method called {name!r}; write one of"
            f" {', '.join(sorted(METHODS))}."
        )
    return METHODS[name]


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Stand-ins for the functions that users pass to ``update``. Each call is one equation
# of the traced program, with the name of the function.


@jax.jit
def _gradient(point: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, point)


@jax.jit
def _forward(point: Any, losses: jax.Array) -> jax.Array:
    return losses + sum(jnp.sum(x) for x in jax.tree.leaves(point))


@jax.jit
def _forward_and_gradient(point: Any, losses: jax.Array) -> tuple[jax.Array, Any]:
    return _forward(point, losses), _gradient(point)


@jax.custom_vjp
def _losses(point: Any, like: jax.Array) -> jax.Array:
    return _forward(point, like)


_losses.defvjp(
    _forward_and_gradient,
    lambda grads, out: (jax.tree.map(lambda x: jnp.sum(out) * x, grads), out),
)


def _grad_fn(point: Any, *shard: Any) -> Any:
    if shard:
        raise ValueError(f"summary found micro_sharpness. {_ONE_POINT}")
    return _gradient(point)


def _per_example_loss_fn(point: Any, indices: Any = None) -> jax.Array:
    examples = jnp.arange(_BATCH) if indices is None else indices
    return _losses(point, examples.astype(float))


def _stand_ins(state: Any) -> dict[str, dict[str, Any]]:
    """The stand-ins to pass to ``update``, by the argument that it misses."""
    classes = [saf.logits.shape[-1] for saf in nodes(state, SAFState)]
    return {
        "grad_fn": {"grad_fn": _grad_fn},
        "previous_grad_fn": {"previous_grad_fn": _grad_fn},
        "per_example_loss_fn": {
            "per_example_loss_fn": _per_example_loss_fn,
            "per_example_losses": np.zeros(_BATCH, np.float32),
        },
        "logits": {"logits": np.zeros((_BATCH, *classes[:1]), np.float32)},
        "indices": {"indices": np.zeros(_BATCH, np.int32)},
    }


def programs_in(equation: Any) -> list[Any]:
    """The programs that an equation of a jaxpr runs, such as a loop's."""
    is_program = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [getattr(x, "jaxpr", x) for x in found if is_program(x)]


def _calls(update: Callable[..., Any], params: Any, state: Any) -> Counter[str]:
    """The numbers of gradients and forward passes of a batch in a step."""
    program = jax.make_jaxpr(update)(params, state, params).jaxpr
    counts, used = live(program)
    incoming = program.invars[: len(jax.tree.leaves(params))]
    counts["gradient"] += any(id(x) in used for x in incoming)
    return counts


def live(program: Any) -> tuple[Counter[str], set[int]]:
    """The calls whose results a program uses, and the variables it needs for them."""
    counts: Counter[str] = Counter()
    used = {id(x) for x in program.outvars}
    for equation in reversed(program.eqns):
        if not used.isdisjoint(map(id, equation.outvars)):
            used.update(map(id, equation.invars))
            counts.update(_calls_in(equation))
    return counts, used


def _calls_in(equation: Any) -> Counter[str]:
    """The calls in one equation, and in the programs that it runs."""
    called = equation.params.get("name")
    if called == "_gradient":
        return Counter(gradient=1)
    if called in ("_forward", "_forward_and_gradient"):
        kind = called.split("_")[-1]
        return Counter({kind: equation.outvars[0].aval.size / _BATCH})  # type: ignore[dict-item]
    inside = [live(program)[0] for program in programs_in(equation)]
    if equation.primitive.name == "cond":  # one branch runs: count the dearest
        return functools.reduce(operator.or_, inside)
    repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
    return sum(inside * repeats, Counter())
