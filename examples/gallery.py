"""The pictures of docs/measures/gallery.md: SGD, SAM and vSAM on noisy digits.

Some labels are wrong. The program trains a small network with each method, follows its
curvature, and draws the landscape around its final weights. It takes about a minute on
two cores, and needs flax, matplotlib, rich and scikit-learn too.

    python examples/gallery.py [--out docs/images]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import gallery_measures as measure
import jax
import numpy as np
from gallery_training import (
    LEARNING_RATE,
    NUM_BATCHES,
    OPTIMIZERS,
    WINDOW,
    noisy_digits,
    train,
)
from PIL import Image
from rich.progress import Progress

import optax_sam
from optax_sam import plots, sharpness

TITLES = {
    "sharpness": "Sharpness over training",
    "line": "Loss along a random line",
    "surface": "Loss on a random plane",
    "path": "Three training runs",
    "eigenvectors": "SGD's loss along three eigenvectors",
    "spectrum": "Eigenvalues of the Hessian",
    "ggn": "SGD's network, two matrices",
    "sampling": "How often vSAM perturbs",
}


def main() -> None:
    """Trains, measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (out)")
    parser.add_argument("--quick", action="store_true", help="few of everything")
    args = parser.parse_args()
    num_epochs, every, points = (4, 2, 5) if args.quick else (120, 4, 31)
    data = noisy_digits()
    measured = 64 if args.quick else len(data[0])
    whole = jax.tree.map(lambda x: x[None, :measured], data)  # in one batch
    steps, grid = np.linspace(-1, 1, 61), np.linspace(-1, 1, points)
    lambda_max, paths, densities = defaultdict(list), defaultdict(list), {}
    lines, surfaces = {}, {}
    records: list[dict[str, jax.Array]] = []

    with Progress() as progress:
        for name, optimizer in OPTIMIZERS.items():
            states = train(optimizer, data, num_epochs)
            told: Any = dict(total=num_epochs + 1, description=f"{name} trains")
            vector: Any = None
            for i, (params, opt_state) in enumerate(progress.track(states, **told)):
                if i % every == 0:
                    start = params if vector is None else vector
                    value, vector = measure.top_eigenpair(params, whole, start)
                    lambda_max[name].append(value)
                    paths[name].append(params)
                if name == "vSAM":
                    records.append(optax_sam.metrics(opt_state))
            pair = [
                sharpness.filter_normalized_direction(key, params) for key in (1, 2)
            ]
            lines[name] = measure.plane(params, whole, pair, steps, np.zeros(1))[:, 0]
            rows = progress.track(grid, description=f"{name}'s landscape")
            surfaces[name] = measure.surface(params, whole, pair, rows, grid)
            densities[name] = measure.spectra(params, whole)
        first, last = paths["SGD"][0], paths["SGD"][-1]
        along = measure.along_eigenvectors(last, whole, steps)
        path = sharpness.project_path(paths, first)
        ends = np.concatenate(list(path.coordinates.values()))
        reach = 0.15 * np.ptp(ends, axis=0).max()
        low, high = ends.min(0) - reach, ends.max(0) + reach
        across, up = np.linspace(low, high, points).T
        rows = progress.track(across, description="The paths")
        below = measure.surface(first, whole, path.directions, rows, up)

    trained = NUM_BATCHES * np.arange(num_epochs + 1)
    pictures = {
        "sharpness": plots.sharpness_history(
            trained[::every], lambda_max, learning_rate=LEARNING_RATE
        ),
        "line": plots.loss_line(steps, lines),
        "surface": plots.loss_surface(grid, grid, surfaces)[0],
        "path": plots.loss_surface(across, up, below, path=path),
        "eigenvectors": plots.loss_along_eigenvectors(along),
        "spectrum": plots.spectral_density(
            {name: found["Hessian"] for name, found in densities.items()}
        ),
        "ggn": plots.spectral_panels(
            {name: densities["SGD"][name] for name in ("Hessian", "GGN")}
        )[0],
        "sampling": plots.sampling_rate(trained, records, window=WINDOW),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, ax in pictures.items():
        file = args.out / f"gallery_{name}.png"
        ax.figure.suptitle(f"{TITLES[name]}: digits, 36 % wrong labels", fontsize=10)
        ax.figure.savefig(file)
        # Few colours make a small file.
        Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
