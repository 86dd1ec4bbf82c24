"""Print which versions an environment holds: show.py NAME."""

import platform
import sys
from importlib.metadata import version

packages = " ".join(f"{name} {version(name)}" for name in ("jax", "optax", "flax"))
print(f"{sys.argv[1]}: Python {platform.python_version()}, {packages}", flush=True)
