"""The one list of methods that the batteries go through.

A method of the package is in it by itself. An entry says what is special about one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from optax_sam.method import METHODS as PUBLIC
from optax_sam.when import bernoulli, every_k


def grad_fn_only(loss_fn, batch):
    """The extra arguments of most methods: the gradients on this step's batch."""
    return {"grad_fn": lambda params: jax.grad(loss_fn)(params, batch)}


def l2_norm(offset, params, g):
    """The norm in which an l2 ball is a ball."""
    return optax.tree.norm(offset)


def relative_norm(offset, params, g):
    """Relative to the weights; every leaf has the same."""
    return optax.tree.norm(offset) / optax.tree.norm(params)


def esam_norm(offset, params, g):
    """Without ESAM's factor ``1 / beta`` (0.6 here) and its large epsilon."""
    chosen = lambda e, g: jnp.where(jnp.any(e != 0), g, 0)
    n = optax.tree.norm(jax.tree.map(chosen, offset, g))
    # No leaf is chosen where rho is zero.
    return 0.6 * optax.tree.norm(offset) * jnp.where(n > 0, (n + 1e-7) / n, 1)


def vasso_norm(offset, params, g):
    """Without VaSSO's large epsilon, on the first step."""
    n = optax.tree.norm(g)
    return optax.tree.norm(offset) * (n + 1e-7) / n


def renyi_norm(offset, params, g):
    """``rho`` from the length ``rho S / ||g||``, for ``alpha = 1.2``."""
    n = optax.tree.norm(g)
    s = sum(jnp.sum((jnp.abs(x) / n) ** 2.4) for x in jax.tree.leaves(g))
    return optax.tree.norm(offset) * n / s


def ellipsoid_norm(eta, everywhere=False):
    """ASAM's norm of an offset: ``||e / T||``."""

    def norm(offset, params, g):
        sizes = jax.tree.map(
            lambda w: jnp.abs(w) + eta if everywhere or w.ndim >= 2 else 1, params
        )
        return optax.tree.norm(jax.tree.map(jnp.divide, offset, sizes))

    return norm


def centered_norm(offset, params, g):
    """GCSAM scales by the norm of the gradient before its means are taken out."""
    less = lambda x: x - x.mean(0, keepdims=True) if x.ndim == 2 else x
    moved = optax.tree.norm(jax.tree.map(less, g))
    return optax.tree.norm(offset) * optax.tree.norm(g) / moved


def budget(offset, params, g):
    """By how much LE-SAM lets the loss rise."""
    return optax.tree.norm(offset) * optax.tree.norm(g)


def unit_norm(offset, params, g):
    """Relative to the weights of each unit, as normals that are 1 make it."""
    units = lambda w: jnp.sqrt(jnp.sum(w**2, 0 if w.ndim == 2 else None, keepdims=True))
    sizes = jax.tree.map(lambda w: units(w) * jnp.ones_like(w), params)
    return optax.tree.norm(offset) / optax.tree.norm(sizes)


def ascended(g, g_s):
    """What most methods emit on an ascended step."""
    return g_s


def without_gap(g, g_s, alpha=0.4):
    """What GSAM emits on an ascended step."""
    g_s = jax.tree.map(lambda x, like: x.astype(like.dtype), g_s, g)
    c = optax.tree.vdot(g, g_s) / optax.tree.vdot(g_s, g_s)
    return jax.tree.map(lambda x, x_s: x_s - alpha * (x - c * x_s), g, g_s)


def fisher_norm(offset, params, g):
    """In the metric of the Fisher information, for ``eta = 1``."""
    squares = jax.tree.map(lambda e, x: (1 + x**2) * e**2, offset, g)
    return jnp.sqrt(optax.tree.sum(squares))


def leaf_norm(offset, params, g):
    """AMP's balls are around leaves."""
    return jnp.max(jnp.stack([optax.tree.norm(x) for x in jax.tree.leaves(offset)]))


def interpolated(alpha):
    """What GNP emits on an ascended step."""

    def fresh(g, g_s):
        return jax.tree.map(lambda x, x_s: (1 - alpha) * x + alpha * x_s, g, g_s)

    return fresh


def renormalized(g, g_s):
    """What StableSAM emits on an ascended step."""
    return optax.tree.scale(optax.tree.norm(g) / optax.tree.norm(g_s), g_s)


def gam_of_one(g, g_s, beta=0.5, gamma=0.03):
    """What GAM makes of three ascended gradients that are equal."""
    g_s = jax.tree.map(lambda x, like: x.astype(like.dtype), g_s, g)
    less = jax.tree.map(lambda x, x_s: beta * x + (1 - beta) * x_s, g, g_s)
    c = optax.tree.vdot(less, g_s) / optax.tree.vdot(g_s, g_s)
    return jax.tree.map(lambda x, x_s: x_s - gamma * (x - c * x_s), less, g_s)


