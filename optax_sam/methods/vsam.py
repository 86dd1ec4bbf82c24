"""vSAM: SAM sampled by the variation of its gradient (Deng et al., 2403.08821)."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.ascent.ball import l2
from optax_sam.keys import check_key, raw_key, uniform
from optax_sam.masks import Mask, resolve_nonempty_mask
from optax_sam.method import WithoutWhen, method, on_engine
from optax_sam.parts import Blend, Step, When
from optax_sam.schedules import check_integer, check_number
from optax_sam.trees import add, cache, norm


class VarianceControlledState(NamedTuple):
    """State of :func:`variance_controlled`, with the letters of its equations.

    Attributes:
      ascends: whether the next step is perturbed, () bool.
      count: number of steps taken, () int32; numbers the draws.
      warmup_steps: the first steps, which are all perturbed, () int32.
      position: the next step's place in its window, () int32 in ``[0, K)``.
      used: perturbed steps in this window so far, () int32.
      rate: ``s``, samples per window, () float in ``[1, K * max_rate]``.
      catch_up: whether a window's quota is enforced, () bool.
      key: raw key data, (2,) uint32.
      psf_norms: ``x``, the last K sampled norms of the PSF, oldest first, (K,) float.
      ratios: ``r``, the last K norms of the PSF relative to the gradient's, (K,) float.
      variances: ``v``, the last K sorted-slice variances, (K,) float.
    """

    ascends: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    warmup_steps: jax.Array
    position: jax.Array
    used: jax.Array
    rate: jax.Array
    catch_up: jax.Array
    key: jax.Array
    psf_norms: jax.Array
    ratios: jax.Array
    variances: jax.Array

    @property
    def settings(self) -> tuple[str, ...]:
        """The fields that the current rule rewrites in a state of other settings."""
        return "catch_up", "warmup_steps"

    @property
    def warmup_left(self) -> jax.Array:
        """Steps of warm-up to come, () int32."""
        return jnp.maximum(self.warmup_steps - self.count, 0)

    def turned(self, ascended: jax.Array) -> VarianceControlledState:
        """The clocks after one more step."""
        window = self.psf_norms.shape[-1]
        warm = self.warmup_left > 0
        position = jnp.where(warm, self.position, (self.position + 1) % window)
        used = jnp.where(warm, 1, self.used + ascended.astype(jnp.int32))
        return self._replace(
            count=optax.safe_increment(self.count),
            position=position,
            used=jnp.where(position == 0, 0, used).astype(jnp.int32),
        )

    def decided(self) -> VarianceControlledState:
        """With the next step's decision: warm-up, a draw below s/K, or catch-up."""
        window = self.psf_norms.shape[-1]
        quota = jnp.floor(self.rate).astype(jnp.int32)
        drawn = uniform(self.key, self.count) < self.rate / window
        forced = self.catch_up & (window - self.position <= quota - self.used)
        take = ((self.used < quota) & drawn) | forced
        return self._replace(ascends=(self.warmup_left > 0) | take)

    def plan(self) -> tuple[jax.Array, jax.Array]:
        """The decisions up to the next window, and their number."""
        window = self.psf_norms.shape[-1]

        def next_step(
            state: VarianceControlledState, _: Any
        ) -> tuple[VarianceControlledState, jax.Array]:
            return state.turned(state.ascends).decided(), state.ascends

        _, decisions = jax.lax.scan(next_step, self, length=window)
        known = self.warmup_left + window - self.position
        return decisions, jnp.minimum(known, window)

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars to log."""
        return {
            "samples_per_window": self.rate,
            "used_in_window": self.used,
            "psf_norm": self.psf_norms[..., -1],
        }


def variance_controlled(
    window: int = 50,
    num_slices: int = 5,
    sensitivity: ArrayLike = 0.13,
    max_rate: ArrayLike = 0.8,
    warmup_steps: int | None = None,
    initial_rate: ArrayLike | None = None,
    norm_mask: Mask = None,
    force_quota: bool = True,
    key: ArrayLike = 0,
) -> When:
    r"""The rule of :func:`optax_sam.vsam`: perturbs more often if the PSF varies more.

    On perturbed steps it records three numbers of :math:`\mathrm{PSF} = g_s - g`. Three
    rings keep the last :math:`K` samples of them:

    .. math::
      x = \|\mathrm{PSF}\|, \qquad r = x / \|g\|, \qquad
      v = \tfrac1m \textstyle\sum_{j=1}^m \mathrm{Var}(\text{slice } j
      \text{ of the sorted ring of } x)

    Every :math:`K` steps the number :math:`s` of samples per window follows their mean
    relative changes. Each step of the window is drawn with probability :math:`s / K`,
    and no more than :math:`\lfloor s \rfloor` steps are perturbed:

    .. math::
      \Delta_r = \mathrm{clip}\Big(\tfrac1{K-1}\sum_i \frac{r_i}{r_{i-1}} - 1,
      -1, 1\Big), \quad \Delta_v \text{ likewise}, \qquad
      s \leftarrow \mathrm{clip}\big(s (1 + a \Delta_r + a \Delta_v),
      1, \lfloor K\, \text{max\_rate} \rfloor\big)

    Args:
      window: ``K``, steps per window and samples per ring, divisible by
        ``num_slices``.
      num_slices: ``m``, slices of the sorted ring, of at least two values each.
      sensitivity: ``a``, at least 0; 0.05 to 0.2 in the paper.
      max_rate: largest share of perturbed steps, in ``(0, 1]``, at least one per
        window.
      warmup_steps: steps at the start that are all perturbed and fill the rings.
        ``None`` means two windows; the paper's script takes three epochs. Below
        ``2 * window - 1`` the rings are not full when the first window ends. Changes
        across unfilled entries then count as zero.
      initial_rate: the share of perturbed steps in the first window after the warm-up,
        in ``(0, max_rate]``. ``None`` is the authors' start, one step per window. The
        share grows by a factor of at most ``1 + 2 a`` per window, so a short run with
        the authors' start never reaches the shares of the paper.
      norm_mask: the leaves whose norms are measured, for instance the last layers (the
        paper's script takes the last 10 leaves); a pytree of bools like the parameters
        or a prefix of it, or a function from the parameters to one. ``None`` means all.
      force_quota: whether the last steps of a window are perturbed to fill its quota,
        so that each full window has exactly ``floor(s)`` perturbed steps.
      key: an int, a key from ``jax.random.key``, or raw key data.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if an argument is out of its range, ``window`` is not divisible by
        ``num_slices``, or an argument that sets a shape is traced.

    Examples:
      >>> import optax_sam
      >>> rule = optax_sam.when.variance_controlled(window=20, num_slices=4)
      >>> sampled_sam = optax_sam.sam(0.05, when=rule)
    """
    check_integer("window", window, 2)
    check_integer("num_slices", num_slices, 1)
    if window % num_slices or window // num_slices < 2:
        raise ValueError(
            "window must be divisible by num_slices, with at least two values per"
            f" slice; got window={window} and num_slices={num_slices}."
        )
    sensitivity = check_number("sensitivity", sensitivity, 0.0)
    max_rate = check_number("max_rate", max_rate, 0.0, 1.0, open_low=True)
    largest: ArrayLike
    if isinstance(max_rate, jax.core.Tracer):
        largest = jnp.maximum(jnp.floor(window * max_rate), 1)
    else:
        # In Python numbers, as the authors do: float32 rounds 100 * 0.29 up to 29.
        largest = int(window * float(np.asarray(max_rate)))
        if largest < 1:
            raise ValueError(
                "max_rate must allow at least one perturbed step per window of"
                f" {window} steps (max_rate >= {1 / window:.3g}); got {max_rate}."
            )
    if initial_rate is not None:
        is_traced = isinstance(max_rate, jax.core.Tracer)
        most = 1.0 if is_traced else float(np.asarray(max_rate))
        initial_rate = check_number(
            "initial_rate",
            initial_rate,
            0.0,
            most,
            open_low=True,
            or_what=", to max_rate",
        )
    if warmup_steps is None:
        warmup_steps = 2 * window
    check_integer("warmup_steps", warmup_steps, 0)
    check_key(key)

    def first_rate() -> jax.Array:
        if initial_rate is None:
            return jnp.ones((), float)
        return jnp.clip(jnp.asarray(window * initial_rate, float), 1, largest)

    def init(params: Any) -> VarianceControlledState:
        return VarianceControlledState(
            ascends=jnp.array(False),
            count=jnp.zeros((), jnp.int32),
            warmup_steps=jnp.array(warmup_steps, jnp.int32),
            # The authors' clock starts inside a window with a spent quota, so the first
            # window after the warm-up takes no sample.
            position=jnp.ones((), jnp.int32),
            used=jnp.ones((), jnp.int32),
            rate=first_rate(),
            catch_up=jnp.array(force_quota),
            key=raw_key(key),
            psf_norms=jnp.zeros((window,), float),
            ratios=jnp.zeros((window,), float),
            variances=jnp.zeros((window,), float),
        ).decided()

    def observe(state: Any, g: Any, g_s: Any, step: Step) -> VarianceControlledState:
        watched = jax.tree.leaves(resolve_nonempty_mask(norm_mask, g, name="norm_mask"))
        tail = lambda tree: [
            leaf
            for leaf, kept in zip(jax.tree.leaves(tree), watched, strict=True)
            if kept
        ]
        psf = add(tail(g_s), jax.tree.map(jnp.negative, tail(g)))
        dtype = state.rate.dtype
        x, size = step.mean((norm(psf).astype(dtype), norm(tail(g)).astype(dtype)))
        r = jnp.where(size > 0, x / jnp.where(size > 0, size, 1), 0)
        push = lambda ring, value: jnp.append(ring[1:], value)
        xs = push(state.psf_norms, x)
        slices = jnp.sort(xs).reshape(num_slices, window // num_slices)
        v = jnp.mean(jnp.var(slices, axis=1, ddof=1))
        rings = (xs, push(state.ratios, r), push(state.variances, v))
        # x, r and v can overflow where both gradients are finite.
        finite = jnp.isfinite(x) & jnp.isfinite(r) & jnp.isfinite(v)
        xs, rs, vs = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            rings,
            (state.psf_norms, state.ratios, state.variances),
        )
        return state._replace(psf_norms=xs, ratios=rs, variances=vs)

    def mean_change(ring: jax.Array) -> jax.Array:
        before, after = ring[:-1], ring[1:]
        known = before > jnp.finfo(ring.dtype).tiny
        change = jnp.where(known, after / jnp.where(known, before, 1) - 1, 0)
        return jnp.clip(jnp.mean(change), -1, 1)

    def advance(state: Any, ascended: jax.Array) -> VarianceControlledState:
        state = state.turned(ascended)
        growth = mean_change(state.ratios) + mean_change(state.variances)
        s = jnp.clip(state.rate * (1 + sensitivity * growth), 1, largest)
        s = jnp.where(state.position == 0, s, state.rate).astype(state.rate.dtype)
        # The settings of the current rule, also in a state that has other settings.
        return state._replace(
            rate=s,
            catch_up=jnp.array(force_quota),
            warmup_steps=jnp.array(warmup_steps, jnp.int32),
        ).decided()

    call = f"when.variance_controlled(window={window})"
    return When(init, observe=observe, advance=advance, call=call)


class ReuseDifferenceState(NamedTuple):
    """State of :func:`reuse_difference`.

    Attributes:
      psf: the last difference of gradients, like the parameters, float32 or better.
      age: steps since it was taken, () int32.
    """

    psf: Any
    age: jax.Array


def reuse_difference(decay: ArrayLike = 0.8, max_reuse: int | None = 6) -> Blend:
    """The blend of :func:`optax_sam.vsam`: adds the last difference with a damping.

    Args:
      decay: the damping ``beta`` per step, in ``[0, 1]``; 0.6 to 0.9 in the paper,
        0.7 in its code.
      max_reuse: the largest ``j`` that still reuses, at least 0; afterwards the
        gradient at ``w`` is emitted. ``None`` means no limit.

    Returns:
      A rule for ``blend=``, with one pytree like the parameters as state.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> import optax_sam
      >>> sam_5_with_reuse = optax_sam.sharpness_aware(
      ...     optax_sam.ascent.l2(0.05),
      ...     when=optax_sam.when.every_k(5),
      ...     blend=optax_sam.blend.reuse_difference(decay=0.8))
    """
    decay = check_number("decay", decay, 0.0, 1.0)
    if max_reuse is not None:
        check_integer("max_reuse", max_reuse, 0)

    def init(params: Any) -> ReuseDifferenceState:
        return ReuseDifferenceState(psf=cache(params), age=jnp.zeros((), jnp.int32))

    def fresh(g: Any, g_s: Any, state: Any, step: Step) -> tuple[Any, Any]:
        psf = jax.tree.map(
            lambda a, b, cached: a.astype(cached.dtype) - b.astype(cached.dtype),
            g_s,
            g,
            state.psf,
        )
        return g_s, ReuseDifferenceState(step.mean(psf), jnp.zeros_like(state.age))

    def stale(g: Any, state: Any, step: Step) -> tuple[Any, Any]:
        age = optax.safe_increment(state.age)
        weight = jnp.asarray(decay, float) ** age.astype(float)
        if max_reuse is not None:
            weight = jnp.where(age <= max_reuse, weight, 0)
        reused = lambda x, psf: x.astype(psf.dtype) + weight.astype(psf.dtype) * psf
        d = jax.tree.map(reused, g, state.psf)
        return d, state._replace(age=age)

    call = f"blend.reuse_difference({decay}, max_reuse={max_reuse})"
    return Blend(init, fresh, stale, call)


@method(variance_controlled, reuse_difference, l2)
def vsam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    window: int = 50,
    num_slices: int = 5,
    sensitivity: ArrayLike = 0.13,
    max_rate: ArrayLike = 0.8,
    warmup_steps: int | None = None,
    initial_rate: ArrayLike | None = None,
    reuse_decay: ArrayLike = 0.8,
    max_reuse: int | None = 6,
    norm_mask: Mask = None,
    force_quota: bool = True,
    key: ArrayLike = 0,
    **options: Unpack[WithoutWhen],
) -> optax.GradientTransformationExtraArgs:
    r"""vSAM: perturbs on sampled steps and reuses SAM's correction on the others.

    SAM's gradient is the gradient at ``w`` plus a difference,
    :math:`\mathrm{PSF} = \nabla L(w + \rho\, g / \|g\|) - g`. A sampled step computes
    the difference. The steps after it damp and reuse it:

    .. math::
      d = g + \mathrm{PSF} \;\text{ on sampled steps}, \qquad
      d = g + \beta^j\, \mathrm{PSF} \;\text{ on the } j\text{-th step after}

    The number of sampled steps per window follows the variation of
    :math:`\|\mathrm{PSF}\|`, see :func:`optax_sam.when.variance_controlled`. This
    number grows during the training run, since the mean relative change of a noisy norm
    is positive. The cost therefore depends on how many windows the run has. The authors
    start with one sample per window, and a run of few windows hardly raises this
    number. Such a run needs smaller windows, or an ``initial_rate`` between 0.2 and
    0.35 (the published shares).

    We measured the difference to SAM in points of accuracy (docs/results/accuracy.md),
    on four tasks with 1,900 to 3,900 steps:

    =====================  =========  ======  ======  ======  ========
    setting                gradients  digits  MLP     CNN     CIFAR-10
    =====================  =========  ======  ======  ======  ========
    the authors' start     1.1 - 1.2  -0.7    -0.7    -0.6    -1.4
    ``initial_rate=0.33``  1.5 - 1.6  -0.1    -0.4    -0.6    -2.6
    and ``max_rate=0.4``   1.4        -0.4    -0.1    -0.1    -0.7
    a fixed period of 3    1.33       -0.1    -0.3    -0.1    -0.7
    =====================  =========  ======  ======  ======  ========

    SAM gained 2.2, 0.5, 1.2 and 3.6 points over tuned SGD. So we advise
    ``initial_rate=0.33, max_rate=0.4`` for a short run. The fixed period has the same
    reuse.

    ``reuse_decay=0.0`` is vSAM-A. It samples in the same way, but neither stores nor
    reuses the difference.

    Cost: 1 gradient per step plus 1 per sampled step, 1.3 to 1.43 on average in the
    published runs; one pytree like the parameters, three windows of scalars and a
    dozen scalars of state.

    Args:
      max_rate: largest share of sampled steps, in ``(0, 1]``, at least one per window.
      reuse_decay: ``beta``, damping per step, in ``[0, 1]``; 0.6 to 0.9 in the paper,
        0.7 in its code.

    Raises:
      ValueError: if an argument is out of its range, ``window`` is not divisible by
        ``num_slices``, or an argument that sets a shape is traced.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> vsam = optax_sam.vsam(rho=0.05, window=10, warmup_steps=20)
      >>> tx = optax.chain(vsam, optax.sgd(0.02, momentum=0.9))
      >>> loss_fn = lambda w: jnp.sum((w - 1.0) ** 2)
      >>> grad_fn = jax.grad(loss_fn)
      >>> @jax.jit
      ... def train_step(w, state):
      ...     updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...     w, state = train_step(w, state)
      >>> bool(loss_fn(w) < 0.1)
      True
      >>> bool(optax_sam.metrics(state)["ascent_rate"] < 0.6)
      True

    Differs from the authors' code in:
      1. The reuse ends after ``max_reuse`` steps, counted in integers; there a
         comparison of floats allows 6 or 7, depending on ``beta``.
      2. A mask chooses the measured leaves; there they are the last 10 registered
         tensors.
      3. A change whose predecessor is zero counts as zero; there it is NaN. Samples
         that are not finite are not recorded.
      4. The rule decides at the end of the step before, from the same numbers.
      5. With ``axis_name``, norms are the means of the devices' norms.

    References:
      Deng et al., `Effective Gradient Sample Size via Variation Estimation for
      Accelerating Sharpness aware Minimization <https://arxiv.org/abs/2403.08821>`_,
      2024; code: ajiaaa/vSAM
    """
    reuse_decay = check_number("reuse_decay", reuse_decay, 0.0, 1.0)
    # Only a Python zero: the state's structure cannot depend on a traced value.
    without_reuse = isinstance(reuse_decay, (int, float)) and reuse_decay == 0
    control = (window, num_slices, sensitivity, max_rate, warmup_steps, initial_rate)
    steps = variance_controlled(*control, norm_mask, force_quota, key)
    blend = Blend() if without_reuse else reuse_difference(reuse_decay, max_reuse)
    return on_engine("vsam", options, ascent=l2(rho), when=steps, blend=blend)
