"""Quantization-aware training (LSQ) with SGD, SAM and vSAM, on digits.

It trains as examples/lsq_digits.py does. A full-precision network is trained for each
of ten seeds. Then it is quantized, and all methods fine-tune it from the same start and
on the same batches. This takes a minute on two cores.

    python benchmarks/studies/lsq.py [--bits 4 2] [--quick] [--out FILE]
    python benchmarks/studies/lsq.py --report [FILE]

Bits that the file already holds are not trained again. The results for four bits are
printed beside the published ones of vSAM.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import lsq_digits as example
from lsq_layers import Network, not_steps

import optax_sam
from benchmarks.lib import costs, published, study
from benchmarks.lib.tables import table


class Method(NamedTuple):
    """The method before weight decay and SGD, and whether the network is quantized."""

    quantized: bool
    settings: str
    member: Any


# Radii from 0.1, 0.2, 0.3, 0.5 and 0.7 (vSAM to 0.5) and windows of 10, 15, 20 and 30
# steps: twelve seeds not used here, judged on the images that are neither trained on
# nor tested. SAM's 0.2 to 0.5 are equally good. In 500 steps vSAM needs short windows.
SAM = optax_sam.sam(rho=0.3, mask=not_steps)
METHODS = {
    "FP + SGD": Method(False, "", example.SGD),
    "FP + SAM": Method(False, "`rho` 0.3", SAM),
    "LSQ + SGD": Method(True, "", example.SGD),
    "LSQ + SAM": Method(True, "`rho` 0.3", SAM),
    "LSQ + vSAM": Method(True, "`rho` 0.2, window 15", example.VSAM),
}
STEPS = "weight_step", "input_step"


def train(
    bits: int, num_seeds: int, num_epochs: int, progress: Progress
) -> dict[str, Any]:
    """Trains a full-precision network per seed, and fine-tunes it with all methods.

    Args:
      bits: the bits of the inner layers' weights and activations.
      num_seeds: number of runs; a seed sets the images, the weights and the batches.
      num_epochs: epochs of the full-precision run, and of each fine-tuning.
      progress: the progress bar.

    Returns:
      A row of results for each method, with lists over the seeds.
    """
    images, test_images, labels, test_labels = example.load()
    models = {False: Network(None), True: Network(bits)}
    steps = num_epochs * example.NUM_IMAGES // example.BATCH_SIZE
    pretrain = example.make_fit(
        models[False], example.SGD, example.PRETRAINING_RATE, steps
    )
    fits = {
        name: example.make_fit(models[x.quantized], x.member, example.RATE, steps)
        for name, x in METHODS.items()
    }
    measured: Any = defaultdict(lambda: defaultdict(list))
    task = progress.add_task(f"{bits} bits", total=num_seeds * len(METHODS))
    for seed in range(num_seeds):
        batches = example.batches_of(images, labels, seed, num_epochs)
        first = batches[0][0]
        params = models[False].init(jax.random.key(seed), first)
        params, _ = pretrain(params, batches)
        start = {False: params, True: example.quantized(bits, params, first)}
        for name, (quantized, _, member) in METHODS.items():
            params, opt_state = fits[name](start[quantized], batches)
            logits = models[quantized].apply(params, test_images)
            row = {"accuracy": 100 * np.mean(logits.argmax(-1) == test_labels)}
            price, rate = costs.cost(member), 1.0
            if price.skipped is not None:
                rate = optax_sam.metrics(opt_state)["ascent_rate"]
            row["gradients_per_step"] = price.mean(rate)
            now, then = params["params"], start[quantized]["params"]
            for kind in STEPS if quantized else ():
                row[kind] = np.mean([now[k][kind] / then[k][kind] for k in now])
            for quantity, value in row.items():
                measured[name][quantity].append(round(float(value), 4))
            progress.advance(task)
    return {
        f"{bits} bits, {name}": {"settings": METHODS[name].settings, **row}
        for name, row in measured.items()
    }


def summary(values: Any, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{spread}"


def comparison(rows: dict[str, Any], beside: dict[str, dict[str, Any]]) -> str:
    """One line per method, with the published results beside it."""
    seeds = len(rows["LSQ + SGD"]["accuracy"])
    header = ["method", "settings", f"test accuracy (%), {seeds} seeds"]
    header += ["minus LSQ + SGD", "ahead of it on", "gradients per step"]
    header += ["weight steps", "input steps"]
    for network in beside:
        header += [f"{network} (%)", "its AIS / SAM's"]
    lines = []
    for name, row in rows.items():
        gain = np.subtract(row["accuracy"], rows["LSQ + SGD"]["accuracy"])
        cells = [name, row["settings"], summary(row["accuracy"])]
        compared = name != "LSQ + SGD"
        cells += [summary(gain, "+") if compared else ""]
        cells += [f"{np.sum(gain > 0)} of {seeds}" if compared else ""]
        cells += [f"{np.mean(row['gradients_per_step']):.2f}"]
        cells += [f"{np.mean(row[k]):.2f}" if k in row else "" for k in STEPS]
        for known in beside.values():
            cells += quoted(known, name)
        lines.append(cells)
    for name in next(iter(beside.values()), {}):
        if name not in rows:
            blank = [""] * (len(header) - 1 - 2 * len(beside))
            cells = [quoted(published, name) for published in beside.values()]
            lines.append([f"{name} (paper)", *blank, *sum(cells, [])])
    return table(header, lines)


def quoted(published: dict[str, Any], name: str) -> list[str]:
    """The published accuracy and speed of a method."""
    row = published.get(name, [{"accuracy": "", "ais_percent": ""}])[0]
    speed = row["ais_percent"]
    return [row["accuracy"], f"{speed} %" if speed else ""]


def markdown(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/guide/quantization.md, by name."""
    by_bits: dict[str, dict[str, Any]] = {}
    for name, row in results["rows"].items():
        bits, method = name.split(", ")
        by_bits.setdefault(bits, {})[method] = row
    networks = {"ResNet-18": "resnet18", "MobileNets": "mobilenets"}
    known = {
        title: published.figures("cifar10-w4a4", name)
        for title, name in networks.items()
    }
    return {
        bits: comparison(rows, known if bits == "4 bits" else {})
        for bits, rows in by_bits.items()
    }


def main() -> None:
    """Trains, writes and prints."""
    parser = study.parser(__doc__, "lsq.json", quick="one seed, ten epochs")
    wanted = "of the inner layers (4 2)"
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help=wanted)
    options = parser.parse_args()
    if min(options.bits) < 2:
        parser.error("--bits must be at least 2: a sign takes one of them")
    if not options.report:
        run(options.bits, options.quick, options.out)
    study.show(options, markdown)


def run(bits: list[int], quick: bool, out: Path) -> None:
    """Trains the networks that the file lacks, and adds the results."""
    num_seeds, num_epochs = (1, 10) if quick else (10, 50)
    settings = {
        **study.environment(),
        "seeds": num_seeds,
        "epochs": num_epochs,
        "training_images": example.NUM_IMAGES,
        "batch_size": example.BATCH_SIZE,
        "learning_rates": [example.PRETRAINING_RATE, example.RATE],
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    results = study.begun(settings, out)
    with study.progress() as progress:
        for number in bits:
            if f"{number} bits, LSQ + SGD" not in results["rows"]:
                rows = train(number, num_seeds, num_epochs, progress)
                results["rows"] |= rows
                study.write(results, out)


if __name__ == "__main__":
    main()
