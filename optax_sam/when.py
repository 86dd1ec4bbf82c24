"""When the second gradient is taken: small state machines that decide each step.

A rule is a :class:`When`. It decides at the *end* of a step about the next one and
keeps the decision in its state as the field ``ascends``, so that a loop outside the
compiled step can read it (``optax_sam.ascends_next``). A rule whose draws are known
ahead also gives its state a method ``plan()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_sam.ascent import norm
from optax_sam.contract import (
    Mask,
    at,
    check_integer,
    check_key,
    check_number,
    check_schedule,
    raw_key,
    resolve_mask,
    uniform,
)

__all__ = [
    "BernoulliState",
    "EveryKState",
    "Step",
    "VarianceControlledState",
    "When",
    "always",
    "bernoulli",
    "every_k",
    "variance_controlled",
]

# How many decisions of a rule without windows are read ahead at once.
LOOKAHEAD = 64


class Step(NamedTuple):
    """What a part may ask about the current step.

    Attributes:
      count: number of steps taken before this one, () int32; schedules are read here.
      mean: averages a tree over the devices of ``axis_name``; else the identity.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mean: Callable[[Any], Any]


class When(NamedTuple):
    """A rule that decides on which steps the second gradient is taken.

    Attributes:
      init: ``init(params) -> state``.
      now: ``now(state, g, step) -> decision`` for this step. A Python bool compiles
        no conditional.
      observe: ``observe(state, g, g_s, step) -> state``, called on ascended steps
        whose gradients are finite. What it stores of a gradient must go through
        ``step.mean``.
      advance: ``advance(state, ascended) -> state``, called at the end of every
        step; ``ascended`` says what was decided, also where ``ascend=`` overruled.
    """

    init: Callable[[Any], Any]
    now: Callable[[Any, Any, Step], bool | jax.Array]
    observe: Callable[[Any, Any, Any, Step], Any]
    advance: Callable[[Any, jax.Array], Any]


def _kept(state: Any, g: Any, step: Step) -> jax.Array:
    del g, step
    return state.ascends


def _unobserved(state: Any, g: Any, g_s: Any, step: Step) -> Any:
    del g, g_s, step
    return state


class AlwaysState(NamedTuple):
    """Nothing to remember."""

    @property
    def ascends(self) -> bool:
        """Every step ascends."""
        return True

    def plan(self) -> tuple[np.ndarray, int]:
        """Only ascents, without asking the device."""
        return np.ones(LOOKAHEAD, bool), LOOKAHEAD


def always() -> When:
    """On every step; no conditional is compiled.

    Returns:
      A rule for ``when=``.

    Examples:
      >>> import optax_sam
      >>> tx = optax_sam.sam(0.05, when=optax_sam.when.always())
    """
    return When(
        init=lambda params: AlwaysState(),
        now=lambda state, g, step: True,
        observe=_unobserved,
        advance=lambda state, ascended: state,
    )


class EveryKState(NamedTuple):
    """State of :func:`every_k`.

    Attributes:
      ascends: whether the next step ascends, () bool.
      position: the next step's place in its period, () int32 in ``[0, k)``.
      period: the period ``k``, () int32.
    """

    ascends: jax.Array
    position: jax.Array
    period: jax.Array

    def plan(self) -> tuple[jax.Array, int]:
        """The decisions of the next steps, and how many of them are known."""
        ahead = self.position + jnp.arange(LOOKAHEAD, dtype=jnp.int32)
        return ahead % self.period == 0, LOOKAHEAD


def every_k(k: int, phase: int = 0) -> When:
    r"""On every k-th step, as in SAM-5 and SAM-10.

    Step :math:`t = 0, 1, \dots` ascends where :math:`(t + \text{phase}) \bmod k = 0`.
    The average cost is :math:`1 + 1/k` gradients per step.

    Args:
      k: the period in steps, at least 1.
      phase: how far into the period training starts, ``0 <= phase < k``: 0 ascends
        on the first step of each period, 1 on the last.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if ``k`` or ``phase`` is out of range.

    Examples:
      >>> import optax, optax_sam
      >>> sam_5 = optax_sam.sam(0.05, when=optax_sam.when.every_k(5))
      >>> state = sam_5.init({"w": 1.0})
      >>> print(optax_sam.ascent_plan(state)[:6])
      [ True False False False False  True]
    """
    check_integer("k", k, 1)
    check_integer("phase", phase, 0)
    if phase >= k:
        raise ValueError(f"phase must be below k = {k}; got {phase}.")

    def init(params: Any) -> EveryKState:
        del params
        return EveryKState(
            ascends=jnp.array(phase == 0),
            position=jnp.array(phase, jnp.int32),
            period=jnp.array(k, jnp.int32),
        )

    def advance(state: EveryKState, ascended: jax.Array) -> EveryKState:
        del ascended
        position = (state.position + 1) % k
        return state._replace(ascends=position == 0, position=position)

    return When(init, _kept, _unobserved, advance)


