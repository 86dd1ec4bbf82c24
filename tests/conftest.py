"""Devices and fixtures for all tests."""

import os

# Before JAX is imported: eight devices of the CPU, for the tests of sharding; machine
# code as it comes: a quarter of compiling, which dominates, is improving what runs for
# milliseconds here. What XLA makes of a program, and counts, is not affected.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

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
