"""Several processes, as on several hosts: the decisions and numbers of one.

Real processes of ``jax.distributed`` over loopback, with JAX's collectives for CPUs.
What they run is in ``hosts.py``.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 300


def launch(folder, num_processes, *names, devices=1):
    """Runs ``hosts.py`` once per process; returns their exit codes and outputs.

    The first failure ends the others, which would wait for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error",
        # Compiling dominates, and what these runs compare needs no fast code.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0",
    }
    logs = [folder / f"{i}_of_{num_processes}.log" for i in range(num_processes)]
    processes = []
    try:
        for i, log in enumerate(logs):
            arguments = coordinator, num_processes, i, folder, *names
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, ROOT / "tests/hosts.py", *map(str, arguments)],
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + TIMEOUT
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            outputs = "\n".join(log.read_text() for log in logs)
            assert time.monotonic() < end, f"no end after {TIMEOUT} s:\n{outputs}"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return codes, "\n".join(log.read_text() for log in logs)


def assert_equals_one_process(folder, num_processes, name, expected, first=0):
    """Every process has made the decisions, and has the numbers, of the one."""
    happened = np.cumsum(expected["decisions"])
    assert 0.2 < np.mean(expected["decisions"]) < 0.8
    np.testing.assert_array_equal(expected["ascents"], happened)
    for i in range(num_processes):
        actual = np.load(folder / f"{name}_{i}.npz")
        assert set(actual) == set(expected)
        for key, value in expected.items():
            wanted = value[first:] if key in ("decisions", "ascents") else value
            # Decisions, counters and keys are equal, numbers to rounding.
            tolerance = 1e-9 if np.issubdtype(value.dtype, np.floating) else 0
            np.testing.assert_allclose(
                actual[key],
                wanted,
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{name}, process {i}, {key}",
            )


def test_two_processes_equal_one(tmp_path, x64):
    """Data parallel, in one program with a conditional and in two without."""
    codes, outputs = launch(tmp_path, 2, "conditional", "dispatch")
    assert codes == [0, 0], outputs
    expected = hosts.train("conditional", jax.devices()[:1])
    for name in ("conditional", "dispatch"):
        assert_equals_one_process(tmp_path, 2, name, expected)


@pytest.mark.slow
def test_four_processes_die_and_two_go_on(tmp_path, x64):
    """Parameters and state are split over all; and m-sharpness of four devices."""
    codes, outputs = launch(tmp_path, 4, "split")
    assert codes[1] == -signal.SIGKILL, outputs
    assert not list(tmp_path.glob("split_*"))
    codes, outputs = launch(tmp_path, 2, "split", "m_sharpness", devices=2)
    assert codes == [0, 0], outputs
    expected = hosts.train("split", jax.devices()[:1])
    assert_equals_one_process(tmp_path, 2, "split", expected, hosts.SAVED_AFTER)
    expected = hosts.train("m_sharpness", jax.devices()[:4])
    assert_equals_one_process(tmp_path, 2, "m_sharpness", expected)
