"""A training that is killed goes on from its last checkpoint as if it had not been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import saved_training
from registry import METHODS, OTHERS

HERE = Path(__file__).parent
STEPS, EVERY = 24, 3
# After as many steps in a process as drawn, and a little later; then in a write.
KILLS_BETWEEN, KILLS_IN_A_WRITE = 2, 1


class Training:
    """A process that trains all methods, and what it says."""

    def __init__(self, directory, cache=None, every=EVERY, devices=8):
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.log = (directory / "stderr").open("a")
        arguments = [HERE / "saved_training.py", directory, str(STEPS), str(every)]
        # A process that resumes would else compile everything again.
        keep_compiled = {
            "JAX_COMPILATION_CACHE_DIR": f"{cache}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": f"{HERE.parent}",
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            | (keep_compiled if cache else {}),
        )
        self.first = self.heard("from")

    def heard(self, word):
        """The number in the next line, which begins with this word."""
        line = self.process.stdout.readline().split()
        assert line[:1] == [word], (self.directory / "stderr").read_text()
        return int(line[1])

    def unfinished(self):
        return [*(self.directory / "checkpoints").glob("*.orbax-checkpoint-tmp*")]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        self.log.close()
        assert self.process.returncode == -signal.SIGKILL

    def finish(self):
        self.process.communicate()
        self.log.close()
        assert self.process.returncode == 0, (self.directory / "stderr").read_text()
        with np.load(self.directory / "end.npz") as arrays:
            return dict(arrays)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def uninterrupted(cache):
    """Where a run left a checkpoint in the middle, and what it reached."""
    training = Training(cache.parent / "uninterrupted", cache, every=STEPS // 2)
    return training.directory, training.finish()


def assert_all_methods_trained(reached):
    named = {m.factory for m in METHODS + OTHERS}
    assert {method.factory for method in saved_training.TRAINED} == named
    for method in saved_training.TRAINED:
        assert any(f"['{method.name}']" in path for path in reached)


@pytest.mark.slow
def test_resumes_to_the_bit(cache, uninterrupted, tmp_path):
    draw = random.Random(0)
    firsts = []
    for _ in range(KILLS_BETWEEN):
        training = Training(tmp_path / "killed", cache)
        firsts.append(training.first)
        last = training.first + draw.randint(EVERY, 2 * EVERY)
        while training.heard("step") < last:
            pass
        time.sleep(draw.uniform(0, 0.2))
        training.kill()
    for _ in range(KILLS_IN_A_WRITE):
        training = Training(tmp_path / "killed", cache)
        firsts.append(training.first)
        before = training.unfinished()
        deadline = time.monotonic() + 120
        while training.unfinished() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        training.kill()
        assert training.unfinished() != before
    training = Training(tmp_path / "killed", cache)
    firsts.append(training.first)
    actual, (_, expected) = training.finish(), uninterrupted
    # Each began where a checkpoint was, and all but the first with one.
    assert firsts == sorted(firsts)
    assert 0 == firsts[0] < firsts[1] < firsts[2]
    assert_all_methods_trained(actual)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert array.dtype == actual[path].dtype, path
        assert array.tobytes() == actual[path].tobytes(), path


@pytest.mark.slow
def test_resumes_on_another_number_of_devices(uninterrupted, tmp_path):
    directory, expected = uninterrupted
    middle = Path("checkpoints", f"{STEPS // 2}")
    shutil.copytree(directory / middle, tmp_path / "moved" / middle)
    training = Training(tmp_path / "moved", devices=2)
    assert training.first == STEPS // 2
    actual = training.finish()
    assert_all_methods_trained(actual)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        exact = not np.issubdtype(array.dtype, np.floating)
        tolerance = 0 if exact else 1e-5
        np.testing.assert_allclose(
            actual[path], array, rtol=tolerance, atol=tolerance, err_msg=path
        )
    # Rounding has had its part, or nothing would be shown.
    assert any(np.any(actual[path] != expected[path]) for path in expected)
