"""Which measure of sharpness correlates with generalization?

Small networks of one architecture are trained on a grid of optimizers, learning rates,
batch sizes and weight decays, for the same number of epochs. Every measure of
``optax_sam.sharpness`` is computed for each network, on the same 512 training examples
with their training labels. Kendall's tau-a of a measure with the generalization gap
(test minus training error) over all models has a bootstrap interval over models. The
granulated tau is the mean over pairs that differ in one hyperparameter alone. All radii
are reported, not only the best. A second part compares geodesic with adaptive sharpness
of a small transformer whose weights change while its function stays the same.

    python benchmarks/studies/correlation.py [--data fashion_mnist_20k.npz] [--quick]
        [--sets digits fashion] [--out FILE] [--figure FILE]
    python benchmarks/studies/correlation.py --report [FILE] [--figure FILE]

Without ``--data`` only digits run. The script continues where it stopped: models in the
file are not trained again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

sys.path.insert(0, str(Path(__file__).parents[2]))

import optax_sam
from benchmarks.lib import datasets, networks, study
from benchmarks.lib.tables import table
from optax_sam import sharpness
from optax_sam.plots import method_colour
from optax_sam.plots.colours import BLACK, GREY, ORANGE

TITLES = {
    "digits": "Digits, 20 % of the labels replaced",
    "fashion": "Fashion-MNIST, 2,000 images, clean labels",
}
GRID: dict[str, tuple[Any, ...]] = {
    "optimizer": ("SGD", "SAM", "vSAM", "MSAM"),
    "learning_rate": (0.02, 0.05, 0.1),
    "batch_size": (32, 128),
    "weight_decay": (0.0, 2e-3),
}
SHAPE = tuple(map(len, GRID.values()))
SUBSET, BATCH = 512, 128  # m, which m-sharpness depends on
RENYI = {"num_top_matvecs": 40, "num_lanczos": 30, "num_probes": 5, "num_eigs": 20}

model = networks.dense(48, 32)


class Task(NamedTuple):
    """A data set with flat images from 0 to 1, and the length of a training run."""

    images: np.ndarray
    labels: np.ndarray  # as trained on
    test_images: np.ndarray
    test_labels: np.ndarray
    noise: float
    epochs: int
    rho: dict[str, float]


def load(name: str, data: Path | None) -> Task:
    """The data set of that name."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32)
        x, test_x, y, test_y = train_test_split(
            images, labels, train_size=1024, stratify=labels, random_state=0
        )
        y = datasets.replaced(y, len(y) // 5, np.random.default_rng(0))
        rho = {"SAM": 0.2, "vSAM": 0.2, "MSAM": 1.0}
        return Task(x, y.astype(np.int32), test_x, test_y, 0.2, 100, rho)
    x, y, test_x, test_y = datasets.load("fashion-mnist", data)
    # Two by two pixels in one: a tenth of the time for the measures.
    small = lambda x: datasets.flat(x.reshape(-1, 14, 2, 14, 2).mean((2, 4)), 255)
    rows = np.random.default_rng(0).permutation(len(y))[:2048]
    rho = {"SAM": 0.1, "vSAM": 0.1, "MSAM": 0.4}
    return Task(small(x[rows]), y[rows], small(test_x), test_y, 0.0, 60, rho)


def logits_of(params: Any, images: jax.Array) -> jax.Array:
    """The logits of the network."""
    return model.apply(params, images)


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy, without weight decay."""
    return networks.losses(logits_of(params, batch[0]), batch[1]).mean()


def normalized_loss(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of normalized logits, so that their scale does not matter."""
    logits = sharpness.normalize_logits(logits_of(params, batch[0]))
    return networks.losses(logits, batch[1]).mean()


def accuracy(params: Any, batch: Any) -> jax.Array:
    """The share of right answers."""
    return jnp.mean(logits_of(params, batch[0]).argmax(-1) == batch[1])


@functools.partial(jax.jit, static_argnames=("optimizer", "batch_size", "epochs"))
def train(
    optimizer: str,
    batch_size: int,
    epochs: int,
    data: Any,
    learning_rate: Any,
    weight_decay: Any,
    rho: Any,
) -> Any:
    """A training run as one program; returns the final and the initial parameters."""
    images, labels = data
    per_epoch = len(labels) // batch_size
    schedule = lambda count: (
        learning_rate * (1 + jnp.cos(jnp.pi * count / (epochs * per_epoch))) / 2
    )
    decay = optax.add_decayed_weights(weight_decay)
    sgd = optax.sgd(schedule, momentum=0.9)
    tx = {
        "SGD": lambda: optax.chain(decay, sgd),
        "SAM": lambda: optax.chain(optax_sam.sam(rho), decay, sgd),
        "vSAM": lambda: optax.chain(optax_sam.vsam(rho, window=30), decay, sgd),
        "MSAM": lambda: optax.chain(decay, optax_sam.msam(sgd, rho=rho)),
    }[optimizer]()
    tx = optax.with_extra_args_support(tx)
    start = model.init(jax.random.key(0), images[:1])

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        batch = images[rows], labels[rows]
        grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
        order = jax.random.permutation(key, len(labels))[: per_epoch * batch_size]
        return jax.lax.scan(step, carry, order.reshape(per_epoch, batch_size))

    keys = jax.random.split(jax.random.key(1), epochs)
    (params, opt_state), _ = jax.lax.scan(epoch, (start, tx.init(start)), keys)
    if optimizer == "MSAM":
        params = optax_sam.msam_eval_params(opt_state, params)
    return params, start


Measure = Callable[[Any, Any], dict[str, Any]]


def measures() -> dict[str, Measure]:
    """Each group of measures, as a program of the parameters and the batches."""

    def eigenvalues(params: Any, batches: Any) -> dict[str, Any]:
        result = sharpness.hessian_eigenvalues(
            loss_fn, params, batches, 0, k=5, num_matvecs=40
        )
        trace = sharpness.hessian_trace(loss_fn, params, batches, 0).estimate
        norm = sharpness.hessian_frobenius_norm(loss_fn, params, batches, 0).estimate
        top = result.eigenvalues
        return {
            "lambda_max": top[0],
            "lambda_1 / lambda_5": top[0] / top[4],
            "trace": trace,
            "Frobenius norm": norm,
            "lambda_max / trace": top[0] / trace,
            "effective rank, negative": -((trace / norm) ** 2),
        }

    def entropies(params: Any, batches: Any) -> dict[str, Any]:
        options: Any = {"alpha": (0.5, 1.5), **RENYI}
        whole = sharpness.renyi_sharpness(loss_fn, params, batches, 0, **options)
        layers = sharpness.renyi_sharpness(
            loss_fn, params, batches, 0, layerwise=True, **options
        )
        is_result = lambda x: isinstance(x, sharpness.RenyiResult)
        found = [x for x in jax.tree.leaves(layers, is_leaf=is_result) if x]
        named = {"whole network": whole}
        named |= {f"layer {i + 1}": result for i, result in enumerate(found)}
        return {
            f"Renyi, order {alpha}, {name}": result.value[i]
            for i, alpha in enumerate((0.5, 1.5))
            for name, result in named.items()
        }

    def averages(params: Any, batches: Any) -> dict[str, Any]:
        radii = {False: (0.01, 0.03, 0.1), True: (0.1, 0.2, 0.4)}
        run = functools.partial(sharpness.average_sharpness, loss_fn, params, batches)
        return {
            f"average{', adaptive' * adaptive}, rho {rho}": run(
                rho, 0, adaptive=adaptive
            ).value
            for adaptive in radii
            for rho in radii[adaptive]
        }

    def worst_cases(params: Any, batches: Any) -> dict[str, Any]:
        radii = {
            (False, "l2"): (0.1, 0.3, 1.0),
            (True, "l2"): (0.3, 1.0, 3.0),
            (False, "linf"): (0.001, 0.003, 0.01),
            (True, "linf"): (0.01, 0.03, 0.1),
        }
        return {
            f"worst case{', adaptive' * adaptive}, {norm}, rho {rho}": (
                sharpness.worst_case_sharpness(
                    loss_fn, params, batches, rho, 0, adaptive=adaptive, norm=norm
                ).value
            )
            for (adaptive, norm), rhos in radii.items()
            for rho in rhos
        }

    def normalized(params: Any, batches: Any) -> dict[str, Any]:
        return {
            f"worst case, adaptive, {norm}, normalized logits, rho {rho}": (
                sharpness.worst_case_sharpness(
                    normalized_loss, params, batches, rho, 0, adaptive=True, norm=norm
                ).value
            )
            for norm, rho in (("l2", 1.0), ("linf", 0.03))
        }

    def steps(params: Any, batches: Any) -> dict[str, Any]:
        run = functools.partial(sharpness.sam_sharpness, loss_fn, params, batches)
        keskar = sharpness.keskar_sharpness(loss_fn, params, batches, 0).value
        return {
            "one SAM step, rho 0.1": run(0.1).value,
            "one SAM step, adaptive, rho 1.0": run(1.0, adaptive=True).value,
            "Keskar, eps 0.001": keskar,
        }

    def flatness(params: Any, batches: Any) -> dict[str, Any]:
        run = functools.partial(
            sharpness.pac_bayes_flatness, accuracy, params, batches, 0
        )
        return {
            "PAC-Bayes, 1 / sigma^2": run().value,
            "PAC-Bayes, magnitude-aware": run(magnitude_aware=True).value,
        }

    groups = eigenvalues, entropies, averages, worst_cases, normalized, steps, flatness
    return {f.__name__: jax.jit(f) for f in groups}


def outcome(params: Any, start: Any, task: Task) -> dict[str, float]:
    """Losses, errors and norms: the quantities to predict, and baselines."""
    of = lambda f, *data: float(jax.jit(f)(params, data))
    train_set = task.images, task.labels
    test_set = task.test_images, task.test_labels
    return {
        "training loss": of(loss_fn, *train_set),
        "test loss": of(loss_fn, *test_set),
        "training error (%)": 100 * (1 - of(accuracy, *train_set)),
        "test error (%)": 100 * (1 - of(accuracy, *test_set)),
        "weight norm": float(optax.tree.norm(params)),
        "distance from the start": float(
            optax.tree.norm(optax.tree.sub(params, start))
        ),
    }


def fill(name: str, task: Task, rows: list[Any], save: Any, quick: bool) -> None:
    """Trains and measures all models of the grid that are not in ``rows``."""
    grid = [dict(zip(GRID, x, strict=True)) for x in itertools.product(*GRID.values())]
    done = [row["settings"] for row in rows]
    wanted = [x for x in grid if x not in done][: 3 if quick else None]
    data = jnp.asarray(task.images), jnp.asarray(task.labels)
    subset = jax.tree.map(lambda x: x[:SUBSET], data)
    batches = sharpness.stack_batches(subset, BATCH)
    groups = measures()
    with study.progress() as progress:
        bar = progress.add_task(name, total=len(wanted) * (1 + len(groups)))
        for settings in wanted:
            params, start = train(
                settings["optimizer"],
                settings["batch_size"],
                2 if quick else task.epochs,
                data,
                settings["learning_rate"],
                settings["weight_decay"],
                task.rho.get(settings["optimizer"], 0.0),
            )
            row = {"settings": settings, **outcome(params, start, task)}
            progress.advance(bar)
            row["measures"] = {}
            for measure in groups.values():
                values = jax.device_get(measure(params, batches))
                row["measures"] |= {k: float(f"{v:.6g}") for k, v in values.items()}
                progress.advance(bar)
            rows.append(row)
            save()


class Block(nn.Module):
    """A layer of a transformer, with biases in its attention."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From tokens to tokens."""
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """Two layers on the eight rows of a digit."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From images to logits."""
        x = nn.Dense(16)(images.reshape(-1, 8, 8))
        x = x + self.param("position", nn.initializers.normal(0.1), (8, 16))
        x = Block(name="layer_1")(x)
        x = Block(name="layer_2")(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def transformed(params: Any, seed: int, spread: float) -> Any:
    """Other weights of the same function: the products of each head are factored again.

    ``(G, H)`` becomes ``(G A^-1, H A^T)``, for queries with keys and for values with
    outputs, with random invertible ``A`` whose singular values lie between ``1 /
    spread`` and ``spread``.
    """
    rng = np.random.default_rng(seed)

    def random(heads: int, size: int) -> np.ndarray:
        U, _, V = np.linalg.svd(rng.normal(size=(heads, size, size)))
        D = spread ** rng.uniform(-1, 1, (heads, 1, size))
        return (U * D) @ V

    params = jax.tree.map(np.asarray, params)
    for layer in ("layer_1", "layer_2"):
        parts = params["params"][layer]["attention"]
        heads, size = parts["query"]["bias"].shape
        for left, right in (("query", "key"), ("value", "out")):
            A = random(heads, size)
            inverse = np.linalg.inv(A)
            for name in ("kernel", "bias"):
                # G A^-1, where the bias is one more row of G
                parts[left][name] = np.einsum(
                    "...hk,hkl->...hl", parts[left][name], inverse
                )
            if right == "key":
                for name in ("kernel", "bias"):
                    parts[right][name] = np.einsum(
                        "...hk,hlk->...hl", parts[right][name], A
                    )
            else:  # its kernel is (heads, size, features): H^T
                parts[right]["kernel"] = np.einsum(
                    "hlk,hkf->hlf", A, parts[right]["kernel"]
                )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def transformer(quick: bool) -> dict[str, Any]:
    """Geodesic and adaptive sharpness of one function in several factorizations."""
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    net = Transformer()
    loss = lambda params, batch: networks.losses(
        net.apply(params, batch[0]), batch[1]
    ).mean()
    tx = optax.adamw(2e-3)

    @jax.jit
    def fit(params: Any, data: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.choice(key, len(data[1]), (128,), replace=False)
            batch = jax.tree.map(lambda x: x[rows], data)
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), 20 if quick else 600)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    params = fit(net.init(jax.random.key(0), data[0][:1]), data)
    batches = sharpness.stack_batches(jax.tree.map(lambda x: x[:256], data), 128)
    paths = [f"params/layer_{i}/attention" for i in (1, 2)]
    pairs = [p for path in paths for p in sharpness.attention_gl_pairs(params, path)]

    @jax.jit
    def values(params: Any) -> dict[str, jax.Array]:
        geodesic = functools.partial(sharpness.geodesic_sharpness, loss, params)
        return {
            "geodesic, mix": geodesic(batches, 0.3, pairs, metric="mix").value,
            "geodesic, inv": geodesic(batches, 0.3, pairs, metric="inv").value,
            "adaptive": sharpness.worst_case_sharpness(
                loss, params, batches, 0.3, adaptive=True, random_init=False
            ).value,
            "plain": sharpness.worst_case_sharpness(
                loss, params, batches, 0.1, random_init=False
            ).value,
            "lambda_max": sharpness.hessian_eigenvalues(
                loss, params, batches, 0, num_matvecs=40
            ).eigenvalues[0],
            "loss": sharpness_loss(loss, params, batches),
        }

    rows = []
    spreads = [1.0] + [s for s in (1.5, 3.0, 10.0) for _ in range(1 if quick else 3)]
    for seed, spread in enumerate(spreads):
        moved = params if spread == 1 else transformed(params, seed, spread)
        found = {k: float(v) for k, v in values(moved).items()}
        rows.append({"spread": spread, **found})
    return {"rows": rows, "parameters": sum(x.size for x in jax.tree.leaves(params))}


def sharpness_loss(loss: Any, params: Any, batches: Any) -> jax.Array:
    """The loss itself, to check that it did not change."""
    return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches))


