"""Devices and fixtures for all tests."""

import importlib
import importlib.metadata
import os
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
ROOT = Path(__file__).parents[1]
for _flag, _value in _FLAGS.items():
    _given = os.environ.get("XLA_FLAGS", "")
    if _flag not in _given:
        os.environ["XLA_FLAGS"] = f"{_given} {_flag}={_value}".strip()

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The first example of a shape compiles, so a deadline would measure the compiler. The
# same examples on every run: a failure in CI can be repeated.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("tests")


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
