"""The catalogue: names that exist, papers that are listed, and nothing left open."""

import operator
import re

import harness
import optax

import optax_sam
from optax_sam.method import METHODS

PAGE = "methods/catalogue.md"
ROWS = harness.table(PAGE, "Variants")


def named(text):
    """The names in backticks, without their arguments."""
    return re.findall(r"`([a-z_]\w*(?:\.\w+)*)(?=[(`])", text)


def unknown(names):
    """Those that neither the library nor, with its prefix, Optax has."""

    def exists(name):
        root = optax if name.startswith("optax.") else optax_sam
        try:
            return bool(operator.attrgetter(name.removeprefix("optax."))(root))
        except AttributeError:
            return False

    return [name for name in names if not exists(name)]


def test_each_row_says_where_it_is_or_why_not():
    assert len(ROWS) >= 50
    for name, rule, paper, _, here in ROWS:
        assert rule, name
        assert re.search(r"\[\d{4}\.\d{5}\]|\b20\d\d$", paper), name
        assert re.match(r"(here as `|not here: .)", here), name
        if here.startswith("here as"):
            assert unknown(named(here)) == [], name


def test_all_methods_and_papers_are_known():
    text = harness.page(PAGE)
    assert METHODS.keys() <= {*named(" ".join(row[-1] for row in ROWS))}
    listed = harness.page("reference/bibliography.md")
    papers = set(re.findall(r"\d{4}\.\d{5}", text))
    assert len(papers) > 40
    assert [x for x in papers if f"https://arxiv.org/abs/{x}" not in listed] == []


def test_the_glossary():
    rows = harness.table(PAGE, "Names that collide")
    assert len(rows) >= 12
    for name, *meanings in rows:
        known = [x for cell in meanings for x in named(cell)]
        assert known or "not here" in " ".join(meanings), name
        assert unknown(known) == [], name
    assert unknown(["no_such_sam", "optax.no_such"]) == ["no_such_sam", "optax.no_such"]
