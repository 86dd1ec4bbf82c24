"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits_label_noise_prints_a_table_and_draws(tmp_path: Path) -> None:
    for package in ("flax", "matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    picture = tmp_path / "new" / "digits.png"
    script = EXAMPLES / "digits_label_noise.py"
    run = subprocess.run(
        [sys.executable, script, "--quick", "--out", picture],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr

    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    table = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows}
    assert list(table) == ["SGD", "SAM", "SAM-5", "ASAM", "vSAM"]
    gradients = {name: cells[1] for name, cells in table.items()}
    assert gradients["SGD"] == 1
    assert gradients["SAM"] == gradients["ASAM"] == 2
    assert gradients["SAM-5"] == pytest.approx(1.2, abs=0.02)
    assert all(0 <= cells[0] <= 100 and cells[2] > 0 for cells in table.values())

    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1200
    assert height >= 600
    assert len(content) > 30_000


def test_digits_label_noise_refuses_empty_runs() -> None:
    for package in ("flax", "matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    script = EXAMPLES / "digits_label_noise.py"
    run = subprocess.run(
        [sys.executable, script, "--seeds", "0"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 2
    assert "at least 1" in run.stderr
