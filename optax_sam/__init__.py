"""Sharpness-aware minimization as pure Optax gradient transformations."""

from optax_sam.version import __version__

__all__ = ["__version__"]
