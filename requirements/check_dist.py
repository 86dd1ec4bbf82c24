"""Check what `make dist` built, and use the wheel alone in a new environment.

    python requirements/check_dist.py dist

The wheel must hold all files of the package and nothing else; it was built from the
sdist, which holds what that takes. Then the wheel is installed with what it requires,
no extras, and try_installed.py runs there.
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def package_files() -> set[str]:
    """The files of the package in the working tree, as a wheel names them."""
    files = (ROOT / "optax_sam").rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }


def require_equal(what: str, found: set[str], expected: set[str]) -> None:
    """Stops with what is missing and what should not be there."""
    if found != expected:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        sys.exit(f"{what} lacks {missing} and should not have {surplus}.")


def check_wheel(wheel: Path) -> None:
    """All modules and ``py.typed``, and neither tests nor documentation."""
    with zipfile.ZipFile(wheel) as archive:
        names = {x for x in archive.namelist() if ".dist-info/" not in x}
    require_equal(wheel.name, names, package_files())


def check_sdist(sdist: Path) -> None:
    """The package with what builds it, and the tests."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {x.relative_to(ROOT).as_posix() for x in (ROOT / "tests").glob("*.py")}
    also = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO"}
    expected = package_files() | tests | also
    require_equal(sdist.name, names & expected, expected)


def try_wheel(wheel: Path) -> None:
    """Installs the wheel in an environment of its own and uses it there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        install = [python, "-m", "pip", "install", "--quiet", wheel.resolve()]
        subprocess.run([*install, "--disable-pip-version-check"], check=True)
        # Isolated: neither the working tree nor PYTHONPATH is importable.
        script = Path(__file__).with_name("try_installed.py")
        version = wheel.name.split("-")[1]
        subprocess.run([python, "-I", script, version], cwd=folder, check=True)


def main(folder: Path) -> None:
    """All checks of the one wheel and the one sdist of a folder."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    try_wheel(wheel)


main(Path(sys.argv[1]))
