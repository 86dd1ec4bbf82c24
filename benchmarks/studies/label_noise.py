"""All methods on digits, 40 % of whose training labels are replaced.

A small network is trained by each method for three seeds, in turns of one epoch so that
their times compare, and tested on clean labels after each. Gradients are counted, a
forward pass alone as a third of one. Four minutes on two cores for all methods.

    python benchmarks/studies/label_noise.py [--methods LookSAM,MSAM] [--quick]
        [--out FILE]
    python benchmarks/studies/label_noise.py --report [FILE]
        [--methods SGD,SAM,vSAM,MSAM --figure docs/images/digits_label_noise.png]

Methods that the file already holds are not trained again; SGD always is, as the measure
of time. A figure of up to seven methods has their learning curves, one of more their
costs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import TextColumn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.lib.tables import table
from benchmarks.studies.label_noise_figure import draw
from benchmarks.studies.label_noise_methods import BATCH_SIZE, all_methods
from benchmarks.studies.label_noise_training import NOISE, train

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
    """The tables of docs/results/demo.md, by name."""
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
    quick = "one seed, two epochs"
    parser = study.parser(__doc__, "label_noise.json", quick=quick, figure=True)
    which = "names with commas between; all if not given"
    parser.add_argument("--methods", type=chosen, help=which)
    options = parser.parse_args()
    names = options.methods or list(all_methods(1, 1))
    if not options.report:
        run(names, options.quick, options.out)

    def read(path: Path) -> dict[str, Any]:
        rows = study.read(path)["rows"]
        return {"rows": {name: rows[name] for name in names if name in rows}}

    study.show(options, markdown, lambda found, path: draw(found["rows"], path), read)


def run(names: list[str], quick: bool, out: Path) -> None:
    """Trains what the file lacks, and adds it."""
    num_seeds, num_epochs = (1, 2) if quick else (3, 100)
    settings = {
        **study.environment(),
        "seeds": num_seeds,
        "epochs": num_epochs,
        "batch_size": BATCH_SIZE,
        "noise": NOISE,
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    rows = study.begun(settings, out)["rows"]
    missing = [name for name in names if name not in rows]
    if not missing:
        return
    speed = TextColumn("{task.fields[rate]:.1f} epochs/s")
    with study.progress(speed) as progress:
        wanted = [name for name in names if name in {"SGD", *missing}]
        rows = train(wanted, num_seeds, num_epochs, progress) | rows
    ordered = {name: rows[name] for name in all_methods(1, 1) if name in rows}
    study.write({"settings": settings, "rows": ordered}, out)


if __name__ == "__main__":
    main()
