"""What scripts of the repository leave: their output, tables and pictures."""

import os
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(folder, path, *arguments, **env):
    """What a script prints, run in a folder as a process of its own."""
    env = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"} | env
    done = subprocess.run(
        [sys.executable, ROOT / path, *arguments],
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def boxed_table(text):
    """The cells of each row of a table that is drawn with lines, by its name."""
    rows = [x.strip("│ ").split("│") for x in text.splitlines() if x.startswith("│")]
    return {name.strip(): [x.strip() for x in cells] for name, *cells in rows}


def markdown_table(text):
    """The cells of each row by the names of the columns, by the first one."""
    lines = [line.strip("|").split("|") for line in text.splitlines()]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def assert_is_picture(path, width=1, height=1, size=0):
    """A PNG file of at least so many pixels and bytes."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    found_width, found_height = struct.unpack(">II", content[16:24])
    assert found_width >= width
    assert found_height >= height
    assert len(content) > size
