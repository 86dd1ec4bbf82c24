"""StableSAM: SAM at the length of the gradient at w (Tan et al., arXiv 2401.07250)."""

from __future__ import annotations

from typing import Any, Unpack

import optax

from optax_sam.ascent.ball import l2
from optax_sam.method import Options, method, on_engine
from optax_sam.parts import Blend, Step
from optax_sam.trees import of_length, tiny_norm


def renormalize(blend: Blend = Blend()) -> Blend:
    r"""Gives another rule's gradient the length of the gradient at ``w``, as StableSAM.

    .. math::
      d = \frac{\|g\|}{\|d'\|}\, d' \quad\text{on perturbed steps}

    and zero where :math:`d'` is zero. On other steps it emits the rule's gradient. With
    ``axis_name``, each device takes the norms of its gradients.

    Args:
      blend: the rule that makes :math:`d'`; by default SAM's.

    Returns:
      A rule for ``blend=``.

    Raises:
      ValueError: if ``blend`` is no rule.

    Examples:
      >>> import optax_sam
      >>> stable_gsam = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05),
      ...     blend=optax_sam.blend.renormalize(optax_sam.blend.surrogate_gap(0.4)))
    """
    if not isinstance(blend, Blend):
        raise ValueError(
            "renormalize needs a rule of optax_sam.blend, such as"
            f" blend.take_ascended(); got {blend!r}."
        )

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        d, state = blend.fresh(g, g_s, state, step)
        return of_length(d, tiny_norm(g)), state

    return blend._replace(fresh=fresh, call=f"blend.renormalize({blend})")


@method(l2)
def stable_sam(
    rho: optax.ScalarOrSchedule = 0.05, **options: Unpack[Options]
) -> optax.GradientTransformationExtraArgs:
    r"""StableSAM: the perturbed gradient with the length of the gradient at ``w``.

    .. math::
      g_s = \nabla L\Big(w + \rho\, \frac{g}{\|g\|}\Big), \qquad
      d = \frac{\|g\|}{\|g_s\|}\, g_s

    The perturbed gradient is longer than the gradient at ``w``, so SAM needs a smaller
    learning rate than its base optimizer. StableSAM keeps the length of the base
    optimizer's step. It is also called SSAM, a name that it shares with an unrelated
    sparse SAM. :func:`optax_sam.blend.renormalize` does the same for every method.

    Cost: 2 gradients per perturbed step, 1 on others; a few scalars of state.

    Examples:
      >>> import optax, optax_sam
      >>> tx = optax.chain(optax_sam.stable_sam(rho=0.1), optax.sgd(0.1))

    Differs from the authors' code in:
      1. We found no code of theirs: the formula is the paper's, with norms over all
         leaves together.

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
    """
    return on_engine("stable_sam", options, ascent=l2(rho), blend=renormalize())
