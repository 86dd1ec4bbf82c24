"""The pictures of docs/measures/gallery.md: SGD, SAM and vSAM on noisy digits.

Some labels are wrong. It trains a small network with each, follows the curvature of its
training loss, looks at the landscape around the end, and draws. It takes less than a
minute on two cores, and needs flax, matplotlib, rich and scikit-learn too.

    python examples/gallery.py [--out docs/images]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gallery_training import (
    LEARNING_RATE,
    NUM_BATCHES,
    OPTIMIZERS,
    WINDOW,
    loss_fn,
    noisy_digits,
    train,
)
from PIL import Image
from rich.progress import Progress

import optax_sam
from optax_sam import plots, sharpness


# Parameters and data are arguments: closed over, they would be compiled in.
@jax.jit
def top_eigenpair(params: Any, data: Any, init: Any) -> tuple[jax.Array, Any]:
    """The largest eigenvalue; from the last eigenvector, few products find it."""
    options: Any = dict(num_matvecs=10, init=init)
    found = sharpness.hessian_eigenvalues(loss_fn, params, data, 0, **options)
    return found.eigenvalues[0], jax.tree.map(lambda v: v[0], found.eigenvectors)


@jax.jit
def landscape(params: Any, data: Any, alphas: Any, betas: Any) -> jax.Array:
    """The loss on a plane in two random directions, of the filters' lengths."""
    pair = [sharpness.filter_normalized_direction(key, params) for key in (1, 2)]
    return sharpness.loss_surface(loss_fn, params, data, pair, alphas, betas)


@jax.jit
def spectrum(params: Any, data: Any) -> sharpness.SpectralDensity:
    """The density of the eigenvalues, smoothed alike for all networks."""
    options: Any = dict(num_lanczos=60, num_probes=4, sigma=0.05)
    return sharpness.spectral_density(loss_fn, params, data, 0, **options)


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
    line, plane = np.linspace(-1, 1, 61), np.linspace(-1, 1, points)
    lambda_max, lines, surfaces, spectra = defaultdict(list), {}, {}, {}
    records: list[dict[str, jax.Array]] = []

    with Progress() as progress:
        for name, optimizer in OPTIMIZERS.items():
            states = train(optimizer, data, num_epochs)
            told: Any = dict(total=num_epochs + 1, description=f"{name} trains")
            vector: Any = None
            for i, (params, opt_state) in enumerate(progress.track(states, **told)):
                if i % every == 0:
                    start = params if vector is None else vector
                    value, vector = top_eigenpair(params, whole, start)
                    lambda_max[name].append(value)
                if name == "vSAM":
                    records.append(optax_sam.metrics(opt_state))
            lines[name] = landscape(params, whole, line, np.zeros(1))[:, 0]
            # Row by row, all by one compiled program, so that the bar can move.
            rows = progress.track(plane, description=f"{name}'s landscape")
            surfaces[name] = [landscape(params, whole, a[None], plane)[0] for a in rows]
            spectra[name] = spectrum(params, whole)

    steps = NUM_BATCHES * np.arange(num_epochs + 1)
    pictures = {
        "sharpness": plots.sharpness_history(
            steps[::every], lambda_max, learning_rate=LEARNING_RATE
        ),
        "line": plots.loss_line(line, lines),
        "surface": plots.loss_surface(plane, plane, surfaces)[0],
        "spectrum": plots.spectral_density(spectra),
        "sampling": plots.sampling_rate(steps, records, window=WINDOW),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, ax in pictures.items():
        path = args.out / f"gallery_{name}.png"
        ax.figure.savefig(path)
        # Few colours make a small file.
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