@functools.wraps(optax_sam.sampa)
def sampa_on_one_batch(*args, **kwargs):
    """SAMPa whose batch before is always this one."""
    method = optax_sam.sampa(*args, **kwargs)

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        extra |= {"previous_grad_fn": grad_fn, "grad_fn": grad_fn}
        return method.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(method.init, update)


@functools.wraps(optax_sam.esam)
def esam_by_grad_fn(*args, **kwargs):
    """ESAM on four examples each of whose losses has the gradient ``grad_fn``."""
    method = optax_sam.esam(*args, **kwargs)

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        @jax.custom_vjp
        def losses(p, like):
            return like

        def forward(p, like):
            grads = grad_fn(p)
            return like, jax.tree.map(lambda g, x: g.astype(x.dtype), grads, p)

        def backward(grads, cotangent):
            return jax.tree.map(lambda g: jnp.sum(cotangent) * g, grads), cotangent

        losses.defvjp(forward, backward)

        def per_example_loss_fn(p, indices=None):
            return losses(p, jnp.zeros(4 if indices is None else indices.shape))

        if callable(grad_fn):
            extra["per_example_loss_fn"] = per_example_loss_fn
        return method.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(method.init, update)


@functools.wraps(optax_sam.mrwp)
def mrwp_of_ones(*args, **kwargs):
    """mRWP whose normals are all 1."""
    method = optax_sam.mrwp(*args, **kwargs)

    def update(updates, state, params=None, **extra):
        ones = None if params is None else jax.tree.map(jnp.ones_like, params)
        return method.update(updates, state, params, **({"noise": ones} | extra))

    return optax.GradientTransformationExtraArgs(method.init, update)


