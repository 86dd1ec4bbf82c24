"""Check that what `make dist` built is the release that a tag names.

    python requirements/check_release.py dist v0.1.0

All places that name the version must name this one, and the metadata must say where the
package comes from.
"""

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(folder: Path, tag: str) -> list[str]:
    """What is not as the tag says."""
    version, found = tag.removeprefix("v"), []
    (wheel,) = folder.glob("*.whl")
    if wheel.name.split("-")[1] != version:
        found.append(f"optax_sam/version.py makes {wheel.name}")
    if not re.search(rf"^## \[{re.escape(version)}\]", read("CHANGELOG.md"), re.M):
        found.append(f"CHANGELOG.md has no heading [{version}]")
    if f"\nversion: {version}\n" not in read("CITATION.cff"):
        found.append("CITATION.cff has another version")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (x for x in archive.namelist() if x.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    if "Project-URL: " not in metadata:
        found.append("no addresses: GITHUB_REPOSITORY was not set")
    if relative := re.findall(r"\]\((?!https?://|#)([^)\s]*)\)", metadata):
        found.append(f"README.md has links that an index cannot follow: {relative}")
    return found


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text()


if __name__ == "__main__":
    sys.exit("\n".join(problems(Path(sys.argv[1]), sys.argv[2])) or 0)
