"""Finds the leaves of pairs, reads them as matrices, and writes them back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.roles import named_leaves
from optax_sam.sharpness.gl_pairs import ATTENTION, GLBlock, GLPair, describe


class Located(NamedTuple):
    """A pair whose leaves were found and fit each other.

    Attributes:
      G: the blocks of the left factor, with the shapes in which they are read.
      H: the blocks of the right factor.
      number: the number of pairs.
    """

    G: tuple[GLBlock, ...]
    H: tuple[GLBlock, ...]
    number: int

    def read(self, leaves: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Both factors, ``(number, n, h)`` and ``(number, m, h)``."""

        def rows(block: GLBlock) -> jax.Array:
            x = leaves[block.path].reshape(_whole(block))[_place(block)]
            x = x.transpose(_order(block))
            return x.reshape(self.number, -1, x.shape[-1])

        both = ([rows(x) for x in blocks] for blocks in (self.G, self.H))
        G, H = (jnp.concatenate(x, axis=1) for x in both)
        return G, H

    def write(
        self, G: jax.Array, H: jax.Array, leaves: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The leaves with these factors in their places."""
        leaves = dict(leaves)
        for blocks, matrix in ((self.G, G), (self.H, H)):
            sizes = [_size(x) // (self.number * G.shape[-1]) for x in blocks]
            parts = jnp.split(matrix, np.cumsum(sizes)[:-1], axis=1)
            for block, part in zip(blocks, parts, strict=True):
                old, order = leaves[block.path], _order(block)
                x = part.reshape([_shape(block)[i] for i in order])
                x = x.transpose(np.argsort(order)).astype(old.dtype)
                whole = old.reshape(_whole(block)).at[_place(block)].set(x)
                leaves[block.path] = whole.reshape(old.shape)
        return leaves


def locate(gl_pairs: Sequence[GLPair], params: Any, w: Any) -> list[Located]:
    """Finds the leaves of all pairs, and checks that they make valid pairs.

    Args:
      gl_pairs: the descriptions.
      params: all parameters.
      w: the chosen parameters; pairs that are left out as a whole are dropped.
    """
    if not (
        isinstance(gl_pairs, (list, tuple))
        and not isinstance(gl_pairs, GLPair)
        and all(isinstance(x, GLPair) for x in gl_pairs)
    ):
        raise ValueError(
            "gl_pairs must be a list of what sharpness.gl_pair or"
            " sharpness.attention_gl_pairs returns (several layers: add their lists);"
            f" got {gl_pairs!r}."
        )
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    chosen = named_leaves(w)
    taken: dict[str, np.ndarray] = {}
    located = []
    for pair in gl_pairs:
        pair = GLPair(*(tuple(_find(x, shapes) for x in side) for side in pair))
        paths = [x.path for side in pair for x in side]
        for block in (x for side in pair for x in side):
            places = np.zeros(_whole(block), bool)
            places[_place(block)] = True
            before = taken.setdefault(block.path, np.zeros(places.size, bool))
            if (before & places.ravel()).any():
                raise ValueError(
                    f"{block.path} is in gl_pairs twice. An entry can be in one pair"
                    " only, because a second pair takes symmetries away from the first."
                    " Leave one pair out, or name a part of the leaf: GLBlock(part=)."
                )
            before |= places.ravel()
        inside = [x for x in paths if x in chosen]
        if inside and len(inside) < len(paths):
            absent = [x for x in paths if x not in chosen]
            raise ValueError(
                f"The mask cuts a pair: it selects {inside[0]} but not {absent[0]}."
                " Select all leaves of a pair or none. Or take the pair out of"
                " gl_pairs: its leaves then count one by one."
            )
        fitted = _fit(pair)
        located += [fitted] * bool(inside)
    return located


def _find(block: GLBlock, shapes: dict[str, tuple[int, ...]]) -> GLBlock:
    """The block with the shape in which it is read."""
    if block.path not in shapes:
        raise ValueError(
            f"gl_pairs names {block.path!r}, and there is no such parameter;"
            f" {describe(shapes)} Write the path of one, such as 'layer/kernel'."
        )
    own = shapes[block.path]
    try:
        as_read = np.empty(own, np.bool_).reshape(block.shape or own).shape
    except ValueError:
        raise ValueError(
            f"{block.path} has shape {own}, and cannot be read as {block.shape}. Give a"
            " shape of the same size: GLBlock(path, rank_axis, head_axis, shape)."
        ) from None
    axes = [block.rank_axis, *_heads(block)]
    inside = all(-len(as_read) <= x < len(as_read) for x in axes)
    if not inside or len({x % len(as_read) for x in axes}) < len(axes):
        raise ValueError(
            f"{block.path} has shape {as_read}, where rank_axis={block.rank_axis} and"
            f" head_axis={block.head_axis} must be two different axes. Give"
            " GLBlock(path, rank_axis, head_axis). For a leaf with fewer axes, add"
            " shape=(n, h), the shape in which to read it."
        )
    if not _heads(block) and block.shape is None and len(own) == 2:
        module = block.path.split("/")[-2:][0]
        if module in ATTENTION:
            raise ValueError(
                f"{block.path} has shape {own} and the name of an attention layer's"
                " matrix, in which each head is a separate pair. Say how many: "
                "attention_gl_pairs(params, path, num_heads=8), or GLBlock(path,"
                " rank_axis, head_axis, shape=(d, heads, k)). For a single head give"
                f" shape={own}."
            )
    return block._replace(shape=as_read)


def _fit(pair: GLPair) -> Located:
    """The pair, with the number of pairs that it describes."""

    def sizes(block: GLBlock) -> tuple[int, int]:
        shape = _shape(block)
        heads = math.prod(shape[x] for x in _heads(block))
        return heads, shape[block.rank_axis]

    blocks = pair.G + pair.H
    described = ", ".join(
        f"{x.path} {_shape(x)}: {heads} of h = {h}"
        for x, (heads, h) in ((x, sizes(x)) for x in blocks)
    )
    heads, ranks = zip(*map(sizes, blocks), strict=True)
    number, h = min(heads), ranks[0]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"The blocks of a pair must have one number h of columns, over which G H'"
            f" sums, but these are {described}. A matrix that multiplies from the"
            " right, as B in x @ A @ B, is H' and not H: write"
            " gl_pair('A', GLBlock('B', rank_axis=0))."
        )
    if 0 in (number, h) or any(x % number for x in heads):
        raise ValueError(
            "The numbers of heads in a pair must be multiples of the smallest one, and"
            f" not 0, but these are {described}."
        )
    for name, side in (("G", pair.G), ("H", pair.H)):
        rows = sum(map(_size, side)) // (number * h)
        if rows < h:
            raise ValueError(
                f"{name} has {rows} rows and {h} columns. With more columns than rows,"
                f" the columns of a factor depend on each other: {described}."
                " Check rank_axis, or leave this pair out."
            )
    return Located(*pair, number)


def _whole(block: GLBlock) -> tuple[int, ...]:
    assert block.shape is not None  # locate has set it
    return block.shape


def _place(block: GLBlock) -> tuple[slice, ...]:
    """The entries of the block in the leaf, in the shape in which the leaf is read."""
    places = [slice(None)] * len(_whole(block))
    if block.part is not None:
        axis, start, stop = block.part
        places[axis] = slice(start, stop)
    return tuple(places)


def _shape(block: GLBlock) -> tuple[int, ...]:
    at = zip(_place(block), _whole(block), strict=True)
    return tuple(len(range(*place.indices(n))) for place, n in at)


def _size(block: GLBlock) -> int:
    return math.prod(_shape(block))


def _heads(block: GLBlock) -> tuple[int, ...]:
    axes = block.head_axis
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _order(block: GLBlock) -> list[int]:
    """The axes: heads, rows, rank."""
    number = len(_shape(block))
    rank = block.rank_axis % number
    head = [x % number for x in _heads(block)]
    return [*head, *(i for i in range(number) if i not in (*head, rank)), rank]
