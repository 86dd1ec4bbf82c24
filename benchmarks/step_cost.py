"""What a step of each method costs beside plain SGD and ``optax.contrib.sam``.

Blocks of steps of all methods are interleaved in one process with blocks of SGD and of
a program that computes one gradient. "Ideal" is the step of SGD, and for each further
gradient (forward pass) that a method needs one program of that and nothing else, timed
in the same rounds. Compile times are ratios to SGD's, compiled just before.

    python benchmarks/step_cost.py [--models MLP CNN transformer] [--methods sam vsam]
        [--rounds 9] [--half] [--workers 1] [--quick] [--out FILE]
    python benchmarks/step_cost.py --report benchmarks/results/step_cost_cpu.json

On an accelerator ``--workers 16`` compiles that many programs at a time, and times the
compiling of a few only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cost_methods
import cost_report
import jax
import tables
from cost_methods import METHODS, NUM_BATCHES
from cost_models import MODELS, subject
from cost_rows import Row, allocator, timer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

RESULTS = Path(__file__).parent / "results/step_cost_{}.json"
BETWEEN = 2  # rows between two blocks of what they are compared with
# What is compiled alone, to be timed, where others are compiled side by side.
ALONE = cost_methods.OPAQUE, "sam", "sam_5", "vsam", "gsam"


def compile_all(rows: list[Row], compiles: int, workers: int, advance: Any) -> None:
    """Compiles all rows: one after another, each after SGD, to be timed, or at once."""
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
                needed = 1 + rate * (row.method.gradients - 1)
                ideal = sgd + (needed - 1) * of_gradient
                ideal += min(rate, 1) * row.method.forwards * of_forward
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
    """What the compiler says of a row's programs, at the rate that was measured."""
    shares = [1.0]
    if row.form == "dispatched":
        rate = statistics.mean(x["gradients"] - 1 for x in row.measured)
        rate /= row.method.gradients - 1
        shares = [rate, 1 - rate]
    total = {"flops": 0.0, "bytes": 0.0, "peak": 0.0, "temporary": 0.0}
    for share, program in zip(shares, row.programs, strict=True):
        counted, memory = program.cost_analysis(), program.memory_analysis()
        total["flops"] += share * row.method.calls * counted["flops"]
        total["bytes"] += share * row.method.calls * counted["bytes accessed"]
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        total["peak"] = max(total["peak"], peak)
        total["temporary"] = max(total["temporary"], memory.temp_size_in_bytes)
    if row.form == "conditional":  # counted at its dearer branch
        del total["flops"], total["bytes"]
    return total


def study(
    name: str, options: argparse.Namespace, progress: Progress
) -> Iterator[dict[str, Any]]:
    """All rows of one model, after each round."""
    backend = jax.default_backend()
    model = subject(name, backend, options.half, options.quick)
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
        "compute": "bfloat16" if options.half else "float32",
        # Of all rows together; a peak cannot be set back within a process.
        "bytes_in_use": live.get("bytes_in_use"),
    }
    for done in measure(rows, start, options.rounds, advance):
        made = cost_report.rows(rows, [costs(row) for row in rows])
        yield {"settings": settings | {"rounds": done}, "rows": made}


def main() -> None:
    """Times, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--compiles", type=int, default=1, help="of each program")
    parser.add_argument("--workers", type=int, default=1, help="that compile")
    parser.add_argument("--half", action="store_true", help="compute in bfloat16")
    parser.add_argument("--quick", action="store_true", help="tiny models, few methods")
    parser.add_argument("--out", type=Path, help="JSON to write, or to add models to")
    parser.add_argument("--report", type=Path, help="JSON to print as Markdown")
    options = parser.parse_args()
    if options.report:
        print(cost_report.markdown(json.loads(options.report.read_text())))
        return
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.methods = options.methods or list(
        cost_methods.QUICK if options.quick else METHODS
    )
    backend = jax.default_backend()
    out = options.out or Path(str(RESULTS).format(backend))
    if options.quick and not options.out:
        out = Path("out/step_cost.json")
    results = json.loads(out.read_text()) if out.exists() else {"models": {}}
    results["settings"] = {
        **tables.environment(),
        "backend": backend,
        "machine": platform.machine(),
        "allocator": allocator(),
    }
    console = Console()
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        for name in options.models:
            for made in study(name, options, progress):
                cost_report.merge(results, name, made)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
            # The next model's programs want the memory, and no pauses.
            jax.clear_caches()
    print(cost_report.markdown(results))
    console.print(f"Results: {out}")


if __name__ == "__main__":
    main()
