"""The tables of the pages are those of the committed results."""

import re

import pytest

from benchmarks import pages


@pytest.fixture(scope="module")
def made():
    return pages.tables()


def test_every_page_has_the_tables_of_the_results(made):
    written = {page.name: page.read_text() for page in pages.PAGES}
    changed = [k for k, text in written.items() if pages.rendered(text, made) != text]
    assert changed == [], "make tables writes them"


def test_every_table_has_its_page(made):
    asked = [name for page in pages.PAGES for name in pages.names(page.read_text())]
    assert sorted(asked) == sorted(made)


def test_a_changed_number_is_written_again():
    start, end = "<!-- table a: written by make tables -->", "<!-- end -->"
    text = f"before\n\n{start}\n\n| 1 |\n\n{end}\n\nafter | 1 |\n"
    assert pages.names(text) == ["a"]
    new = pages.rendered(text, {"a": "| 2 |"})
    assert new == text.replace("| 1 |", "| 2 |", 1)
    assert pages.rendered(f"{start}\n{end}", {"a": "x"}) == f"{start}\n\nx\n\n{end}"
    with pytest.raises(SystemExit, match="no results have a table 'a'; there are b"):
        pages.rendered(text, {"b": ""})


def test_the_list_of_tables_names_commands_that_exist():
    text = (pages.ROOT / "benchmarks/README.md").read_text()
    listed = text.split("## Where each table comes from")[1].split("\n## ")[0]
    scripts = set(re.findall(r"`([\w/]+\.py)", listed))
    tests = {name for name in scripts if name.startswith("test_")}
    assert tests
    assert [x for x in tests if not any((pages.ROOT / "tests").rglob(x))] == []
    lost = [x for x in scripts - tests if not (pages.ROOT / "benchmarks" / x).is_file()]
    assert lost == []
    # Each page with a table of results is on the list.
    for page in pages.PAGES:
        if pages.names(page.read_text()):
            assert page.name in listed
