"""Curvature as a function of a vector: Hessian, Gauss-Newton and Fisher matrices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from optax_sam.masks import Mask
from optax_sam.sharpness.data import data_of
from optax_sam.sharpness.objective import (
    LossFn,
    Objective,
    chosen_part,
    objective,
)
from optax_sam.trees import wide, widest

Mode = Literal["fwd_rev", "rev_rev"]
ModelFn = Callable[[Any, Any], Any]  # (params, batch) -> outputs


class Operator(NamedTuple):
    """A symmetric linear map on pytrees.

    :func:`hessian`, :func:`ggn`, :func:`fisher` and :func:`empirical_fisher` make one,
    and :func:`eigenvalues`, :func:`trace` and the other estimators take one. You can
    make one from any other symmetric map, too.

    Attributes:
      matvec: the map, from a pytree like ``like`` to another one.
      like: a pytree of arrays of the shapes and dtypes that it acts on.
      size: ``n``, the number of entries.
      to_params: a vector as a pytree like all parameters, with zeros in those left out.
      on_host: whether ``matvec`` loops on the host, so that it cannot run in ``jit``.
    """

    matvec: Callable[[Any], Any]
    like: Any
    size: int
    to_params: Callable[[Any], Any]
    on_host: bool = False

    def times(self, v: jax.Array) -> jax.Array:
        """The map of a vector ``(n,)``, whose parts are the raveled leaves."""
        return ravel(self.matvec(self.unravel(v)))

    def unravel(self, v: jax.Array) -> Any:
        """A vector ``(n,)`` as a pytree that ``matvec`` takes."""
        leaves, structure = jax.tree.flatten(self.like)
        ends = np.cumsum([x.size for x in leaves])[:-1]
        parts = zip(jnp.split(v, ends), leaves, strict=True)
        shaped = [part.reshape(x.shape).astype(x.dtype) for part, x in parts]
        return jax.tree.unflatten(structure, shaped)

    def unravel_params(self, v: jax.Array) -> Any:
        """A vector ``(n,)`` as a pytree like all parameters."""
        return self.to_params(self.unravel(v))


def to_scipy(operator: Operator) -> Any:
    """An operator for SciPy: its eigensolvers, its linear solvers, its norms.

    Args:
      operator: the operator, outside of ``jit``.

    Returns:
      A ``scipy.sparse.linalg.LinearOperator`` on vectors ``(n,)``, the raveled leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import scipy.sparse.linalg
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.sum(jnp.mean(batch, 0) * w**2)
      >>> H = sharpness.hessian(loss, jnp.ones(3), jnp.array([[[1.0, -7.0, 5.0]]]))
      >>> A = sharpness.to_scipy(H)
      >>> values = scipy.sparse.linalg.eigsh(A, k=1, return_eigenvectors=False)
      >>> print(values.round(3))
      [-7.]
    """
    from scipy.sparse.linalg import LinearOperator

    dtype = widest(*jax.tree.leaves(operator.like))
    times = lambda v: operator.times(v)
    times = times if operator.on_host else jax.jit(times)
    product = lambda v: np.asarray(times(jnp.asarray(np.ravel(v), dtype)))
    shape = (operator.size, operator.size)
    return LinearOperator(shape, matvec=product, rmatvec=product, dtype=dtype)


def ravel(tree: Any) -> jax.Array:
    """The leaves of a pytree as one vector ``(n,)``."""
    return ravel_pytree(tree)[0]


def hessian(
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    *,
    mode: Mode = "fwd_rev",
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> Operator:
    r"""The Hessian of the mean loss as a linear operator on the chosen leaves.

    .. math:: H v = \frac{d}{dt} \nabla L(w + t v) \Big|_{t = 0},
       \qquad L = \sum_S p_S L_S, \quad p_S \text{ the share of batch } S

    A product is one forward derivative through one gradient, a batch at a time. It
    takes about two to three times the operations of a gradient and at most a few times
    its memory, for any number of parameters.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of one batch; deterministic,
        so dropout off and BatchNorm with its running averages.
      params: the weights ``w``; leaves in half precision are widened to float32.
      batches: a pytree of arrays ``(B, m, ...)``: ``B`` batches of ``m`` examples. Or a
        list of batches, a loader or a generator. The host reads it batch by batch, once
        for each product. A loader must give the same batches each time. A generator
        gives its batches only once, so they are kept on the host.
      mode: ``"fwd_rev"``, or ``"rev_rev"``, which costs about 1.7 times as much, for
        models whose backward pass has no forward derivative (a ``custom_vjp`` inside
        another one).
      mask: the leaves to look at: a pytree of bools like the parameters or a prefix of
        it, or a function from the parameters to one; ``None`` means all. Vectors have
        no entries for the others, and the operator is the diagonal block.
      weights: ``(B,)``, the examples that count in each batch, or ``(B, m)``, a weight
        for each example, which ``loss_fn`` must then use in its mean, too; for a list
        or a loader also a function from a batch to its weights. ``None``: all alike.
      axis_name: name of a mapped axis over which the batches are spread.

    Returns:
      The operator. Inside ``jit``, use it within the same ``jit``. With a list or a
      loader it keeps its compiled program, with the values that the loss closes over;
      make a new operator when they change.

    Raises:
      ValueError: if the loss is no scalar, the batches are empty, were not stacked or
        change between products, a chosen leaf is not real, or the mask selects nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
      >>> H = sharpness.hessian(loss, jnp.ones(2), jnp.eye(2)[None])
      >>> print(H.size, H.matvec(jnp.array([2.0, 4.0])))
      2 [1. 2.]

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """
    if mode not in ("fwd_rev", "rev_rev"):
        raise ValueError(f'mode must be "fwd_rev" or "rev_rev"; got {mode!r}.')
    product = _fwd_rev if mode == "fwd_rev" else _rev_rev
    return _operator(product, loss_fn, params, batches, mask, weights, axis_name)


def ggn(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    *,
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> Operator:
    r"""The generalized Gauss-Newton matrix: the Hessian of the linearized model.

    .. math:: G = \sum_S p_S\, J_S^\top\, \nabla^2_z \ell_S(z)\, J_S, \qquad
       z = f(w, S), \quad J_S = \partial_w f(w, S)

    If the loss is convex in the outputs, it has no negative eigenvalues. If the model
    fits its data, it is the Hessian. A product costs about as much as a product with
    the Hessian. The mean over batches does not depend on their size ``m``. So take
    small batches if the outputs are wide, such as logits over a vocabulary: only one
    batch is in memory at a time.

    Args:
      model_fn: ``model_fn(params, batch)``, the outputs ``z``, an array or a pytree of
        arrays.
      loss_fn: ``loss_fn(outputs, batch)``, the mean loss of one batch.
      params: as in :func:`hessian`, and so are the other arguments.
      batches: as in :func:`hessian`.
      mask: as in :func:`hessian`.
      weights: as in :func:`hessian`.
      axis_name: as in :func:`hessian`.

    Returns:
      The operator.

    Raises:
      ValueError: as :func:`hessian` does, and if a loss is no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> model = lambda w, batch: batch @ jnp.sin(w)
      >>> loss = lambda z, batch: 0.5 * jnp.mean(z**2)
      >>> G = sharpness.ggn(model, loss, jnp.zeros(2), jnp.eye(2)[None])
      >>> print(sharpness.trace(G, 0).estimate)
      1.0

    References:
      Schraudolph, "Fast curvature matrix-vector products", 2002; Martens, `New Insights
      and Perspectives on the Natural Gradient Method
      <https://arxiv.org/abs/1412.1193>`_, 2020
    """

    def mean_loss(z: Any, batch: Any) -> Any:
        loss = loss_fn(z, batch)
        if jnp.shape(loss):
            raise ValueError(
                "The loss_fn(outputs, batch) of ggn must return a scalar, the mean loss"
                f" of the batch; got shape {jnp.shape(loss)}. Write losses.mean()."
            )
        return loss

    def curvature(z: Any, u: Any, batch: Any) -> Any:
        return jax.jvp(jax.grad(lambda z: mean_loss(z, batch)), (z,), (u,))[1]

    loss = lambda params, batch: loss_fn(model_fn(params, batch), batch)
    product = _through(model_fn, curvature)
    return _operator(product, loss, params, batches, mask, weights, axis_name)


def fisher(
    model_fn: ModelFn,
    params: Any,
    batches: Any,
    *,
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> Operator:
    r"""The Fisher matrix of a classifier, exactly, without labels.

    .. math:: F = \mathbb{E}_x\, \mathbb{E}_{y \sim p_w(\cdot | x)}
       \big[\nabla \log p_w(y | x)\, \nabla \log p_w(y | x)^\top\big]
       = \mathbb{E}_x\, J_x^\top (\operatorname{diag}(p) - p p^\top) J_x

    with :math:`p` the softmax of the logits. It is the :func:`ggn` of the mean
    cross-entropy. For a regression with squared errors, the Fisher matrix is the
    :func:`ggn` of half the sum of the errors over the outputs.

    Args:
      model_fn: ``model_fn(params, batch)``, the logits, classes along the last axis;
        the mean is over all other axes.
      params: as in :func:`hessian`, and so are the other arguments.
      batches: as in :func:`hessian`; keep them small where there are many classes, see
        :func:`ggn`.
      mask: as in :func:`hessian`.
      weights: ``(B, m)``, a weight for each example, 0 for padding, or ``(B, m,
        tokens)`` for each token; for a list or a loader also a function from a batch to
        ``(m,)``. ``None``: all alike.
      axis_name: as in :func:`hessian`.

    Returns:
      The operator; positive semidefinite.

    Raises:
      ValueError: as :func:`hessian` does, and if there are no logits of examples, or
        no weights of examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> logits = lambda w, batch: batch * w  # two classes, one example
      >>> F = sharpness.fisher(logits, jnp.zeros(2), jnp.ones((1, 1, 1)))
      >>> print(F.matvec(jnp.array([1.0, 0.0])))
      [ 0.25 -0.25]

    References:
      Martens, `New Insights and Perspectives on the Natural Gradient Method
      <https://arxiv.org/abs/1412.1193>`_, 2020
    """

    def curvature(z: jax.Array, u: jax.Array, pair: Any) -> jax.Array:
        if jnp.ndim(z) < 2:
            raise ValueError(
                "The model_fn of fisher must return logits (m, classes); got shape"
                f" {jnp.shape(z)}. For one logit of each example, whose sign decides,"
                " write jnp.stack([jnp.zeros_like(z), z], -1)."
            )
        p = jax.nn.softmax(z)
        mean = jnp.sum(p * u, -1, keepdims=True)
        return p * (u - mean) * _share(pair[1], mean)

    loss = lambda params, batch: jax.nn.logsumexp(model_fn(params, batch), -1).mean()
    product = _through(_of_first(model_fn), curvature)
    pairs = data_of(batches, weights, axis_name).beside_weights()
    return _operator(product, _of_first(loss), params, pairs, mask, None, axis_name)


def empirical_fisher(
    losses_fn: ModelFn,
    params: Any,
    batches: Any,
    *,
    mask: Mask = None,
    weights: Any = None,
    axis_name: Any = None,
) -> Operator:
    r"""The mean outer product of the gradients of single examples.

    .. math:: E = \frac{1}{N} \sum_{i=1}^N \nabla \ell_i(w)\, \nabla \ell_i(w)^\top

    Use it with care. It is not the Fisher matrix, whose labels are drawn from the
    model, and it vanishes if every example is fitted.

    Args:
      losses_fn: ``losses_fn(params, batch)``, the loss of each example, ``(m,)``.
      params: as in :func:`hessian`, and so are the other arguments.
      batches: as in :func:`hessian`.
      mask: as in :func:`hessian`.
      weights: as in :func:`fisher`.
      axis_name: as in :func:`hessian`.

    Returns:
      The operator; positive semidefinite, of rank at most the number of examples.

    Raises:
      ValueError: as :func:`hessian` does, and if there are no losses of examples, or
        no weights of examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> losses = lambda w, batch: batch @ w
      >>> E = sharpness.empirical_fisher(losses, jnp.ones(2), jnp.eye(2)[None])
      >>> print(E.matvec(jnp.array([2.0, 4.0])))
      [1. 2.]

    References:
      Kunstner, Balles and Hennig, `Limitations of the Empirical Fisher Approximation
      for Natural Gradient Descent <https://arxiv.org/abs/1905.12558>`_, 2019
    """

    def curvature(z: jax.Array, u: jax.Array, pair: Any) -> jax.Array:
        if not jnp.shape(z):
            raise ValueError(
                "losses_fn must return the loss of each example, (m,); got a scalar."
                " Drop .mean(): the mean is over outer products."
            )
        return u * _share(pair[1], z)

    loss = lambda params, batch: losses_fn(params, batch).mean()
    product = _through(_of_first(losses_fn), curvature)
    pairs = data_of(batches, weights, axis_name).beside_weights()
    return _operator(product, _of_first(loss), params, pairs, mask, None, axis_name)


def hvp(loss_fn: LossFn, params: Any, batches: Any, v: Any, **options: Any) -> Any:
    r"""The product of the Hessian of the mean loss with a vector.

    Args:
      loss_fn: as in :func:`hessian`.
      params: the weights ``w``.
      batches: as in :func:`hessian`.
      v: a pytree like ``params``; its values in leaves that are left out are ignored.
      **options: ``mode``, ``mask``, ``weights`` and ``axis_name`` of :func:`hessian`.

    Returns:
      ``Hv``, a pytree like ``params``, zero in leaves that are left out.

    Raises:
      ValueError: if ``v`` differs from the parameters in structure or shape, or as
        :func:`hessian` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> loss = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
      >>> batches = jnp.eye(2)[None] * jnp.sqrt(2)  # one batch, H = I
      >>> print(sharpness.hvp(loss, jnp.ones(2), batches, jnp.array([3.0, 4.0])))
      [3. 4.]
    """
    H = hessian(loss_fn, params, batches, **options)
    return H.to_params(H.matvec(chosen_part("v", v, params, H.like)))


def also_of_loss(estimator: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an estimator of an operator take a loss, too, and estimate its Hessian.

    It then takes ``loss_fn, params, batches`` in place of the operator, and the options
    of :func:`hessian` as well.
    """
    own = list(inspect.signature(estimator).parameters.values())
    place = [x.name for x in own].index("operator")
    extra = list(inspect.signature(hessian).parameters.values())

    @functools.wraps(estimator)
    def measure(*args: Any, **options: Any) -> Any:
        given = args[place] if len(args) > place else options.get("operator")
        if isinstance(given, Operator):
            return estimator(*args, **options)
        bound = signature.bind(*args, **options).arguments
        of_loss = {x.name: bound.pop(x.name) for x in extra if x.name in bound}
        return estimator(operator=hessian(**of_loss), **bound)

    positional = [x for x in own if x.kind is x.POSITIONAL_OR_KEYWORD]
    signature = inspect.Signature(
        [*positional[:place], *extra[:3], *positional[place + 1 :]]
        + [x for x in own if x.kind is x.KEYWORD_ONLY]
        + extra[3:]
    )
    measure.__signature__ = signature  # type: ignore[attr-defined]
    return measure


