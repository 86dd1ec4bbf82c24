"""What the benchmarks print for the pages, and the files that they keep."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import optax_sam


def table(header: list[str], lines: list[list[str]]) -> str:
    """As Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean, and its standard error (not a number for one value)."""
    values = np.asarray(values, float)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def with_error(values: Any, sign: str = "") -> str:
    """Both, as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f}" + ("" if np.isnan(error) else f" ± {error:.2f}")


def environment() -> dict[str, str]:
    """The versions, and the device."""
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "optax_sam": optax_sam.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def begun(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results that are there, to be added to, if they were made in the same way."""
    if not path.exists():
        return {"settings": settings, "rows": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(
            f"{path} holds results of other settings or versions, which cannot be added"
            " to: remove it, or give another --out"
        )
    return results


def write(results: dict[str, Any], path: Path) -> None:
    """JSON of settings and rows, with a line for each row, however many numbers."""
    text = lambda value: json.dumps(value, ensure_ascii=False)
    rows = [f"{text(name)}: {text(row)}" for name, row in results["rows"].items()]
    settings = text(results["settings"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"settings": {settings},\n"rows": {{\n' + ",\n".join(rows) + "\n}}\n"
    )
