"""What each leaf of the parameters is: a kernel, a bias, a gain, or else.

Everything here reads names, containers and shapes. It computes nothing, so that it
works on arrays, tracers and ``jax.ShapeDtypeStruct`` alike.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

Kind = Literal["kernel", "bias", "embedding", "gain", "offset", "other"]
Shape = tuple[int, ...]

KINDS = ("kernel", "bias", "embedding", "gain", "offset", "other")

# Parts of a layer, alone or with more around: bias, ln1_scale, w_q, weight_ih, b2.
_PART = re.compile(
    r"(?:(?P<before>.+)_)?"
    r"(?:(?P<kernel>kernel|weights?|w)|(?P<bias>bias(?:es)?|b)"
    r"|(?P<gain>scale|gain|gamma|g)|(?P<offset>offset|shift|beta)"
    r"|(?P<embedding>embeddings?))"
    r"(?:(?P<number>\d+)|_(?P<after>.+))?"
)
# As in BatchNorm_0, norm1, bn1, ln_f and conv_bn, and not as in subnet.
_NORM = re.compile(r"norm|(?<![a-z])(?:bn|ln)(?![a-z])")
_TABLE = re.compile(r"embed|(?:^|_)emb(?:_|\d|$)|^w[tp]e$|token|^cls$")
_HEADS = re.compile(r"q|k|v|kv|qkv|query|key|value")
# What Linen calls a module that nn.scan or nn.vmap makes, once for each of them.
_LIFTED = re.compile(r"Scan(?=[A-Z])|Vmap(?=[A-Z])")


@dataclasses.dataclass(frozen=True)
class Role:
    """What a leaf is; itself a leaf, in a pytree like the parameters.

    Attributes:
      kind: ``"kernel"``, ``"bias"``, ``"embedding"``, ``"gain"`` and ``"offset"`` (the
        factor and the summand of a normalization layer), or ``"other"``.
      stack: the number of leading axes along which layers or networks are stacked.
      output: the axes of a kernel or an embedding that count its output units, from
        the first axis of the leaf on and without the stacked ones; empty for all
        other leaves, each of which is one unit.
      unsure: what names and shapes leave open, so that a default was taken: some of
        ``"kind"``, ``"stack"`` and ``"output"``. Two roles
        that differ in nothing else are equal.
    """

    kind: Kind
    stack: int = 0
    output: tuple[int, ...] = ()
    unsure: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def is_matrix(self, ndim: int) -> bool:
        """Whether it is a kernel or an embedding with two or more axes in a layer."""
        return self.kind in ("kernel", "embedding") and ndim - self.stack >= 2

    def within_layer(self, ndim: int) -> tuple[int, ...]:
        """The axes of a leaf with ``ndim`` axes that belong to one layer of a stack."""
        return tuple(range(self.stack, ndim))

    def within_unit(self, ndim: int) -> tuple[int, ...]:
        """Those of one output unit, or of one layer where there are no units."""
        return tuple(x for x in self.within_layer(ndim) if x not in self.output)


def roles(
    params: Any,
    *,
    stacked: int | Mapping[str, int] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    output: Literal["first", "last"] | None = None,
) -> Any:
    r"""Tells kernels, biases, embeddings, gains and offsets apart.

    Rules that treat them differently, or layers one by one, all ask this function:
    ASAM's default, SAM-ON, R-SAM's noise, the layers of LookLayerSAM, AMP and Renyi
    SAM, filter-normalized directions and layer-wise Renyi sharpness. Pass your own
    answer as their argument ``roles``: a pytree of roles, or a function such as
    ``functools.partial(optax_sam.roles, stacked={"blocks": 1})``.

    It goes by the names that Flax, Haiku, Equinox, PyTorch and plain pytrees use, and
    by what else is in the same module:

    - A ``bias`` (or ``b``) is a bias, and an offset if its module has a gain instead of
      a kernel. A ``scale`` whose module has no kernel is a gain. A ``weight`` of the
      shape of its bias, or in a module called ``norm``, ``bn`` or ``ln``, is a gain.
    - Leaves under other names are kernels if they have two or more axes, else other.
      In tuples and lists, what follows a kernel and fits its outputs is its bias.
    - Output units are counted where the bias fits the kernel: along several axes in
      Flax's attention, along the first one in Equinox. Where both ends fit, or there is
      no bias, it is the last axis, but the first in Equinox, and what the other layers
      have in common under names that no library fixes.
    - Layers are stacked (``nn.scan``, ``nnx.vmap``, ``eqx.filter_vmap``, an ensemble)
      in the largest part of the pytree whose leaves share their first axis, if there
      is a leaf that only a stack explains, such as a gain of two axes or a bias
      ``(L, out)`` beside a kernel ``(L, in, out)``, and none that no stack explains.
      Kernels alone do not tell: three axes may be a convolution's, and are taken for
      one kernel. Only leading axes are read as stacks.

    Args:
      params: the parameters, or anything of their structure and shapes.
      stacked: the number of leading stacked axes: an int for all leaves, or ints for
        some subtrees or leaves by their paths, such as ``{"encoder/blocks": 1}``; the
        innermost one counts, and the rest is detected. ``None`` detects all.
      kinds: the kinds of some leaves or subtrees by their paths.
      output: the end of a kernel that counts its output units, ``"first"`` or
        ``"last"``, where neither the shapes nor the names of a library tell.

    Returns:
      A pytree like ``params`` of :class:`optax_sam.Role`. :func:`optax_sam.roles_table`
      prints it.

    Raises:
      ValueError: if there is nothing at a path, a leaf has fewer axes than are
        stacked, or a value is none of those allowed.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> params = {"scale": {"kernel": jnp.ones((6, 3, 4)), "bias": jnp.ones((6, 4))}}
      >>> found = optax_sam.roles(params)["scale"]
      >>> print(found["bias"].kind, found["bias"].stack, found["kernel"].output)
      bias 1 (2,)
    """
    found, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [_Leaf(params, path, x) for path, x in found]
    if output not in (None, "first", "last"):
        raise ValueError(f'output must be "first", "last" or None; got {output!r}.')
    _override(leaves, stacked, kinds)
    _name_kinds(leaves)
    groups = _groups(leaves)
    _read_attention(groups)
    for group in groups:
        group.find_options()
    _settle(groups)
    ends = {
        end for group in groups for leaf in group.kernels for end in group.ends(leaf)
    }
    common = ends.pop() if len(ends) == 1 else None
    for group in groups:
        group.count_units(output or common)
    return jax.tree.unflatten(structure, [leaf.role() for leaf in leaves])


def roles_table(params: Any, roles: Any = None) -> str:
    """The roles of all leaves as a table to print.

    Args:
      params: the parameters, or anything of their structure and shapes.
      roles: a pytree of roles, or a function from the parameters to one; ``None``
        means :func:`optax_sam.roles`.

    Returns:
      A line for each leaf with path, shape, kind, stacked axes and output axes. A
      question mark follows what was decided by a default, since shapes and names
      allow more than one reading.

    Raises:
      ValueError: if ``roles`` is neither.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> norm = {"scale": jnp.ones((6, 4)), "bias": jnp.ones((6, 4))}
      >>> params = {"conv": jnp.ones((3, 8, 4)), "norm": norm}
      >>> print(optax_sam.roles_table(params))
      leaf        shape      kind    stacked  output
      conv        (3, 8, 4)  kernel?  0?       2?
      norm/bias   (6, 4)     offset  1
      norm/scale  (6, 4)     gain    1
      ?: a default, since names and shapes allow more; set it with optax_sam.roles
    """
    found = jax.tree.leaves(resolve_roles(roles, params))
    lines = [("leaf", "shape", "kind", "stacked", "output")]
    for (path, x), role in zip(_pairs(params), found, strict=True):
        mark = lambda text, field, role=role: f"{text}{'?' * (field in role.unsure)}"
        units = ", ".join(map(str, role.output))
        lines.append(
            (
                path or "the root",
                str(_shape(x)),
                mark(role.kind, "kind"),
                mark(role.stack, "stack"),
                mark(units, "output"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if any(role.unsure for role in found):
        text.append(
            "?: a default, since names and shapes allow more; set it with"
            " optax_sam.roles"
        )
    return "\n".join(text)


def resolve_roles(given: Any, params: Any) -> Any:
    """A role for each leaf of ``params`` from what users give as ``roles``."""
    if given is None:
        return roles(params)
    if callable(given):
        given = given(params)
    advice = (
        "roles must be a pytree of optax_sam.Role like the parameters, or a function"
        " that makes one from them, such as functools.partial(optax_sam.roles,"
        " stacked={'blocks': 1})"
    )

    def fill(role: Any, subtree: Any) -> Any:
        if not isinstance(role, Role):
            raise ValueError(f"it must hold roles (optax_sam.Role); got {role!r}")
        for path, x in _pairs(subtree):
            axes = (role.stack - 1, *role.output)
            if max(axes) >= len(_shape(x)):
                raise ValueError(
                    f"{role} must not name axis {max(axes)} of a leaf of shape"
                    f" {_shape(x)} at {path or 'the root'}"
                )
        return jax.tree.map(lambda _: role, subtree)

    try:
        return jax.tree.map(fill, given, params, is_leaf=lambda x: isinstance(x, Role))
    except ValueError as error:
        raise ValueError(f"{advice}: {error}.") from error


def by_layer(function: Callable[..., Any], role: Role) -> Callable[..., Any]:
    """Maps a function of whole leaves over the layers that are stacked in them."""
    for _ in range(role.stack):
        function = jax.vmap(function)
    return function


def is_weight(role: Role) -> bool:
    """Whether ASAM adapts the leaf: what PyTorch calls ``weight``."""
    return role.kind in ("kernel", "embedding", "gain")


def path_names(path: Any) -> list[Any]:
    """The keys along a path: names of dict keys and attributes, and positions."""
    kinds = ("key", "name", "idx")
    names = [next((getattr(k, x) for x in kinds if hasattr(k, x)), k) for k in path]
    # Tuples are keys of flat dicts, as flax.traverse_util.flatten_dict makes them.
    names = [x for k in names for x in (k if isinstance(k, tuple) else (k,))]
    # The last one of an NNX variable, an attribute, is that of its array.
    of_array = path and getattr(path[-1], "name", None) in ("value", "raw_value")
    return names[:-1] if of_array else names


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, joined by ``/``."""
    return dict(_pairs(tree))


