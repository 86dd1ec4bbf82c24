"""Pairs of matrices that a network uses only as their product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam.roles import named_leaves, resolve_roles


class GLBlock(NamedTuple):
    """One leaf of the parameters, and how to read it as rows of a factor of a pair.

    Attributes:
      path: the leaf's path, its keys joined by ``/``, as in ``"attention/out/kernel"``.
      rank_axis: the axis, of length ``h``, over which the product sums.
      head_axis: the axis that counts the pairs, such as the heads of an attention
        layer, or several such axes, such as heads and stacked layers; ``None`` for a
        single pair. All other axes are rows.
      shape: the shape in which to read the leaf first, such as ``(d, heads, k)`` for a
        kernel ``(d, heads * k)``; ``None`` keeps its shape.
      part: ``(axis, start, stop)``, a part of the leaf in that shape, such as the
        queries in a kernel of queries, keys and values; ``None`` for all of it.
    """

    path: str
    rank_axis: int = -1
    head_axis: int | tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None


class GLPair(NamedTuple):
    """Where one pair, or one for each head, lies in the parameters; see `gl_pair`.

    Attributes:
      G: the blocks of rows of the left factor.
      H: the blocks of rows of the right factor.
    """

    G: tuple[GLBlock, ...]
    H: tuple[GLBlock, ...]


Factor = str | GLBlock | list[str | GLBlock]


def gl_pair(G: Factor, H: Factor) -> GLPair:
    r"""Names two matrices that enter the network only through their product.

    .. math::
      G H', \qquad G \in \mathbb{R}^{n \times h}, \; H \in \mathbb{R}^{m \times h}

    Each factor is a leaf, or several leaves whose rows are stacked. So a kernel goes
    with its bias, which is the row for a constant input of 1. If one factor has more
    heads than the other, its heads are stacked, too: in grouped-query attention, these
    are the query heads that share a key head. They must be next to each other.

    Args:
      G: the path of a leaf with ``h`` as its last axis, a :class:`GLBlock` for any
        other leaf, or a list of these.
      H: likewise. In ``x @ G @ B`` the matrix ``B`` is ``H'``, so write
        ``GLBlock("B", rank_axis=0)``.

    Returns:
      The pair's description, for :func:`geodesic_sharpness`.

    Raises:
      ValueError: if a factor has another type. :func:`geodesic_sharpness` checks the
        factors against the parameters.

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
    single = not isinstance(factor, list)
    parts = (factor,) if single else tuple(factor)
    if not parts or not all(isinstance(x, (str, GLBlock)) for x in parts):
        raise ValueError(
            f"{name} must be the path of a leaf, such as 'layer/kernel', a"
            f" sharpness.GLBlock, or a list of these; got {factor!r}."
        )
    return tuple(GLBlock(x) if isinstance(x, str) else x for x in parts)


# The names of an attention layer's matrices, after the path of the layer.
_NAMES = {
    "query": ("query", "q_proj", "q"),
    "key": ("key", "k_proj", "k"),
    "value": ("value", "v_proj", "v"),
    "out": ("out", "out_proj", "o_proj", "o", "proj", "../output/dense"),
    "fused": ("qkv", "qkv_proj", "in_proj"),
}
ATTENTION = {x for names in _NAMES.values() for x in names} - {"proj"}


