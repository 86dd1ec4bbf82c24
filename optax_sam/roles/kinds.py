"""What kind each leaf is, from its name and from the leaves beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optax_sam.roles.leaves import (
    KINDS,
    Kind,
    Leaf,
    Shape,
    equinox_rank,
    split,
)

_TABLE = re.compile(r"embed|(?:^|_)emb(?:_|\d|$)|^w[tp]e$|token|^cls$")


def override(leaves: list[Leaf], stacked: Any, kinds: Any) -> None:
    """Stores the choices of the user."""

    def apply(argument: str, given: Any, write: Callable[[Leaf, Any], None]) -> None:
        # Outer subtrees first, so that the innermost one counts.
        for path in sorted(given, key=lambda path: len(tuple(split([path])))):
            keys = tuple(map(str, split([path])))
            inside = [x for x in leaves if tuple(map(str, x.path))[: len(keys)] == keys]
            if not inside:
                have = ", ".join("/".join(map(str, x.path)) for x in leaves[:5])
                raise ValueError(
                    f"{argument} names {path!r}, where there is no leaf; choose from"
                    f" {have}{', ...' if len(leaves) > 5 else ''}."
                )
            for leaf in inside:
                write(leaf, given[path])

    def stack(leaf: Leaf, value: Any) -> None:
        name = "/".join(map(str, leaf.path)) or "the root"
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"stacked must hold integers; got {value!r} for {name}.")
        if not 0 <= value <= len(leaf.shape):
            raise ValueError(
                f"stacked says {value} leading axes for the leaf at {name}, which has"
                f" the shape {leaf.shape}; give at most as many as that."
            )
        leaf.given_stack = int(value)

    def kind(leaf: Leaf, value: Any) -> None:
        if value not in KINDS:
            raise ValueError(f"kinds must hold some of {KINDS}; got {value!r}.")
        leaf.kind = value

    if stacked is not None:
        by_path = stacked if isinstance(stacked, Mapping) else {"": stacked}
        apply("stacked", by_path, stack)
    apply("kinds", kinds or {}, kind)


def name_kinds(leaves: list[Leaf]) -> None:
    """Finds the kinds of leaves that names or neighbours show."""
    modules: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        modules.setdefault(leaf.module, []).append(leaf)
    for module in modules.values():
        others = lambda leaf, module=module: [x for x in module if x is not leaf]
        for leaf in module:  # kernels and embeddings first: the rest depends on them
            if leaf.kind is None:
                leaf.kind = _weight_kind(leaf, others(leaf))
        for kinds in (_gain_kind, _summand_kind):
            for leaf in module:
                if leaf.kind is None:
                    leaf.kind = kinds(leaf, others(leaf))
        _name_positions([x for x in module if x.is_position and x.kind is None])


def beside(leaf: Leaf, others: list[Leaf], *kinds: str) -> list[Leaf]:
    """The others of some kinds, with the leaf's prefix and number if there are any."""
    found = [x for x in others if x.kind in kinds]
    return [x for x in found if x.stem == leaf.stem] or found


def _weight_kind(leaf: Leaf, others: list[Leaf]) -> Kind | None:
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
    rank = equinox_rank(leaf.owner)
    if rank is None and (affine or leaf.in_norm) and not _fits_any(leaf, biases):
        return "gain"
    if rank is not None and "Norm" in type(leaf.owner).__name__:
        return "gain"
    is_table = not biases and any(map(_TABLE.search, leaf.called))
    return "embedding" if is_table else "kernel"


def _fits_any(kernel: Leaf, biases: list[Leaf]) -> bool:
    return any(
        x.shape != kernel.shape and len(kernel.shape) > 1 and fitting(kernel, x)
        for x in biases
    )


def _gain_kind(leaf: Leaf, others: list[Leaf]) -> Kind | None:
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


def _summand_kind(leaf: Leaf, others: list[Leaf]) -> Kind | None:
    if leaf.part not in ("bias", "offset"):
        return None
    kernels = beside(leaf, others, "kernel")
    gains = beside(leaf, others, "gain")
    near = any(x.stem == leaf.stem for x in gains)
    if kernels and not (near and not any(x.stem == leaf.stem for x in kernels)):
        if leaf.exact != "b" or len(leaf.shape) < 2:
            return "bias"
        size = math.prod(leaf.shape)
        units = {n for x in kernels for n in (x.shape[-1:], x.shape[:1])}
        fits = (size,) in units or any(fitting(x, leaf) for x in kernels)
        return "bias" if fits else None
    if gains or leaf.in_norm:
        return "offset"
    if leaf.part == "offset":
        return "offset" if leaf.exact == "offset" else None
    return "bias" if leaf.exact != "b" or len(leaf.shape) < 2 else None


def _name_positions(leaves: list[Leaf]) -> None:
    """In a tuple or a list, a kernel's bias comes after it."""
    kernel = None
    for leaf in leaves:
        forms = set()
        if kernel is not None:
            fits = fitting(kernel, leaf).values()
            forms = {form for readings in fits for form, _ in readings}
        if kernel is not None and forms - {"several"}:
            kernel.kind, leaf.kind, leaf.stem = "kernel", "bias", kernel.stem
        elif len(leaf.shape) > 1:
            kernel = leaf
            leaf.stem = ("position", str(leaf.name))


def fitting(kernel: Leaf, bias: Leaf) -> dict[int, list[tuple[str, Shape]]]:
    """For each number of stacked axes, the outputs of the kernel that the bias fits.

    The text says how it fits: ``"exact"``, one axis; ``"several"``, such as heads;
    ``"units"``, with axes of length one, as in Haiku's and Equinox's convolutions.
    """
    rank = equinox_rank(kernel.owner)
    found = {}
    for n in range(min(len(kernel.shape), len(bias.shape) + 1)):
        if kernel.shape[:n] != bias.shape[:n]:
            break
        if rank is None or len(kernel.shape) - n == rank:
            fits = _outputs(kernel.shape[n:], bias.shape[n:])
            found[n] = [(form, tuple(x + n for x in axes)) for form, axes in fits]
    # Rare readings count only if nothing else fits: stacked kernels of one axis, each
    # with a number as its bias, and outputs that do not come last in Flax.
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
