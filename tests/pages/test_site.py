"""The pages: their Python runs, the commands they name exist, and links lead somewhere.

What only the build can tell, names without documentation and roles without a target,
fails `make docs`.
"""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import optax
import pytest
from site_pages import DOCS, PAGES, ROOT, by_hand

import optax_sam

# Pages whose blocks want more than each other: how many there are, so that a new one is
# not overlooked. Other tests run them.
ELSEWHERE = {
    "README.md": 1,
    "docs/guide/accumulation.md": 6,
    "docs/guide/devices.md": 8,
    "docs/guide/flax.md": 5,
    "docs/guide/precision.md": 3,
    "docs/measures/sharpness.md": 5,
    "docs/measures/tracking.md": 6,
    "docs/methods/ascent_batch.md": 2,
    "docs/start/migrating.md": 5,
    "docs/start/trainers.md": 1,
}
SLOW = {"docs/start/concepts.md", "docs/start/getting_started.md"}
IMPORTED = {"jax": jax, "jnp": jnp, "optax": optax, "optax_sam": optax_sam}
# What some pages take as the reader's own; each of their blocks stands by itself.
GIVEN = {
    "docs/methods/index.md": {
        "params": jnp.zeros(3),
        "x": jnp.ones((4, 8, 3)),
        "y": jnp.ones((4, 8)),
        "loss_fn": lambda params, x, y: jnp.mean((x @ params - y) ** 2),
    },
    "docs/guide/reliability.md": {
        "z": jnp.ones(3, "complex64"),
        "loss_fn": lambda z: jnp.sum(jnp.abs(z) ** 2),
    },
}


def code(page):
    return harness.code(f"../{page}")


HERE = [page for page in PAGES if code(page) and page not in ELSEWHERE]


def test_blocks_that_other_tests_run():
    assert {page: len(code(page)) for page in ELSEWHERE} == ELSEWHERE
    others = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    read = "".join(path.read_text() for path in others)
    for page in ELSEWHERE:
        assert re.search(rf'"[./]*{Path(page).name}"', read), page


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in HERE]
)
def test_blocks_run(page, capsys):
    names = dict(IMPORTED)
    for number, block in enumerate(code(page), 1):
        if page in GIVEN:
            names = IMPORTED | GIVEN[page]
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page in CHECKS:
        CHECKS[page](names, capsys.readouterr().out)


def check_getting_started(names, printed):
    for correct in (names["correct"], names["linen_correct"], names["nnx_correct"]):
        assert correct.mean() > 0.93
    assert "ascent_rate 1\n" in printed
    assert 0 < names["vsam_rate"] < 1


def check_concepts(names, _):
    harness.assert_close(names["emitted"], names["by_hand"], 1e-5)
    assert names["cost"] == pytest.approx(1.2)
    assert optax.tree.norm(names["clipped"]) == pytest.approx(1, rel=1e-5)
    assert optax.tree.norm(names["unclipped"]) > 2
    assert names["survival"] == pytest.approx({None: 1.0, "bfloat16": 0.0}, abs=1e-3)

    def of_shard(i):
        g = names["shard_grad_fn"](names["params"], i)
        offset = optax.tree.scale(0.1 / optax.tree.norm(g), g)
        return names["shard_grad_fn"](optax.tree.add(names["params"], offset), i)

    by_hand = optax.tree.scale(1 / 4, optax.tree.add(*map(of_shard, range(4))))
    harness.assert_close(names["m_emitted"], by_hand, 1e-4)


def check_home(names, _):
    assert jnp.all(names["w"] > 0)


def check_logging(names, _):
    head, *rows = names["file"].getvalue().splitlines()
    assert {"step", "sam/loss", "sam/ascent_rate"} <= set(head.split(","))
    assert [row.split(",")[0] for row in rows] == ["0", "100", "200"]


def check_checkpoints(names, _):
    harness.assert_equal(names["resumed"], names["state"])
    (old, momentum), (new, kept) = names["state"][1], names["new_state"]
    harness.assert_equal(kept, momentum)
    assert (old.count, new.count) == (20, 0)
    assert harness.is_finite(names["nnx_target"])


def check_masks(names, _):
    assert not names["updates"]["base"]["kernel"].any()
    assert names["updates"]["head"]["kernel"].all()
    sizes = [x.size for x in jax.tree.leaves(names["adapter_state"])]
    assert max(sizes) == names["adapters"]["down"].size


