"""The example for many hosts runs on two processes, and goes on as one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder, *arguments):
    """Each epoch that it printed: number, test accuracy, ascents and steps so far."""
    output = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "multihost.py",
            "--out",
            "run",
            *arguments,
        ],
        cwd=folder,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Compiling dominates; one device per process.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert output.returncode == 0, output.stdout + output.stderr
    pattern = r"^Epoch +(\d+): .* accuracy ([\d.]+), (\d+) of (\d+) steps ascended$"
    return re.findall(pattern, output.stdout, re.MULTILINE)


@pytest.mark.slow
def test_two_processes_and_then_one(tmp_path):
    for package in ("flax", "orbax.checkpoint", "sklearn"):
        pytest.importorskip(package)
    # The lines of one process alone are printed.
    rows = run(tmp_path, "--num-processes", "2", "--epochs", "2")
    assert [epoch for epoch, *_ in rows] == ["1", "2"]
    rows += run(tmp_path, "--epochs", "4")
    assert [epoch for epoch, *_ in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1][1]) > 0.9
    # 21 steps per epoch: 40 of warm-up and a window without an ascent in three epochs,
    # which a state that began anew after two would not have.
    assert [(int(n), int(of)) for _, _, n, of in rows[:3]] == [
        (21, 21),
        (40, 42),
        (40, 63),
    ]
