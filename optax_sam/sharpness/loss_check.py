"""Warns about a loss that draws random numbers or mixes the examples of a batch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_DRAWS = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
_COMBINE = {"add", "sub", "mul", "div"}
_warned: weakref.WeakSet[Any] = weakref.WeakSet()

RANDOM = (
    "loss_fn draws random numbers: is dropout on? The measure then describes another"
    " function than the evaluated one, or another one in every product. Call the model"
    " in evaluation mode: train=False or deterministic=True in Linen, model.eval() in"
    " NNX, eqx.nn.inference_mode(model) in Equinox."
)
MIXED = (
    "loss_fn computes statistics over the examples of a batch and applies them to each:"
    " is BatchNorm in training mode? The loss of an example then depends on its batch,"
    " and the mean over batches is another function. Call the model with its running"
    " averages: train=False or use_running_average=True in Linen, model.eval() in NNX,"
    " eqx.nn.inference_mode(model) in Equinox."
)


def check_loss(loss_fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> None:
    """Warns once if a loss is not a mean of deterministic losses of examples.

    It inspects the program of the loss and runs nothing.
    """
    try:
        if loss_fn in _warned:
            return
        # A new function, because JAX would not trace an equal one again: what it closes
        # over may have changed, such as a switch between training and evaluation.
        trace = jax.make_jaxpr(lambda *args: loss_fn(*args))
        jaxpr = trace(*map(_shapes, (params, batch))).jaxpr
    except Exception:
        return  # the measure itself will raise an error
    found = [RANDOM] if any(x.primitive.name in _DRAWS for x in _all(jaxpr)) else []
    # Beside the examples, a batch may hold other arrays, such as a number of tokens.
    lengths = [(*jnp.shape(x), 0)[0] for x in jax.tree.leaves(batch)]
    others = [_NONE] * (len(jaxpr.invars) - len(lengths))
    for size in {x for x in lengths if x > 1}:
        kinds = others + [_EXAMPLES if x == size else _NONE for x in lengths]
        if _MIXED in _propagated(jaxpr, kinds, size):
            found.append(MIXED)
            break
    for message in found:
        _warned.add(loss_fn)
        warnings.warn(message, stacklevel=2)


# Values that depend on no example, on a statistic over the examples, or on one example
# each; and values that mix the last two.
_NONE, _STATISTIC, _EXAMPLES, _MIXED = range(4)


def _propagated(jaxpr: Any, kinds: list[int], size: int) -> list[int]:
    """The kinds of the outputs for given kinds of the inputs; or only "mixed"."""
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    of = lambda x: _NONE if hasattr(x, "val") else known.get(x, _NONE)
    for eqn in jaxpr.eqns:
        given = [of(x) for x in eqn.invars]
        inner = next(_inner(eqn), None)
        if inner is not None and len(inner.invars) == len(given):
            outs = _propagated(inner, given, size)
        else:
            outs = [max(given, default=_NONE)] * len(eqn.outvars)
            if eqn.primitive.name in _COMBINE and {_STATISTIC, _EXAMPLES} <= {*given}:
                return [_MIXED]
            # The mean over the axis of a vmap is a psum.
            name, axes = eqn.primitive.name, eqn.params.get("axes", ())
            pools = 0 in axes and ("reduce" in name or name == "psum")
            shape: Any = getattr(eqn.invars[0].aval, "shape", ()) if given else ()
            if pools and outs[0] == _EXAMPLES and shape[0] % size == 0:
                # A scalar, such as a loss or a number of tokens, is no statistic.
                outs = [_STATISTIC if x.aval.shape else _NONE for x in eqn.outvars]
        if _MIXED in outs:
            return [_MIXED]
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(x) for x in jaxpr.outvars]


def _inner(eqn: Any) -> Iterator[Any]:
    """The programs within an operation: of jit, scan, a custom derivative."""
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(x, "jaxpr") and hasattr(x.jaxpr, "eqns"):
                yield x.jaxpr
            elif hasattr(x, "eqns"):
                yield x


def _all(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _all(inner)


def _shapes(tree: Any) -> Any:
    shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return jax.tree.map(shape, tree)
