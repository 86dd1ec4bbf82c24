"""The pages as plain Markdown, which is what a repository's host shows of them."""

import itertools
import re

import pytest
from markdown_it import MarkdownIt
from site_pages import DOCS, PAGES, ROOT, by_hand

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def leftovers(text):
    """What nobody should see: roles, directives, and headings with nothing below."""
    tokens = MARKDOWN.parse(text)
    for token in tokens:
        if token.type == "fence" and (token.info.startswith("{") or not token.content):
            yield f"a block {token.info!r}"
        if token.type == "inline":
            for part, after in itertools.pairwise([*token.children, token]):
                if part.type == "text" and after.type == "code_inline":
                    yield from re.findall(r"\{[\w:-]+\}$", part.content)
                if part.type == "text" and part.content.startswith(":::"):
                    yield part.content
    outer = [x for x in tokens if x.level == 0 and x.nesting >= 0]
    outer = [x for x in outer if not x.content.startswith("<!--")]
    headings = [x.tag if x.type == "heading_open" else None for x in outer]
    for tag, after in zip(headings, [*headings[1:], "h1"], strict=True):
        if tag and after and after <= tag:
            yield f"a heading {tag} with nothing below it"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_the_site_is_left_over(page):
    assert [*leftovers(PAGES[page])] == []
    words = re.sub(r"<!--.*?-->", "", PAGES[page], flags=re.DOTALL).split()
    assert len(words) > 12


@pytest.mark.parametrize(
    "text",
    [
        "See {func}`optax_sam.sam`.",
        "```{eval-rst}\n.. autofunction:: optax_sam.sam\n```",
        "Text.\n\n```python\n```",
        "::: note\nText.\n:::",
        "# A page\n\n## Empty\n\n<!-- {toctree}\nsam\n-->\n\n## Full\n\nText.",
        "# A page",
    ],
)
def test_what_is_left_over_is_found(text):
    assert [*leftovers(text)]
    assert not [*leftovers("# A page\n\n## Full\n\n`{x}` and $a_{b}$.\n")]


def test_pages_of_methods_say_what_when_and_how():
    for page in PAGES:
        if page.startswith("docs/methods/") and PAGES[page].count("<!-- method"):
            assert "**When to use it.**" in by_hand(page), page
            kinds = re.findall(
                r"<!-- (\w+) [^\n]*: written by make tables", PAGES[page]
            )
            assert kinds == ["method", "results"], page


# What people look for, and the pages that should have it.
SEARCHED = ["GPU", "bf16", "mixed precision", "wandb", "LoRA", "muon", "cite"]


@pytest.mark.parametrize("word", SEARCHED)
def test_what_people_search_is_found(word):
    of_site = [x for x in PAGES if (ROOT / x).is_relative_to(DOCS)]
    assert any(re.search(rf"\b{word}\b", PAGES[page], re.I) for page in of_site)