def gap(rows: list[Any], kind: str) -> np.ndarray:
    """Test minus training error, or loss."""
    of = lambda part: np.array(
        [
            row[f"{part} error (%)" if kind == "error" else f"{part} loss"]
            for row in rows
        ]
    )
    return of("test") - of("training")


BASELINES = "weight norm", "distance from the start", "training loss"


def correlations(rows: list[Any]) -> list[dict[str, Any]]:
    """Every measure with the gap: tau-a with its interval, granulated tau, tau-b."""
    order = list(itertools.product(*GRID.values()))
    rows = sorted(rows, key=lambda row: order.index(tuple(row["settings"].values())))
    columns = {name: [row[name] for row in rows] for name in BASELINES}
    columns |= {
        name: [row["measures"][name] for row in rows] for name in rows[0]["measures"]
    }
    found = []
    for name, s in columns.items():
        tau = sharpness.kendall_interval(s, gap(rows, "error"))
        line = {"measure": name, "tau": tau.tau, "low": tau.low, "high": tau.high}
        line["tau_loss"] = sharpness.kendall_tau(s, gap(rows, "loss"), variant="b")
        if len(rows) == len(order):
            granulated = sharpness.granulated_kendall(s, gap(rows, "error"), SHAPE)
            line["granulated"] = float(granulated.Psi)
            line["by_axis"] = [round(float(x), 3) for x in granulated.psi]
        found.append(line)
    return found


