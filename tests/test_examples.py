"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_method_trains(tmp_path: Path) -> None:
    for package in ("flax", "sklearn"):
        pytest.importorskip(package)
    output = subprocess.run(
        [sys.executable, EXAMPLES / "own_method.py"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    loss, ascents = re.fullmatch(
        r"Loss (.*) after 200 steps, (\d+) of them ascents.\n", output
    ).groups()
    assert float(loss) < 0.5
    assert ascents == "100"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods", "least"),
    [
        ("plain_functions", ["AdamW", "vSAM"], 60),
        ("equinox_digits", ["SGD", "SAM"], 60),
        ("linen_batchnorm", ["SGD", "SAM"], 70),
        ("nnx_batchnorm", ["SGD", "SAM"], 70),
    ],
)
def test_examples_of_frameworks_train(
    name: str, methods: list[str], least: float, tmp_path: Path
) -> None:
    for package in ("equinox", "flax", "sklearn"):
        pytest.importorskip(package)
    output = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    found = re.findall(r"^(\w+) +([\d.]+) % test accuracy", output, re.MULTILINE)
    assert [method for method, _ in found] == methods
    assert all(float(accuracy) > least for _, accuracy in found)


def test_digits_label_noise_prints_a_table(tmp_path: Path) -> None:
    for package in ("flax", "rich", "sklearn"):
        pytest.importorskip(package)
    output = subprocess.run(
        [sys.executable, EXAMPLES / "digits_label_noise.py", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=True,
    ).stdout
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    table = {name.strip(): [float(x) for x in numbers] for name, *numbers in rows}
    # vSAM warms up in these 44 steps.
    gradients = {"SGD": 1, "SAM": 2, "vSAM": 2, "MSAM": 1}
    assert {name: cells[-1] for name, cells in table.items()} == gradients
    assert all(10 < last <= best <= 100 for best, last, _ in table.values())
