"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_demo(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    for package in ("flax", "matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    return subprocess.run(
        [sys.executable, EXAMPLES / "digits_label_noise.py", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def table_of(output: str) -> dict[str, list[float]]:
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    table = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows}
    assert all(0 <= cells[0] <= 100 and cells[2] > 0 for cells in table.values())
    return table


def check_picture(picture: Path) -> None:
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1200
    assert height >= 600
    assert len(content) > 30_000


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


def test_digits_label_noise_prints_a_table_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "digits.png"
    run = run_demo(tmp_path, "--quick", "--out", picture)
    assert run.returncode == 0, run.stderr
    table = table_of(run.stdout)
    assert list(table) == ["SGD", "SAM", "SAM-5", "ASAM", "vSAM"]
    gradients = {name: cells[1] for name, cells in table.items()}
    assert gradients["SGD"] == 1
    assert gradients["SAM"] == gradients["ASAM"] == 2
    assert gradients["SAM-5"] == pytest.approx(1.2, abs=0.02)
    check_picture(picture)


@pytest.mark.slow
def test_digits_label_noise_knows_all_methods(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    run = run_demo(tmp_path, "--quick", "--methods", "all", "--out", picture)
    assert run.returncode == 0, run.stderr
    table = table_of(run.stdout)
    gradients = {name: cells[1] for name, cells in table.items()}
    exact = {"SGD": 1, "MSAM": 1, "SAF": 1, "MESA": 4 / 3, "ESAM": 4 / 3 + 31 / 64}
    exact |= dict.fromkeys(("SAM", "ASAM", "GSAM", "R-SAM", "RSAM", "GNP", "F-SAM"), 2)
    exact |= dict.fromkeys(("WSAM", "Fisher SAM", "AMP", "StableSAM", "SAMPa"), 2)
    exact |= {"GAM": 4, "SAM 1/4": 1.25, "SAM 1/16": 1.0625}
    exact |= dict.fromkeys(("SAM-5", "LookSAM", "Look-LayerSAM"), 1 + 9 / 44)
    # Those that choose: vSAM warms up in these 44 steps.
    exact |= {"vSAM": 2, "vSAM-A": 2}
    adaptive = {"AE-SAM", "AE-LookSAM", "RST", "G-RST"}
    assert gradients.keys() == exact.keys() | adaptive
    assert {k: gradients[k] for k in exact} == pytest.approx(exact, abs=0.006)
    assert all(1 < gradients[k] < 2 for k in adaptive)
    check_picture(picture)


@pytest.mark.slow
def test_digits_label_noise_takes_names_in_any_case(tmp_path: Path) -> None:
    run = run_demo(tmp_path, "--quick", "--methods", "mesa, Msam,saf")
    assert run.returncode == 0, run.stderr
    # In the order of the list, after the reference for times.
    assert list(table_of(run.stdout)) == ["SGD", "MSAM", "SAF", "MESA"]


def test_digits_label_noise_names_its_methods(tmp_path: Path) -> None:
    run = run_demo(tmp_path, "--methods", "SAM,SGLD")
    assert run.returncode == 2
    assert "no method sgld" in run.stderr
    assert "Look-LayerSAM, ESAM, AE-SAM" in " ".join(run.stderr.split())


def test_digits_label_noise_refuses_empty_runs(tmp_path: Path) -> None:
    run = run_demo(tmp_path, "--seeds", "0")
    assert run.returncode == 2
    assert "at least 1" in run.stderr