def _pairs(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(map(str, path_names(path))), x) for path, x in leaves]


def _split(names: list[Any]) -> Iterator[Any]:
    for name in names:
        if isinstance(name, str):  # those of flat dicts are whole paths
            yield from (x for x in re.split(r"[/.]", name) if x)
        else:
            yield name


def _shape(leaf: Any) -> Shape:
    """Its shape; () for what is no array, such as a function in a module."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


class _Leaf:
    """A leaf while its role is being found."""

    def __init__(self, params: Any, path: Any, leaf: Any):
        names = tuple(_split(path_names(path)))
        self.path, self.shape = names, _shape(leaf)
        self.module, self.name = names[:-1], names[-1] if names else ""
        self.owner = _equinox_module(params, path)
        self.given_stack: int | None = None
        self.kind: Any = None
        self.stack = 0
        self.output: tuple[int, ...] = ()
        self.unsure: list[str] = []
        word = self.name.lower() if isinstance(self.name, str) else ""
        match = None if "lora" in word else _PART.fullmatch(word)
        named = match.groupdict() if match else {}
        self.part = next((x for x in KINDS if named.get(x)), "")
        self.exact = named.get(self.part) or ""  # w or weight, b or bias
        self.stem = (named.get("before"), named.get("after") or named.get("number"))
        self.word = word
        # A layer at a position of a list is called as the list.
        called = [x for x in self.module if isinstance(x, str)]
        self.layer = called[-1].lower() if called else ""
        self.called = [self.layer, type(self.owner).__name__.lower()]
        self.called += [x for x in self.stem if x]
        self.in_norm = any(map(_NORM.search, self.called))

    @property
    def is_position(self) -> bool:
        return bool(self.path) and not isinstance(self.name, str)

    def role(self) -> Role:
        kind = self.kind
        if kind is None:  # no name that tells
            kind = "kernel" if len(self.shape) - self.stack >= 2 else "other"
            self.unsure += ["kind"] * (kind == "kernel")
        if kind in ("kernel", "embedding"):
            return Role(kind, self.stack, self.output, tuple(self.unsure))
        return Role(kind, self.stack)


def _equinox_module(params: Any, path: Any) -> Any:
    """The Equinox module that has the leaf as an attribute, else ``None``."""
    if not path or not isinstance(path[-1], jax.tree_util.GetAttrKey):
        return None
    for key in path[:-1]:
        try:
            if isinstance(key, jax.tree_util.GetAttrKey):
                params = getattr(params, key.name)
            else:
                params = params[key.key if hasattr(key, "key") else key.idx]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    classes = type(params).__mro__
    return params if any(c.__module__.startswith("equinox") for c in classes) else None


def _equinox_rank(owner: Any) -> int | None:
    """How many axes a weight or a gain has in a module of Equinox's own."""
    name = type(owner).__name__
    if owner is None or not type(owner).__module__.startswith("equinox.nn"):
        return None
    if hasattr(owner, "num_spatial_dims") and "Conv" in name:
        return owner.num_spatial_dims + 2
    if name in ("Linear", "Embedding"):
        return 2
    if "Norm" in name and isinstance(getattr(owner, "shape", None), tuple):
        return len(owner.shape)
    return None


