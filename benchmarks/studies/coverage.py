"""How often is the true value within two standard errors? Nine spectra, 100 keys.

Seven spectra are drawn, with random eigenvectors. Two are the Hessians of trained
networks: a tanh network on digits and a small convolutional one. The estimates run with
100 keys on each, in float32 and float64. The script counts the keys for which the true
value lies within two standard errors.

    python benchmarks/studies/coverage.py [--quick] [--out FILE]
    python benchmarks/studies/coverage.py --report [FILE]
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.lib.tables import table
from optax_sam import sharpness
from optax_sam.sharpness.renyi import entropy_of

ORDERS = (0.5, 1.0, 1.5, 2.0)
SIZE = 400


def drawn() -> dict[str, np.ndarray]:
    """The eigenvalues of the spectra that are drawn."""
    rng = np.random.default_rng(7)
    normal, place = rng.normal(size=SIZE), np.arange(1, SIZE + 1)
    clusters = np.repeat([10.0, 1.0, 0.01], [8, 72, SIZE - 80])
    return {
        "positive": np.exp(2 * normal),
        "half negative": normal * np.exp(rng.normal(size=SIZE)),
        "heavy tail": place**-1.5,
        "clusters": clusters * (1 + 0.05 * normal),
        "rank 40": np.where(place <= 40, normal**2, 0),
        "bulk and outliers": np.where(place <= 10, 5.0 / place, 0.01 * normal),
        # Spectra of this kind had no influence on the design of the estimators.
        "eight decades": 10.0 ** np.linspace(-8, 0, SIZE),
    }


def rotated(eigenvalues: np.ndarray) -> np.ndarray:
    """A matrix with these eigenvalues and random eigenvectors."""
    draws = np.random.default_rng(1).normal(size=(len(eigenvalues),) * 2)
    Q = np.linalg.qr(draws)[0]
    return Q * eigenvalues @ Q.T


def dense(p: dict[str, jax.Array], convolution: bool) -> np.ndarray:
    """The Hessian of a network after 400 steps of AdamW on the digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16), jnp.asarray(labels)

    def logits(p: dict[str, jax.Array]) -> jax.Array:
        if not convolution:
            return jnp.tanh(jnp.tanh(x @ p["in"] + p["bias"]) @ p["mid"]) @ p["out"]
        patches = jnp.stack([x.reshape(-1, 8, 8)[:, i : i + 6, j : j + 6]
                             for i in range(3) for j in range(3)], -1)  # fmt: skip
        maps = jnp.tanh(patches @ p["in"] + p["bias"])
        return (
            maps.reshape(len(x), 3, 2, 3, 2, -1).mean((2, 4)).reshape(len(x), -1)
            @ p["out"]
        )

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(p), y).mean()

    tx = optax.adamw(3e-3)

    def step(_: int, carry: Any) -> Any:
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    p = jax.jit(lambda p: jax.lax.fori_loop(0, 400, step, (p, tx.init(p)))[0])(p)
    w, unravel = jax.flatten_util.ravel_pytree(p)
    row = lambda v: jax.jvp(jax.grad(lambda w: loss(unravel(w))), (w,), (v,))[1]
    H = np.asarray(jax.jit(functools.partial(jax.lax.map, row))(jnp.eye(len(w))))
    return (H + H.T) / 2


def networks() -> dict[str, np.ndarray]:
    """Their Hessians, of 400 parameters each."""
    draw = lambda *shape: jnp.asarray(np.random.default_rng(2).normal(size=shape))
    dense_net = {"in": draw(64, 5) / 8, "bias": jnp.zeros(5)}
    dense_net |= {"mid": draw(5, 5) / 2, "out": draw(5, 10) / 2}
    conv_net = {"in": draw(9, 4) / 3, "bias": jnp.zeros(4), "out": draw(36, 10) / 6}
    return {"dense net": dense(dense_net, False), "conv net": dense(conv_net, True)}


def entropy(eigenvalues: np.ndarray, order: float) -> float:
    """Their Renyi entropy."""
    size = abs(eigenvalues)
    p = size[size > 1e-12 * size.max()] / size.sum()
    if order == 1:
        return float(-(p * np.log(p)).sum())
    return float(np.log((p**order).sum()) / (1 - order))


def quadratic(w: jax.Array, batch: jax.Array) -> jax.Array:
    """A loss whose Hessian has one batch's example as its diagonal."""
    return jnp.sum(batch[0] * w**2) / 2


