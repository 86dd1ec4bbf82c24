"""Two compiled steps instead of one conditional, chosen on the host."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_sam.readers import ascent_plan, members


def dispatch(train_step: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """Compiles a train step with and without the ascent, and calls the right one.

    XLA's CPU backend runs backward convolutions inside a conditional (or a loop) many
    times slower than outside, and a GPU has to read the decision back. Two
    straight-line programs have neither cost. Decisions are read ahead: the loop waits
    for the device once per window (vSAM) or once per 64 steps, and otherwise runs
    ahead of it. A state that is not the one returned by the call before, such as a
    restored one, is read anew. A rule that needs the next gradient to decide gets the
    single program with the conditional.

    Args:
      train_step: the step to compile: among its arguments and among its results is
        the state of an optimizer with one sharpness-aware member, and it has a
        keyword ``ascend`` which it passes on to ``tx.update(..., ascend=ascend)``.
      **jit_options: options of ``jax.jit``, such as ``donate_argnums``.

    Returns:
      A function with the arguments and results of ``train_step``, less ``ascend``.

    Raises:
      ValueError: if ``train_step`` has no keyword ``ascend``; on the first call, if
        its arguments hold no such state, or several.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(
      ...     optax_sam.sam(0.05, when=optax_sam.when.every_k(5)), optax.sgd(0.1))
      >>> def train_step(w, opt_state, x, ascend=None):
      ...     grad_fn = jax.grad(lambda w: jnp.sum((w - x) ** 2))
      ...     updates, opt_state = tx.update(
      ...         grad_fn(w), opt_state, w, grad_fn=grad_fn, ascend=ascend)
      ...     return optax.apply_updates(w, updates), opt_state
      >>> step = optax_sam.dispatch(train_step, donate_argnums=(0, 1))
      >>> w = jnp.zeros(2)
      >>> opt_state = tx.init(w)
      >>> for _ in range(10):
      ...     w, opt_state = step(w, opt_state, 1.0)
      >>> int(optax_sam.metrics(opt_state)["ascents"])
      2
    """
    parameters = inspect.signature(train_step).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "ascend" not in parameters and not takes_any:
        raise ValueError(
            "The train step needs a keyword to choose its variant: def"
            " train_step(..., ascend=None), passed on as tx.update(grads, opt_state,"
            " params, grad_fn=grad_fn, ascend=ascend)."
        )
    variants = {
        ascend: jax.jit(functools.partial(train_step, ascend=ascend), **jit_options)
        for ascend in (None, True, False)
    }
    plan = np.zeros(0, bool)  # decisions read ahead and not used yet ...
    follows: Any = None  # ... which hold for the state with this very step counter

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal plan, follows
        found = members((args, kwargs))
        if len(found) == 1 and not hasattr(found[0].when, "ascends"):
            return variants[None](*args, **kwargs)
        if not plan.size or found[0].count is not follows:
            plan = ascent_plan((args, kwargs))
        ascend, plan = bool(plan[0]), plan[1:]
        result = variants[ascend](*args, **kwargs)
        after = members(result)
        follows = after[0].count if len(after) == 1 else None
        return result

    return functools.wraps(train_step)(step)