def _override(leaves: list[_Leaf], stacked: Any, kinds: Any) -> None:
    """Writes down what the user has said."""

    def apply(argument: str, given: Any, write: Callable[[_Leaf, Any], None]) -> None:
        # Outer subtrees first, so that the innermost one counts.
        for path in sorted(given, key=lambda path: len(tuple(_split([path])))):
            keys = tuple(map(str, _split([path])))
            inside = [x for x in leaves if tuple(map(str, x.path))[: len(keys)] == keys]
            if not inside:
                have = ", ".join("/".join(map(str, x.path)) for x in leaves[:5])
                raise ValueError(
                    f"{argument} names {path!r}, where there is no leaf; choose from"
                    f" {have}{', ...' if len(leaves) > 5 else ''}."
                )
            for leaf in inside:
                write(leaf, given[path])

    def stack(leaf: _Leaf, value: Any) -> None:
        name = "/".join(map(str, leaf.path)) or "the root"
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"stacked must hold integers; got {value!r} for {name}.")
        if not 0 <= value <= len(leaf.shape):
            raise ValueError(
                f"stacked says {value} leading axes for the leaf at {name}, which has"
                f" the shape {leaf.shape}; give at most as many as that."
            )
        leaf.given_stack = int(value)

    def kind(leaf: _Leaf, value: Any) -> None:
        if value not in KINDS:
            raise ValueError(f"kinds must hold some of {KINDS}; got {value!r}.")
        leaf.kind = value

    if stacked is not None:
        by_path = stacked if isinstance(stacked, Mapping) else {"": stacked}
        apply("stacked", by_path, stack)
    apply("kinds", kinds or {}, kind)