def markdown(results: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/measures/correlation.md, by name."""
    tables = {}
    for name, part in results["sets"].items():
        header = ["measure", "tau-a with the gap of errors", "95 % interval"]
        header += ["granulated", *(f"by {axis}" for axis in GRID)]
        header += ["tau-b with the gap of losses"]
        lines = []
        for line in correlations(part["rows"]):
            cells = [line["measure"], f"{line['tau']:+.2f}"]
            cells.append(f"{line['low']:+.2f} to {line['high']:+.2f}")
            cells.append(f"{line['granulated']:+.2f}" if "granulated" in line else "")
            cells += [f"{x:+.2f}" for x in line.get("by_axis", [])] or [""] * len(GRID)
            cells.append(f"{line['tau_loss']:+.2f}")
            lines.append(cells)
        tables[name] = table(header, lines)
        tables[f"{name}, optimizers"] = optimizers(part["rows"])
    rows = results["transformer"]["rows"]
    names = [name for name in rows[0] if name != "spread"]
    lines = [
        [f"{row['spread']:g}", *(f"{row[name]:.6g}" for name in names)] for row in rows
    ]
    tables["transformer"] = table(["singular values up to", *names], lines)
    return tables


SHOWN = "lambda_max", "trace", "worst case, adaptive, l2, rho 1.0"


def optimizers(rows: list[Any]) -> str:
    """The means over the models of each optimizer."""
    header = ["optimizer", "training error (%)", "test error (%)", *SHOWN]
    lines = []
    for name in GRID["optimizer"]:
        own = [row for row in rows if row["settings"]["optimizer"] == name]
        if not own:
            continue
        mean = lambda f, own=own: float(np.mean([f(row) for row in own]))
        cells = [name, *(f"{mean(lambda r, k=k: r[k]):.2f}" for k in header[1:3])]
        cells += [f"{mean(lambda r, k=k: r['measures'][k]):.3g}" for k in SHOWN]
        lines.append(cells)
    return table(header, lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Kendall's tau of each measure, and two measures against the gap."""
    sets = results["sets"]
    figure = Figure(figsize=(9, 11.5), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    for i, (axes, (name, part)) in enumerate(
        zip(
            top.subplots(1, len(sets), squeeze=False, sharey=True)[0],
            sets.items(),
            strict=True,
        )
    ):
        lines = correlations(part["rows"])[::-1]
        y = np.arange(len(lines))
        tau = np.array([line["tau"] for line in lines])
        low, high = (np.array([line[k] for line in lines]) for k in ("low", "high"))
        axes.hlines(y, low, high, color=GREY, linewidth=3, alpha=0.4)
        axes.plot(tau, y, "o", color=BLACK, markersize=4, label="all models")
        if "granulated" in lines[0]:
            psi = [line["granulated"] for line in lines]
            axes.plot(
                psi, y, "D", color=ORANGE, markersize=4, fillstyle="none",
                label="granulated",
            )  # fmt: skip
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.set_yticks(y, [line["measure"] for line in lines], fontsize=8)
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, len(lines))
        axes.set_xlabel("Kendall's tau with the gap of errors")
        axes.set_title(TITLES[name].replace(", ", "\n", 1), fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if not i:
            axes.legend(fontsize=9, loc="lower left", frameon=False)
    names = SHOWN[0], SHOWN[2]
    panels = bottom.subplots(1, len(names) * len(sets), squeeze=False)[0]
    for axes, ((name, part), measure) in zip(
        panels, itertools.product(sets.items(), names), strict=True
    ):
        for optimizer in GRID["optimizer"]:
            own = [r for r in part["rows"] if r["settings"]["optimizer"] == optimizer]
            if own:
                axes.plot(
                    [r["measures"][measure] for r in own], gap(own, "error"), "o",
                    color=method_colour(optimizer), markersize=4, label=optimizer,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(measure.replace(", l2,", ",\nl2,"), fontsize=9)
        axes.set_title(TITLES[name].split(",")[0], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Gap: test minus\ntraining error (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    bottom.legend(
        handles, labels, fontsize=9, frameon=False, ncols=4, loc="outside upper center"
    )
    study.save(figure, path)


def run(options: argparse.Namespace) -> None:
    """Trains and measures the models that the file lacks."""
    settings = {**study.environment(), "grid": json.loads(json.dumps(GRID))}
    results = study.begun(settings, options.out, sets={}, transformer=None)
    save = lambda: study.write(results, options.out)
    results["transformer"] = results["transformer"] or transformer(options.quick)
    for name in options.sets or (list(TITLES) if options.data else ["digits"]):
        task = load(name, options.data)
        new = {
            "training_images": len(task.labels),
            "test_images": len(task.test_labels),
            "noise": task.noise,
            "epochs": task.epochs,
            "rho": task.rho,
            "subset": SUBSET,
            "m": BATCH,
            "rows": [],
        }
        part = results["sets"].setdefault(name, new)
        fill(name, task, part["rows"], save, options.quick)
    save()


def main() -> None:
    """Runs what the command line asks for."""
    name, quick = "correlation.json", "three models, to try it"
    parser = study.parser(__doc__, name, quick=quick, data=True, figure=True)
    parser.add_argument("--sets", nargs="+", choices=TITLES)
    options = parser.parse_args()
    if not options.report:
        run(options)
    study.show(options, markdown, draw)


if __name__ == "__main__":
    main()