def check_tuning(names, _):
    """The tuned values are those of the results."""
    tasks = "Digits with wrong labels", "Fashion-MNIST with an MLP"
    tasks += "Fashion-MNIST with a CNN", "CIFAR-10 with a ResNet"
    rho = [
        {row.partition(" (")[0]: re.search(r"rho ([\d.]+)|$", setting)[1]}
        for task in tasks
        for row, setting, *_ in harness.table("accuracy.md", task)
    ]
    labels = "SAM", "vSAM .33 to .4", "quarter-batch SAM", "SAM-5", "MSAM", "ASAM"
    rows = harness.table("tuning_rho.md", "Which values to try")
    for label, (_, _, *cells) in zip(labels, rows, strict=False):
        tuned = [cell.split(" ")[0] for cell in cells if cell]
        assert tuned == [found[label] for found in rho if label in found]
    assert not any(cell for _, _, *cells in rows[len(labels) :] for cell in cells)
    assert names["state"].hyperparams["rho"] == pytest.approx(0.1)


CHECKS = {
    "docs/guide/checkpoints.md": check_checkpoints,
    "docs/guide/logging.md": check_logging,
    "docs/guide/masks.md": check_masks,
    "docs/start/tuning_rho.md": check_tuning,
    "docs/index.md": check_home,
    "docs/start/getting_started.md": check_getting_started,
    "docs/start/concepts.md": check_concepts,
}


def test_blocks_are_of_kinds_that_are_looked_at():
    for page, text in PAGES.items():
        opened = re.findall(r"^ *```(\S*).*\n(?:.*\n)*?^ *```$", text, re.MULTILINE)
        kinds = {kind for kind in opened if not kind.startswith("{")}
        assert kinds <= {"python", "pycon", "console", "text", "diff"}, page
        assert "```pycon" not in by_hand(page)  # a docstring's, which runs there
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(opened), page


# Commands.


def commands():
    """The words of each command, in blocks and within text, with its page."""
    for page, text in PAGES.items():
        blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        inline = re.findall(r"`((?:make|python|pip) [^`]+)`", text)
        lines = "\n".join(blocks + inline).replace("\\\n", " ").splitlines()
        for line in lines:
            # Also one that is quoted within another.
            pattern = r'\b(?:make|python|pip) (?:[^"#]|"[^"]*")*'
            if found := re.search(pattern, line.split(" #")[0]):
                yield page, shlex.split(found[0])


def options(script):
    """The options of a script."""
    text = (ROOT / script).read_text()
    if "study.parser(" in text:
        text += (ROOT / "benchmarks/lib/study.py").read_text()
    return set(re.findall(r'"(--[\w-]+)"', text))


