"""The example for many hosts runs on two processes, and goes on as one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(folder, *arguments):
    """The epochs that it printed, and all that it kept of metrics."""
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
    epochs = re.findall(r"^Epoch +(\d+): training loss", output.stdout, re.MULTILINE)
    return list(map(int, epochs)), json.loads((folder / "run/metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_and_then_one(tmp_path):
    for package in ("flax", "orbax.checkpoint", "sklearn"):
        pytest.importorskip(package)
    # The lines of one process alone are printed and kept.
    epochs, rows = run(tmp_path, "--num-processes", "2", "--epochs", "2")
    assert epochs == [row["epoch"] for row in rows] == [1, 2]
    epochs, rows = run(tmp_path, "--epochs", "4")
    assert epochs == [3, 4]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["test_accuracy"] > 0.9
    # 21 steps per epoch: 40 of warm-up and a window without an ascent in three epochs,
    # which a state that began anew after two would not have.
    ascents = [row["ascent_rate"] * 21 * row["epoch"] for row in rows]
    assert ascents[:3] == pytest.approx([21, 40, 40], abs=0.01)
