"""The registry of methods, and the arguments that they share, written once.

All methods on the engine take the arguments of :func:`optax_sam.sharpness_aware`. A
method takes them as ``**options``, and :func:`method` writes them into its signature
and its docstring.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

import optax
from jax.typing import DTypeLike

from optax_sam.engine import sharpness_aware
from optax_sam.masks import Mask
from optax_sam.parts import When

Factory = TypeVar("Factory", bound=Callable[..., Any])

# The methods by name.
METHODS: dict[str, Callable[..., Any]] = {}


class _Shared(TypedDict, total=False):
    axis_name: Any
    ascent_dtype: DTypeLike | None


class WithoutWhen(_Shared, total=False):
    """The shared arguments of a method with a fixed rule for the steps."""

    mask: Mask


class WithoutMask(_Shared, total=False):
    """The shared arguments of a method with a fixed mask."""

    when: When


class Options(WithoutWhen, WithoutMask, total=False):
    """The arguments that methods on the engine share."""


def method(*sources: Callable[..., Any]) -> Callable[[Factory], Factory]:
    """Registers a function as a method, and completes its docstring.

    If the docstring does not describe an argument, the description comes from the first
    source that has one. ``Raises`` comes from there too, and ``Returns`` from the last
    source. ``**options`` stands for the keys of its ``TypedDict``, as the engine
    describes them.

    Args:
      *sources: the functions that the method is made of, documented in full; a method
        on the engine needs not name :func:`optax_sam.sharpness_aware`.

    Returns:
      A decorator. It does not change what the function does.
    """

    def decorate(factory: Factory) -> Factory:
        signature = _signature(factory)
        factory.__signature__ = signature  # type: ignore[attr-defined]
        factory.__doc__ = _docstring(factory, signature, (*sources, sharpness_aware))
        METHODS[factory.__name__] = factory
        return factory

    return decorate


def on_engine(
    name: str, options: Mapping[str, Any], **parts: Any
) -> optax.GradientTransformationExtraArgs:
    """The method with a name, made of its parts and of the shared arguments."""
    known = inspect.signature(METHODS[name]).parameters
    for key in options:
        if key not in known:
            raise TypeError(
                f"{name}() got an unexpected keyword argument {key!r}. Write one of"
                f" {', '.join(known)}."
            )
    return sharpness_aware(name=name, **{**parts, **options})


def _signature(factory: Any) -> inspect.Signature:
    """The signature with the shared arguments in the place of ``**options``."""
    own = inspect.signature(factory)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(parameters) == len(own.parameters):
        return own
    kind = re.findall(r"\w+", factory.__annotations__.pop("options"))[-1]
    hints = typing.get_type_hints(globals()[kind])
    engine = inspect.signature(sharpness_aware).parameters
    for name in hints:
        parameters.append(engine[name].replace(kind=inspect.Parameter.KEYWORD_ONLY))
        factory.__annotations__[name] = hints[name]
    # In one order everywhere, also where a method has another default for one.
    last = [name for name in engine if name in typing.get_type_hints(Options)]
    parameters.sort(key=lambda p: last.index(p.name) if p.name in last else -1)
    return own.replace(parameters=parameters)


_TITLE = re.compile(r"^([A-Z][\w' ]*):\n(?=  \S)", re.MULTILINE)


def _sections(function: Any) -> dict[str, str]:
    """The sections of a docstring by their titles, in order; the text before is ''."""
    text, *rest = _TITLE.split(inspect.cleandoc(function.__doc__) + "\n")
    return {"": text} | dict(zip(rest[::2], rest[1::2], strict=True))


def _arguments(section: str) -> dict[str, str]:
    """The text of a section ``Args`` for each argument, by its name."""
    entries = re.split(r"^(?=  \S)", section, flags=re.MULTILINE)
    return {x.split(":")[0].strip(): x.rstrip() for x in entries if x.strip()}


def _docstring(factory: Any, signature: Any, sources: tuple[Any, ...]) -> str:
    own = _sections(factory)
    others = [_sections(source) for source in sources]
    known = [_arguments(x.pop("Args", "")) for x in (own, *others)]
    args = [next(x[name] for x in known if name in x) for name in signature.parameters]
    written = {"": own.pop(""), "Args": "\n".join(args) + "\n"}
    for title, found in (("Returns", others[::-1]), ("Raises", others)):
        written[title] = own.pop(title, "") or next(
            x[title] for x in found if title in x
        )
    parts = ((title, text.rstrip("\n")) for title, text in (written | own).items())
    return "\n\n".join(f"{title}:\n{text}" if title else text for title, text in parts)
