"""SAM-ON: only the normalization layers are perturbed (Mueller et al., 2306.04226)."""

from __future__ import annotations

import functools
from typing import Any, Unpack

import jax
import optax

from optax_sam.masks import Mask
from optax_sam.method import WithoutMask, method, on_engine
from optax_sam.methods.asam import adaptive
from optax_sam.roles import named_leaves, resolve_roles


def normalization_layers(params: Any, *, roles: Any = None) -> Any:
    """The mask of the normalization layers, which ``sam_on`` perturbs.

    Their leaves are the gains and offsets that :func:`optax_sam.roles` finds. A
    normalization layer has no kernel, and it has one of these three properties:

    - Its name contains ``norm``, or ``bn`` or ``ln`` as a word, in any case.
    - It has a parameter ``scale``, as Flax's have under any name.
    - It has a gain beside an offset of the same shape.

    Args:
      params: a pytree of parameters whose leaves are named by dicts or attributes.
      roles: what each leaf is, a pytree of :class:`optax_sam.Role` or a function from
        the parameters to one; ``None`` means :func:`optax_sam.roles`.

    Returns:
      A pytree of bools like the parameters.

    Raises:
      ValueError: if there is no such layer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> layer = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
      >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2))}, "ln_f": layer}
      >>> print(optax_sam.ascent.normalization_layers(params)["ln_f"])
      {'bias': True, 'scale': True}

      All the others:

      >>> no_norm = lambda params: jax.tree.map(
      ...     lambda chosen: not chosen, optax_sam.ascent.normalization_layers(params))
      >>> print(no_norm(params)["Dense_0"])
      {'kernel': True}
    """
    in_norm = lambda role: role.kind in ("gain", "offset")
    chosen = jax.tree.map(in_norm, resolve_roles(roles, params))
    if not any(jax.tree.leaves(chosen)):
        names = [name or "the root" for name in named_leaves(params)]
        raise ValueError(
            "No normalization layer was found, by a name with norm, bn or ln or a"
            " parameter called scale, among"
            f" {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
            " Say which leaves to perturb: mask= a pytree of bools like the parameters,"
            " or a function that makes one from them; or roles=, see"
            " optax_sam.roles_table."
        )
    return chosen


@method(adaptive)
def sam_on(
    rho: optax.ScalarOrSchedule = 0.5,
    *,
    adapt: Mask = False,
    eta: optax.ScalarOrSchedule = 0.01,
    roles: Any = None,
    mask: Mask = normalization_layers,
    **options: Unpack[WithoutMask],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM-ON: perturbs only the normalization layers, as SAM or ASAM does.

    .. math::
      e = \rho\, \frac{T^2 g_N}{\|T g_N\|} \text{ on normalization layers } N,
      \text{ else } 0, \qquad d = \nabla L(w + e)

    with :math:`T = 1`, or :math:`|w| + \eta` on adapted leaves as in ASAM. The norm is
    over :math:`g_N` alone; :math:`d` is the gradient of all parameters. These layers
    hold less than 0.1 % of the weights. Their radius, as in the default, is an order of
    magnitude larger than SAM's: the authors' example on CIFAR-100 (WRN-28-10) has
    ``rho=10, adapt=True``.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state. With
    ``when=always()`` the gradient at ``w`` may be zero outside the mask. This saves its
    weight gradients there, which are a third of it. If a perturbed gradient is then
    rejected, the emitted gradient lacks them too.

    Args:
      rho: radius of the perturbation, at least 0, or a schedule of the step; in units
        of the weights, or relative to their sizes where they are adapted.
      adapt: the adapted leaves, ``True`` for all that are perturbed, or a pytree of
        bools or a function as for ``mask``; ``None`` means gains and not offsets, as in
        ASAM.
      eta: added to the sizes of adapted weights, at least 0, or a schedule. The
        authors' script has 0, which does not perturb weights that are zero, such as
        new biases.
      roles: what each leaf is, for the default of ``mask`` and for ``adapt=None``: a
        pytree of :class:`optax_sam.Role` or a function from the parameters to one;
        ``None`` means :func:`optax_sam.roles`.
      mask: the perturbed leaves, by default
        :func:`optax_sam.ascent.normalization_layers`; see
        :func:`optax_sam.sharpness_aware`.

    Raises:
      ValueError: if ``rho`` or ``eta`` is negative; on ``update``, if no normalization
        layer is found.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.sam_on(rho=0.5), optax.sgd(0.1))

    Differs from the authors' code in:
      1. The layers are found by names and structure, see :func:`optax_sam.roles`;
         there by ``norm`` or ``bn`` in the name of a parameter. Finding no layer is an
         error. A layer with a kernel is no normalization layer, whatever its name.
      2. 1e-12 is added to the norm; there it is 1e-16, which float32 rounds away.

    References:
      Mueller et al., `Normalization Layers Are All That Sharpness-Aware Minimization
      Needs <https://arxiv.org/abs/2306.04226>`_, 2023; code: mueller-mp/SAM-ON
    """
    if mask is normalization_layers:
        mask = functools.partial(normalization_layers, roles=roles)
    rule = adaptive(rho, eta, adapt, roles=roles if adapt is None else None)
    return on_engine("sam_on", options, ascent=rule, mask=mask)
