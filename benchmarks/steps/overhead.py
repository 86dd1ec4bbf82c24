"""Attempts to reduce the overhead of a step, and their effects.

Each variant is the library with one change. It is timed in blocks interleaved with SGD,
as in ``step_cost.py``. The results also have the bytes that it moves and keeps.

    python benchmarks/steps/overhead.py [--rounds 7] [--models MLP CNN] [--out FILE]
    python benchmarks/steps/overhead.py --report

The report has two runs side by side: one in which glibc keeps its memory (see
``docs/design/overhead.md``), and one with the defaults of glibc.
"""

from __future__ import annotations

import contextlib
import importlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import optax
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2]))

import optax_sam
from benchmarks.lib import study, tables
from benchmarks.steps import cost_methods
from benchmarks.steps.cost_models import MODELS, Subject, subject
from benchmarks.steps.cost_report import MIB, quartiles
from benchmarks.steps.cost_rows import AS_IT_IS, Row, allocator

STEADY, PLAIN = "overhead_cpu.json", "overhead_glibc_cpu.json"


def barrier() -> Any:
    """Sends each gradient through a barrier on a CPU, too."""
    default = lambda *args, default, cpu: default(*args)
    return mock.patch.object(jax.lax, "platform_dependent", default)


def no_choice() -> Any:
    """Takes the perturbed gradient, finite or not."""
    take_first = lambda condition, x, y: x
    return mock.patch.object(optax.tree, "where", take_first)


def normals(draw: Any) -> Any:
    """Draws the normals of R-SAM in another way."""
    module = importlib.import_module("optax_sam.methods.random_sam")
    return mock.patch.object(module, "normal_like", draw)


def by_generator(key: jax.Array, like: Any) -> Any:
    """Makes each normal from bits of the generator."""
    return optax.tree.random_like(key, like, jax.random.normal)


def anywhere() -> Any:
    """Draws the normals of R-SAM where they are used, and not in a branch."""
    return mock.patch.object(jax.lax, "cond", lambda condition, draw, other: draw())


def shards(method: str) -> Any:
    """Computes the gradients of m-SAM in another way."""

    def build(base: Any, subject: Subject) -> Any:
        del subject
        member = optax_sam.sam(axis_name="shards")
        count = cost_methods.SHARDS
        return optax.chain(
            optax_sam.micro_sharpness(member, count, method=method), base
        )

    way = cost_methods.Method(build, summed=False)
    return mock.patch.dict(cost_methods.METHODS, {"m-sam, 4 shards": way})


ALIKE = contextlib.nullcontext
VARIANTS = {  # name: row of step_cost.py, and the change
    "SGD": ("SGD", ALIKE),
    "`optax.contrib.sam`, opaque": (cost_methods.OPAQUE, ALIKE),
    "SAM": ("sam", ALIKE),
    "SAM, a barrier at each gradient": ("sam", barrier),
    "SAM, no choice": ("sam", no_choice),
    "R-SAM": ("random_sam", ALIKE),
    "R-SAM, bits of the generator": ("random_sam", lambda: normals(by_generator)),
    "R-SAM, normals not in a branch": ("random_sam", anywhere),
    "m-SAM, unrolled": ("m-sam, 4 shards", lambda: shards("unroll")),
    "m-SAM, in a loop": ("m-sam, 4 shards", lambda: shards("scan")),
    "m-SAM, vmapped": ("m-sam, 4 shards", lambda: shards("vmap")),
}


def built(model: Subject) -> Iterator[Row]:
    """Every variant, compiled."""
    start, batches = model.init(), model.batches(cost_methods.NUM_BATCHES)
    for name, change in VARIANTS.values():
        with change():
            row = Row(name, "", model, start, batches)
            row.compile()
        row.warm()
        yield row


def variants(name: str, rounds: int) -> list[dict[str, Any]]:
    """All variants of a model."""
    model = subject(name, "cpu", half=False)
    rows = list(built(model))
    ratios: list[list[float]] = [[] for _ in rows]
    faults = [0] * len(rows)
    for _ in track(range(rounds), name):
        before = rows[0].block()[0]
        for i, row in enumerate(rows):
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = row.block()[0]
            faults[i] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
            after = rows[0].block()[0]
            ratios[i].append(2 * seconds / (before + after))
            before = after
    made = []
    for variant, row, values, count in zip(VARIANTS, rows, ratios, faults, strict=True):
        program = row.programs[0]
        moved = program.cost_analysis()["bytes accessed"]
        kept = program.memory_analysis().temp_size_in_bytes
        made.append(
            {
                "variant": variant,
                "to_sgd": quartiles(values),
                "moved_mib": round(moved / MIB, 1),
                "temporary_mib": round(kept / MIB, 1),
                "page_faults": round(count / rounds / model.steps),
            }
        )
    return made


def markdown(steady: dict[str, Any], plain: dict[str, Any]) -> str:
    """All models in one table, with the two allocators side by side."""
    lines = []
    for name, rows in steady["models"].items():
        for row, other in zip(rows, plain["models"][name], strict=True):
            low, middle, high = row["to_sgd"]
            lines.append(
                [
                    *(name, row["variant"], f"{middle:.2f} ({low:.2f} to {high:.2f})"),
                    f"{row['moved_mib']:.0f}",
                    f"{row['temporary_mib']:.1f}",
                    f"{other['to_sgd'][1]:.2f}",
                    f"{other['page_faults']:,}",
                ]
            )
    header = ["model", "variant", "time / SGD (quartiles)", "MiB moved"]
    header += ["MiB of temporaries", "glibc: time / SGD", "page faults per step"]
    return tables.table(header, lines)


def main() -> None:
    """Times, writes and prints."""
    default = PLAIN if allocator() == AS_IT_IS else STEADY
    parser = study.parser(__doc__, STEADY, out=study.RESULTS / default)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.report:
        beside = study.read(study.RESULTS / PLAIN)
        study.show(options, lambda results: markdown(results, beside))
        return
    settings = {
        **study.environment(),
        "rounds": options.rounds,
        "allocator": allocator(),
    }
    made = {name: variants(name, options.rounds) for name in options.models}
    study.write({"settings": settings, "models": made}, options.out)
    study.show(options, lambda results: markdown(results, results))


if __name__ == "__main__":
    main()
