"""Devices, fixtures, and what a test run is held to: expected skips, memory.

It lies here, since the doctests of the package need it too.
"""

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import sys
from pathlib import Path

# Before JAX is imported: eight devices of the CPU, for the tests of sharding; machine
# code as it comes: half of compiling, which dominates, is improving what runs for
# milliseconds here. The operations that XLA counts are the same; the old emitters fuse
# them otherwise.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # later ones do not know it
ROOT = Path(__file__).parent
# In which nobody looks for doctests: it trains when it is imported.
collect_ignore = ["tests/user_code.py"]
for _flag, _value in _FLAGS.items():
    _given = os.environ.get("XLA_FLAGS", "")
    if _flag not in _given:
        os.environ["XLA_FLAGS"] = f"{_given} {_flag}={_value}".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# The first example of a shape compiles, so a deadline would measure the compiler. The
# same examples on every run: a failure in CI can be repeated.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("tests")

# Reasons of skips that some environment of the Makefile has. Any other fails the run.
EXPECTED_SKIPS = (
    r"libtpu is missing",
    r"optax\.microbatching came with 0\.2\.7",
    r"could not import '(keras|clu\.metric_writers)'",
    r"this Optax has no ",  # the oldest
)
# A laptop runs two test processes beside a browser. The compiler for TPUs takes more.
MEMORY_LIMIT = 2.5e9 if importlib.util.find_spec("libtpu") else 1.5e9


def _let_programs_go():
    """JAX keeps every program it compiled; a whole run would take gigabytes."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # else glibc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def _where_much_was_compiled():
    """Not more often: what the modules share would be compiled again for each."""
    yield
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    if pages * resource.getpagesize() > 0.6 * MEMORY_LIMIT:
        _let_programs_go()


@pytest.fixture
def x64():
    """Double precision within one test."""
    import harness

    with harness.x64():
        yield


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of ``benchmarks/`` by its name, whatever folder it lies in."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the scripts add

    def found(name):
        (path,) = (ROOT / "benchmarks").rglob(f"{name}.py")
        parts = path.relative_to(ROOT).with_suffix("").parts
        return importlib.import_module(".".join(parts))

    return found


def _peak() -> float:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_peaks = []


class _Workers:
    """Hooks of pytest-xdist, which pytest refuses where that is not there."""

    @staticmethod
    def pytest_testnodedown(node):
        _peaks.append(getattr(node, "workeroutput", {}).get("peak", 0))


def pytest_configure(config):
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Workers())


def _unexpected(reporter):
    reasons = [str(x.longrepr[2]) for x in reporter.stats.get("skipped", [])]
    return [x for x in reasons if not any(re.search(y, x) for y in EXPECTED_SKIPS)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker["peak"] = _peak()
        return
    _peaks.append(_peak())
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == 0 and (
        _unexpected(reporter) or max(_peaks) > MEMORY_LIMIT
    ):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for reason in _unexpected(terminalreporter):
        terminalreporter.write_line(f"FAILED: skip that is not expected: {reason}")
    peak = max(_peaks, default=0)
    verdict = "FAILED: " if peak > MEMORY_LIMIT else ""
    terminalreporter.write_line(
        f"{verdict}largest test process: {peak / 1e9:.2f} GB, of at most"
        f" {MEMORY_LIMIT / 1e9:.1f}"
    )
