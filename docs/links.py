"""Inline code that names something public links to its documentation.

So the pages need no roles, which GitHub would show as they are written.
"""

import re
from pydoc import locate

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

# A name, perhaps with the package and with arguments.
NAME = re.compile(r"(optax_sam\.)?(\w+(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)
# Their functions are named as the frameworks' own: only with the package are they ours.
FRAMEWORKS = "linen.", "nnx.", "equinox."


class Links(SphinxPostTransform):
    """Puts such code into a reference, and warns of a name that there is not."""

    default_priority = 5

    def run(self, **kwargs):
        """Goes through a page."""
        elsewhere = nodes.reference | nodes.title | pending_xref
        for code in [*self.document.findall(nodes.literal)]:
            found = NAME.fullmatch(code.astext())
            if found and not isinstance(code.parent, elsewhere):
                self.link(code, whole=bool(found[1]), name=found[2])

    def link(self, code, whole, name):
        """Links one name."""
        target = self.env.domains.python_domain.objects.get(f"optax_sam.{name}")
        foreign = name.startswith(FRAMEWORKS)
        if target and (whole or not (target.objtype == "module" or foreign)):
            here = self.env.current_document.docname
            place = here, target.docname, target.node_id
            code.replace_self(make_refnode(self.app.builder, *place, code.deepcopy()))
        elif whole and locate(f"optax_sam.{name}") is None:
            logging.getLogger(__name__).warning(
                f"There is no optax_sam.{name}.", location=code
            )


def setup(app):
    """Registers it."""
    app.add_post_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
