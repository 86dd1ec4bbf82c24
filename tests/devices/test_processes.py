"""Several processes, as on several hosts; and processes that are killed.

Real processes of ``jax.distributed`` over loopback, with JAX's collectives for CPUs,
make the decisions and numbers of one; a training that is killed goes on from its last
checkpoint as if it had not been. They run ``hosts.py``, ``saved_training.py`` and the
example for many hosts.
"""

import os
import random
import re
import shutil
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
import saved_training
from saved_training import EVERY, KILLS_BETWEEN, KILLS_IN_A_WRITE, STEPS

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
pytestmark = pytest.mark.slow


def start(script, *arguments, devices=1, warnings="default", **options):
    """A process that runs a script on so many devices."""
    # Compiling dominates, and what these runs compare needs no more.
    flags = f"--xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0"
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}", "XLA_FLAGS": flags}
    env |= {"PYTHONWARNINGS": warnings}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | env, text=True, **options)


# Several processes.


def launch(folder, num_processes, *names, devices=1):
    """Runs ``hosts.py`` once per process; returns their exit codes and outputs.

    The first failure ends the others, which would wait for it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    logs = [folder / f"{i}_of_{num_processes}.log" for i in range(num_processes)]
    read = lambda: "\n".join(log.read_text() for log in logs)
    processes = []
    try:
        for i, log in enumerate(logs):
            arguments = hosts.__file__, coordinator, num_processes, i, folder, *names
            options = {"devices": devices, "warnings": "error"}
            with log.open("w") as output:
                options |= {"stdout": output, "stderr": subprocess.STDOUT}
                processes.append(start(*arguments, **options))
        end = time.monotonic() + TIMEOUT
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            assert time.monotonic() < end, f"no end after {TIMEOUT} s:\n{read()}"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return codes, read()


def assert_equal_to_one_device(folder, name, expected, first=0):
    """Both processes have made the decisions, and have the numbers, of the one."""
    for i in range(2):
        hosts.assert_equal(np.load(folder / f"{name}_{i}.npz"), expected, first)


def test_four_processes_die_and_two_go_on(tmp_path, x64):
    """Parameters and state are split; then other runs on the same four devices.

    In two programs as with a conditional, and with a perturbation for each device.
    """
    codes, outputs = launch(tmp_path, 4, "split")
    assert codes[1] == -signal.SIGKILL, outputs
    assert not list(tmp_path.glob("split_*"))
    names = "split", "dispatch", "m_sharpness"
    codes, outputs = launch(tmp_path, 2, *names, devices=2)
    assert codes == [0, 0], outputs
    expected = hosts.on_one_device("conditional")
    assert_equal_to_one_device(tmp_path, "dispatch", expected)
    assert_equal_to_one_device(tmp_path, "split", expected, hosts.SAVED_AFTER)
    expected = hosts.train("m_sharpness", jax.devices()[:4])
    assert_equal_to_one_device(tmp_path, "m_sharpness", expected)


def example(folder, *arguments):
    """Each epoch that it printed: number, test accuracy, ascents and steps so far."""
    process = start(
        ROOT / "examples" / "multihost.py",
        *("--out", "run", *arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    pattern = r"^Epoch +(\d+): .* accuracy ([\d.]+), (\d+) of (\d+) steps perturbed$"
    return re.findall(pattern, output, re.MULTILINE)


def test_the_example_on_two_processes_and_then_one(tmp_path):
    # The lines of one process alone are printed.
    rows = example(tmp_path, "--num-processes", "2", "--epochs", "2")
    rows += example(tmp_path, "--epochs", "4")
    assert [epoch for epoch, *_ in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1][1]) > 0.9
    # 21 steps per epoch: 40 of warm-up and a window without an ascent in three epochs,
    # which a state that began anew after two would not have.
    counted = [(int(n), int(of)) for _, _, n, of in rows[:3]]
    assert counted == [(21, 21), (40, 42), (40, 63)]


# Killed processes.


class Training:
    """A process that trains all methods, and what it says."""

    def __init__(self, directory, every=EVERY, devices=8):
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.log = (directory / "stderr").open("a")
        self.process = start(
            *(saved_training.__file__, directory, STEPS, every),
            devices=devices,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.first = self.heard("from")

    def heard(self, word):
        """The number in the next line, which begins with this word."""
        line = self.process.stdout.readline().split()
        assert line[:1] == [word], (self.directory / "stderr").read_text()
        return int(line[1])

    def unfinished(self):
        return [*(self.directory / "checkpoints").glob("*.orbax-checkpoint-tmp*")]

    def end(self, code):
        self.process.communicate()
        self.log.close()
        errors = (self.directory / "stderr").read_text()
        assert self.process.returncode == code, errors

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.end(-signal.SIGKILL)

    def finish(self):
        self.end(0)
        with np.load(self.directory / "end.npz") as arrays:
            return dict(arrays)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Where a run left a checkpoint in the middle, and what it reached."""
    training = Training(tmp_path_factory.mktemp("uninterrupted"), every=STEPS // 2)
    return training.directory, training.finish()


def assert_reached(actual, expected, tolerance):
    """By all methods, decisions and counters exactly."""
    for method in saved_training.TRAINED:
        assert any(f"['{method.name}']" in path for path in actual)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert array.dtype == actual[path].dtype, path
        if not tolerance:
            assert array.tobytes() == actual[path].tobytes(), path
        rtol = tolerance if np.issubdtype(array.dtype, np.floating) else 0
        np.testing.assert_allclose(
            actual[path], array, rtol=rtol, atol=rtol, err_msg=path
        )


def test_resumes_to_the_bit(uninterrupted, tmp_path):
    draw, firsts = random.Random(0), []

    def resumed():
        training = Training(tmp_path / "killed")
        firsts.append(training.first)
        return training

    for _ in range(KILLS_BETWEEN):
        training = resumed()
        last = training.first + draw.randint(EVERY, 2 * EVERY)
        while training.heard("step") < last:
            pass
        time.sleep(draw.uniform(0, 0.2))
        training.kill()
    for _ in range(KILLS_IN_A_WRITE):
        training = resumed()
        before = training.unfinished()
        deadline = time.monotonic() + 120
        while training.unfinished() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        training.kill()
        assert training.unfinished() != before
    assert_reached(resumed().finish(), uninterrupted[1], tolerance=0)
    # Each began where a checkpoint was, and all but the first with one.
    assert firsts == sorted(firsts)
    assert 0 == firsts[0] < firsts[1] < firsts[2]


def test_resumes_on_another_number_of_devices(uninterrupted, tmp_path):
    directory, expected = uninterrupted
    middle = Path("checkpoints", f"{STEPS // 2}")
    shutil.copytree(directory / middle, tmp_path / "moved" / middle)
    training = Training(tmp_path / "moved", devices=2)
    assert training.first == STEPS // 2
    actual = training.finish()
    assert_reached(actual, expected, tolerance=1e-5)
    # Rounding has had its part, or nothing would be shown.
    assert any(np.any(actual[path] != expected[path]) for path in expected)
