"""SAM-ON: only the normalization layers are perturbed (Mueller et al., 2306.04226)."""

from __future__ import annotations

import functools
from typing import Any

import optax
from jax.typing import DTypeLike

from optax_sam import ascent
from optax_sam.arguments import Mask
from optax_sam.engine import sharpness_aware
from optax_sam.when import When, always


def sam_on(
    rho: optax.ScalarOrSchedule = 0.5,
    *,
    adapt: Mask = False,
    eta: optax.ScalarOrSchedule = 0.01,
    roles: Any = None,
    when: When = always(),
    mask: Mask = ascent.normalization_layers,
    axis_name: Any = None,
    ascent_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM-ON: SAM or ASAM that perturbs nothing but the normalization layers.

    .. math::
      e = \rho\, \frac{T^2 g_N}{\|T g_N\|} \text{ on normalization layers } N,
      \text{ else } 0, \qquad d = \nabla L(w + e)

    with :math:`T = 1`, or :math:`|w| + \eta` on adapted leaves as in ASAM. The norm is
    of :math:`g_N` alone; the descent gradient is of all parameters. These layers hold
    less than 0.1 % of the weights, and their radius is larger than SAM's by an order of
    magnitude, as the default is: the authors' example on CIFAR-100 (WRN-28-10) has
    ``rho=10, adapt=True``.

    Cost: 2 gradients per ascended step, 1 on others; a few scalars of state. The first
    gradient is needed in full only where it is emitted: with ``when=always()`` it may
    be zero outside the mask, which saves its weight gradients there, a third of it
    (what a rejected ascent falls back to then lacks them too).

    Args:
      rho: radius of the perturbation, at least 0, or a schedule of the step; in units
        of the weights, or relative to their sizes where they are adapted.
      adapt: the adapted leaves, ``True`` for all that are perturbed, or a tree of bools
        or a function as for ``mask``; ``None`` means gains and not offsets, as in ASAM.
      eta: added to the sizes of adapted weights, at least 0, or a schedule. The
        authors' script has 0, which keeps weights that are zero, such as new biases,
        where they are.
      roles: what each leaf is, for the default of ``mask`` and for ``adapt=None``: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      when: on which steps to ascend, a rule of ``optax_sam.when``.
      mask: the perturbed leaves, by default
        :func:`optax_sam.ascent.normalization_layers`; see
        :func:`optax_sam.sharpness_aware`.
      axis_name: a mapped axis for m-sharpness, see
        :func:`optax_sam.sharpness_aware`.
      ascent_dtype: dtype of the perturbed parameters, see
        :func:`optax_sam.sharpness_aware`.

    Returns:
      A transformation that stands first in a chain and needs ``grad_fn``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative; on ``update``, if no normalization
        layer is found.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_sam
      >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.relu, nn.Dense(1)])
      >>> x = jnp.linspace(0.0, 1.0, 16)[:, None]
      >>> loss_fn = lambda p: jnp.mean((model.apply(p, x) - x**2) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> tx = optax.chain(optax_sam.sam_on(rho=0.5), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         jax.grad(loss_fn)(params), state, params, grad_fn=jax.grad(loss_fn))
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 0.1)
      True

    Differs from the authors' code in:
      1. The layers are found by names and structure, see :func:`optax_sam.roles`;
         there by ``norm`` or ``bn`` in the name of a parameter. No layer at all is an
         error, and a kernel is in no normalization layer, whatever that is called.
      2. 1e-12 is added to the norm; there 1e-16, which float32 does not see.

    References:
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware Minimization
      Needs <https://arxiv.org/abs/2306.04226>`_, 2023; code: mueller-mp/SAM-ON
    """
    if mask is ascent.normalization_layers:
        mask = functools.partial(ascent.normalization_layers, roles=roles)
    return sharpness_aware(
        ascent.adaptive(rho, eta, adapt, roles=roles if adapt is None else None),
        when,
        mask=mask,
        axis_name=axis_name,
        ascent_dtype=ascent_dtype,
        name="sam_on",
    )