def _name_kinds(leaves: list[_Leaf]) -> None:
    """The kind of every leaf whose name or whose neighbours tell it."""
    modules: dict[Any, list[_Leaf]] = {}
    for leaf in leaves:
        modules.setdefault(leaf.module, []).append(leaf)
    for module in modules.values():
        others = lambda leaf, module=module: [x for x in module if x is not leaf]
        for leaf in module:  # kernels and embeddings first, of which the rest depends
            if leaf.kind is None:
                leaf.kind = _weight_kind(leaf, others(leaf))
        for kinds in (_gain_kind, _summand_kind):
            for leaf in module:
                if leaf.kind is None:
                    leaf.kind = kinds(leaf, others(leaf))
        _name_positions([x for x in module if x.is_position and x.kind is None])


def _beside(leaf: _Leaf, others: list[_Leaf], *kinds: str) -> list[_Leaf]:
    """Those of some kinds with its prefix and number if there are any, else all."""
    found = [x for x in others if x.kind in kinds]
    return [x for x in found if x.stem == leaf.stem] or found


def _weight_kind(leaf: _Leaf, others: list[_Leaf]) -> Kind | None:
    if "lora" in leaf.word:
        return "kernel"
    if leaf.part == "embedding" or (not leaf.part and _TABLE.search(leaf.word)):
        return "embedding"
    biases = [x for x in others if x.part == "bias" and x.stem == leaf.stem]
    if not leaf.part and not leaf.is_position and _fits_any(leaf, biases):
        return "kernel"
    if leaf.part != "kernel":
        return None
    if leaf.exact == "kernel":
        return "kernel"
    affine = leaf.exact != "w" and any(x.shape == leaf.shape for x in biases)
    rank = _equinox_rank(leaf.owner)
    if rank is None and (affine or leaf.in_norm) and not _fits_any(leaf, biases):
        return "gain"
    if rank is not None and "Norm" in type(leaf.owner).__name__:
        return "gain"
    is_table = not biases and any(map(_TABLE.search, leaf.called))
    return "embedding" if is_table else "kernel"


