"""Do two standard errors hold the true value? Estimates of eight spectra, 100 keys.

Six spectra are drawn, with random eigenvectors; two are the Hessians of trained
networks, a tanh network on digits and a small convolutional one. For each, in float32
and float64, the estimates run with 100 keys, and the share of keys is counted at which
the true value lies within two standard errors.

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
    rng = np.random.default_rng(0)
    normal, place = rng.normal(size=SIZE), np.arange(1, SIZE + 1)
    clusters = np.repeat([10.0, 1.0, 0.01], [8, 72, SIZE - 80])
    return {
        "positive": np.exp(2 * normal),
        "half negative": normal * np.exp(rng.normal(size=SIZE)),
        "heavy tail": place**-1.5,
        "clusters": clusters * (1 + 0.05 * normal),
        "rank 40": np.where(place <= 40, normal**2, 0),
        "bulk and outliers": np.where(place <= 10, 5.0 / place, 0.01 * normal),
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
            return jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"]
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
    """Their Hessians, of 1,002 and 724 parameters."""
    draw = lambda *shape: jnp.asarray(np.random.default_rng(2).normal(size=shape))
    dense_net = {"in": draw(64, 13) / 8, "bias": jnp.zeros(13), "out": draw(13, 10) / 4}
    conv_net = {"in": draw(9, 8) / 3, "bias": jnp.zeros(8), "out": draw(72, 9) / 8}
    conv_net["out"] = jnp.pad(conv_net["out"], ((0, 0), (0, 1)))
    return {"dense net": dense(dense_net, False), "conv net": dense(conv_net, True)}


def entropies(eigenvalues: np.ndarray) -> list[float]:
    """The Renyi entropies of the orders."""
    size = abs(eigenvalues)
    p = size[size > 1e-12 * size.max()] / size.sum()
    shannon = -(p * np.log(p)).sum()
    return [
        shannon if a == 1 else np.log((p**a).sum()) / (1 - a) for a in ORDERS
    ]  # fmt: skip


def estimates(H: jax.Array, key: jax.Array) -> dict[str, Any]:
    """All that is estimated, with its standard error."""
    operator = sharpness.Operator(lambda v: H @ v, H[0], len(H), lambda v: v)
    quadrature = sharpness.deflated_quadrature(operator, key)
    power = lambda a: quadrature.sum(lambda x: jnp.abs(x) ** a)[:2]
    found = {
        "trace, XTrace": sharpness.trace(operator, key),
        "trace, Hutchinson": sharpness.trace(operator, key, method="hutchinson"),
        "Frobenius norm": sharpness.frobenius_norm(operator, key),
        "sum of abs(x)": power(1.0),
        "sum of squares": power(2.0),
    }
    for a in ORDERS:  # as renyi_entropy has them, from the same products
        found[f"Renyi, order {a:g}"] = entropy_of(quadrature, a)
    return {name: jnp.stack(tuple(x)) for name, x in found.items()}


@jax.jit
def run(H: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """The estimates with each key, one after the other."""
    return jax.lax.map(functools.partial(estimates, H), keys)


def truth(H: np.ndarray) -> dict[str, float]:
    """The same from all eigenvalues."""
    x = np.linalg.eigvalsh(H)
    found = {
        "trace, XTrace": x.sum(),
        "trace, Hutchinson": x.sum(),
        "Frobenius norm": np.sqrt((x**2).sum()),
        "sum of abs(x)": abs(x).sum(),
        "sum of squares": (x**2).sum(),
    }
    orders = zip(ORDERS, entropies(x), strict=True)
    return found | {f"Renyi, order {a:g}": value for a, value in orders}


def measured(H: np.ndarray, dtype: str, num_keys: int) -> dict[str, list[float]]:
    """For each estimate: coverage, error, bias and standard error, in its own unit."""
    H = np.asarray(H, dtype).astype(float)
    keys = jax.random.split(jax.random.key(0), num_keys)
    found = jax.device_get(run(jnp.asarray(H, dtype), keys))
    rows = {}
    for name, true in truth(H).items():
        value, stderr = np.asarray(found[name], float).T
        off = value - true
        # To a rounding, which no spread of draws knows.
        rounding = 100 * np.finfo(dtype).eps * max(abs(true), 1)
        within = abs(off) <= 2 * stderr + rounding
        rms = np.sqrt(np.mean(off**2))
        unit = 1 if "Renyi" in name else abs(true)
        exact = bool(rms <= rounding)
        rows[name] = [float(within.mean()), *(float(x / unit) for x in (
            rms, off.mean(), stderr.mean())), exact]  # fmt: skip
    return rows


def markdown(results: Any) -> dict[str, str]:
    """For each estimate the coverage of all spectra, and its largest error."""
    lines, names = [], list(next(iter(results["rows"].values())))
    for name in names:
        rows = [(case, row[name]) for case, row in results["rows"].items()]
        held = [100 * x[0] for _, x in rows if not x[4]]
        case, worst = max(rows, key=lambda x: x[1][1])
        error = f"{worst[1]:.2f} nats" if "Renyi" in name else f"{100 * worst[1]:.1f} %"
        lines.append([name, f"{min(held):.0f} to {max(held):.0f} %, median"
                      f" {np.median(held):.0f} %", f"{error} ({case})"])  # fmt: skip
    header = [
        "estimate",
        "keys within two standard errors",
        "largest error (rms), where",
    ]
    return {"all": table(header, lines)}


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    options = study.parser(__doc__, "coverage.json", quick="4 keys").parse_args()
    if not options.report:
        num_keys = 4 if options.quick else 100
        settings = study.environment() | {"keys": num_keys}
        results = study.begun(settings, options.out)
        jax.config.update("jax_enable_x64", True)
        matrices = {name: rotated(x) for name, x in drawn().items()}
        matrices |= networks()
        for dtype in ("float64", "float32"):
            for name, H in matrices.items():
                case = f"{name}, {dtype}"
                if case not in results["rows"]:
                    results["rows"][case] = measured(H, dtype, num_keys)
                    study.write(results, options.out)
    study.show(options, markdown)


if __name__ == "__main__":
    main()
