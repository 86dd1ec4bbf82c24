"""What an installation depends on, and what importing it costs.

`make test-dist` checks the wheel itself.
"""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import optax_sam

ROOT = Path(__file__).parents[2]
# NumPy and SciPy come with JAX. The others are extras, each in the parts that need it.
CORE = {"jax", "optax", "numpy", "scipy", "optax_sam"}
EXTRAS = {
    "equinox": {"equinox.py"},
    "flax": {"linen.py", "nnx.py"},
    "matplotlib": {"plots"},
    "rich": {"sharpness"},  # a progress bar, which is text without it
}


def imported(path):
    """The top names of what a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_nothing_is_imported_that_is_not_declared():
    package = ROOT / "optax_sam"
    used = {}
    for path in package.rglob("*.py"):
        for name in set(imported(path)) - CORE - set(sys.stdlib_module_names):
            used.setdefault(name, set()).add(path.relative_to(package).parts[0])
    assert used == EXTRAS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = lambda needs: {re.match(r"[a-z]+", need)[0] for need in needs}
    assert names(project["dependencies"]) == {"jax", "optax"}
    extras = set().union(*map(names, project["optional-dependencies"].values()))
    assert extras == EXTRAS.keys() - {"rich"}


# Processor time, which other processes do not lengthen much. Without the collector: a
# full collection that was due may fall into either import.
IMPORT = """
import gc, json, sys, time
gc.disable()
start = time.process_time()
import optax
between, before = time.process_time(), set(sys.modules)
import optax_sam
after = time.process_time()
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
optax_sam.sharpness.hvp, optax_sam.plots.loss_line  # at their first use
assert not hasattr(optax_sam, "sharp")
sys.modules |= {"flax": None, "equinox": None}
errors = []
for name in ("linen", "nnx", "equinox"):
    try:
        getattr(optax_sam, name)
    except ImportError as error:
        errors.append(str(error))
print(json.dumps([new, (after - between) / (between - start), errors]))
"""


def import_afresh():
    """What a new process imports, the time for that, and the errors without extras."""
    # With bytecode: optax was installed with its own, and this may be a checkout.
    bytecode = {"PYTHONDONTWRITEBYTECODE": ""}
    env = os.environ | bytecode | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORT]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env
    )
    return json.loads(printed.stdout)


def test_importing_it_after_optax_is_cheap_and_an_error_names_what_to_install():
    new, share, errors = import_afresh()
    assert set(new) - set(sys.stdlib_module_names) == {"optax_sam"}
    # 0.02 on all versions that were measured. The least counts: the first process may
    # write the bytecode, and a busy machine makes any one of them slow.
    assert share < 0.1 or any(import_afresh()[1] < 0.1 for _ in range(3))
    needs = {"linen": "Flax", "nnx": "Flax", "equinox": "Equinox"}
    assert errors == [
        f"optax_sam.{name} needs {package}: pip install {package.lower()}."
        for name, package in needs.items()
    ]


def test_user_code_runs():
    names = runpy.run_path(str(ROOT / "tests" / "user_code.py"))
    for mistake in names["mistakes"]:
        with pytest.raises((AttributeError, TypeError, ValueError)):
            mistake()


def test_the_changelog_knows_the_version():
    release = optax_sam.__version__.partition(".dev")[0]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if ".dev" in optax_sam.__version__:
        assert f"## [Unreleased]\n\nTowards {release}" in changelog
    else:
        assert f"\n## [{release}]" in changelog
