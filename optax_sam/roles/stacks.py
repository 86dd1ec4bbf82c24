"""Which axes of a leaf count stacked layers, and which output units, from shapes."""

from __future__ import annotations

import re
from typing import Any

from optax_sam.roles.kinds import fitting
from optax_sam.roles.leaves import (
    Leaf,
    Shape,
    equinox_rank,
)

_HEADS = re.compile(r"q|k|v|kv|qkv|query|key|value")


# Linen puts this before the name of a module, once for each nn.scan or nn.vmap.
_LIFTED = re.compile(r"Scan(?=[A-Z])|Vmap(?=[A-Z])")


class Group:
    """Leaves of one layer, which are stacked together or not at all."""

    def __init__(self, leaves: list[Leaf]):
        self.leaves = leaves
        self.module = leaves[0].module
        self.kernels = [x for x in leaves if x.kind == "kernel"]
        self.biases = [x for x in leaves if x.kind == "bias"]
        self.is_heads = bool(_HEADS.fullmatch(leaves[0].layer))
        self.attention: int | None = None  # axes of its kernels, if they are known
        self.options: set[int] = set()  # possible numbers of stacked axes
        self.preferred = 0
        self.stack = 0

    def fits(self, kernel: Leaf) -> dict[int, list[tuple[str, Shape]]]:
        """All readings of a kernel, with the biases that fit it in some reading."""
        fits = [x for x in (fitting(kernel, bias) for bias in self.biases) if x]
        return {
            n: [fit for x in fits for fit in x[n]]
            for n in range(len(kernel.shape))
            if fits and all(n in x for x in fits)
        }

    def find_options(self) -> None:
        """Finds how many leading axes may be stacked, and which number is likely."""
        given = {x.given_stack for x in self.leaves if x.given_stack is not None}
        if given:
            self.options, self.preferred = given, max(given)
            return
        choices = [self.choices(x) for x in self.leaves]
        self.options = set.intersection(*choices) or choices[0]
        self.preferred = min(self.options)
        for kernel in self.kernels:
            # A stack with a bias of one axis goes before heads or axes of length one.
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

    def choices(self, leaf: Leaf) -> set[int]:
        """The numbers of stacked axes that a leaf allows."""
        ndim, rank = len(leaf.shape), equinox_rank(leaf.owner)
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

    def pair_of_lora(self, leaf: Leaf) -> set[int]:
        """The numbers of stacked axes with which both matrices of LoRA share ``r``."""
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

    def ends(self, kernel: Leaf) -> set[str]:
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


def groups_of(leaves: list[Leaf]) -> list[Group]:
    """Leaves of one module, and of one prefix or number if there are any."""
    found: dict[Any, list[Leaf]] = {}
    for i, leaf in enumerate(leaves):
        layer = leaf.kind in ("kernel", "bias", "gain", "offset")
        key = (leaf.module, leaf.stem) if layer else (leaf.module, i)
        found.setdefault(key, []).append(leaf)
    # weight_ih and bias have different prefixes, but belong together.
    merged: dict[Any, list[Leaf]] = {}
    for (module, stem), group in found.items():
        kinds = {x.kind for x in group}
        lone = len(kinds) == 1 and kinds & {"kernel", "bias"}
        at = (
            module if lone and not any(x.is_position for x in group) else (module, stem)
        )
        merged.setdefault(at, []).extend(group)
    return [Group(group) for group in merged.values()]


def read_attention(groups: list[Group]) -> None:
    """Finds kernels with axes for heads by names and shapes, without biases."""
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


def settle(groups: list[Group]) -> None:
    """Decides the numbers of stacked axes, from the root down."""

    def descend(groups: list[Group], position: int, lifted: int) -> None:
        while _share_an_axis(groups, lifted > 0):
            lifted -= 1
            for group in groups:
                group.stack += 1
        below: dict[Any, list[Group]] = {}
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


def _share_an_axis(groups: list[Group], lifted: bool) -> bool:
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
