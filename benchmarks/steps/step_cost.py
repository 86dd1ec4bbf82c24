"""The cost of a step of each method, beside plain SGD and ``optax.contrib.sam``.

Blocks of steps of all methods are interleaved in one process with blocks of SGD and of
a program that computes one gradient. "Ideal" is the step of SGD plus, for each further
gradient (or forward pass) that a method needs, a program that computes only this, timed
in the same rounds. Compile times are ratios to SGD's, compiled just before.

    python benchmarks/steps/step_cost.py [--models MLP CNN transformer]
        [--methods sam vsam] [--rounds 9] [--compute float32 bfloat16] [--workers 1]
        [--minutes 9] [--quick] [--out FILE]
    python benchmarks/steps/step_cost.py --report [FILE]

On an accelerator ``--workers 16`` compiles this number of programs at a time, and times
the compilation of a few only. ``make bench-gpu`` needs ten minutes of a GPU. The file
is written after each round, and no model begins after ``--minutes``.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.steps import cost_methods, cost_report
from benchmarks.steps.cost_methods import METHODS, NUM_BATCHES
from benchmarks.steps.cost_models import ALL, MODELS, subject
from benchmarks.steps.cost_rows import Row, allocator, timer

BETWEEN = 2  # rows between two blocks of SGD and of one gradient
# Rows that are compiled alone, to be timed, while others are compiled side by side.
ALONE = cost_methods.OPAQUE, "sam", "sam_5", "vsam", "gsam"


def compile_all(rows: list[Row], compiles: int, workers: int, advance: Any) -> None:
    """Compiles all rows: one by one, each after SGD, to be timed; or all at once."""
    sgd = rows[0]
    sgd.compile()  # the first one is slower
    sgd.seconds.clear()
    alone = [row for row in rows if workers == 1 or row.name in ALONE]
    for row in alone:
        for _ in range(compiles):
            sgd.compile()
            row.baseline.append(sgd.seconds[-1])
            if row is not sgd:
                row.compile()
        row.warm()
        advance()

    def others(row: Row) -> None:
        row.compile()
        row.seconds.clear()
        row.warm()
        advance()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(others, [row for row in rows if row not in alone]))


def measure(rows: list[Row], start: Any, rounds: int, advance: Any) -> Iterator[int]:
    """Times all rows in turn, a few between two blocks of SGD and of one gradient.

    Yields the number of rounds, after each.
    """
    plain = rows[0]
    model, batches = plain.model, plain.batches
    gradient, forward = (
        timer(function(model), model.steps, start, batches)
        for function in (cost_methods.gradient, cost_methods.forward)
    )
    for done in range(1, rounds + 1):
        of_forward, before = forward(), (plain.block()[0], gradient())
        for i in range(0, len(rows), BETWEEN):
            some = rows[i : i + BETWEEN]
            blocks = [row.block() for row in some]
            after = plain.block()[0], gradient()
            sgd, of_gradient = ((x + y) / 2 for x, y in zip(before, after, strict=True))
            for row, (seconds, rate) in zip(some, blocks, strict=True):
                needed = 1 + rate * (row.cost.gradients - 1)
                ideal = sgd + (needed - 1) * of_gradient
                ideal += min(rate, 1) * row.cost.forwards * of_forward
                row.measured.append(
                    {
                        "seconds": seconds,
                        "gradients": needed,
                        "to_sgd": seconds / sgd,
                        "to_ideal": seconds / ideal,
                    }
                )
                advance()
            before = after
        yield done


def costs(row: Row) -> dict[str, float]:
    """The compiler's counts for the programs of a row, at the measured rate."""
    shares = [1.0]
    if row.form == "dispatched":
        rate = statistics.mean(x["gradients"] - 1 for x in row.measured)
        rate /= row.cost.gradients - 1
        shares = [rate, 1 - rate]
    total = {"flops": 0.0, "bytes": 0.0, "peak": 0.0, "temporary": 0.0}
    for share, program, whole in zip(shares, row.programs, row.counted, strict=True):
        counted, memory = whole.cost_analysis(), program.memory_analysis()
        total["flops"] += share * row.method.calls * counted["flops"]
        total["bytes"] += share * row.method.calls * counted["bytes accessed"]
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        total["peak"] = max(total["peak"], peak)
        total["temporary"] = max(total["temporary"], memory.temp_size_in_bytes)
    if row.form == "conditional":  # counted at its dearer branch
        del total["flops"], total["bytes"]
    return total


def rows_of(
    name: str, compute: str, options: argparse.Namespace, progress: Progress
) -> Iterator[dict[str, Any]]:
    """All rows of one model, after each round."""
    backend = jax.default_backend()
    model = subject(name, backend, compute == "bfloat16", options.quick)
    start, batches = model.init(), model.batches(NUM_BATCHES)
    wanted = cost_methods.rows(name, backend, options.methods)
    rows = [Row(*names, model, start, batches) for names in wanted]
    jax.block_until_ready([row.opt_state for row in rows])
    live = jax.devices()[0].memory_stats() or {}
    task = progress.add_task(f"{name}, compiling", total=len(rows))
    advance = lambda: progress.advance(task)
    compile_all(rows, options.compiles, options.workers, advance)
    total = options.rounds * len(rows)
    task = progress.add_task(f"{name}, timing", total=total)
    advance = lambda: progress.advance(task)
    settings = {
        "parameters": model.parameters,
        "batch_size": model.batch_size,
        "steps_per_block": model.steps,
        "compiles": options.compiles,
        "compute": compute,
        # The peak of all rows together, because a process cannot reset it.
        "bytes_in_use": live.get("bytes_in_use"),
    }
    for done in measure(rows, start, options.rounds, advance):
        made = cost_report.rows(rows, [costs(row) for row in rows])
        yield {"settings": settings | {"rounds": done}, "rows": made}


def run(options: argparse.Namespace) -> None:
    """Times the models, and writes after each round."""
    results = study.read(options.out, {"models": {}})
    results["settings"] = {
        **study.environment(),
        "backend": jax.default_backend(),
        "machine": platform.machine(),
        "allocator": allocator(),
    }
    start = time.monotonic()
    with study.progress() as progress:
        for compute, name in itertools.product(options.compute, options.models):
            if time.monotonic() - start > 60 * options.minutes:
                break
            called = name if compute == "float32" else f"{name}, {compute}"
            for made in rows_of(name, compute, options, progress):
                cost_report.merge(results, called, made)
                study.write(results, options.out)
            # The next model's programs need the memory, without pauses.
            jax.clear_caches()


def main() -> None:
    """Times, writes and prints."""
    name = f"step_cost_{jax.default_backend()}.json"
    quick = "tiny models, few methods"
    parser = study.parser(__doc__, name, out=study.RESULTS / name, quick=quick)
    parser.add_argument("--models", nargs="+", choices=ALL, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiles", type=int, default=1, help="of each program")
    parser.add_argument("--workers", type=int, default=1, help="that compile")
    types = ["float32", "bfloat16"]
    parser.add_argument("--compute", nargs="+", choices=types, default=types[:1])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
        options.methods = options.methods or cost_methods.QUICK
    options.methods = options.methods or list(METHODS)
    if not options.report:
        run(options)
    study.show(options, cost_report.markdown)


if __name__ == "__main__":
    main()
