"""The pages of the repository, and what of them is written by hand."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        *ROOT.glob("*.md"),
        *(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
        *(ROOT / "benchmarks").rglob("*.md"),
    )
}


def by_hand(page):
    """A page without what `make tables` writes."""
    written = r"<!-- \w+[^\n]*: written by make tables -->\n.*?<!-- end -->"
    return re.sub(written, "", PAGES[page], flags=re.DOTALL)
