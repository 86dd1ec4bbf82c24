"""Plant faults in the package, one at a time: do the quick tests see each of them?

Each fault of ``tests/data/faults.toml`` is one wrong edit, and the file of quick tests
that must fail with it. The package is copied first, so nothing happens to the checkout.

    python tests/faults.py [--workers 2] [words of a fault, or parts of its test's path]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "data" / "faults.toml"
COPIED = (
    *("optax_sam", "tests", "examples", "docs", "benchmarks"),
    *("conftest.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
)


def faults():
    """The faults, each with ``old``, ``new`` and ``test``."""
    return tomllib.loads(FAULTS.read_text())["fault"]


def copy_to(folder):
    """Copies what the package and its quick tests need."""
    folder.mkdir(exist_ok=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("_build", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)


def place(fault, root=ROOT):
    """The one file of the package that holds the line to change."""
    files = (root / "optax_sam").rglob("*.py")
    found = [path for path in files if fault["old"] in path.read_text()]
    if len(found) != 1 or found[0].read_text().count(fault["old"]) != 1:
        raise ValueError(
            f"This must stand once in the package, but stands in"
            f" {[path.name for path in found]}:\n{fault['old']}"
        )
    return found[0]


def is_seen(fault, root):
    """Whether the tests fail where the fault is planted."""
    path = place(fault, root)
    whole = path.read_text()
    path.write_text(whole.replace(fault["old"], fault["new"]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", fault["test"]]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    try:
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True)
    finally:
        path.write_text(whole)
    return run.returncode == 1  # failed tests, not a run that broke off otherwise


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults that hold all of these")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    chosen = [x for x in faults() if all(w in str(x) for w in given.words)]
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(i) for i in range(given.workers)]
        for copy in copies:
            copy_to(copy)

        def try_one(fault):
            copy = copies.pop()
            try:
                return is_seen(fault, copy)
            finally:
                copies.append(copy)

        missed = 0
        with ThreadPoolExecutor(given.workers) as pool:
            running = {pool.submit(try_one, fault): fault for fault in chosen}
            for number, done in enumerate(as_completed(running), 1):
                fault, seen = running[done], done.result()
                missed += not seen
                verdict = "seen  " if seen else "MISSED"
                first = fault["new"].strip().splitlines() or ["(taken away)"]
                print(
                    f"{number:3}/{len(chosen)} {verdict} {place(fault).stem:14}"
                    f" {first[0][:60]}",
                    flush=True,
                )
    print(f"{len(chosen) - missed} of {len(chosen)} faults seen by the quick tests")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
