"""MSAM: the momentum as perturbation (Becker et al., arXiv 2401.12033)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import checks, momentum, probe, schedules, states
from optax_sam.method import method
from optax_sam.schedules import at
from optax_sam.states import the_state, with_dicts, without_variables
from optax_sam.trees import add, mapped, norm, rescale, scaled, wide

_EXAMPLE = "optax_sam.msam(optax.sgd(0.1, momentum=0.9))"


@states.registered
class MSAMState(NamedTuple):
    """State of :func:`msam`.

    Attributes:
      count: number of steps taken, () int32; drives the schedule of ``rho``.
      scale: the factor ``c`` of the momentum in the present perturbation, () float;
        negative for a momentum of steps.
      inner: state of the inner optimizer, with the momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    scale: jax.Array
    inner: Any

    def metrics(self) -> dict[str, jax.Array]:
        """The ``perturbation_scale`` to log; zero if there is no perturbation.

        The norm of the momentum is ``rho`` divided by this scale.
        """
        return {"perturbation_scale": jnp.abs(self.scale)}


@method()
def msam(
    inner: optax.GradientTransformation, *, rho: optax.ScalarOrSchedule = 3.0
) -> optax.GradientTransformationExtraArgs:
    r"""MSAM: perturbs along the momentum, at the cost of the base optimizer.

    You train the perturbed parameters, :math:`\tilde w`. With the inner optimizer's
    momentum :math:`v`:

    .. math::
      w = \tilde w + c\, v, \qquad
      w \leftarrow w + \text{inner}\big(\nabla L(\tilde w), w\big), \qquad
      c \leftarrow \frac{\rho}{\|v\|}, \qquad \tilde w = w - c\, v

    where the new :math:`c` belongs to the new :math:`v`. The perturbation continues the
    last step, along which the loss of the next batch rises. **Evaluate, checkpoint and
    average at** :math:`w`, which is :func:`msam_eval_params`.

    It wraps a whole optimizer, and nothing may come after it in a chain. The update
    must be applied unchanged, because it also moves the perturbation. Put
    transformations that change the gradient before it. A decay before it is coupled and
    decays the perturbed weights, as in the authors' SGD. A decay inside decays
    :math:`w`. Their AdamW decays after the step, ``optax.adamw`` before it:

    .. code-block:: python

      optax.chain(
          optax.clip_by_global_norm(1.0),
          optax.add_decayed_weights(wd),
          optax_sam.msam(optax.sgd(lr, momentum=0.9)),
      )
      optax_sam.msam(optax.chain(optax.adam(lr), optax_sam.decay_after(lr * wd)))
      optax_sam.msam(optax.adamw(lr, weight_decay=wd))

    To freeze leaves, set their gradients to zero before it:
    ``optax.masked(optax.set_to_zero(), frozen)``.

    BatchNorm's statistics come from :math:`\tilde w`. The authors estimate them again
    at :math:`w` in one pass over the data after the training run. Keep the parameters
    in float32: in bfloat16 an offset of norm 3 over ten million weights rounds away.
    While the learning rate warms up, set ``rho`` to zero, and let it jump afterwards:
    ``lambda t: jnp.where(t < warmup_steps, 0.0, 3.0)``. Otherwise the paper's ViT-S/32
    loses 3 points.

    **The momentum** is a part of the state of ``inner``. It is a field called ``mu``,
    ``m``, ``trace``, ``ema``, ``exp_avg``, ``momentum`` or ``velocity``, or the only
    pytree there that is like the parameters. Every parameter needs a momentum. The
    parts of ``optax.partition`` share one norm (SGD's momentum is a sum of gradients,
    about ten times as long as Adam's mean). Some optimizers keep a momentum of steps,
    which contains the learning rate: ``optax.rmsprop``, ``optax.lars``. It points the
    other way, so :math:`c` is negative, and :math:`\tilde w` still lies further along
    the last step. ``init`` finds out which kind it is: it runs ``inner`` for a few
    steps on a small copy of the parameters, with a gradient and with its negative. This
    takes about as long as compiling the update of ``inner``.

    Cost: 1 gradient per step; two scalars of state.

    Args:
      inner: the optimizer, with its learning rate and a momentum:
        ``optax.sgd(..., momentum=0.9)``, ``optax.adam``, ``optax.lion``,
        ``optax.contrib.muon``, ``optax.contrib.prodigy``,
        ``optax.rmsprop(..., momentum=0.9)``, an ``optax.partition`` of such, or your
        own.
      rho: length of the perturbation in units of the weights, at least 0, or a
        schedule of the step. About 0.3 to 3 for CNNs with SGD, 1 to 10 for AdamW.

    Returns:
      An optimizer; its ``update`` needs ``params``, the perturbed ones, and forwards
      all extra arguments to ``inner``. Its state is a :class:`MSAMState`.

    Raises:
      ValueError: if ``rho`` is negative or ``inner`` is no optimizer; on ``init``, if
        a parameter has no momentum or several, if what ``inner`` keeps is no momentum
        of its steps, or if those steps lead uphill; on ``init`` or ``update``, if it
        is inside ``optax.masked`` or ``optax.partition``; on ``update``, if
        ``params`` is missing or a gradient does not fit them.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.msam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> w = optax_sam.msam_eval_params(state, params)
      >>> print(f"{jnp.linalg.norm(params - w):.3f}")
      0.500
      >>> bool(loss_fn(w) < loss_fn(params))
      True

    Differs from the authors' code in:
      1. A perturbation is removed with the scale that applied it; their SGD takes the
         current ``rho``, which differs after a jump.
      2. The inner optimizer's ``nesterov`` acts; there it is ignored.
      3. ``inner`` decides where the decay acts, see above.

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024; code:
      MarlonBecker/MSAM
    """
    rho = schedules.check_schedule("rho", rho, 0.0)
    inner = checks.wrapped("msam", inner, "msam(optax.sgd(0.1, momentum=0.9), rho=3.0)")

    # Found once for parameters and states of one form, so that an eager step is quick.
    places: dict[Any, tuple[int, ...]] = {}
    signs: dict[Any, int] = {}

    def place(inner_state: Any, params: Any) -> tuple[int, ...]:
        form = jax.tree.structure(inner_state), _form(params)
        if form not in places:
            places[form] = momentum.locate(inner_state, params)
        return places[form]

    def which_way(params: Any, extra: dict[str, Any] | None) -> int | None:
        form = _form(params)
        if form not in signs:
            sign = probe.sign(inner, params, extra)
            if sign is None:
                return None
            signs[form] = sign
        return signs[form]

    def init(params: Any) -> MSAMState:
        _check_not_masked(params)
        state = inner.init(params)
        if all(map(checks.is_perturbable, jax.tree.leaves(params))):
            # update refuses the other placeholders. An optimizer that needs an extra
            # argument runs there.
            which_way(params, None)
        return MSAMState(jnp.zeros((), jnp.int32), jnp.zeros((), float), state)

    def update(
        updates: Any, state: MSAMState, params: Any = None, **extra: Any
    ) -> tuple[Any, MSAMState]:
        if params is None:
            raise ValueError(
                "msam needs the parameters: tx.update(grads, opt_state, params), with"
                " the gradients taken at these same parameters."
            )
        _check_not_masked(updates, params)
        states.check_state("msam", MSAMState, state)
        checks.check_gradients("msam", "the gradient at w", updates, params)
        # Python and NumPy numbers among the leaves become arrays, as in Optax.
        g, params = jax.tree.map(jnp.asarray, (updates, params))
        where = place(state.inner, params)
        before = scaled(momentum.take(state.inner, where, params), state.scale)
        w = optax.tree.cast_like(add(params, before), params)
        u, inner_state = inner.update(g, state.inner, w, **extra)
        v = momentum.take(inner_state, where, params)
        # The perturbation is against a momentum of gradients, and along one of steps.
        sign = which_way(params, extra)
        assert sign is not None  # only missing extra arguments would leave it open
        radius = sign * at(rho, state.count)
        scale = rescale(jnp.ones((), float), norm(v), radius)
        after = scaled(v, scale)
        # Not computed from the sum w: a step much smaller than w would lose digits.
        moved = jax.tree.map(
            lambda u, x, y, like: (wide(u) + (x - y)).astype(like.dtype),
            *(u, before, after, params),
        )
        return moved, MSAMState(optax.safe_increment(state.count), scale, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def msam_eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    r"""The parameters without MSAM's perturbation: :math:`w = \tilde w + c\, v`.

    Args:
      opt_state: state of an optimizer with one :func:`msam` anywhere in it.
      params: the parameters that this optimizer trains, of the same step.

    Returns:
      The parameters to evaluate, to average and to keep, in the dtypes of ``params``.
      To resume the training run keep ``params`` and ``opt_state``.

    Raises:
      ValueError: if there is no MSAM state, or several, or if ``params`` are not like
        its momentum.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.msam(optax.sgd(0.1, momentum=0.9), rho=5.0)
      >>> w, g = jnp.zeros(2), jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(g, tx.init(w), w)
      >>> params = optax.apply_updates(w, updates)
      >>> print(params)  # -0.1 * g and 5.0 further along it
      [-3.3 -4.4]
      >>> print(jnp.round(optax_sam.msam_eval_params(state, params), 3))
      [-0.3 -0.4]
    """
    state = the_state(MSAMState, "msam", opt_state, _EXAMPLE)
    live, structure = jax.tree.flatten(params)
    # NNX keeps momenta and parameters in different kinds of variables and mappings.
    inner = with_dicts(state.inner)
    try:
        if not all(map(checks.is_perturbable, live)):
            raise ValueError
        where = momentum.locate(inner, with_dicts(without_variables(params)))
    except ValueError as error:
        raise ValueError(
            "msam_eval_params got parameters that differ from the momentum in the state"
            " in structure or shapes; pass the parameters that this optimizer trains,"
            " with Equinox eqx.filter(model, eqx.is_inexact_array)."
        ) from error
    kept = jax.tree.leaves(inner)
    of_one = mapped(scaled, jnp.ndim(state.scale))  # of each replica or seed
    offset = of_one([kept[i] for i in where], state.scale)
    live = [jnp.asarray(x) for x in live]
    w = optax.tree.cast_like(add(live, offset), live)
    return jax.tree.unflatten(structure, w)


def _form(params: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(params)
    return structure, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _check_not_masked(*trees: Any) -> None:
    states.check_not_masked(
        "msam",
        *trees,
        advice="it would perturb a part of the parameters, and msam_eval_params could"
        " not tell which. Put it outside; to freeze leaves, write"
        " optax.chain(optax.masked(optax.set_to_zero(), frozen),"
        f" {_EXAMPLE}).",
    )
