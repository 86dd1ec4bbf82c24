"""A leaf of the parameters: its path, its names, its shape, and finally its role."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
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


@dataclasses.dataclass(frozen=True)
class Role:
    """What a leaf is; itself a leaf, in a pytree like the parameters.

    Attributes:
      kind: ``"kernel"``, ``"bias"``, ``"embedding"``, ``"gain"`` and ``"offset"`` (the
        factor and the summand of a normalization layer), or ``"other"``.
      stack: the number of leading axes along which layers or networks are stacked.
      output: the axes of a kernel or an embedding that count its output units, from
        the first axis of the leaf on and without the stacked ones; empty for all
        other leaves, because each of them is one unit.
      unsure: the fields that names and shapes leave open, so that a default was taken:
        some of ``"kind"``, ``"stack"`` and ``"output"``. The comparison of two roles
        ignores it.
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
        """The axes of one output unit, or of one layer if there are no units."""
        return tuple(x for x in self.within_layer(ndim) if x not in self.output)


def path_names(path: Any) -> list[Any]:
    """The keys along a path: names of dict keys and attributes, and positions."""
    kinds = ("key", "name", "idx")
    names = [next((getattr(k, x) for x in kinds if hasattr(k, x)), k) for k in path]
    # Tuples are keys of flat dicts, as flax.traverse_util.flatten_dict makes them.
    names = [x for k in names for x in (k if isinstance(k, tuple) else (k,))]
    # The last key of an NNX variable, an attribute, belongs to its array.
    of_array = path and getattr(path[-1], "name", None) in ("value", "raw_value")
    return names[:-1] if of_array else names


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, joined by ``/``."""
    return dict(pairs(tree))


def pairs(tree: Any) -> list[tuple[str, Any]]:
    """The paths of the leaves, joined by ``/``, and the leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(map(str, path_names(path))), x) for path, x in leaves]


def split(names: list[Any]) -> Iterator[Any]:
    """The names; names in flat dicts are whole paths, and are split."""
    for name in names:
        if isinstance(name, str):
            yield from (x for x in re.split(r"[/.]", name) if x)
        else:
            yield name


def shape_of(leaf: Any) -> Shape:
    """Its shape; () for a leaf that is not an array, such as a function in a module."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


class Leaf:
    """A leaf while its role is being found."""

    def __init__(self, params: Any, path: Any, leaf: Any):
        names = tuple(split(path_names(path)))
        self.path, self.shape = names, shape_of(leaf)
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
        # A layer at a position of a list has the name of the list.
        called = [x for x in self.module if isinstance(x, str)]
        self.layer = called[-1].lower() if called else ""
        self.called = [self.layer, type(self.owner).__name__.lower()]
        self.called += [x for x in self.stem if x]
        self.in_norm = any(map(_NORM.search, self.called))

    @property
    def is_position(self) -> bool:
        """Whether it is known by its place in a list alone."""
        return bool(self.path) and not isinstance(self.name, str)

    def role(self) -> Role:
        """The role; if no name shows it, by the number of axes."""
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


def equinox_rank(owner: Any) -> int | None:
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
