"""Addresses in the package's metadata: those of the repository that builds it.

So a fork, or a repository that moves, has its own. Links of the README are relative,
which an index cannot follow, and are made absolute. Outside GitHub nothing is added.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def absolute(text: str, root: str, revision: str) -> str:
    """A page with links that lead somewhere from anywhere."""

    def link(found: re.Match) -> str:
        image, text, target = found.groups()
        kind = f"{'raw' if image else 'blob'}/{revision}/"
        if target.startswith("../../"):  # what GitHub has beside the files
            kind, target = "", target.removeprefix("../../")
        return f"{image}[{text}]({root}/{kind}{target})"

    relative = r"\]\((?!https?:|#)([^)\s]+)\)"
    image = r"!\[[^]]*\]\([^)]*\)"
    text = re.sub(rf"(!)\[([^]]*){relative}", link, text)
    # A link may hold an image.
    return re.sub(rf"(?<!!)()\[((?:{image}|[^][])*){relative}", link, text)


class Addresses(MetadataHookInterface):
    """Fills in ``readme`` and ``urls``."""

    def update(self, metadata: dict) -> None:
        """Called by hatchling."""
        readme = Path(self.root, "README.md").read_text()
        if repository := os.environ.get("GITHUB_REPOSITORY"):
            owner, name = repository.split("/")
            root = f"https://github.com/{repository}"
            readme = absolute(readme, root, os.environ.get("GITHUB_REF_NAME", "main"))
            metadata["urls"] = {
                "Documentation": f"https://{owner}.github.io/{name}/",
                "Repository": root,
                "Changelog": f"{root}/blob/main/CHANGELOG.md",
                "Issues": f"{root}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