def of_hessian(estimator: Callable[..., Any]) -> Callable[..., Any]:
    """An estimator under a name that says that it estimates the Hessian of a loss."""

    @functools.wraps(estimator)
    def measure(*args: Any, **options: Any) -> Any:
        return estimator(*args, **options)

    name = estimator.__name__
    measure.__name__ = measure.__qualname__ = f"hessian_{name}"
    measure.__doc__ = f"""The :func:`{name}` of the Hessian of a loss.

    It is ``{name}(hessian(loss_fn, params, batches), key)``, with the options of
    :func:`{name}` and :func:`hessian`.
    """
    return measure


def _operator(
    product: Callable[..., Any],
    loss_fn: LossFn,
    params: Any,
    batches: Any,
    mask: Mask,
    weights: Any,
    axis_name: Any,
) -> Operator:
    """The mean over batches of ``product(objective, batch, v)``."""
    o = objective(
        loss_fn, params, batches, mask=mask, weights=weights, axis_name=axis_name
    )
    size = sum(x.size for x in jax.tree.leaves(o.w))
    matvec = lambda v: o.mean(product, v)
    return Operator(matvec, o.w, size, o.like_params, o.on_host)


def _fwd_rev(o: Objective, batch: Any, v: Any) -> Any:
    gradient = jax.grad(lambda w: o.loss(w, batch))
    return jax.jvp(gradient, (o.w,), (o.vary(v),))[1]


