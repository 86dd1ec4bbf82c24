"""m-sharpness in one program: a perturbation for each shard of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import checks, schedules
from optax_sam.axes import vary
from optax_sam.engine import Found, Method, in_shards
from optax_sam.parts import Call
from optax_sam.summary import live, programs_in
from optax_sam.trees import wide

_CALL = (
    "tx.update(None, opt_state, params,"
    " grad_fn=lambda p, i: jax.grad(loss_fn)(p, jax.tree.map(lambda x: x[i], shards)))"
)
# With more shards, compilation takes longer than it gains.
_UNROLL_LIMIT = 8


def micro_sharpness(
    transformation: optax.GradientTransformation,
    num_shards: int,
    *,
    method: Literal["unroll", "scan", "vmap"] | None = None,
    axis_name: str = "shards",
) -> optax.GradientTransformationExtraArgs:
    r"""m-SAM: perturbs each shard of the batch separately, and emits the mean.

    For SAM, with :math:`M` shards of the batch and the loss :math:`L_i` of a shard:

    .. math::
      g_i = \nabla L_i(w), \qquad e_i = \rho\, \frac{g_i}{\|g_i\|}, \qquad
      d = \frac1M \sum_i \nabla L_i(w + e_i)

    ``axis_name=`` does the same on :math:`M` devices. This function does it on any
    number of devices, for any method with that argument. The shards share decisions,
    caches, rejections and metrics. ``num_shards=1`` is the method itself.

    ``grad_fn(params, i)`` returns the gradients on shard ``i`` alone. It also computes
    the gradients at ``w``, so ``updates`` is not used. Pass ``None``, or the mean
    gradient if a transformation before or around this one
    (``optax.apply_if_finite``) looks at it. XLA drops the mean gradient if nothing uses
    it. The second argument is the number of the shard, as in ``optax.contrib.sam``, and
    not a part of the batch. So the caller decides what else belongs to a shard, such as
    a dropout key. A number must mean the same examples, and the same key, in both
    gradients of a step.

    It costs the gradients of the method on the whole batch (for SAM 2 on perturbed
    steps, 1 on others), and its state.

    Args:
      transformation: a transformation built with ``axis_name="shards"``, for instance
        ``optax_sam.sam(0.05, axis_name="shards")``, or an optimizer that begins with
        one. With ``axis_name=("shards", "data")`` each device splits its part of the
        batch into shards, in a ``shard_map`` with ``check_vma=False``.
      num_shards: number :math:`M` of shards, at least 1. In the paper ``m`` is the
        number of examples in one shard.
      method: how the gradients of the shards are computed. The results agree to
        rounding.

        - ``"unroll"``: one after another, each written out in the program. The compiler
          decides when it frees gradients and activations; on CPU it keeps the gradients
          of all shards.
        - ``"scan"``: one after another in a loop. It compiles once and needs the memory
          of one shard. On CPU, XLA runs backward convolutions in a loop 20 to 80 times
          slower.
        - ``"vmap"``: all at once, with the activations of the whole batch, as in SAM,
          and the gradients of every shard. Convolutions become grouped convolutions, on
          CPU two to three times slower. Use it for small shards on an accelerator.
        - ``None``: ``"scan"``; for a model with convolutions and up to 8 shards
          ``"unroll"``.

        Some methods neither store a gradient nor decide by one (``sam``, ``asam``,
        ``gsam``, ``gnp``, ``random_sam``, ..., on every step or every k-th). They add
        the shards up, so a loop keeps two sums and the gradients of one shard. Others
        (``vsam``, ``looksam``, ``ae_sam``, ``friendly_sam``, ``vasso``, ``wsam``) need
        means over all shards before they continue. They keep two to three pytrees like
        the parameters for each shard.
      axis_name: the axis name with which ``transformation`` was built.

    Returns:
      A transformation for the first place in a chain. It needs ``grad_fn(params, i)``
      and has the state of ``transformation``, so all readers and
      ``optax_sam.dispatch`` find it. Other extra arguments, such as ``ascend``, reach
      the method on every shard.

    Raises:
      ValueError: if ``transformation`` is none, ``num_shards`` is below 1 or traced, or
        ``method`` is unknown; on ``update``, if ``params`` or ``grad_fn`` is missing or
        ``grad_fn`` does not take two arguments, if ``transformation`` was built without
        ``axis_name`` or has none (``sampa``, ``msam``, ``mesa``), or if it gets
        ``per_example_loss_fn``, because ``esam`` selects by the losses of the whole
        batch (map it over shards by hand).

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> sam = optax_sam.sam(0.1, axis_name="shards")
      >>> tx = optax.chain(optax_sam.micro_sharpness(sam, 4), optax.sgd(0.1))
      >>> grads = jax.grad(lambda w, x: jnp.mean((w - x) ** 2))
      >>> w, shards = jnp.zeros(()), jnp.arange(8.0).reshape(4, 2)
      >>> state = tx.init(w)
      >>> for _ in range(50):
      ...     updates, state = tx.update(
      ...         None, state, w, grad_fn=lambda w, i: grads(w, shards[i]))
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{w:.1f}", optax_sam.metrics(state)["ascents"])
      3.5 50

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, on m-sharpness; Behdin
      et al., `mSAM: Micro-Batch-Averaged Sharpness-Aware Minimization
      <https://arxiv.org/abs/2302.09693>`_, 2023
    """
    schedules.check_integer("num_shards", num_shards, 1)
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise ValueError(
            "micro_sharpness needs a transformation, such as"
            f" optax_sam.sam(0.05, axis_name={axis_name!r}); got {transformation!r}."
        )
    if method not in ("unroll", "scan", "vmap", None):
        raise ValueError(
            f'method must be "unroll", "scan", "vmap" or None; got {method!r}.'
        )
    transformation = optax.with_extra_args_support(transformation)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        grad_fn: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del updates
        _check_call(params, grad_fn, extra)
        first = lambda p: grad_fn(p, 0)
        program, abstract = jax.make_jaxpr(lambda: first(params), return_shape=True)()
        written_out = num_shards <= _UNROLL_LIMIT and _convolves(program.jaxpr)
        form = method or ("unroll" if written_out else "scan")
        shards = _Shards(num_shards, form, axis_name, grad_fn)
        try:
            with in_shards(shards):
                return transformation.update(
                    abstract, state, params, grad_fn=first, **extra
                )
        except (_NotSummed, AttributeError, TypeError, ValueError):
            # A rule looks at the gradients of all shards before its next line, or the
            # call is wrong, and this way gives the error of the method.
            return shards.stacked(transformation, state, params, extra)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


class _NotSummed(Exception):
    """The method cannot take its step on a sum over shards."""


class _Shards(NamedTuple):
    """The shards of a batch, in which the engine takes a step."""

    number: int
    form: str
    axis_name: str
    grad_fn: Callable[[Any, Any], Any]

    def inside(self, method: Method) -> Method:
        names = method.axis_name
        names = tuple(names) if isinstance(names, (tuple, list)) else (names,)
        if self.axis_name not in names:
            raise _NotSummed
        others = tuple(name for name in names if name != self.axis_name)
        return method._replace(axis_name=others or None)

    def mean(self, _: Any) -> Any:
        raise _NotSummed

    def average(
        self, find: Callable[[Call], Found], method: Method, call: Call
    ) -> Found:
        abstract = lambda x: isinstance(x, jax.ShapeDtypeStruct)
        if not all(map(abstract, jax.tree.leaves(call.g))):
            raise _NotSummed  # a second method in a chain, after the shards' mean
        if _stores_a_gradient(find, method, call):
            raise _NotSummed  # and not its mean over the shards

        def of_shard(i: Any) -> tuple[Any, Any]:
            own = lambda p: self.grad_fn(p, i)
            device = call.step.device
            device = i if device is None else device * self.number + i
            # At the parameters themselves, which ascent_dtype does not round.
            g = call.taken(lambda _: own(call.whole(call.params)), call.params)
            step = call.step._replace(device=device)
            found = find(call._replace(g=g, grad_fn=own, step=step))
            return jax.tree.map(wide, (found.emitted, found.measured)), found.states

        total, states = self._summed(of_shard, method)
        emitted, measured = jax.tree.map(lambda x: x / self.number, total)
        emitted = tuple(optax.tree.cast_like(x, call.g) for x in emitted)
        return Found(emitted, states, measured)

    def _summed(self, of_shard: Callable[[Any], Any], method: Method) -> Any:
        def one_more(total: Any, i: Any) -> tuple[Any, Any]:
            x, states = of_shard(i)
            return jax.tree.map(jnp.add, total, x), states

        numbers = jnp.arange(self.number)
        if self.form == "unroll":
            total, states = of_shard(0)
            for i in range(1, self.number):
                total, states = one_more(total, i)
            return total, states
        if self.form == "vmap":
            stacks, states = jax.vmap(of_shard)(numbers)
            return jax.tree.map(lambda x: x.sum(0), stacks), _at(states, 0)
        shapes = jax.eval_shape(of_shard, 0)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = vary(zeros, method.axis_name)
        total, states = jax.lax.scan(one_more, start, numbers)
        return total, _at(states, -1)

    def stacked(
        self, transformation: Any, state: Any, params: Any, extra: dict[str, Any]
    ) -> tuple[Any, Any]:
        """The step of the method on all shards at once, on a mapped axis."""

        def of_all(gradient: Callable[[Any], Any]) -> Any:
            """``gradient(i)`` of all shards, stacked."""
            if self.form == "unroll":
                found = map(gradient, range(self.number))
                return jax.tree.map(lambda *x: jnp.stack(x), *found)
            mapped = jax.lax.map if self.form == "scan" else _vmapped
            return mapped(gradient, jnp.arange(self.number))

        def of_shard(i: jax.Array, g: Any) -> tuple[Any, Any]:
            try:
                jax.lax.psum(i, self.axis_name)
            except AssertionError as error:  # all that JAX says about it
                raise ValueError(
                    "Inside shard_map, micro_sharpness of this transformation needs"
                    " jax.shard_map(..., check_vma=False). Otherwise JAX has no means"
                    " over the axis of vmap."
                ) from error

            def own_grad_fn(point: Any) -> Any:
                if self.form == "vmap":
                    return self.grad_fn(point, i)
                # All shards meet here, and each takes its part of the result. Only the
                # gradients leave the vmap: the rest of a method is cheap, and needs the
                # means over all shards before its next line.
                points = jax.lax.all_gather(point, self.axis_name)
                return _at(of_all(lambda k: self.grad_fn(_at(points, k), k)), i)

            return transformation.update(g, state, params, grad_fn=own_grad_fn, **extra)

        first = of_all(lambda i: self.grad_fn(params, i))
        on_axis = jax.vmap(of_shard, axis_name=self.axis_name, out_axes=None)
        try:
            return on_axis(jnp.arange(self.number), first)
        except (NameError, ValueError) as error:
            # JAX's words for an unknown axis, and for a result that is not a mean.
            if not ("unbound axis" in str(error) or "out_axes" in str(error)):
                raise
            raise ValueError(
                "micro_sharpness: the transformation does not average over"
                f" {self.axis_name!r}, or over another axis too. Build it with this"
                f" name: optax_sam.sam(0.05, axis_name={self.axis_name!r}). A method"
                " without axis_name (sampa, msam, mesa) has no m-sharpness."
            ) from error


def _vmapped(gradient: Callable[[Any], Any], numbers: jax.Array) -> Any:
    return jax.vmap(gradient)(numbers)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _stores_a_gradient(
    find: Callable[[Call], Found], method: Method, call: Call
) -> bool:
    """Whether a state depends on values that differ between shards."""

    def states(g: Any, i: Any) -> Any:
        g = vary(g, method.axis_name)
        step = call.step._replace(device=i)
        return find(call._replace(g=g, grad_fn=lambda p: g, step=step)).states

    program = jax.make_jaxpr(states)(call.g, 0).jaxpr
    _, used = live(program)
    return not used.isdisjoint(map(id, program.invars))


def _convolves(program: Any) -> bool:
    """Whether a convolution is in a program, or in one that it runs."""
    return any(
        x.primitive.name == "conv_general_dilated"
        or any(map(_convolves, programs_in(x)))
        for x in program.eqns
    )


def _check_call(params: Any, grad_fn: Any, extra: dict[str, Any]) -> None:
    if params is None:
        raise ValueError(f"micro_sharpness needs the parameters: {_CALL}.")
    if "per_example_loss_fn" in extra:
        raise ValueError(
            "micro_sharpness cannot cut per_example_loss_fn into shards. Map the"
            " method over them by hand: jax.vmap(of_shard, axis_name=...,"
            " out_axes=None)."
        )
    try:
        inspect.signature(grad_fn).bind(params, 0)
    except (TypeError, ValueError):
        raise checks.MissingArgument(
            "micro_sharpness needs grad_fn, a function of the parameters and of the"
            " number of a shard that returns the gradients on this shard alone; got"
            f" {grad_fn!r}. Write {_CALL}.",
            "grad_fn",
        ) from None
    shard = list(inspect.signature(grad_fn).parameters.values())[1:2]
    default = shard[0].default if shard else None
    if default is not inspect.Parameter.empty and not isinstance(default, int | None):
        raise ValueError(
            "micro_sharpness passes the number of the shard as the second argument of"
            f" grad_fn, but {shard[0].name} has a default, probably a batch, which the"
            f" number would replace. Write {_CALL}."
        )