def unknown_words(words):
    """What there is not, of a command."""
    makefile = (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tool, first, *rest = words
    if tool == "pip":
        extras = re.findall(r"\[(.*?)\]", " ".join(rest))
        named = {extra for group in extras for extra in group.split(",")}
        return named - project["optional-dependencies"].keys()
    if tool == "make":
        recipe = re.search(rf"^{first}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        if not recipe:
            return {first}
        variables = dict(word.split("=", 1) for word in rest)
        unknown = {v for v in variables if f"\n{v} ?=" not in makefile}
        scripts = re.findall(r"\S+\.py", recipe[1])
        if not scripts:
            return unknown
        first, rest = scripts[-1], shlex.split(variables.get("ARGS", ""))
        return unknown | unknown_words(["python", first, *rest])
    if not (ROOT / first).is_file():
        return {first}
    given = {word.split("=")[0] for word in rest if word.startswith("--")}
    inputs = [v for k, v in zip(rest, rest[1:], strict=False) if k in READ]
    ours = {v for v in inputs if v.startswith(("benchmarks/", "docs/", "examples/"))}
    return (given - options(first)) | {v for v in ours if not (ROOT / v).is_file()}


READ = {"--report"}


def test_commands_exist():
    found = list(commands())
    assert len(found) > 30
    unknown = {(page, *words): unknown_words(words) for page, words in found}
    assert {command: words for command, words in unknown.items() if words} == {}


# Links.


def anchors(page):
    """Those that its headings make, to the depth that conf.py gives."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,3} (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken(page, link):
    """Whether a link of a page leads nowhere."""
    target, _, anchor = link.partition("#")
    path = (ROOT / page).parent / target if target else ROOT / page
    if not path.exists():
        return True
    return bool(anchor) and anchor not in anchors(
        str(path.resolve().relative_to(ROOT.resolve()))
    )


def links(page):
    """The links within the repository."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    beside_files = "../../actions/"  # of GitHub
    return [x for x in found if "://" not in x and not x.startswith(beside_files)]


def test_links_lead_somewhere():
    assert sum(len(links(page)) for page in PAGES) > 100
    assert [(p, link) for p in PAGES for link in links(p) if broken(p, link)] == []
    assert broken("README.md", "docs/nowhere.md")
    assert broken("README.md", "docs/methods/index.md#nowhere")


def test_every_picture_is_on_a_page():
    whole = lambda page, link: ((ROOT / page).parent / link).resolve()
    linked = {whole(page, link) for page in PAGES for link in links(page)}
    assert set((DOCS / "images").glob("*")) <= linked


# What is quoted.


@pytest.fixture
def excerpts(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("excerpts")


def labels(page):
    """What the tables call the method of a page."""
    return re.search(r"<!-- results (.*): written by", PAGES[page])[1].split("; ")


INDEX = "docs/methods/index.md"
OF_ALL = INDEX, "docs/methods/catalogue.md"
METHOD_PAGES = [x for x in PAGES if x.startswith("docs/methods/") and x not in OF_ALL]


def test_every_row_is_on_the_page_of_a_method(excerpts):
    everything = [label for page in METHOD_PAGES for label in labels(page)]
    no_method = re.compile(r"SGD|AdamW|optax\.contrib\.sam")
    for page, start, *_ in excerpts.TABLES:
        _, _, *rows = excerpts.table_behind(page, start)
        cells = [row[0] for row in rows if not no_method.match(row[0])]
        assert [c for c in cells if not excerpts.is_about(c, everything)] == [], page


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_a_page_shows_its_method(page, excerpts):
    for label in labels(page):
        rows = re.findall(r"^\| (.*?) \|", PAGES[page], re.MULTILINE)
        assert any(excerpts.is_about(row, [label]) for row in rows), label
    name = Path(page).stem
    assert f"autofunction:: optax_sam.{name}\n" in PAGES[page]


def test_every_method_has_a_page():
    documented = {Path(page).stem for page in METHOD_PAGES}
    rows = harness.table("methods/index.md", "Hyperparameters")
    assert {row[0].strip("`") for row in rows} <= documented
    # Those that the list of pages does not name follow by themselves.
    listed = PAGES[INDEX].rpartition("<!-- {toctree}")[2]
    assert ":glob:\n" in listed
    assert "\n*\n" in listed


def test_excerpts_keep_rows_and_columns_that_say_something(excerpts):
    digits = "results/accuracy.md", "## Digits with wrong labels"
    head, _, *rows = excerpts.table_behind(*digits)
    (sam,) = [row for row in rows if row[0] == "SAM"]
    shown = excerpts.markdown(head, sam).splitlines()
    assert "minus SAM" in head
    assert "minus SAM" not in shown[0]
    assert [cell for cell in sam if cell] == shown[2].strip("| ").split(" | ")
    with pytest.raises(ValueError, match="has no table behind"):
        excerpts.table_behind("results/accuracy.md", "## Nothing")


def test_numbers_are_those_of_the_pages_that_are_quoted():
    sources = "results/accuracy", "guide/quantization", "guide/examples"
    number = re.compile(r"\d+\.\d+ ± \d+\.\d+")
    numbers = lambda text: set(number.findall(" ".join(text.split())))
    known = set().union(*(numbers(PAGES[f"docs/{name}.md"]) for name in sources))
    start = "docs/start/choosing.md", "docs/start/does_it_help.md"
    for page in ("README.md", *start, *METHOD_PAGES):
        assert numbers(by_hand(page)) <= known, page
    assert len(numbers(by_hand("docs/start/choosing.md"))) > 5
    # The sentences of that page quote its tables.
    accuracy = "docs/results/accuracy.md"
    tables = re.findall(r"^\|.*\|$", PAGES[accuracy], re.MULTILINE)
    assert len(numbers(by_hand(accuracy))) > 10
    assert numbers(by_hand(accuracy)) <= numbers("\n".join(tables))


# Code by authors of papers with which no docstring compares ours.
NOT_COMPARED = {
    "eepperly/XTrace",
    "fra31/auto-attack",
    "google-deepmind/sam_edge",
    "google/spectral-density",
    "keskarnitish/large-batch-training",
    "locuslab/edge-of-stability",
    "tml-epfl/sharpness-vs-generalization",
    "tml-epfl/understanding-sam",
    "zzp1012/SAM-in-Late-Phase",
}


def test_the_bibliography_has_all_that_is_cited():
    """Papers of the package and of the pages, and the authors' code."""
    page = PAGES["docs/reference/bibliography.md"]
    package = "".join(p.read_text() for p in (ROOT / "optax_sam").rglob("*.py"))
    pages = "".join(text for text in PAGES.values() if text is not page)
    papers = lambda text: set(re.findall(r"\b\d{4}\.\d{5}\b", text))
    assert papers(page) == papers(package + pages)
    name = r"[\w-]+/[\w-]+"
    cited = re.findall(rf"\bcode:\s+({name}(?:,\s+{name})*)", package)
    listed = set(re.findall(rf"\[({name})\]", page))
    assert listed == set(re.findall(name, " ".join(cited))) | NOT_COMPARED
