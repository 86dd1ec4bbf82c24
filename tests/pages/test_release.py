"""What a release and its repository need: workflows, forms, versions in agreement."""

import re

import pytest
import yaml
from site_pages import ROOT

import optax_sam

GITHUB = ROOT / ".github"
FILES = {str(x.relative_to(GITHUB)): x.read_text() for x in GITHUB.rglob("*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text()


def test_workflows_run_what_ci_runs():
    tests = yaml.safe_load(FILES["workflows/tests.yml"])
    rows = tests["jobs"]["make"]["strategy"]["matrix"]["include"]
    ci = re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {row["target"] for row in rows} == set(ci)
    publish = yaml.safe_load(FILES["workflows/publish.yml"])["jobs"]
    assert {"tests", "build"} <= set(publish["pypi"]["needs"])
    assert publish["pypi"]["permissions"] == {"id-token": "write"}  # and no secret
    assert "secrets." not in FILES["workflows/publish.yml"]
    for name, text in FILES.items():
        for target in re.findall(r"run: make (\w[\w-]*)", text):
            assert f"\n{target}:" in MAKEFILE, name
        for script in re.findall(r"[\w/]+\.py\b", text):
            assert (ROOT / script).is_file(), name


@pytest.mark.parametrize("form", ["bug", "method"])
def test_forms_ask_for_what_decides(form):
    fields = yaml.safe_load(FILES[f"ISSUE_TEMPLATE/{form}.yml"])["body"]
    needed = {x["id"] for x in fields if x.get("validations", {}).get("required")}
    wanted = {"bug": {"step", "versions"}, "method": {"paper", "comparison"}}
    assert wanted[form] <= needed


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == optax_sam.__version__
    assert {"title", "abstract", "authors", "message", "license"} <= citation.keys()