def _fits_any(kernel: _Leaf, biases: list[_Leaf]) -> bool:
    return any(
        x.shape != kernel.shape and len(kernel.shape) > 1 and _fits(kernel, x)
        for x in biases
    )


def _gain_kind(leaf: _Leaf, others: list[_Leaf]) -> Kind | None:
    alone = not leaf.part and leaf.in_norm and not leaf.is_position
    if leaf.part != "gain" and not alone:
        return None
    no_stem = leaf.stem == (None, None)
    kernels = [x for x in others if x.kind == "kernel"]
    if any(no_stem or x.stem == leaf.stem for x in kernels):
        return None if alone else "other"
    partners = [x for x in others if x.part in ("bias", "offset")]
    paired = any(x.shape == leaf.shape and x.stem == leaf.stem for x in partners)
    plain = leaf.exact == "scale" and no_stem
    return "gain" if alone or plain or paired or leaf.in_norm else None


def _summand_kind(leaf: _Leaf, others: list[_Leaf]) -> Kind | None:
    if leaf.part not in ("bias", "offset"):
        return None
    kernels = _beside(leaf, others, "kernel")
    gains = _beside(leaf, others, "gain")
    near = any(x.stem == leaf.stem for x in gains)
    if kernels and not (near and not any(x.stem == leaf.stem for x in kernels)):
        if leaf.exact != "b" or len(leaf.shape) < 2:
            return "bias"
        size = math.prod(leaf.shape)
        units = {n for x in kernels for n in (x.shape[-1:], x.shape[:1])}
        fits = (size,) in units or any(_fits(x, leaf) for x in kernels)
        return "bias" if fits else None
    if gains or leaf.in_norm:
        return "offset"
    if leaf.part == "offset":
        return "offset" if leaf.exact == "offset" else None
    return "bias" if leaf.exact != "b" or len(leaf.shape) < 2 else None


def _name_positions(leaves: list[_Leaf]) -> None:
    """In a tuple or a list, a kernel's bias comes after it."""
    kernel = None
    for leaf in leaves:
        forms = set()
        if kernel is not None:
            fits = _fits(kernel, leaf).values()
            forms = {form for readings in fits for form, _ in readings}
        if kernel is not None and forms - {"several"}:
            kernel.kind, leaf.kind, leaf.stem = "kernel", "bias", kernel.stem
        elif len(leaf.shape) > 1:
            kernel = leaf
            leaf.stem = ("position", str(leaf.name))


def _fits(kernel: _Leaf, bias: _Leaf) -> dict[int, list[tuple[str, Shape]]]:
    """For each number of stacked axes, the outputs of the kernel that the bias fits.

    With it stands how: ``"exact"``, one axis; ``"several"``, as of heads; ``"units"``,
    with axes of length one, as Haiku's and Equinox's convolutions have them.
    """
    rank = _equinox_rank(kernel.owner)
    found = {}
    for n in range(min(len(kernel.shape), len(bias.shape) + 1)):
        if kernel.shape[:n] != bias.shape[:n]:
            break
        if rank is None or len(kernel.shape) - n == rank:
            fits = _outputs(kernel.shape[n:], bias.shape[n:])
            found[n] = [(form, tuple(x + n for x in axes)) for form, axes in fits]
    # What is seldom counts where nothing else fits: stacked kernels of one axis, each
    # with a number for its bias, and outputs that do not come last in Flax.
    seldom: list[Callable[[int, Shape], bool]] = [lambda n, axes: axes == ()]
    if kernel.exact == "kernel":
        seldom.append(lambda n, axes: axes == (n,))
    for is_seldom in seldom:
        usual = {
            n: [(form, axes) for form, axes in fits if not is_seldom(n, axes)]
            for n, fits in found.items()
        }
        found = usual if any(usual.values()) else found
    return {n: fits for n, fits in found.items() if fits}


def _outputs(kernel: Shape, bias: Shape) -> list[tuple[str, Shape]]:
    """The axes of one kernel that its bias counts, for each reading."""
    last = len(kernel) - 1
    if last == 0:  # one unit
        return [("exact", ())] if bias in ((), (1,)) else []
    found: list[tuple[str, Shape]] = []
    for axis in (last, 0):
        size = (kernel[axis],)
        ones, after = (1,) * (len(bias) - 1), len(bias) == last
        if bias == size:
            found.append(("exact", (axis,)))
        elif len(bias) > 1 and (
            (axis == last and bias == ones + size) or (after and bias == size + ones)
        ):
            found.append(("units", (axis,)))
    if 1 < len(bias) <= last and bias == kernel[-len(bias) :]:
        several = tuple(range(len(kernel) - len(bias), len(kernel)))
        found.append(("several", several))
    return found


