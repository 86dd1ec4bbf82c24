"""Tables and numbers as the pages show them."""

from __future__ import annotations

from typing import Any

import numpy as np


def table(header: list[str], lines: list[list[str]]) -> str:
    """As Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean, and its standard error (not a number for one value)."""
    values = np.asarray(values, float)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def signed(mean: float, error: float, sign: str = "+") -> str:
    """A number, by default a difference, and its standard error if it has one."""
    return f"{mean:{sign}.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")


def with_error(values: Any, sign: str = "") -> str:
    """The mean and its standard error, as text."""
    return signed(*mean_and_error(values), sign)