class BernoulliState(NamedTuple):
    """State of :func:`bernoulli`.

    Attributes:
      ascends: whether the next step ascends, () bool.
      count: number of steps taken, () int32.
      key: raw key data, (2,) uint32; the draw of a step is a function of both.
      probability: the next step's probability, () float.
      known: for how many steps that probability is known to hold, () int32.
    """

    ascends: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    key: jax.Array
    probability: jax.Array
    known: jax.Array

    def plan(self) -> tuple[jax.Array, jax.Array]:
        """The decisions of the next steps, and how many of them are known."""
        ahead = self.count + jnp.arange(LOOKAHEAD, dtype=jnp.int32)
        draws = jax.vmap(uniform, in_axes=(None, 0))(self.key, ahead)
        return draws < self.probability, self.known


def bernoulli(p: optax.ScalarOrSchedule = 0.5, key: ArrayLike = 0) -> When:
    r"""On each step with probability p, as in SS-SAM and RST.

    Step :math:`t` ascends where :math:`u_t < p_t`, with :math:`u_t` uniform on
    :math:`[0, 1)`, drawn before any gradient is seen and equal on all devices. The
    average cost is :math:`1 + p` gradients per step.

    Args:
      p: probability in ``[0, 1]``, or a schedule of the step.
      key: an int, a key from ``jax.random.key``, or raw key data.

    Returns:
      A rule for ``when=``.

    Raises:
      ValueError: if ``p`` is not in ``[0, 1]`` or ``key`` is no key.

    Examples:
      >>> import optax_sam
      >>> ss_sam = optax_sam.sam(0.05, when=optax_sam.when.bernoulli(0.5, key=7))

    References:
      Zhao et al., `SS-SAM <https://arxiv.org/abs/2203.09962>`_, 2022
    """
    check_schedule("p", p, 0.0, 1.0)
    check_key(key)

    def decide(state: BernoulliState) -> BernoulliState:
        probability = at(p, state.count).astype(state.probability.dtype)
        return state._replace(
            ascends=uniform(state.key, state.count) < probability,
            probability=probability,
        )

    def init(params: Any) -> BernoulliState:
        del params
        return decide(
            BernoulliState(
                ascends=jnp.array(False),
                count=jnp.zeros((), jnp.int32),
                key=raw_key(key),
                probability=jnp.zeros((), float),
                known=jnp.array(1 if callable(p) else LOOKAHEAD, jnp.int32),
            )
        )

    def advance(state: BernoulliState, ascended: jax.Array) -> BernoulliState:
        del ascended
        return decide(state._replace(count=optax.safe_increment(state.count)))

    return When(init, _kept, _unobserved, advance)


class VarianceControlledState(NamedTuple):
    """State of :func:`variance_controlled`; the letters are those of its equations.

    Attributes:
      ascends: whether the next step ascends, () bool.
      count: number of steps taken, () int32; numbers the draws.
      warmup_left: steps of warm-up to come, () int32.
      position: the next step's place in its window, () int32 in ``[0, K)``.
      used: ascents taken in this window, () int32.
      rate: ``s``, samples per window, () float in ``[1, K * max_rate]``.
      catch_up: whether a window's quota is enforced, () bool.
      key: raw key data, (2,) uint32.
      psf_norms: ``x``, the last K sampled norms of the PSF, oldest first, (K,) float.
      ratios: ``r``, the same of the PSF's norm relative to the gradient's.
      variances: ``v``, the same of the sorted-slice variance.
    """

    ascends: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    warmup_left: jax.Array
    position: jax.Array
    used: jax.Array
    rate: jax.Array
    catch_up: jax.Array
    key: jax.Array
    psf_norms: jax.Array
    ratios: jax.Array
    variances: jax.Array

    def turned(self, ascended: jax.Array) -> VarianceControlledState:
        """The clocks after one more step."""
        window = self.psf_norms.shape[0]
        warm = self.warmup_left > 0
        position = jnp.where(warm, self.position, (self.position + 1) % window)
        used = jnp.where(warm, 1, self.used + ascended)
        return self._replace(
            count=optax.safe_increment(self.count),
            warmup_left=jnp.maximum(self.warmup_left - 1, 0),
            position=position,
            used=jnp.where(position == 0, 0, used).astype(jnp.int32),
        )

    def decided(self) -> VarianceControlledState:
        """With the next step's decision: warm-up, a draw below s/K, or catch-up."""
        window = self.psf_norms.shape[0]
        quota = jnp.floor(self.rate)
        drawn = uniform(self.key, self.count) < self.rate / window
        forced = self.catch_up & (window - self.position <= quota - self.used)
        take = ((self.used < quota) & drawn) | forced
        return self._replace(ascends=(self.warmup_left > 0) | take)

    def plan(self) -> tuple[jax.Array, jax.Array]:
        """The decisions up to the next window, and how many they are."""
        window = self.psf_norms.shape[0]

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
            "psf_norm": self.psf_norms[-1],
        }