class _Group:
    """Leaves of one layer, which are stacked together or not at all."""

    def __init__(self, leaves: list[_Leaf]):
        self.leaves = leaves
        self.module = leaves[0].module
        self.kernels = [x for x in leaves if x.kind == "kernel"]
        self.biases = [x for x in leaves if x.kind == "bias"]
        self.is_heads = bool(_HEADS.fullmatch(leaves[0].layer))
        self.attention: int | None = None  # axes of its kernels, where they tell
        self.options: set[int] = set()  # possible numbers of stacked axes
        self.preferred = 0
        self.stack = 0

    def fits(self, kernel: _Leaf) -> dict[int, list[tuple[str, Shape]]]:
        """All readings of a kernel with those of its biases that fit it at all."""
        fits = [x for x in (_fits(kernel, bias) for bias in self.biases) if x]
        return {
            n: [fit for x in fits for fit in x[n]]
            for n in range(len(kernel.shape))
            if fits and all(n in x for x in fits)
        }

    def find_options(self) -> None:
        given = {x.given_stack for x in self.leaves if x.given_stack is not None}
        if given:
            self.options, self.preferred = given, max(given)
            return
        choices = [self.choices(x) for x in self.leaves]
        self.options = set.intersection(*choices) or choices[0]
        self.preferred = min(self.options)
        for kernel in self.kernels:
            # A stack with a bias of one axis before heads or axes of length one.
            order = ["exact", "several", "units"]
            if self.is_heads:
                order = ["several", "exact", "units"]
            ranked = [
                (min(order.index(form) for form, _ in fits), n)
                for n, fits in self.fits(kernel).items()
                if n in self.options
            ]
            if ranked:
                self.preferred = min(ranked)[1]

    def choices(self, leaf: _Leaf) -> set[int]:
        """The numbers of stacked axes that a leaf allows."""
        ndim, rank = len(leaf.shape), _equinox_rank(leaf.owner)
        anything = set(range(ndim + 1))
        if leaf.kind == "kernel":
            if rank is not None:
                return {max(ndim - rank, 0)}
            if self.attention is not None:
                return {max(ndim - self.attention, 0)}
            return (
                set(self.fits(leaf))
                or self.pair_of_lora(leaf)
                or set(range(max(ndim - 1, 1)))
            )
        if leaf.kind == "embedding":
            table = leaf.part == "embedding" and leaf.stem == (None, None)
            if rank is not None or (table and ndim >= 2):
                return {max(ndim - 2, 0)}
            return anything
        if leaf.kind in ("gain", "offset") and rank is not None:
            return {max(ndim - rank, 0)}
        if leaf.kind in ("gain", "offset") and ndim:
            # One axis, and axes of length one around it, as in Haiku's BatchNorm.
            long = [i for i, length in enumerate(leaf.shape) if length != 1]
            return set(range(long[-2] + 1 if len(long) > 1 else 0, ndim))
        return anything

    def pair_of_lora(self, leaf: _Leaf) -> set[int]:
        """Where ``(in, r)`` and ``(r, out)`` share ``r``."""
        a, b = (
            next((x for x in self.kernels if x.word.endswith(f"lora_{end}")), None)
            for end in "ab"
        )
        if a is None or b is None or leaf not in (a, b):
            return set()
        most = min(len(a.shape), len(b.shape)) - 1
        return {
            n
            for n in range(max(most, 0))
            if a.shape[:n] == b.shape[:n] and a.shape[-1] == b.shape[n]
        }

    def ends(self, kernel: _Leaf) -> set[str]:
        """The end that counts the outputs, if shapes tell it."""
        found = {
            "first" if axes == (kernel.stack,) else "last"
            for _, axes in self.fits(kernel).get(kernel.stack, [])
            if len(axes) == 1
        }
        return found if len(found) == 1 and kernel.exact != "kernel" else set()

    def count_units(self, otherwise: str | None) -> None:
        """Finds the axes of output units; needs the numbers of stacked axes."""
        for leaf in self.leaves:
            n, ndim = leaf.stack, len(leaf.shape)
            leaf.output = (ndim - 1,) if ndim - n > 1 else ()
            if ndim - n <= 1 or leaf.kind not in ("kernel", None):
                continue
            heads = self.attention is not None and self.is_heads
            axes = [axes for _, axes in self.fits(leaf).get(n, [])]
            if "lora" in leaf.word:
                is_b = leaf.word.endswith("b")
                leaf.output = tuple(range(n + 1, ndim)) if is_b else (ndim - 1,)
            elif heads:
                leaf.output = (ndim - 2, ndim - 1)
            elif len(set(axes)) == 1:
                leaf.output = axes[0]
            elif leaf.owner is not None:
                leaf.output = (n,)
            elif leaf.exact != "kernel":
                leaf.unsure += ["output"] * (otherwise is None)
                leaf.output = (n,) if otherwise == "first" else (ndim - 1,)