def attention_gl_pairs(
    params: Any,
    path: str | Sequence[Any] | None = None,
    *,
    num_heads: int | None = None,
    qk: bool = True,
    vo: bool = True,
) -> list[GLPair]:
    r"""The pairs of attention layers, one for each head, biases included.

    .. math:: \begin{bmatrix} W_q \\ b_q' \end{bmatrix}
       \begin{bmatrix} W_k \\ b_k' \end{bmatrix}', \qquad
       \begin{bmatrix} W_v \\ b_v' \end{bmatrix} W_o

    It finds Linen's ``MultiHeadDotProductAttention``, NNX's ``MultiHeadAttention``, and
    other layers with such parameters: kernels ``(d, heads, k)`` and biases
    ``(heads, k)`` of ``query``, ``key`` and ``value`` (or ``q_proj``, ``k_proj``,
    ``v_proj``), and a kernel ``(heads, k, f)`` of ``out`` (``out_proj``, ``o_proj``).
    The bias of ``out`` is in no pair. Kernels with two axes, ``(d, heads * k)``, need
    ``num_heads``. One kernel ``qkv`` for all three has the heads of queries, keys and
    values one after the other. With fewer key and value heads than query heads,
    neighbours share one (grouped queries). Layers that are stacked in one leaf
    (``nn.scan``) are separate pairs.

    Rotary position embeddings act between query and key, and break the symmetry of
    their product. The parameters do not show them, so write ``qk=False``.

    Args:
      params: the parameters; only their paths and shapes are read.
      path: the path of the layer, its keys joined by ``/`` or as a tuple; ``""`` if
        ``params`` is the layer; ``None`` for all layers.
      num_heads: the number of query heads, for kernels with two axes.
      qk: whether to take the query-key pairs.
      vo: whether to take the value-output pairs.

    Returns:
      A list of up to two descriptions for each layer, for :func:`geodesic_sharpness`.

    Raises:
      ValueError: if no such layer is at ``path``, its shapes do not fit, it has no axis
        of heads and ``num_heads`` is missing, or it normalizes queries or keys and
        ``qk`` is not False.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> kernel = {"kernel": jnp.ones((6, 2, 4))}
      >>> layer = {"query": kernel, "key": kernel, "value": kernel,
      ...          "out": {"kernel": jnp.ones((2, 4, 6))}}
      >>> pairs = sharpness.attention_gl_pairs({"attention": layer})
      >>> [(x.G[0].path, x.H[0].path) for x in pairs]
      [('attention/query/kernel', 'attention/key/kernel'),
       ('attention/value/kernel', 'attention/out/kernel')]

    References:
      da Silva, Dangel, Oore, "Hide & Seek: Transformer Symmetries Obscure Sharpness &
      Riemannian Geometry Finds It", ICML 2025. arXiv:2505.05409
    """
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    stacks = [role.stack for role in jax.tree.leaves(resolve_roles(None, params))]
    layers = _Layers(shapes, dict(zip(shapes, stacks, strict=True)), num_heads)
    found = list(dict.fromkeys(x for x in map(layers.at, shapes) if x is not None))
    if path is not None:
        path = path if isinstance(path, str) else "/".join(map(str, path))
    if path not in (None, *found) or not found:
        raise ValueError(
            "There is no attention layer"
            + ("" if path is None else f" at {path!r}")
            + ", with kernels such as query/kernel and key/kernel; "
            + (
                f"there are some at {', '.join(map(repr, found))}."
                if found
                else describe(shapes)
            )
            + " Describe other layers by sharpness.gl_pair."
        )
    return [
        pair for x in found if path in (None, x) for pair in layers.pairs(x, qk, vo)
    ]


