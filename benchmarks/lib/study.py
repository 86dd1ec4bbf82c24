"""Shared code of the scripts: options, files of results, progress, printing.

A script's ``main`` makes a :func:`parser`, adds further options, runs unless
``--report`` is given, and ends with :func:`show`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def parser(
    doc: str | None,
    name: str,
    *,
    out: Path | None = None,
    quick: str = "",
    data: bool = False,
    figure: bool = False,
) -> argparse.ArgumentParser:
    """The options of a script.

    Args:
      doc: the docstring of the script.
      name: the name of its committed results.
      out: the default file for results.
      quick: the help of ``--quick``; without it there is no such option.
      data: whether there is an option for Fashion-MNIST.
      figure: whether there is an option for a figure.
    """
    new = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    out = out or Path("out", name)
    new.add_argument("--out", type=Path, default=out, help=f"JSON, added to ({out})")
    told, committed = f"JSON to print as Markdown (results/{name})", RESULTS / name
    new.add_argument("--report", type=Path, nargs="?", const=committed, help=told)
    if quick:
        new.add_argument("--quick", action="store_true", help=quick)
    if data:
        new.add_argument("--data", type=Path, help="Fashion-MNIST: .npz, or its folder")
    if figure:
        new.add_argument("--figure", type=Path, help="PNG to draw")
    return new


def show(
    options: argparse.Namespace,
    markdown: Callable[[Any], str | dict[str, str]],
    draw: Callable[[Any, Path], None] | None = None,
    reader: Callable[[Path], Any] | None = None,
) -> None:
    """Prints the tables of the results, and draws the figure.

    Args:
      options: the options from :func:`parser`.
      markdown: makes the tables, one text or several by name.
      draw: makes the figure, if the script has one.
      reader: reads the file of results.
    """
    results = (reader or read)(options.report or options.out)
    if draw and options.figure and results:
        draw(results, options.figure)
    made = markdown(results)
    named = made.items() if isinstance(made, dict) else [("", made)]
    for name, text in named:
        print(f"{name}\n\n{text}\n" if name else text)


def read(path: Path, without: Any = None) -> Any:
    """The results in a file; ``without`` if there is no file."""
    if without is not None and not path.exists():
        return without
    return json.loads(path.read_text())


def begun(settings: dict[str, Any], path: Path, **empty: Any) -> dict[str, Any]:
    """The existing results to add to, which must have the same settings."""
    results = read(path, {"settings": settings, **(empty or {"rows": {}})})
    if results.get("settings") != settings:
        raise SystemExit(
            f"{path} holds results of other settings or versions, which cannot be added"
            " to: remove it, or give another --out"
        )
    return results


def write(results: Any, path: Path) -> None:
    """Writes JSON, with one line for each object that holds only numbers and texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(results) + "\n")


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list):
        return text
    named = isinstance(value, dict)
    inner = list(value.values()) if named else value
    if '{"' not in json.dumps(inner):  # within a string the quote would be escaped
        return text
    lines = list(map(_text, inner))
    if named:
        lines = [f'"{name}": {x}' for name, x in zip(value, lines, strict=True)]
    return text[0] + "\n" + ",\n".join(lines) + "\n" + text[-1]


def save(figure: Any, path: Path) -> None:
    """Saves a figure, and makes its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def environment(*packages: str) -> dict[str, str]:
    """The versions, and the device."""
    import jax

    import optax_sam

    return {
        **{name: version(name) for name in packages or ("jax", "optax")},
        "optax_sam": optax_sam.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def progress(*columns: Any, console: Console | None = None) -> Progress:
    """A progress bar with the amount done, or with further columns instead."""
    columns = *Progress.get_default_columns(), *(columns or [MofNCompleteColumn()])
    return Progress(*columns, console=console or Console(), refresh_per_second=2)
