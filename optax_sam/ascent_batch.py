"""A part of the batch for the perturbation: quarter-batch SAM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optax_sam.schedules import check_integer


def ascent_batch(batch: Any, divisor: int = 4) -> Any:
    r"""Takes every ``divisor``-th example of a batch, for quarter-batch SAM.

    The direction of the perturbation needs few examples. Quarter-batch SAM computes it
    on a part :math:`A` of the batch :math:`B`, and the perturbed gradient on all of it:

    .. math::
      g_A = \nabla L_A(w), \qquad d = \nabla L_B\Big(w + \rho\,
      \frac{g_A}{\|g_A\|}\Big), \qquad |A| = \lceil |B| / k \rceil

    This costs :math:`1 + 1/k` gradients, and SAM costs 2. It works with any method that
    emits the perturbed gradient: pass it the gradient on this part, and a ``grad_fn``
    on the whole batch. On steps without a perturbation, the method emits the gradient
    that you pass, so pass the gradient of the whole batch there.

    Args:
      batch: a pytree of arrays, (B, ...), with the examples in random order, such as
        after shuffling.
      divisor: the ``k`` of the part ``1 / k``, at least 1.

    Returns:
      The same pytree, with arrays (ceil(B / k), ...). It takes examples 0, k, 2k, ...
      and not the first ones. So in a batch that is sharded over devices, each device
      takes examples that it already has. Nothing is sent if ``k`` divides the number of
      examples on a device.

    Raises:
      ValueError: if ``divisor`` is below 1 or traced, or the arrays of the batch have
        different lengths.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.sam(rho=0.1), optax.sgd(0.1))
      >>> grads = jax.grad(lambda w, x: jnp.mean((w - x) ** 2))
      >>> w, batch = jnp.zeros(()), jnp.arange(8.0)
      >>> optax_sam.ascent_batch(batch)
      Array([0., 4.], dtype=float32)
      >>> updates, state = tx.update(
      ...     grads(w, optax_sam.ascent_batch(batch)), tx.init(w), w,
      ...     grad_fn=lambda w: grads(w, batch))

      In a step for :func:`optax_sam.dispatch`, use the whole batch for the gradient at
      ``w`` if the step is not perturbed:

      >>> first = lambda batch, ascend: (
      ...     optax_sam.ascent_batch(batch) if ascend else batch)

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, on m-sharpness: few
      examples serve as well, or better
    """
    check_integer("divisor", divisor, 1)
    lengths = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        name = jax.tree_util.keystr(path) or "the root"
        lengths[name] = jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
    if len(set(lengths.values())) > 1 or None in lengths.values():
        found = ", ".join(
            f"{name}: {'a scalar' if n is None else n}" for name, n in lengths.items()
        )
        raise ValueError(
            "ascent_batch needs arrays with one entry per example, of one length; got"
            f" {found}. Pass the examples alone, and keys and settings beside them."
        )
    # jnp's x[::k] becomes a gather in JAX 0.8, which is not partitioned.
    part = lambda x: jax.lax.slice_in_dim(x, 0, None, stride=divisor)
    return jax.tree.map(part, batch)