def variance_controlled(
    window: int = 50,
    num_slices: int = 5,
    sensitivity: ArrayLike = 0.13,
    max_rate: ArrayLike = 0.8,
    warmup_steps: int | None = None,
    norm_mask: Mask = None,
    force_quota: bool = True,
    key: ArrayLike = 0,
) -> When:
    r"""As often as the size of the PSF varies: the rule of vSAM.

    On ascended steps, with :math:`\mathrm{PSF} = g_s - g`, three rings of the last
    :math:`K` samples are kept:

    .. math::
      x = \|\mathrm{PSF}\|, \qquad r = x / \|g\|, \qquad
      v = \tfrac1m \textstyle\sum_{j=1}^m \mathrm{Var}(\text{slice } j
      \text{ of the sorted ring of } x)

    Every :math:`K` steps the number of samples per window follows their mean
    relative changes, and the window's steps are drawn with probability
    :math:`s / K`, not more than :math:`\lfloor s \rfloor` of them:

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
      max_rate: largest share of ascended steps, in ``(0, 1]``, at least one per
        window.
      warmup_steps: steps at the start that all ascend and fill the rings; ``None``
        means two windows. Below ``2 * window - 1`` the rings are not full when the
        first window ends; changes across unfilled entries then count as zero.
      norm_mask: the leaves whose norms are watched, for instance the last layers; a
        tree of bools like the parameters or a prefix of it, or a function from the
        parameters to one. ``None`` means all.
      force_quota: whether the end of a window catches up on its quota, so that each
        full window has exactly ``floor(s)`` ascents.
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

    Differs from the authors' code in:
      1. The decision is made at the end of the step before, from the same numbers.
      2. A change whose predecessor is zero counts as zero (there it would be NaN), and
         samples that are not finite are not recorded.
      3. With ``axis_name``, norms are the mean of the devices' own.

    References:
      Deng et al., `Effective Gradient Sample Size via Variation Estimation for
      Accelerating Sharpness aware Minimization <https://arxiv.org/abs/2403.08821>`_,
      2024; code: ajiaaa/vSAM
    """
    check_integer("window", window, 2)
    check_integer("num_slices", num_slices, 1)
    if window % num_slices or window // num_slices < 2:
        raise ValueError(
            "window must be divisible by num_slices, with at least two values per"
            f" slice; got window={window} and num_slices={num_slices}."
        )
    check_number("sensitivity", sensitivity, 0.0)
    check_number("max_rate", max_rate, 0.0, 1.0, open_low=True)
    largest: ArrayLike
    if isinstance(max_rate, jax.core.Tracer):
        largest = jnp.maximum(jnp.floor(window * max_rate), 1)
    else:
        # In Python numbers, as the authors do: float32 rounds 100 * 0.29 up to 29.
        largest = int(window * float(np.asarray(max_rate)))
        if largest < 1:
            raise ValueError(
                "max_rate must allow at least one ascent per window of"
                f" {window} steps (max_rate >= {1 / window:.3g}); got {max_rate}."
            )
    if warmup_steps is None:
        warmup_steps = 2 * window
    check_integer("warmup_steps", warmup_steps, 0)
    check_key(key)

    def init(params: Any) -> VarianceControlledState:
        del params
        return VarianceControlledState(
            ascends=jnp.array(False),
            count=jnp.zeros((), jnp.int32),
            warmup_left=jnp.array(warmup_steps, jnp.int32),
            # The authors' clock starts inside a window whose quota is spent: the
            # first window after the warm-up takes no sample.
            position=jnp.ones((), jnp.int32),
            used=jnp.ones((), jnp.int32),
            rate=jnp.ones((), float),
            catch_up=jnp.array(force_quota),
            key=raw_key(key),
            psf_norms=jnp.zeros((window,), float),
            ratios=jnp.zeros((window,), float),
            variances=jnp.zeros((window,), float),
        ).decided()

    def observe(
        state: VarianceControlledState, g: Any, g_s: Any, step: Step
    ) -> VarianceControlledState:
        watched = jax.tree.leaves(resolve_mask(norm_mask, g, name="norm_mask"))
        tail = lambda tree: [
            leaf
            for leaf, kept in zip(jax.tree.leaves(tree), watched, strict=True)
            if kept
        ]
        psf = optax.tree.sub(tail(g_s), tail(g))
        dtype = state.rate.dtype
        x, size = step.mean((norm(psf).astype(dtype), norm(tail(g)).astype(dtype)))
        r = jnp.where(size > 0, x / size, 0)
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

    def advance(
        state: VarianceControlledState, ascended: jax.Array
    ) -> VarianceControlledState:
        state = state.turned(ascended)
        growth = mean_change(state.ratios) + mean_change(state.variances)
        s = jnp.clip(state.rate * (1 + sensitivity * growth), 1, largest)
        s = jnp.where(state.position == 0, s, state.rate).astype(state.rate.dtype)
        return state._replace(rate=s).decided()

    return When(init, _kept, observe, advance)