def _rev_rev(o: Objective, batch: Any, v: Any) -> Any:
    gradient = jax.grad(lambda w: o.loss(w, batch))
    return jax.grad(lambda w: optax.tree.vdot(gradient(w), o.vary(v)))(o.w)


def _through(model_fn: ModelFn, curvature: Callable[..., Any]) -> Callable[..., Any]:
    """The product with ``J' C J``, where ``J`` is the Jacobian of the outputs."""

    def product(o: Objective, batch: Any, v: Any) -> Any:
        o.check(batch)
        outputs = lambda w: jax.tree.map(wide, model_fn(o.params_at(w), batch))
        z, push = jax.linearize(outputs, o.w)
        pull = jax.linear_transpose(push, o.w)
        return pull(curvature(z, push(o.vary(v)), batch))[0]

    return product


def _of_first(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of a batch as one of a batch beside its weights."""
    return lambda params, pair: f(params, pair[0])


def _share(weights: ArrayLike | None, like: jax.Array) -> Any:
    """The share of each entry of ``like`` in the mean over the examples of a batch."""
    if weights is None:
        return 1 / like.size
    shape = jnp.shape(weights)
    if not shape or shape != like.shape[: len(shape)]:
        raise ValueError(
            "fisher and empirical_fisher take the mean over the examples of a batch, so"
            " they need to know which ones count. weights must have a number for each"
            f" example, (B, m), 0 for padding; got {shape} for a batch of"
            f" {like.shape[0]}. If all of a batch count alike, write"
            " weights[:, None] * jnp.ones((B, m))."
        )
    each = jnp.asarray(weights, like.dtype)
    each = each.reshape(shape + (1,) * (like.ndim - len(shape)))
    total = each.sum() * (like.size // each.size)
    return each / jnp.where(total > 0, total, 1)  # one batch may be all padding