class _Layers(NamedTuple):
    """The attention layers among parameters of these shapes."""

    shapes: dict[str, tuple[int, ...]]
    stacks: dict[str, int]
    num_heads: int | None

    def at(self, kernel: str) -> str | None:
        """The layer that has this kernel of queries, or this fused kernel."""
        *above, module, leaf = ["", *kernel.split("/")]
        layer = "/".join(above[1:])
        if leaf != "kernel" or module not in _NAMES["query"] + _NAMES["fused"]:
            return None
        keys = [f"{layer}/{x}/kernel".lstrip("/") for x in _NAMES["key"]]
        fused = module in _NAMES["fused"]
        return layer if fused or any(x in self.shapes for x in keys) else None

    def name(self, layer: str, part: str) -> str:
        """The path of a module of a layer, without ``/kernel``."""
        for name in _NAMES[part]:
            parts = layer.split("/") if layer else []
            while name.startswith("../"):
                parts, name = parts[:-1], name[3:]
            if "/".join([*parts, name, "kernel"]) in self.shapes:
                return "/".join([*parts, name])
        return ""

    def pairs(self, layer: str, qk: bool, vo: bool) -> list[GLPair]:
        """The pairs of a layer."""
        normalized = [
            x for x in self.shapes
            for name in ("query_ln", "key_ln", "q_norm", "k_norm")
            if f"/{x}".startswith(f"/{layer}/{name}".replace("//", "/"))
        ]  # fmt: skip
        if qk and normalized:
            raise ValueError(
                f"The layer at {layer!r} normalizes its queries and keys"
                f" ({normalized[0]}), so it depends on more than their product: only"
                " its values and outputs are pairs. Write attention_gl_pairs(params,"
                f" {layer!r}, qk=False)."
            )
        query, out = self.name(layer, "query"), self.name(layer, "out")
        if not out and (vo or not query):
            raise ValueError(
                f"The layer at {layer!r} has no kernel of its outputs, called out,"
                " out_proj or o_proj. Describe it by sharpness.gl_pair."
            )
        first = f"{query or out}/kernel"
        stack = self.stacks[first]
        heads, k, _ = self._with_heads(first, int(bool(query)), self.num_heads)
        rows = lambda part: self._rows(layer, part, stack, heads, k)
        found = [GLPair(rows("query"), rows("key"))] if qk else []
        if not vo:
            return found
        shape = self._with_heads(f"{out}/kernel", 0, heads)[2]
        axes = tuple(range(stack + 1))
        last = GLBlock(
            f"{out}/kernel", rank_axis=stack + 1, head_axis=axes, shape=shape
        )
        return [*found, GLPair(rows("value"), (last,))]

    def _with_heads(
        self, path: str, before: int, heads: int | None
    ) -> tuple[int, int, tuple[int, ...]]:
        """The heads of a kernel, their width, and its shape with both."""
        shape, stack = self.shapes[path], self.stacks[path]
        at = stack + before
        if len(shape) == stack + 3:
            return shape[at], shape[at + 1], shape
        if len(shape) != stack + 2:
            raise ValueError(
                f"{path} has shape {shape}, and Flax's shape would be"
                f" {'(d, heads, k)' if before else '(heads, k, f)'}. Describe it by"
                " sharpness.gl_pair, with GLBlock(path, rank_axis, head_axis, shape)."
            )
        if heads is None or shape[at] % heads:
            raise ValueError(
                f"{path} has shape {shape}, without an axis of heads. Say how many"
                f" query heads there are, a divisor of {shape[at]}: num_heads=8."
            )
        k = shape[at] // heads
        return heads, k, (*shape[:at], heads, k, *shape[at + 1 :])

    def _rows(
        self, layer: str, part: str, stack: int, heads: int, k: int
    ) -> tuple[GLBlock, ...]:
        """The kernel and the bias of queries, keys or values, as blocks."""
        name, fused = self.name(layer, part), self.name(layer, "fused")
        blocks = []
        for leaf in ("kernel", "bias"):
            path = f"{name or fused}/{leaf}"
            if path not in self.shapes:
                continue
            shape = self.shapes[path]
            rows = shape[stack : stack + (leaf == "kernel")]
            number = math.prod(shape[stack:]) // (math.prod(rows) * k)
            place, at = None, stack + len(rows)
            if not name:
                # The heads of all queries, then of the keys, then of the values.
                own = (number - heads) // 2
                ends = {"query": (0, heads), "key": (heads, heads + own)}
                start, stop = ends.get(part, (heads + own, number))
                place = (at, start, stop)
            blocks.append(
                GLBlock(
                    path,
                    rank_axis=at + 1,
                    head_axis=(*range(stack), at),
                    shape=(*shape[:stack], *rows, number, k),
                    part=place,
                )
            )
        return tuple(blocks)


def lora_gl_pairs(params: Any) -> list[GLPair]:
    """The pairs of all LoRA layers, ``x @ lora_a @ lora_b``, also of stacked layers.

    Args:
      params: the parameters, with leaves called ``lora_a`` ``(in, r)`` and ``lora_b``
        ``(r, out)``, as NNX's are, or with modules of these names and a ``kernel``.

    Returns:
      A list of descriptions, for :func:`geodesic_sharpness`.

    Raises:
      ValueError: if there is no such leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_sam import sharpness
      >>> params = {"dense": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
      >>> [pair.H[0].path for pair in sharpness.lora_gl_pairs(params)]
      ['dense/lora_b']
    """
    shapes = {name: jnp.shape(x) for name, x in named_leaves(params).items()}
    found = []
    for path, shape in shapes.items():
        other = path.replace("lora_a", "lora_b").replace("lora_A", "lora_B")
        if other != path and other in shapes:
            stack = tuple(range(len(shape) - 2)) or None
            G = GLBlock(path, rank_axis=-1, head_axis=stack)
            found.append(GLPair((G,), (GLBlock(other, -2, stack),)))
    if not found:
        raise ValueError(
            f"There are no lora_a and lora_b; {describe(shapes)} Describe other pairs"
            " by sharpness.gl_pair."
        )
    return found


def describe(names: Any) -> str:
    """The parameters by name, for an error."""
    names = sorted(names)
    return f"there are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."
