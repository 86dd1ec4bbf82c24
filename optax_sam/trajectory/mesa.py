"""MESA: past predictions from averaged weights (Du et al., arXiv 2205.14083)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam.checks import with_gradients
from optax_sam.method import method
from optax_sam.schedules import at, check_schedule
from optax_sam.states import check_not_masked, check_state, registered, the_state
from optax_sam.trees import widest

_CHAIN = "optax.chain(optax.sgd(0.1), optax_sam.mesa())"


@registered
class MESAState(NamedTuple):
    """State of :func:`mesa`.

    Attributes:
      count: number of steps taken, () int32; drives a schedule of ``decay``.
      average: the averaged weights, like the parameters in float32 or better.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    average: optax.Params


@method()
def mesa(
    decay: optax.ScalarOrSchedule = 0.9998,
) -> optax.GradientTransformationExtraArgs:
    r"""MESA: keeps predictions near the predictions of averaged weights.

    :func:`optax_sam.saf` keeps past logits in a table. MESA computes them with an
    exponential moving average :math:`v` of the weights, taken after the update:

    .. math::
      v_0 = w_0, \qquad v_{t+1} = \beta v_t + (1 - \beta)\, w_{t+1}

    This transformation keeps the average and does not change the updates.
    :func:`mesa_params` reads the average. :func:`optax_sam.trajectory_loss` is the term
    in the loss: give it the logits at :math:`v` as past logits, on the same input as
    the logits at :math:`w`.

    Apply the model in evaluation mode at :math:`v`. BatchNorm's statistics are not
    parameters, so average them beside the optimizer, in the same step:
    ``optax.incremental_update(batch_stats, averaged_stats, 1 - decay)``. Start from
    statistics that forward passes estimated at the first weights. Otherwise the average
    keeps a share of the initial zeros and ones for thousands of steps. The authors
    leave out the term in the first epochs, up to about the fifth:
    ``coefficient=jnp.where(epoch > 5, 0.8, 0.0)``.

    Cost: 1 gradient and 1 forward pass per step; one pytree like the parameters.

    Args:
      decay: ``beta``, in ``[0, 1]``, or a schedule of the step.

    Returns:
      A transformation for the last place in a chain, since it adds the updates to the
      parameters as ``optax.apply_updates`` will. With ``optax.MultiSteps``, put it last
      in the chain inside it. Its state is a :class:`MESAState`.

    Raises:
      ValueError: if ``decay`` is out of its range; on ``init`` or ``update``, if it
        is inside ``optax.masked`` or ``optax.partition``; on ``update``, if
        ``params`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax.sgd(0.5), optax_sam.mesa(decay=0.9))
      >>> x, y = jnp.eye(4), jnp.array([0, 1, 1, 0])
      >>> def loss_fn(w, average):
      ...     ce = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
      ...     term = optax_sam.trajectory_loss(x @ w, x @ average, coefficient=0.8)
      ...     return ce.mean() + term
      >>> @jax.jit
      ... def train_step(w, opt_state):
      ...     average = optax_sam.mesa_params(opt_state)
      ...     loss, grads = jax.value_and_grad(loss_fn)(w, average)
      ...     updates, opt_state = tx.update(grads, opt_state, w)
      ...     return optax.apply_updates(w, updates), opt_state, loss
      >>> w = jnp.zeros((4, 2))
      >>> opt_state = tx.init(w)
      >>> for _ in range(20):
      ...     w, opt_state, loss = train_step(w, opt_state)
      >>> bool(loss < 0.4)
      True

    Differs from the authors' code in:
      1. Weights that are not finite do not enter the average.
      2. Only parameters are averaged; there BatchNorm's statistics are averaged too.

    References:
      Du et al., `Sharpness-Aware Training for Free
      <https://arxiv.org/abs/2205.14083>`_, 2022; code: AngusDujw/SAF. The
      paper's algorithm updates the average before the loss; here, as in the code, it
      is updated after.
    """
    decay = check_schedule("decay", decay, 0.0, 1.0)

    def init(params: Any) -> MESAState:
        _check_whole(params)
        # A copy, so that parameters and state can both be donated.
        wide = lambda x: jnp.array(x, widest(x))
        return MESAState(jnp.zeros((), jnp.int32), jax.tree.map(wide, params))

    def update(
        updates: Any, state: MESAState, params: Any = None, **extra: Any
    ) -> tuple[Any, MESAState]:
        del extra
        if params is None:
            raise ValueError(
                "mesa needs the parameters: tx.update(grads, opt_state, params)."
            )
        _check_whole(updates, params)
        check_state("mesa", MESAState, state)
        params, _ = with_gradients(updates, params)
        old = state.average
        new = optax.tree.cast_like(optax.apply_updates(params, updates), old)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]
        accepted = jnp.all(jnp.array(finite, bool))
        moved = optax.incremental_update(new, old, 1 - at(decay, state.count))
        choose = lambda x, kept: jnp.where(accepted, x.astype(kept.dtype), kept)
        average = jax.tree.map(choose, moved, old)
        return updates, MESAState(optax.safe_increment(state.count), average)

    return optax.GradientTransformationExtraArgs(init, update)


def mesa_params(
    opt_state: optax.OptState, params: optax.Params | None = None
) -> optax.Params:
    """The averaged weights.

    Args:
      opt_state: state of an optimizer with one :func:`mesa`.
      params: the parameters; the average is cast to their dtypes. ``None`` means
        float32 or better, as in the state.

    Returns:
      A pytree like the parameters.

    Raises:
      ValueError: if there is not one :func:`mesa`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax.sgd(1.0), optax_sam.mesa(decay=0.9))
      >>> w = jnp.array([1.0])
      >>> updates, opt_state = tx.update(jnp.array([-1.0]), tx.init(w), w)
      >>> print(optax_sam.mesa_params(opt_state))
      [1.1]
    """
    average = the_state(MESAState, "mesa", opt_state, _CHAIN).average
    if params is None:
        return average
    some, whole = with_gradients(average, params)
    return whole(optax.tree.cast_like(average, some))


def _check_whole(*trees: Any) -> None:
    check_not_masked(
        "mesa",
        *trees,
        advice="its average would lack the other parameters. Put it outside and last:"
        " optax.chain(optax.partition(transforms, labels), optax_sam.mesa()).",
    )
