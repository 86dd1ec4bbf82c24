"""How functions are shown: defaults and types in the words of the source."""

import inspect
import re
from types import SimpleNamespace

from sphinx.ext.autodoc.preserve_defaults import update_defvalue

import optax_sam

# An argument or attribute in a docstring, without a type of its own.
ENTRY = re.compile(r"  (\w+): ")


def defaults_as_written(_app, obj, bound):
    """Show defaults as the source has them, also where a decorator wrote them in."""
    preserving = SimpleNamespace(config=SimpleNamespace(autodoc_preserve_defaults=True))
    whole = vars(obj).get("__signature__") if inspect.isfunction(obj) else None
    if whole and obj.__name__ not in optax_sam.method.METHODS:
        return  # put together from two functions, with plain values for defaults
    if whole:
        del obj.__signature__
    update_defvalue(preserving, obj, bound)
    if whole:
        update_defvalue(preserving, optax_sam.sharpness_aware, False)
        known = dict(inspect.signature(optax_sam.sharpness_aware).parameters)
        known |= inspect.signature(obj).parameters
        written = lambda x: known.get(x.name, x).default
        parameters = [x.replace(default=written(x)) for x in whole.parameters.values()]
        obj.__signature__ = whole.replace(parameters=parameters)


def short_defaults(_app, _what, _name, _obj, _options, signature, returned):
    """Show a function that is a default by its name, and a lambda by dots."""
    if signature:
        signature = re.sub(r"<function (?:\w+\.)*<lambda>>", "...", signature)
        signature = re.sub(r"<function (?:\w+\.)*(\w+)>", r"\1", signature)
        return signature, returned
    return None


def types(obj):
    """The annotations of arguments and attributes, as the source has them."""
    found = {}
    for kind in reversed(obj.__mro__) if inspect.isclass(obj) else [obj]:
        found |= inspect.get_annotations(kind)
    if callable(obj) and not inspect.isclass(obj):
        parameters = inspect.signature(obj).parameters.values()
        found = {p.name: p.annotation for p in parameters}
    texts = {name: getattr(x, "__forward_arg__", x) for name, x in found.items()}
    # Without the modules of ours, which the source imports whole.
    short = lambda text: re.sub(r"\b(?!optax|jax)[a-z_]+\.(?=[A-Z])", "", text)
    return {name: short(x) for name, x in texts.items() if isinstance(x, str)}


def with_types(_app, _what, _name, obj, _options, lines):
    """Write them into the docstring, before it is read."""
    if not callable(obj):
        return
    known, title = types(obj), ""
    for i, line in enumerate(lines):
        title = line if re.fullmatch(r"\w[\w' ]*:", line) else title
        entry = ENTRY.match(line)
        if title in ("Args:", "Attributes:") and entry and entry[1] in known:
            lines[i] = f"  {entry[1]} (``{known[entry[1]]}``): {line[entry.end() :]}"


def skip_tuple_fields(_app, _what, _name, obj, skip, _options):
    """Leave out NamedTuple fields: the class docstring documents them."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field")


def setup(app):
    """Register the functions above; types are for napoleon, which comes at 500."""
    app.connect("autodoc-before-process-signature", defaults_as_written)
    app.connect("autodoc-process-signature", short_defaults)
    app.connect("autodoc-process-docstring", with_types, priority=400)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    return {"parallel_read_safe": True}