@functools.wraps(optax_sam.saf)
def saf_of_four(*args, **kwargs):
    """SAF that is shown the same logits of the same four examples on every step."""
    method = optax_sam.saf(*args, **kwargs)

    def update(updates, state, params=None, **extra):
        # Made here: the precision may have changed since.
        rows = {"logits": jnp.ones((4, 2)), "indices": jnp.arange(4)}
        return method.update(updates, state, params, **(extra | rows))

    return optax.GradientTransformationExtraArgs(method.init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """What the tests have to know about a method.

    Attributes:
      name: of this entry.
      factory: the public function that builds it.
      settings: arguments that suit quick tests.
      calls: how often ``grad_fn`` runs on an ascended step.
      skips: whether it leaves some steps out.
      lookahead: how many steps it plans at a time, at least on average; 0: none.
      uses_incoming: whether an ascended step looks at the incoming gradient.
      needs: the extra argument that it cannot do without.
      extra_args: ``(loss_fn, batch)`` to the extra arguments that ``update`` requires.
      norm: ``(offset, params, g)`` to the length that ``rho`` bounds.
      radius: the argument that bounds the perturbation.
      more_radii: the arguments that bound further ones.
      fresh: ``(g, g_s)`` to what it emits on an ascended step.
      second: ``(g, g_s)`` to what it takes for the ascended gradient.
      place: where it stands: ``"first"`` in a chain, ``"last"``, or ``"around"`` it.
      variant: whether another entry shows nearly the same; then the quick tests leave
        it out.
      seldom: whether its parts are so simple, or so like another's, that only CI runs
        the battery on it.
      misleading: the arguments whose values mislead ``static``: None where a number may
        be, or a number that sets a size.
      trees: how many trees like the parameters its state holds.
      small_bytes: the most that the rest of its state takes in float32.
    """

    name: str
    factory: Callable[..., Any]
    settings: Mapping[str, Any]
    calls: int = 1
    skips: bool = False
    lookahead: int = 4
    uses_incoming: bool = True
    needs: str = "grad_fn"
    extra_args: Callable[[Any, Any], dict] = grad_fn_only
    norm: Callable[[Any, Any, Any], jax.Array] = l2_norm
    radius: str = "rho"
    more_radii: tuple[str, ...] = ()
    fresh: Callable[[Any, Any], Any] = ascended
    second: Callable[[Any, Any], Any] = ascended
    place: str = "first"
    variant: bool = False
    seldom: bool = False
    misleading: tuple[str, ...] = ()
    trees: int = 0
    small_bytes: int = 200

    @property
    def static(self):
        """What ``inject_hyperparams`` must not trace: all that is no real number."""
        value = lambda p: self.settings.get(p.name, p.default)
        return tuple(
            p.name
            for p in inspect.signature(self.factory).parameters.values()
            if isinstance(value(p), float) == (p.name in self.misleading)
        )

    def build(self, **changes):
        """The method alone; one that wraps an optimizer, around SGD with momentum."""
        settings = {**self.settings, **changes}
        if self.place == "around":
            return self.factory(optax.sgd(0.1, momentum=0.9), **settings)
        return self.factory(**settings)

    def of_radius(self, rho):
        """The arguments that give it this radius, and all of them if that is 0."""
        return {self.radius: rho} | dict.fromkeys(() if rho else self.more_radii, rho)

    def optimizer(self, base=None, **changes):
        """The whole optimizer: with SGD and momentum, if no other is given."""
        base = optax.sgd(0.1, momentum=0.9) if base is None else base
        if self.place == "around":
            return self.factory(base, **{**self.settings, **changes})
        member = self.build(**changes)
        first = self.place == "first"
        return optax.chain(member, base) if first else optax.chain(base, member)


def product(
    rho: optax.ScalarOrSchedule = 0.1,
    *,
    mask: Any = None,
    ascent_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A method that has no name: a raw product of the three axes."""
    return optax_sam.sharpness_aware(
        optax_sam.ascent.l2(rho),
        every_k(3, phase=1),
        optax_sam.blend.reuse_difference(0.7, max_reuse=1),
        mask=mask,
        ascent_dtype=ascent_dtype,
    )


def variant(name, settings, of, variant=True, **changes):
    """An entry that is like another one but for some settings."""
    (method,) = [x for x in METHODS if x.name == of]
    settings = {**method.settings, **settings}
    changes |= {"variant": variant, "skips": method.skips or "when" in settings}
    return dataclasses.replace(method, name=name, settings=settings, **changes)


_RHO = {"rho": 0.1}
_LOOK = {"skips": True, "trees": 1}
METHODS = (
    Method("sam", optax_sam.sam, _RHO),
    Method(
        "asam", optax_sam.asam, {"rho": 0.3}, seldom=True, norm=ellipsoid_norm(0.01)
    ),
    Method(
        "vsam",
        optax_sam.vsam,
        _RHO | {"window": 4, "num_slices": 2, "warmup_steps": 7},
        skips=True,
        trees=1,
        # Three windows, a dozen scalars beside two bools, and a key.
        small_bytes=3 * 4 * 6 + 4 * 14 + 8,
        misleading=("initial_rate",),
    ),
    Method("gsam", optax_sam.gsam, _RHO, fresh=without_gap),
    Method("looksam", optax_sam.looksam, _RHO | {"k": 3, "alpha": 0.3}, **_LOOK),
    Method(
        "look_layer_sam",
        optax_sam.look_layer_sam,
        {"rho": 0.05, "k": 4, "alpha": 0.2},
        seldom=True,
        norm=relative_norm,
        **_LOOK,
    ),
    Method("ae_sam", optax_sam.ae_sam, _RHO | {"decay": 0.6}, lookahead=0, skips=True),
    Method(
        "ae_looksam",
        optax_sam.ae_looksam,
        _RHO | {"decay": 0.6, "alpha": 0.3},
        seldom=True,
        lookahead=0,
        **_LOOK,
    ),
    Method(
        "esam",
        esam_by_grad_fn,
        _RHO | {"key": 11},
        needs="per_example_loss_fn",
        norm=esam_norm,
        misleading=("gamma",),
    ),
    Method(
        "renyi_sam",
        optax_sam.renyi_sam,
        _RHO,
        seldom=True,
        norm=renyi_norm,
        misleading=("max_offset_norm",),
    ),
    Method("random_sam", optax_sam.random_sam, _RHO, calls=2, uses_incoming=False),
    Method("gnp", optax_sam.gnp, _RHO, seldom=True, fresh=interpolated(0.8)),
    # With a sigma of 1 nothing would be left of gradients that stay the same.
    Method("friendly_sam", optax_sam.friendly_sam, _RHO | {"sigma": 0.5}, trees=1),
    # The default mask finds no normalization layers here.
    Method("sam_on", optax_sam.sam_on, _RHO | {"mask": True}, seldom=True),
    Method("fisher_sam", optax_sam.fisher_sam, _RHO, seldom=True, norm=fisher_norm),
    Method(
        "amp",
        optax_sam.amp,
        {"epsilon": 0.1, "inner_lr": 100.0},
        seldom=True,
        radius="epsilon",
        norm=leaf_norm,
    ),
    Method(
        "gam",
        optax_sam.gam,
        {"grad_rho": 0.05, "norm_rho": 0.1},
        calls=3,
        radius="grad_rho",
        more_radii=("norm_rho",),
        fresh=gam_of_one,
        second=gam_of_one,
    ),
    Method("stable_sam", optax_sam.stable_sam, _RHO, seldom=True, fresh=renormalized),
    Method(
        "vasso",
        optax_sam.vasso,
        _RHO | {"theta": 0.5},
        seldom=True,
        norm=vasso_norm,
        trees=1,
    ),
    Method(
        "le_sam",
        optax_sam.le_sam,
        {"sigma": 0.1, "max_rho": 1e3},
        seldom=True,
        radius="sigma",
        norm=budget,
    ),
    Method("gcsam", optax_sam.gcsam, _RHO, seldom=True, norm=centered_norm),
    # The default mask is of one leaf here.
    Method(
        "awp",
        optax_sam.awp,
        {"gamma": 0.1, "mask": True},
        seldom=True,
        radius="gamma",
        norm=relative_norm,
    ),
    Method(
        "mrwp",
        mrwp_of_ones,
        {"gamma": 0.1},
        seldom=True,
        radius="gamma",
        norm=unit_norm,
        fresh=interpolated(0.5),
    ),
    Method("product", product, _RHO, skips=True, trees=1),
)
METHODS += (
    variant("sam_2_steps", {"num_ascent_steps": 2}, "sam", False, seldom=True, calls=2),
    variant("sam_5", {"when": every_k(5)}, "sam", False, seldom=True),
    variant("ss_sam", {"when": bernoulli(0.5, key=3)}, "sam", False),
    variant("vsam_a", {"reuse_decay": 0.0}, "vsam", False, seldom=True, trees=0),
    variant(
        "vsam_without_catch_up",
        {
            "window": 6,
            "num_slices": 3,
            "warmup_steps": 11,
            "sensitivity": 0.5,
            "force_quota": False,
            "key": 5,
        },
        "vsam",
    ),
    variant(
        "asam_all_leaves",
        {"adapt": True, "eta": 0.0},
        "asam",
        norm=ellipsoid_norm(0.0, everywhere=True),
    ),
    variant("gsam_5", {"when": every_k(5)}, "gsam"),
    variant("ae_sam_lagged", {"lag": 1}, "ae_sam", lookahead=1),
    variant("esam_2", {"when": every_k(2), "key": 4}, "esam"),
    variant(
        "renyi_sam_after_warmup",
        {"warmup_steps": 6, "when": bernoulli(0.5, key=2)},
        "renyi_sam",
    ),
    variant("random_sam_2", {"sigma": 0.05, "when": every_k(2)}, "random_sam"),
    variant(
        "g_rst",
        {"alpha": 2.0, "when": bernoulli(key=7)},
        "gnp",
        fresh=interpolated(2.0),
    ),
    variant("friendly_sam_2", {"when": every_k(2)}, "friendly_sam"),
    variant("amp_2_steps", {"inner_iter": 2}, "amp", calls=2),
)

# A method of the package without an entry here is run with its defaults.
_NAMED = {method.factory.__name__ for method in METHODS}
_APART = {"wsam", "sampa", "msam", "saf", "mesa"}
METHODS += tuple(
    Method(name, factory, {})
    for name, factory in PUBLIC.items()
    if name not in _NAMED | _APART
)

# What is no member of a chain on the engine.
OTHERS = (
    Method(
        "wsam",
        optax_sam.wsam,
        {"rho": 0.1, "learning_rate": 0.1, "gamma": 0.5},
        place="around",
        misleading=("max_norm",),
    ),
    Method(
        "sampa",
        sampa_on_one_batch,
        {"rho": 0.1},
        calls=2,
        lookahead=0,
        uses_incoming=False,
        place="around",
        trees=1,
        misleading=("learning_rate",),
    ),
    Method("msam", optax_sam.msam, {"rho": 0.1}, calls=0, place="around"),
    Method("saf", saf_of_four, {"num_examples": 5, "num_classes": 2}, calls=0),
    Method("mesa", optax_sam.mesa, {"decay": 0.9}, calls=0, place="last", trees=1),
)
BY_NAME = {method.name: method for method in METHODS + OTHERS}


def each(*methods, slow=lambda method: method.variant or method.seldom):
    """Parametrizes a test by methods, the slow ones of which only CI runs."""
    entries = [
        pytest.param(m, marks=pytest.mark.slow) if slow(m) else m for m in methods
    ]
    return pytest.mark.parametrize("method", entries, ids=lambda m: m.name)


every_method = each(*METHODS)
every_one = each(*METHODS, *OTHERS)
every_skipping = each(*(method for method in METHODS if method.skips))