def _groups(leaves: list[_Leaf]) -> list[_Group]:
    """Leaves of one module, and of one prefix or number if there are such."""
    found: dict[Any, list[_Leaf]] = {}
    for i, leaf in enumerate(leaves):
        layer = leaf.kind in ("kernel", "bias", "gain", "offset")
        key = (leaf.module, leaf.stem) if layer else (leaf.module, i)
        found.setdefault(key, []).append(leaf)
    # A kernel and a bias with different ones, as weight_ih and bias, belong together.
    merged: dict[Any, list[_Leaf]] = {}
    for (module, stem), group in found.items():
        kinds = {x.kind for x in group}
        lone = len(kinds) == 1 and kinds & {"kernel", "bias"}
        at = (
            module if lone and not any(x.is_position for x in group) else (module, stem)
        )
        merged.setdefault(at, []).extend(group)
    return [_Group(group) for group in merged.values()]


def _read_attention(groups: list[_Group]) -> None:
    """Kernels with axes for heads, which their names and shapes tell without biases."""
    kernels = {
        (*group.module[:-1], group.module[-1].lower()): group
        for group in groups
        if group.module
        and isinstance(group.module[-1], str)
        and [x.exact for x in group.kernels] == ["kernel"]
    }
    for (*layer, name), query in kernels.items():
        out = kernels.get((*layer, "out"))
        if name != "query" or out is None:
            continue
        q, o = query.kernels[0].shape, out.kernels[0].shape
        fits = out.fits(out.kernels[0])
        if (
            len(q) == len(o) >= 3
            and q[-2:] == o[-3:-1]
            and (not fits or len(o) - 3 in fits)
        ):
            for part in ("query", "key", "value", "out"):
                if (group := kernels.get((*layer, part))) is not None:
                    group.attention = 3


def _settle(groups: list[_Group]) -> None:
    """Decides the numbers of stacked axes, from the root down."""

    def descend(groups: list[_Group], position: int, lifted: int) -> None:
        while _share_an_axis(groups, lifted > 0):
            lifted -= 1
            for group in groups:
                group.stack += 1
        below: dict[Any, list[_Group]] = {}
        for group in groups:
            if len(group.module) > position:
                below.setdefault(group.module[position], []).append(group)
        for name, inside in below.items():
            times = len(_LIFTED.findall(name)) if isinstance(name, str) else 0
            descend(inside, position + 1, times)

    descend(groups, 0, 0)
    for group in groups:
        later = {n for n in group.options if n >= group.stack}
        if later:
            group.stack = max(group.stack, _first(later, group.preferred))
        for leaf in group.leaves:
            given = leaf.given_stack
            leaf.stack = min(group.stack if given is None else given, len(leaf.shape))
            rest = len(leaf.shape) - leaf.stack
            longer = rest > 2 - len(group.biases) and leaf.shape[leaf.stack] > 1
            if len(later) > 1 and longer and given is None:
                leaf.unsure += ["stack"]


def _first(options: set[int], preferred: int) -> int:
    return preferred if preferred in options else min(options)


def _share_an_axis(groups: list[_Group], lifted: bool) -> bool:
    """Whether the next leading axis is one of stacked layers."""
    shapes = [leaf.shape for group in groups for leaf in group.leaves]
    depth = groups[0].stack if groups else 0
    lengths = {shape[depth] if len(shape) > depth else 1 for shape in shapes}
    if len(lengths) != 1 or lengths == {1}:
        return False
    needed, allowed = lifted, True
    for group in groups:
        more = max(group.options) > depth
        allowed &= more
        needed |= more and depth not in group.options
    return needed and allowed
