"""What each leaf of the parameters is: a kernel, a bias, a gain, or else.

Everything here reads names, containers and shapes. It computes nothing, so that it
works on arrays, tracers and ``jax.ShapeDtypeStruct`` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from optax_sam.roles.kinds import name_kinds, override
from optax_sam.roles.leaves import (
    Kind,
    Leaf,
    pairs,
    shape_of,
)
from optax_sam.roles.leaves import (
    Role as Role,
)
from optax_sam.roles.leaves import (
    named_leaves as named_leaves,
)
from optax_sam.roles.leaves import (
    path_names as path_names,
)
from optax_sam.roles.stacks import groups_of, read_attention, settle
from optax_sam.trees import mapped


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
      In tuples and lists, the leaf after a kernel is its bias if it fits the outputs.
    - Output units are counted where the bias fits the kernel: along several axes in
      Flax's attention, along the first one in Equinox. If both ends fit, or there is no
      bias, they are counted along the last axis, in Equinox along the first one. If no
      library fixes the names, the other layers decide.
    - Layers are stacked (``nn.scan``, ``nnx.vmap``, ``eqx.filter_vmap``, an ensemble)
      in the largest part of the pytree whose leaves share their first axis. This part
      must have a leaf that only a stack explains, such as a gain of two axes or a bias
      ``(L, out)`` beside a kernel ``(L, in, out)``, and no leaf that contradicts a
      stack. Kernels alone are not enough: a leaf with three axes may be a convolution,
      and is taken as one kernel. Only leading axes are read as stacks.

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
        stacked, or a value is not allowed.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> params = {"scale": {"kernel": jnp.ones((6, 3, 4)), "bias": jnp.ones((6, 4))}}
      >>> found = optax_sam.roles(params)["scale"]
      >>> print(found["bias"].kind, found["bias"].stack, found["kernel"].output)
      bias 1 (2,)
    """
    found, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [Leaf(params, path, x) for path, x in found]
    if output not in (None, "first", "last"):
        raise ValueError(f'output must be "first", "last" or None; got {output!r}.')
    override(leaves, stacked, kinds)
    name_kinds(leaves)
    groups = groups_of(leaves)
    read_attention(groups)
    for group in groups:
        group.find_options()
    settle(groups)
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
    for (path, x), role in zip(pairs(params), found, strict=True):
        mark = lambda text, field, role=role: f"{text}{'?' * (field in role.unsure)}"
        units = ", ".join(map(str, role.output))
        lines.append(
            (
                path or "the root",
                str(shape_of(x)),
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
        for path, x in pairs(subtree):
            axes = (role.stack - 1, *role.output)
            if max(axes) >= len(shape_of(x)):
                raise ValueError(
                    f"{role} must not name axis {max(axes)} of a leaf of shape"
                    f" {shape_of(x)} at {path or 'the root'}"
                )
        return jax.tree.map(lambda _: role, subtree)

    try:
        return jax.tree.map(fill, given, params, is_leaf=lambda x: isinstance(x, Role))
    except ValueError as error:
        raise ValueError(f"{advice}: {error}.") from error


def by_layer(function: Callable[..., Any], role: Role) -> Callable[..., Any]:
    """Maps a function of whole leaves over the layers that are stacked in them."""
    return mapped(function, role.stack)


def is_weight(role: Role) -> bool:
    """Whether ASAM adapts the leaf: what PyTorch calls ``weight``."""
    return role.kind in ("kernel", "embedding", "gain")
