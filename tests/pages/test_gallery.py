"""The gallery's example draws all the pictures that its page shows."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import harness
import pytest

ROOT = Path(__file__).parents[2]
PICTURES = [
    f"gallery_{name}.png"
    for name in ("sharpness", "line", "surface", "spectrum", "sampling")
]


def test_the_page_shows_every_picture():
    page = harness.page("gallery.md")
    assert re.findall(r"!\[.+?\]\(\.\./images/(gallery_\w+\.png)\)", page) == PICTURES
    images = ROOT / "docs/images"
    assert max((images / name).stat().st_size for name in PICTURES) < 80_000


@pytest.mark.slow
def test_the_example_draws_them(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "examples/gallery.py", "--quick", "--out", "new/here"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for name in PICTURES:
        content = (tmp_path / "new/here" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        assert width >= 700
        assert height >= 400
        assert len(content) > 5_000
