"""The rows, the tables and the targets of ``step_cost.py``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.lib import tables
from benchmarks.steps.cost_methods import OPAQUE, TRANSPARENT

median = statistics.median
MIB = 2**20
# The largest allowed ratios, for models with a million parameters or more.
LIMITS = {
    "ideal": {"cpu": 1.05, "other": 1.03},
    "peer": 1.0,
    "program": 2.1,
    "pair": 3.2,
}
# Pairs of rows, and the speed of the first relative to the second.
FASTER = (
    ("vsam", "dispatched", "sam", 1.40),
    ("msam", "", "SGD", 0.98),
    ("sam, quarter batch", "", "sam", 1.50),
)
LARGE = 1_000_000


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [round(float(x), 4) for x in np.quantile(values, (0.25, 0.5, 0.75))]


def rows(timed: list[Any], costs: list[dict[str, float]]) -> list[Any]:
    """The entries of the file for all rows; both arguments begin with SGD's."""
    of = lambda row, key: [x[key] for x in row.measured]
    found = {row.name: row for row in timed}
    made = []
    for row, cost in zip(timed, costs, strict=True):
        made.append(
            {
                "method": row.name,
                "form": row.form,
                "gradients": round(statistics.mean(of(row, "gradients")), 3),
                "forwards": int(row.cost.forwards),
                "ms": round(1e3 * median(of(row, "seconds")), 3),
                "to_sgd": quartiles(of(row, "to_sgd")),
                "to_ideal": quartiles(of(row, "to_ideal")),
                "compile_to_sgd": None,
                "peak_mib": round(cost["peak"] / MIB, 3),
                "temporary_mib": round(cost["temporary"] / MIB, 3),
                "state_mib": round((row.state_bytes - timed[0].state_bytes) / MIB, 4),
            }
        )
        if row.baseline and row is not timed[0]:
            compiles = zip(row.seconds, row.baseline, strict=True)
            ratios = [seconds / sgd for seconds, sgd in compiles]
            made[-1]["compile_to_sgd"] = round(median(ratios), 3)
        for key in ("flops", "bytes"):
            ratio = cost[key] / costs[0][key] if key in cost else None
            made[-1][f"{key}_to_sgd"] = ratio and round(ratio, 4)
        for peer, key in ((OPAQUE, "to_opaque"), (TRANSPARENT, "to_transparent")):
            if row.name == "sam" and peer in found:
                both = zip(of(row, "to_sgd"), of(found[peer], "to_sgd"), strict=True)
                made[-1][key] = quartiles([x / y for x, y in both])
    return made


def merge(results: dict[str, Any], model: str, study: dict[str, Any]) -> None:
    """Adds the rows of a model; they replace rows with the same name and form."""
    name = lambda row: (row["method"], row["form"])
    new = {name(row): row for row in study["rows"]}
    old = results["models"].get(model, {"rows": []})["rows"]
    kept = [new.pop(name(row), row) for row in old]
    study["rows"] = kept + list(new.values())
    results["models"][model] = study


def markdown(results: dict[str, Any]) -> str:
    """All tables, the targets first."""
    parts = [targets(results)]
    for model, study in results["models"].items():
        parts.append(f"{title(model, study)}\n\n{table(study)}")
    return "\n\n".join(parts)


def title(model: str, study: dict[str, Any]) -> str:
    """The title of a model's table."""
    settings, plain = study["settings"], study["rows"][0]
    millions = f"{settings['parameters'] / 1e6:.2f} million parameters"
    batch = f"batch {settings['batch_size']}"
    return (
        f"**{model}** ({millions}, {batch}, {settings['compute']}; SGD:"
        f" {plain['ms']:.1f} ms)"
    )


def label(row: dict[str, Any]) -> str:
    """The row's name in a table."""
    return row["method"] + (f", {row['form']}" if row["form"] else "")


def table(study: dict[str, Any]) -> str:
    """One model's rows."""
    heads = ["method", "gradients", "time / SGD", "time / ideal", "(quartiles)"]
    heads += ["compile / SGD", "FLOPs / SGD", "bytes / SGD", "peak MiB", "state MiB"]
    lines = []
    number = lambda x: "" if x is None else f"{x:.2f}"
    for row in study["rows"]:
        low, middle, high = row["to_ideal"]
        needed = f"{row['gradients']:.2f}" + " + 1 forward" * row["forwards"]
        cells = [label(row), needed, number(row["to_sgd"][1]), number(middle)]
        cells += [f"{low:.2f} to {high:.2f}", number(row["compile_to_sgd"])]
        cells += [number(row["flops_to_sgd"]), number(row["bytes_to_sgd"])]
        cells += [f"{row['peak_mib']:.1f}"]
        lines.append([*cells, f"{row['state_mib']:.1f}"])
    return tables.table(heads, lines)


def judged(results: dict[str, Any]) -> Iterator[tuple[str, float, list[Any]]]:
    """Each target with its limit, and the names and values of its rows."""
    backend = "cpu" if results["settings"]["backend"] == "cpu" else "other"
    all_rows = [
        (model, row, study["settings"])
        for model, study in results["models"].items()
        for row in study["rows"]
        if row["method"] not in ("SGD", OPAQUE, TRANSPARENT)
    ]
    ideal, peer, program, pair, cliff = [], [], [], [], []
    for model, row, settings in all_rows:
        name = f"{model}: {label(row)}"
        is_cliff = (model, backend, row["form"]) == ("CNN", "cpu", "conditional")
        if settings["parameters"] >= LARGE and not is_cliff:
            ideal.append((name, row["to_ideal"][1]))
        if model == "CNN" and row["form"] == "dispatched":
            cliff.append((name, row["to_ideal"][1]))
        for key, mode in (("to_opaque", "opaque"), ("to_transparent", "transparent")):
            if row.get(key):
                peer.append((f"{model}, {mode}", row[key][1]))
        # A perturbed step has as many copies of the model as gradients.
        if row["compile_to_sgd"] and row["gradients"] <= 2 and not row["forwards"]:
            compiles = pair if row["form"] == "dispatched" else program
            compiles.append((name, row["compile_to_sgd"]))
    limit = LIMITS["ideal"][backend]
    yield "time / ideal", limit, ideal
    yield "no conditional cliff: dispatched CNN, time / ideal", limit, cliff
    yield "time of SAM / `optax.contrib.sam`", LIMITS["peer"], peer
    yield "compile / SGD, a program of up to 2 gradients", LIMITS["program"], program
    yield "compile / SGD, dispatched pair", LIMITS["pair"], pair
    for method, form, other, speed in FASTER:
        found = []
        for model, study in results["models"].items():
            time = {(x["method"], x["form"]): x["to_sgd"][1] for x in study["rows"]}
            if {(method, form), (other, "")} <= time.keys():
                found.append((model, time[method, form] / time[other, ""]))
        name = label({"method": method, "form": form})
        yield f"time of {name} / {other} ({speed:.2f} of its speed)", 1 / speed, found


def targets(results: dict[str, Any]) -> str:
    """The targets that are met, to two decimals, and the worst rows of the others."""
    heads = ["target", "at most", "met", "worst"]
    lines = []
    for text, limit, values in judged(results):
        if not values:
            continue
        ranked = sorted(values, key=lambda x: -x[1])
        met = [value for _, value in values if round(value, 2) <= limit]
        worst = "; ".join(f"{name} {value:.2f}" for name, value in ranked[:3])
        verdict = "yes" if len(met) == len(values) else f"{len(met)} of {len(values)}"
        lines.append([text, f"{limit:.2f}", verdict, worst])
    return tables.table(heads, lines)
