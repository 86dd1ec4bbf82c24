"""Pairs of matrices that a network knows only by their product, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam.ascent.masks import path_names


class GLBlock(NamedTuple):
    """Some rows of a factor of a pair: one leaf of the parameters, and how to read it.

    Attributes:
      path: the leaf's path, its keys joined by ``/``, as in ``"attention/out/kernel"``.
      rank_axis: the axis, of length ``h``, over which the product sums.
      head_axis: the axis along which there is one pair after the other, as the heads
        of an attention layer; ``None`` for a single pair. All further axes are rows.
      shape: the shape in which to read the leaf first, such as ``(d, heads, k)`` for a
        kernel ``(d, heads * k)``; ``None`` for its own.
    """

    path: str
    rank_axis: int = -1
    head_axis: int | None = None
    shape: tuple[int, ...] | None = None


class GLPair(NamedTuple):
    """Where one pair, or one for each head, lies in the parameters; see `gl_pair`.

    Attributes:
      G: the blocks of rows of the left factor.
      H: those of the right one.
    """

    G: tuple[GLBlock, ...]
    H: tuple[GLBlock, ...]


Factor = str | GLBlock | Sequence[str | GLBlock]


def gl_pair(G: Factor, H: Factor) -> GLPair:
    r"""Names two matrices that enter the network only through their product.

    .. math:: G H', \qquad G \in \mathbb{R}^{n \times h}, \; H \in \mathbb{R}^{m \times h}

    Each factor is a leaf, or several whose rows are stacked: a kernel and its bias, as
    the row that belongs to a constant input of 1. A leaf with more heads than the other
    factor has is stacked, too: in grouped-query attention, the query heads that share a
    key head, which are taken to stand next to each other.

    Args:
      G: the path of a leaf that has ``h`` as its last axis, a :class:`GLBlock` for any
        other, or a list of such.
      H: likewise. What multiplies from the right, ``x @ G @ B``, is ``H'``, so it is
        ``GLBlock("B", rank_axis=0)``.

    Returns:
      The pair's description, for :func:`geodesic_sharpness`.

    Raises:
      ValueError: if a factor is none of these. What depends on the parameters is
        checked where they are known, by :func:`geodesic_sharpness`.

    Examples:
      The two matrices of a LoRA layer, ``x @ lora_a @ lora_b``:

      >>> from optax_sam import sharpness
      >>> pair = sharpness.gl_pair(
      ...     "lora_a", sharpness.GLBlock("lora_b", rank_axis=0))
      >>> pair.G[0].path
      'lora_a'
    """
    return GLPair(_blocks("G", G), _blocks("H", H))


def _blocks(name: str, factor: Any) -> tuple[GLBlock, ...]:
    single = isinstance(factor, (str, GLBlock))
    parts = (factor,) if single else tuple(factor)
    if not parts or not all(isinstance(x, (str, GLBlock)) for x in parts):
        raise ValueError(
            f"{name} must be the path of a leaf, such as 'layer/kernel', a"
            f" sharpness.GLBlock, or a list of these; got {factor!r}."
        )
    return tuple(GLBlock(x) if isinstance(x, str) else x for x in parts)


def attention_gl_pairs(
    params: Any, path: str, *, qk: bool = True, vo: bool = True
) -> list[GLPair]:
    r"""The pairs of a Flax attention layer, one for each head, biases included.

    .. math:: \begin{bmatrix} W_q \\ b_q' \end{bmatrix}
       \begin{bmatrix} W_k \\ b_k' \end{bmatrix}', \qquad
       \begin{bmatrix} W_v \\ b_v' \end{bmatrix} W_o

    For Linen's ``MultiHeadDotProductAttention`` and NNX's ``MultiHeadAttention``, and
    what names and shapes its parameters as they do: kernels ``(d, heads, k)`` and
    biases ``(heads, k)`` of ``query``, ``key`` and ``value``, a kernel
    ``(heads, k, f)`` of ``out``, whose bias is in no pair. With fewer key and value
    heads than query heads, neighbours share one (grouped queries).

    Rotary position embeddings act between query and key, and break the symmetry of
    their product. They cannot be seen in the parameters: write ``qk=False`` there.

    Args:
      params: the parameters; only their paths and shapes are read.
      path: that of the layer, its keys joined by ``/``; ``""`` if it is the whole.
      qk: whether to take the query-key pairs.
      vo: whether to take the value-output pairs.

    Returns:
      A list of up to two descriptions, for :func:`geodesic_sharpness`; add the lists of
      several layers.

    Raises:
      ValueError: if no such layer is at ``path``, its shapes are others, or it
        normalizes queries or keys and ``qk`` is not False.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> kernel = {"kernel": jnp.ones((6, 2, 4))}
      >>> layer = {"query": kernel, "key": kernel, "value": kernel,
      ...          "out": {"kernel": jnp.ones((2, 4, 6))}}
      >>> pairs = sharpness.attention_gl_pairs({"attention": layer}, "attention")
      >>> [(x.G[0].path, x.H[0].path) for x in pairs]
      [('attention/query/kernel', 'attention/key/kernel'),
       ('attention/value/kernel', 'attention/out/kernel')]

    References:
      da Silva, Dangel, Oore, "Hide & Seek: Transformer Symmetries Obscure Sharpness &
      Riemannian Geometry Finds It", ICML 2025. arXiv:2505.05409
    """
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    prefix = f"{path}/" if path else ""
    wanted = ("query", "key") * qk + ("value", "out") * vo
    absent = [x for x in wanted if f"{prefix}{x}/kernel" not in shapes]
    if absent:
        end = "query/kernel" if qk else "value/kernel"
        found = [repr(x[: -len(end) - 1]) for x in shapes if x.endswith(end)]
        raise ValueError(
            f"There is no parameter {prefix}{absent[0]}/kernel, so no Flax attention"
            f" layer at {path!r}; "
            + (f"there is one at {', '.join(found)}." if found else _have(shapes))
            + " Describe other layers by sharpness.gl_pair."
        )
    normalized = [x for x in shapes if x.startswith((f"{prefix}query_ln", f"{prefix}key_ln"))]
    if qk and normalized:
        raise ValueError(
            f"The layer at {path!r} normalizes its queries and keys ({normalized[0]}),"
            " so it depends on more than their product: only its values and outputs"
            " are pairs. Write attention_gl_pairs(params, path, qk=False)."
        )
    for x in wanted:
        if len(shape := shapes[f"{prefix}{x}/kernel"]) != 3:
            raise ValueError(
                f"{prefix}{x}/kernel has shape {shape}, and Flax's would be"
                f" {'(heads, k, f)' if x == 'out' else '(d, heads, k)'}. Describe it by"
                " sharpness.gl_pair, with GLBlock(path, rank_axis, head_axis, shape)."
            )

    def rows(name: str) -> tuple[GLBlock, ...]:
        kernel = GLBlock(f"{prefix}{name}/kernel", rank_axis=2, head_axis=1)
        bias = GLBlock(f"{prefix}{name}/bias", rank_axis=1, head_axis=0)
        return (kernel, bias) if bias.path in shapes else (kernel,)

    out = GLBlock(f"{prefix}out/kernel", rank_axis=1, head_axis=0)
    pairs = [GLPair(rows("query"), rows("key"))] * qk
    return pairs + [GLPair(rows("value"), (out,))] * vo


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, joined by ``/``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(str, path_names(path))): x for path, x in leaves}


def _have(names: Any) -> str:
    names = sorted(names)
    return f"there are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."


class Located(NamedTuple):
    """A pair whose leaves have been found, and fit each other.

    Attributes:
      G: the blocks of the left factor, with the shapes in which they are read.
      H: those of the right one.
      number: how many pairs these are.
    """

    G: tuple[GLBlock, ...]
    H: tuple[GLBlock, ...]
    number: int

    def read(self, leaves: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Both factors, ``(number, n, h)`` and ``(number, m, h)``."""

        def rows(block: GLBlock) -> jax.Array:
            x = leaves[block.path].reshape(_shape(block))
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
            sizes = [leaves[x.path].size // (self.number * G.shape[-1]) for x in blocks]
            parts = jnp.split(matrix, np.cumsum(sizes)[:-1], axis=1)
            for block, part in zip(blocks, parts, strict=True):
                old, order = leaves[block.path], _order(block)
                x = part.reshape([_shape(block)[i] for i in order])
                x = x.transpose(np.argsort(order)).reshape(old.shape)
                leaves[block.path] = x.astype(old.dtype)
        return leaves


def locate(gl_pairs: Sequence[GLPair], params: Any, w: Any) -> list[Located]:
    """Finds the leaves of all pairs, and checks that they are what pairs must be.

    Args:
      gl_pairs: the descriptions.
      params: all parameters.
      w: the chosen ones among them; pairs that are left out as a whole are dropped.
    """
    if isinstance(gl_pairs, GLPair) or not all(isinstance(x, GLPair) for x in gl_pairs):
        raise ValueError(
            "gl_pairs must be a list of what sharpness.gl_pair or"
            " sharpness.attention_gl_pairs returns (several layers: add their lists);"
            f" got {gl_pairs!r}."
        )
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    chosen = named_leaves(w)
    taken: set[str] = set()
    located = []
    for pair in gl_pairs:
        pair = GLPair(*(tuple(_find(x, shapes) for x in side) for side in pair))
        paths = [x.path for side in pair for x in side]
        twice = [x for i, x in enumerate(paths) if x in taken or x in paths[:i]]
        if twice:
            raise ValueError(
                f"{twice[0]} is in gl_pairs twice. A leaf can be in one pair only, for"
                " its symmetries would not be those of each pair alone; leave one out."
            )
        taken.update(paths)
        inside = [x for x in paths if x in chosen]
        if inside and len(inside) < len(paths):
            absent = [x for x in paths if x not in chosen]
            raise ValueError(
                f"The mask cuts a pair: it selects {inside[0]} but not {absent[0]}."
                " Select all leaves of a pair or none, or take the pair out of"
                " gl_pairs, whose leaves then count one by one."
            )
        fitted = _fit(pair)
        located += [fitted] * bool(inside)
    return located


def _find(block: GLBlock, shapes: dict[str, tuple[int, ...]]) -> GLBlock:
    """The block with the shape in which it is read."""
    if block.path not in shapes:
        raise ValueError(
            f"gl_pairs names {block.path!r}, and there is no such parameter;"
            f" {_have(shapes)}"
        )
    own = shapes[block.path]
    try:
        as_read = np.empty(own, np.bool_).reshape(block.shape or own).shape
    except ValueError:
        raise ValueError(
            f"{block.path} has shape {own}, and cannot be read as {block.shape}."
        ) from None
    axes = [block.rank_axis] + [block.head_axis] * (block.head_axis is not None)
    inside = all(-len(as_read) <= x < len(as_read) for x in axes)
    if not inside or len({x % len(as_read) for x in axes}) < len(axes):
        raise ValueError(
            f"{block.path} has shape {as_read}, where rank_axis={block.rank_axis} and"
            f" head_axis={block.head_axis} must be two different axes. Give"
            " GLBlock(path, rank_axis, head_axis), or with shape=(n, h) the shape in"
            " which to read a leaf that has fewer."
        )
    return block._replace(shape=as_read)


def _fit(pair: GLPair) -> Located:
    """The pair with the number of pairs that it stands for."""

    def sizes(block: GLBlock) -> tuple[int, int]:
        shape = _shape(block)
        heads = 1 if block.head_axis is None else shape[block.head_axis]
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
    if number == 0 or any(x % number for x in heads):
        raise ValueError(
            "The numbers of heads in a pair must be multiples of the smallest one, but"
            f" these are {described}."
        )
    for name, side in (("G", pair.G), ("H", pair.H)):
        rows = sum(np.prod(_shape(x), dtype=int) for x in side) // (number * h)
        if rows < h:
            raise ValueError(
                f"{name} has {rows} rows and {h} columns; a factor cannot have more"
                f" columns than rows, for then they depend on each other: {described}."
                " Check rank_axis, or leave this pair out."
            )
    return Located(*pair, number)


def _shape(block: GLBlock) -> tuple[int, ...]:
    assert block.shape is not None  # as locate has left it
    return block.shape


def _order(block: GLBlock) -> list[int]:
    """The axes: heads, rows, rank."""
    number = len(_shape(block))
    rank = block.rank_axis % number
    head = [] if block.head_axis is None else [block.head_axis % number]
    return [*head, *(i for i in range(number) if i not in (*head, rank)), rank]
