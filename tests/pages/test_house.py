"""What the code promises to those who work on it: where things stand, how many."""

import ast
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import faults
import pytest
from matplotlib import colors

import optax_sam
from optax_sam import method

ROOT = Path(__file__).parents[2]
PAGES = ("README", "CHANGELOG", "CONTRIBUTING")
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_where_a_method_stands_in_the_package():
    """Its file, its line, and the room of its kind, which re-exports its rule."""
    package = ROOT / "optax_sam"
    found = [x for x in package.rglob("*.py") if "stable_sam" in x.read_text()]
    assert {str(x.relative_to(package)) for x in found} == {
        "methods/stable_sam.py",
        "methods/__init__.py",
        "blend/__init__.py",
    }
    line = "from optax_sam.methods.stable_sam import stable_sam as stable_sam"
    assert (package / "methods/__init__.py").read_text().count("stable_sam") == 3
    assert line in (package / "methods/__init__.py").read_text()


@pytest.mark.slow
def test_a_new_method_needs_its_file_a_line_and_a_page(tmp_path):
    """The page on what to read first says so. All batteries then run on it."""
    faults.copy_to(tmp_path)
    methods = tmp_path / "optax_sam" / "methods"
    text = (methods / "stable_sam.py").read_text()
    (methods / "other_sam.py").write_text(text.replace("stable_sam", "other_sam"))
    with (methods / "__init__.py").open("a") as registry:
        registry.write("from optax_sam.methods.other_sam import other_sam as other_sam")
    page = (tmp_path / "docs" / "methods" / "stable_sam.md").read_text()
    page = page.replace("StableSAM", "OtherSAM").replace("stable_sam", "other_sam")
    (tmp_path / "docs" / "methods" / "other_sam.md").write_text(page)

    def run(*command):
        printed = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert printed.returncode == 0, printed.stdout + printed.stderr
        return printed.stdout

    run("benchmarks/pages.py")
    quick = ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    run(*quick, "tests/pages/test_docs.py", "optax_sam/methods/other_sam.py")
    tried = run(*quick, "tests/engine/test_every_method.py", "-k", "other_sam")
    assert int(re.search(r"(\d+) passed", tried)[1]) > 1


@pytest.mark.parametrize("name", sorted(method.METHODS))
def test_a_docstring_says_all(name):
    """Whatever of it the decorator has written."""
    factory = method.METHODS[name]
    sections = method._sections(factory)
    parameters = inspect.signature(factory).parameters
    assert list(method._arguments(sections["Args"])) == list(parameters)
    wanted = {"Args", "Returns", "Raises", "Examples", "References"}
    assert wanted <= sections.keys()
    assert f"optax_sam.{name}" in sections["Examples"]
    assert "options" not in parameters


def test_the_shared_arguments_are_those_of_the_engine():
    engine = inspect.signature(optax_sam.sharpness_aware).parameters
    hints = typing.get_type_hints(optax_sam.sharpness_aware)
    for name, kind in typing.get_type_hints(method.Options).items():
        assert hints[name] == kind
        mine = inspect.signature(optax_sam.sam).parameters[name]
        assert mine.default == engine[name].default
        assert mine.kind is inspect.Parameter.KEYWORD_ONLY


def test_an_argument_that_a_method_does_not_have():
    for factory, wrong in (
        (optax_sam.sam, {"maks": None}),
        (optax_sam.vsam, {"when": optax_sam.when.always()}),
        (optax_sam.sam, {"blend": optax_sam.blend.take_ascended()}),
        (optax_sam.looksam, {"descent": None}),
    ):
        (word,) = wrong
        message = rf"{factory.__name__}\(\) got an unexpected keyword .*'{word}'"
        with pytest.raises(TypeError, match=message):
            factory(0.05, **wrong)


def test_rules_show_how_they_were_made():
    when, blend = optax_sam.when, optax_sam.blend
    assert (
        repr(when.after(3, when.every_k(5)))
        == "when.after(3, when.every_k(5, phase=0))"
    )
    assert repr(when.bernoulli(lambda t: 0.5)) == "when.bernoulli(a schedule)"
    assert repr(blend.renormalize()) == "blend.renormalize(blend.Blend(...))"
    assert "= when.always()" in str(inspect.signature(optax_sam.sam))


def is_a_colour(node):
    """Whether it is a text that Matplotlib takes for a colour."""
    if isinstance(node, ast.keyword) and "color" in (node.arg or ""):
        return any(is_text(x) for x in ast.walk(node.value))
    text = node.value if is_text(node) else ""
    return len(text) > 3 and text != "none" and colors.is_color_like(text)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_colours_are_fixed_in_one_place():
    """A method has one in all figures, so no benchmark or example names another."""
    scripts = [
        p for name in ("benchmarks", "examples") for p in (ROOT / name).rglob("*.py")
    ]
    named = {
        f"{path.name}:{node.lineno}"
        for path in scripts
        for node in ast.walk(ast.parse(path.read_text()))
        if is_a_colour(node)
    }
    assert named == set()
    for text, wrong in (("'#0072B2'", True), ("f(color='k')", True), ("'SGD'", False)):
        nodes = ast.walk(ast.parse(text))
        assert any(is_a_colour(node) for node in nodes) == wrong


def test_tests_are_short_and_apart():
    for path in TESTS:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        assert not re.search(r"^(from|import) test_", text, re.MULTILINE), path
        assert path.name.startswith("test_") or not re.search(r"^def test_", text, re.M)
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names))  # pytest imports them by these names


def test_faults_can_be_planted():
    chosen = faults.faults()
    assert len(chosen) >= 40
    for fault in chosen:
        assert fault["old"] != fault["new"]
        assert faults.place(fault)
        assert (ROOT / fault["test"]).is_file()