@jax.jit
def run(H: jax.Array, x: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """All estimates for each key: value, standard error and further results.

    Normal draws are the same in all directions. Estimators that use them run on the
    eigenvalues as a diagonal, where products are cheap. Estimators that use signs, and
    the estimate of the diagonal, run on the matrix.
    """
    as_operator = lambda times, n: sharpness.Operator(times, x, n, lambda v: v)
    matrix = as_operator(lambda v: H @ v, len(x))
    spectrum = as_operator(lambda v: x * v, len(x))
    noisy = lambda f: functools.partial(f, params=0 * x, batches=x[None, None])

    def estimates(key: jax.Array) -> dict[str, Any]:
        quadrature = sharpness.deflated_quadrature(spectrum, key)
        density = sharpness.spectral_density(spectrum, key, num_grid=200)
        top = sharpness.eigenvalues(spectrum, key)
        average = noisy(sharpness.average_sharpness)(quadratic, rho=1.0, key=key)
        noise = noisy(sharpness.pac_bayes_flatness)(
            lambda w, batch: -quadratic(w, batch), key=key, target=jnp.abs(x).sum() / 2
        )
        signs = {"key": key, "method": "hutchinson"}
        return {
            "trace, XTrace": sharpness.trace(spectrum, key, method="xtrace"),
            "trace, Hutchinson": sharpness.trace(matrix, **signs),
            "diagonal, XDiag": sharpness.diagonal(matrix, key, method="xdiag"),
            "diagonal, Hutchinson": sharpness.diagonal(matrix, **signs),
            "Frobenius norm": sharpness.frobenius_norm(matrix, key),
            "largest eigenvalue": (top.eigenvalues[0], top.residuals[0]),
            "sum of abs(x)": quadrature.sum(jnp.abs)[:2],
            "sum of squares": quadrature.sum(jnp.square)[:2],
            "density": (density.density, density.stderr, density.grid, density.sigma),
            "average sharpness": average[:2],
            "PAC-Bayes drop": (noise.drop, noise.stderr, noise.sigma),
        } | {f"Renyi, order {a:g}": entropy_of(quadrature, a) for a in ORDERS}

    return jax.lax.map(estimates, keys)


def truth(name: str, H: np.ndarray, x: np.ndarray, known: Any) -> Any:
    """The same from the matrix and its eigenvalues, and the unit of its error."""
    total = abs(x).sum()
    if name.startswith("Renyi"):
        return entropy(x, float(name.split()[-1])), 1.0
    if name.startswith("diagonal"):
        return np.diag(H), np.sqrt(np.mean(np.diag(H) ** 2))
    if name == "density":
        grid, sigma = known
        # Key by key, to save memory.
        bumps = [
            scipy.stats.norm.pdf(g[:, None], x, s)
            for g, s in zip(grid, sigma, strict=True)
        ]
        of_keys = np.stack([b.mean(1) for b in bumps])
        return of_keys, of_keys.max()
    if name == "PAC-Bayes drop":
        return known[0] ** 2 * x.sum() / 2, total / 2
    return {
        "Frobenius norm": (np.sqrt((x**2).sum()), np.sqrt((x**2).sum())),
        "sum of abs(x)": (total, total),
        "sum of squares": ((x**2).sum(), (x**2).sum()),
        "average sharpness": (x.sum() / 2, total / 2),
        "largest eigenvalue": (x.max(), x.max()),
    }.get(name, (x.sum(), total))


def measured(H: np.ndarray, dtype: str, num_keys: int) -> dict[str, list[Any]]:
    """For each estimate: coverage, error, bias, standard error, whether it is exact."""
    H = np.asarray(H, dtype)
    x = np.asarray(np.linalg.eigvalsh(H.astype(float)), dtype)
    keys = jax.random.split(jax.random.key(0), num_keys)
    found = jax.device_get(run(jnp.asarray(H), jnp.asarray(x), keys))
    H, x, rows = H.astype(float), x.astype(float), {}
    for name, (value, stderr, *known) in found.items():
        true, unit = truth(name, H, x, known)
        off = value - true
        if name == "largest eigenvalue":  # its bound is for the nearest eigenvalue
            off = abs(value[:, None] - x).min(1)
            stderr = stderr / 2
        # Up to rounding, which the spread of the draws does not contain.
        rounding = 100 * np.finfo(dtype).eps * max(unit, abs(x).max())
        within = abs(off) <= 2 * stderr + rounding
        if name == "density":  # only where there is a density
            within = within[true > 0.01 * unit]
        rms = np.sqrt(np.mean(off**2))
        numbers = rms, off.mean(), stderr.mean()
        rows[name] = [
            round(float(within.mean()), 4),
            *(float(f"{x / unit:.3g}") for x in numbers),
            bool(rms <= rounding),
        ]
    return rows


def markdown(results: Any) -> dict[str, str]:
    """For each estimate the coverage, and the largest error and bias of all spectra."""
    lines = []
    for name in next(iter(results["rows"].values())):
        rows = [(case, row[name]) for case, row in results["rows"].items()]
        case, worst = max(rows, key=lambda x: x[1][1])
        bias = max((row[2] for _, row in rows), key=abs)
        where = case.partition(",")[0]
        lines.append([name, held(results, name), f"{_shown(name, worst[1])} ({where})",
                      _shown(name, bias, "+")])  # fmt: skip
    header = ["estimate", "keys within two errors, median", "rms error", "bias"]
    return {"all": table(header, lines)}


def _shown(name: str, error: float, sign: str = "-") -> str:
    if "Renyi" in name:
        return f"{error:{sign}.3f} nats"
    return f"{100 * error:{sign}.2g} %"


def held(results: Any, name: str) -> str:
    """How many of the keys have the true value within two standard errors.

    Args:
      results: all results.
      name: the name of an estimate, or the start of several names.
    """
    shares = [
        100 * row[0]
        for rows in results["rows"].values()
        for key, row in rows.items()
        if key.startswith(name) and (name == "largest eigenvalue" or not row[4])
    ]
    low, high = min(shares), max(shares)
    if low == high:
        return f"{high:.0f} %"
    return f"{low:.0f} to {high:.0f} %, {np.median(shares):.0f} %"


def main() -> None:
    """Runs what the file lacks, and prints the table."""
    options = study.parser(__doc__, "coverage.json", quick="4 keys").parse_args()
    if not options.report:
        num_keys = 4 if options.quick else 100
        settings = study.environment() | {"keys": num_keys}
        results = study.begun(settings, options.out)
        jax.config.update("jax_enable_x64", True)
        matrices = networks()
        matrices |= {name: rotated(x) for name, x in drawn().items()}
        for dtype in ("float64", "float32"):
            for name, H in matrices.items():
                case = f"{name}, {dtype}"
                if case not in results["rows"]:
                    results["rows"][case] = measured(H, dtype, num_keys)
                    study.write(results, options.out)
    study.show(options, markdown)


if __name__ == "__main__":
    main()
