"""SAMPa: two gradients at once (Xie et al., arXiv 2410.10683, NeurIPS 2024)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import checks, schedules, states
from optax_sam.barrier import gradients
from optax_sam.method import method
from optax_sam.schedules import at
from optax_sam.trees import add, cache, mapped, norm, rescale, weighted, wide

_CALL = (
    "tx.update(grads, opt_state, params, grad_fn=grad_fn,"
    " previous_grad_fn=lambda p: jax.grad(loss_fn)(p, previous_batch))"
)


@states.registered
class SAMPaState(NamedTuple):
    """State of :func:`sampa`.

    Attributes:
      count: number of steps taken, () int32; drives the schedules.
      num_rejected: number of perturbed gradients that were not finite, () int32.
      perturbed_norm: norm of the last perturbed gradient that was used, () float.
      gradient: the gradient at the point that the last step predicted, like the
        parameters, float32 or better. The next step perturbs along it.
      inner: state of the inner optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    num_rejected: jax.Array
    perturbed_norm: jax.Array
    gradient: Any
    inner: Any

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars to log."""
        return {
            "rejected_ascents": self.num_rejected,
            "gradient_norm": mapped(norm, jnp.ndim(self.count))(self.gradient),
            "ascended_norm": self.perturbed_norm,
        }


@method()
def sampa(
    inner: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    rho: optax.ScalarOrSchedule = 0.1,
    interpolation: optax.ScalarOrSchedule = 0.2,
    predict: Literal["optimizer", "gradient"] = "optimizer",
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: perturbs along the last step's gradient; both gradients run in parallel.

    With the gradient :math:`g_y` of the last step, on its batch :math:`B'`:

    .. math::
      \tilde w &= w + \rho\, \frac{g_y}{\|g_y\|}, \qquad
        y = w + \text{inner}(g_y, w) \\
      p &= \nabla L_{B'}(\tilde w), \qquad g_y \leftarrow \nabla L_B(y)
        \qquad\text{independent of each other} \\
      w &\leftarrow w + \text{inner}\big((1 - \lambda)\, p + \lambda\, g_y, w\big)

    where :math:`y` predicts the next weights. It is the inner optimizer's step along
    :math:`g_y`, with its momentum and decay, or the paper's
    :math:`y = w - \eta\, g_y`. On the first step :math:`\tilde w = y = w`.

    In SAM the perturbed gradient needs the gradient at ``w`` first. Here neither of the
    two gradients needs the other. ``update`` takes ``grad_fn`` on this step's batch and
    ``previous_grad_fn`` on the batch of the step before (on the first step, on the same
    one). You may replace both with ``paired_grad_fn(w_tilde, y) -> (p, g_y)``. It can
    compute them as one ``vmap`` over two parameters and batches, which two devices can
    share:

    .. code-block:: python

      def paired_grad_fn(w_tilde, y):
          stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
          both = jax.vmap(jax.grad(loss_fn))(
              stack(w_tilde, y), stack(previous_batch, batch))
          return [jax.tree.map(lambda x: x[i], both) for i in range(2)]

    The gradient at ``w`` is not used, and XLA drops its computation. You may pass zeros
    like the parameters. If the perturbed gradient is not finite, :math:`g_y` replaces
    it. If :math:`g_y` is not finite, the optimizer gets it, and it is not kept. Put a
    guard inside, ``sampa(optax.apply_if_finite(...))``: outside, it would check the
    gradient at ``w``.

    It wraps a whole optimizer. Your training loop must keep the previous batch, also
    when it resumes.

    Cost: 2 gradients per step, in the time of 1 where they run in parallel; one pytree
    like the parameters and 3 scalars of state.

    Args:
      inner: the optimizer, with its learning rate.
      learning_rate: the step :math:`\eta` of ``predict="gradient"``, at least 0, or a
        schedule; the optimizer's own step does not need it.
      rho: radius of the perturbation in units of the weights, at least 0, or a
        schedule of the step.
      interpolation: share ``lambda`` of the gradient at the predicted weights, in
        ``[0, 1]``, or a schedule.
      predict: ``"optimizer"``, as the authors' code, or ``"gradient"``, as their paper.

    Returns:
      An optimizer; its ``update`` needs ``params``, ``grad_fn`` and
      ``previous_grad_fn`` and forwards all other extra arguments to ``inner``. Its
      state is a :class:`SAMPaState`.

    Raises:
      ValueError: if a number is out of its range, ``predict`` is neither or lacks its
        learning rate, or ``inner`` is no optimizer; on ``update``, if
        ``previous_grad_fn`` is missing or a gradient does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sampa(optax.sgd(0.05, momentum=0.9), rho=0.1)
      >>> grads = jax.grad(lambda w, x: jnp.mean((w - x) ** 2))
      >>> batches = jnp.linspace(0.0, 2.0, 12).reshape(3, 4, order="F")
      >>> w = jnp.zeros(())
      >>> state, previous = tx.init(w), batches[0]
      >>> for t in range(60):
      ...     x = batches[t % 3]
      ...     updates, state = tx.update(
      ...         jnp.zeros(()), state, w, grad_fn=lambda w: grads(w, x),
      ...         previous_grad_fn=lambda w: grads(w, previous))
      ...     w, previous = optax.apply_updates(w, updates), x
      >>> bool(abs(w - 1.0) < 0.2)
      True

    Differs from the authors' code in:
      1. ``interpolation=0`` works; their code divides by it to recover the gradient.
      2. The caller decides where the gradients run; there each of two processes
         computes one.

    References:
      Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, 2024; code: LIONS-EPFL/SAMPa
    """
    rho = schedules.check_schedule("rho", rho, 0.0)
    interpolation = schedules.check_schedule("interpolation", interpolation, 0.0, 1.0)
    if predict not in ("optimizer", "gradient"):
        raise ValueError(f'predict must be "optimizer" or "gradient"; got {predict!r}.')
    if learning_rate is not None:
        learning_rate = schedules.check_schedule("learning_rate", learning_rate, 0.0)
    elif predict == "gradient":
        raise ValueError(
            'predict="gradient" steps along the gradient by learning_rate= (the inner'
            " optimizer's), which is missing. Write sampa(optax.sgd(0.1),"
            ' learning_rate=0.1, predict="gradient").'
        )
    inner = checks.wrapped("sampa", inner, "sampa(optax.sgd(0.1, momentum=0.9))")

    def init(params: Any) -> SAMPaState:
        states.check_not_masked("sampa", params, advice=_OUTSIDE)
        return SAMPaState(
            count=jnp.zeros((), jnp.int32),
            num_rejected=jnp.zeros((), jnp.int32),
            perturbed_norm=jnp.zeros((), float),
            gradient=cache(params),
            inner=inner.init(params),
        )

    def update(
        updates: Any,
        state: SAMPaState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        previous_grad_fn: Any = None,
        paired_grad_fn: Any = None,
        **extra: Any,
    ) -> tuple[Any, SAMPaState]:
        states.check_not_masked("sampa", updates, params, advice=_OUTSIDE)
        alone = (grad_fn, 1) if grad_fn is not None else (paired_grad_fn, 2)
        checks.check_params("sampa", params)
        checks.check_grad_fn("sampa", *alone)
        checks.check_gradients("sampa", checks.INCOMING, updates, params)
        states.check_state("sampa", SAMPaState, state)
        extra |= {} if grad_fn is None else {"grad_fn": grad_fn}
        sources = ["paired_grad_fn"] * 2
        if paired_grad_fn is None:
            sources = ["previous_grad_fn", "grad_fn"]
            if not callable(previous_grad_fn):
                raise checks.MissingArgument(
                    "sampa needs previous_grad_fn, a function of the parameters alone"
                    " that returns the gradients on the batch of the step before (on"
                    f" the first step, on its own batch): {_CALL}.{checks.DROPPED}",
                    "previous_grad_fn",
                )

            def paired_grad_fn(w_tilde: Any, y: Any) -> tuple[Any, Any]:
                return previous_grad_fn(w_tilde), grad_fn(y)

        w = jax.tree.map(jnp.asarray, params)
        g_y, count = state.gradient, state.count
        w_tilde = add(w, rescale(g_y, norm(g_y), at(rho, count)))
        both = paired_grad_fn(w_tilde, predicted(g_y, state, w, extra))
        if len(both) != 2:
            raise ValueError(
                "paired_grad_fn must return two pytrees of gradients, at w_tilde on the"
                f" batch before and at y on this one; got {len(both)}."
            )
        for name, grads in zip(sources, both, strict=True):
            checks.check_gradients("sampa", f"what {name} returned", grads, w)

        p, g_y = (optax.tree.cast_like(gradients(x), state.gradient) for x in both)
        lam = at(interpolation, count)
        # Judged in the dtype that the inner optimizer gets: float16 may not hold what a
        # function returned for a float32 point.
        length = lambda x: norm(optax.tree.cast_like(x, w))
        perturbed_norm = length(p)
        accepted = jnp.isfinite(perturbed_norm)
        size = perturbed_norm.astype(state.perturbed_norm.dtype)
        d = optax.tree.where(accepted, weighted(1 - lam, p, lam, g_y), g_y)
        d = optax.tree.cast_like(d, w)
        u, inner_state = inner.update(d, state.inner, w, **extra)
        return u, SAMPaState(
            count=optax.safe_increment(count),
            num_rejected=state.num_rejected + (~accepted).astype(jnp.int32),
            perturbed_norm=jnp.where(accepted, size, state.perturbed_norm),
            gradient=optax.tree.where(jnp.isfinite(length(g_y)), g_y, state.gradient),
            inner=inner_state,
        )

    def predicted(g_y: Any, state: SAMPaState, w: Any, extra: dict[str, Any]) -> Any:
        """The weights that a step along ``g_y`` would reach."""
        if predict == "gradient":
            lr = at(learning_rate, state.count)
            return jax.tree.map(lambda w, g: wide(w) - lr.astype(g.dtype) * g, w, g_y)
        u, _ = inner.update(optax.tree.cast_like(g_y, w), state.inner, w, **extra)
        # At first there is nothing to step along, and no decay either.
        first = state.count == 0
        return jax.tree.map(lambda w, u: wide(w) + jnp.where(first, 0, wide(u)), w, u)

    return optax.GradientTransformationExtraArgs(init, update)


_OUTSIDE = (
    "its grad_fn would get placeholders instead of parameters. Put it outside:"
    " optax_sam.sampa(optax.partition(transforms, labels)). To freeze leaves, let the"
    " inner optimizer set their updates to zero."
)
