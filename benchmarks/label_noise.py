"""All methods on digits, 40 % of whose training labels are replaced.

A small network is trained by each method for three seeds, in turns of one epoch so that
their times compare, and tested on clean labels after each. Gradients are counted, a
forward pass alone as a third of one. Four minutes on two cores for all methods.

    python benchmarks/label_noise.py [--methods LookSAM,MSAM] [--quick] [--out FILE]
    python benchmarks/label_noise.py --report benchmarks/results/label_noise.json
        [--methods SGD,SAM,vSAM,MSAM --figure docs/images/digits_label_noise.png]

Methods that the file already holds are not trained again; SGD always is, as the measure
of time. A figure of up to seven methods has their learning curves, one of more their
costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from label_noise_figure import draw
from label_noise_methods import BATCH_SIZE, all_methods
from label_noise_training import NOISE, train
from rich.console import Console
from rich.progress import Progress, TextColumn
from tables import begun, environment, table, write

DEMO = "SGD", "SAM", "vSAM", "MSAM"  # as in examples/digits_label_noise.py


def comparison(rows: dict[str, Any], times: bool = True) -> str:
    """One line per method."""
    epochs = len(rows["SGD"]["accuracy"][0])
    header = ["method", "settings", "best epoch (%)", f"epoch {epochs} (%)"]
    header += ["gradients per step"] + ["time / SGD"] * times
    lines = []
    for name, row in rows.items():
        percent = np.array(row["accuracy"])
        last = f"{percent[:, -1].mean():.1f}"
        if len(percent) > 1:
            last += f" ± {percent[:, -1].std(ddof=1):.1f}"
        cells = [name, row["settings"], f"{percent.mean(0).max():.1f}", last]
        cells += [f"{np.mean(row['gradients_per_step']):.2f}"]
        lines.append(cells + [f"{row['time_to_sgd']:.2f}"] * times)
    return table(header, lines)


def markdown(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/demo.md, by name."""
    rows = results["rows"]
    tables = {"all": comparison(rows)}
    if rows.keys() >= {*DEMO}:
        # On so small a network times show all bookkeeping: for those who want details.
        tables["demo"] = comparison({name: rows[name] for name in DEMO}, times=False)
    return tables


def chosen(text: str) -> list[str]:
    """The names in a comma-separated list, and SGD, the reference for times."""
    known = {name.lower(): name for name in all_methods(1, 1)}
    wanted = {name.strip().lower() for name in text.split(",")}
    if unknown := sorted(wanted - known.keys()):
        raise argparse.ArgumentTypeError(
            f"no method {', '.join(unknown)}; choose from {', '.join(known.values())}"
        )
    return [name for key, name in known.items() if key in wanted | {"sgd"}]


def main() -> None:
    """Trains, writes, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = "names with commas between; all if not given"
    parser.add_argument("--methods", type=chosen, help=which)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    out = Path("out/label_noise.json")
    parser.add_argument("--out", type=Path, default=out, help=f"JSON, added to ({out})")
    parser.add_argument("--report", type=Path, help="JSON to print as Markdown")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args()
    names = options.methods or list(all_methods(1, 1))
    if not options.report:
        run(names, options.quick, options.out)
    results = json.loads((options.report or options.out).read_text())
    rows = {name: results["rows"][name] for name in names if name in results["rows"]}
    if options.figure:
        draw(rows, options.figure)
    for name, text in markdown({"rows": rows}).items():
        print(f"{name}\n\n{text}\n")


def run(names: list[str], quick: bool, out: Path) -> None:
    """Trains what the file lacks, and adds it."""
    num_seeds, num_epochs = (1, 2) if quick else (3, 100)
    settings = {
        **environment(),
        "seeds": num_seeds,
        "epochs": num_epochs,
        "batch_size": BATCH_SIZE,
        "noise": NOISE,
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    rows = begun(settings, out)["rows"]
    missing = [name for name in names if name not in rows]
    if not missing:
        return
    speed = TextColumn("{task.fields[rate]:.1f} epochs/s")
    columns = *Progress.get_default_columns(), speed
    with Progress(*columns, console=Console(), refresh_per_second=4) as progress:
        wanted = [name for name in names if name in {"SGD", *missing}]
        rows = train(wanted, num_seeds, num_epochs, progress) | rows
    ordered = {name: rows[name] for name in all_methods(1, 1) if name in rows}
    write({"settings": settings, "rows": ordered}, out)


if __name__ == "__main__":
    main()
