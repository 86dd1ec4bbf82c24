"""Pairs of matrices that a network knows only by their product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_sam.roles import named_leaves


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


Factor = str | GLBlock | list[str | GLBlock]


def gl_pair(G: Factor, H: Factor) -> GLPair:
    r"""Names two matrices that enter the network only through their product.

    .. math::
      G H', \qquad G \in \mathbb{R}^{n \times h}, \; H \in \mathbb{R}^{m \times h}

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
    single = not isinstance(factor, list)
    parts = (factor,) if single else tuple(factor)
    if not parts or not all(isinstance(x, (str, GLBlock)) for x in parts):
        raise ValueError(
            f"{name} must be the path of a leaf, such as 'layer/kernel', a"
            f" sharpness.GLBlock, or a list of these; got {factor!r}."
        )
    return tuple(GLBlock(x) if isinstance(x, str) else x for x in parts)


def attention_gl_pairs(
    params: Any, path: str | Sequence[Any], *, qk: bool = True, vo: bool = True
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
      path: that of the layer, its keys joined by ``/`` or as a tuple; ``""`` if it is
        the whole.
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
    path = path if isinstance(path, str) else "/".join(map(str, path))
    prefix = f"{path}/" if path else ""
    wanted = ("query", "key") * qk + ("value", "out") * vo
    absent = [x for x in wanted if f"{prefix}{x}/kernel" not in shapes]
    if absent:
        end = "query/kernel" if qk else "value/kernel"
        found = [repr(x[: -len(end) - 1]) for x in shapes if x.endswith(end)]
        raise ValueError(
            f"There is no parameter {prefix}{absent[0]}/kernel, so no Flax attention"
            f" layer at {path!r}; "
            + (f"there is one at {', '.join(found)}." if found else describe(shapes))
            + " Describe other layers by sharpness.gl_pair."
        )
    normalized = [
        x for x in shapes if x.startswith((f"{prefix}query_ln", f"{prefix}key_ln"))
    ]
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


def describe(names: Any) -> str:
    """What parameters there are, for an error."""
    names = sorted(names)
    return f"there are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}."
