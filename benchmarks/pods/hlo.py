"""Reads the text of a compiled program: what it sends, and what its loops repeat."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

_KINDS = {
    "all-reduce": "reduce",
    "all-gather": "gather",
    "all-to-all": "move",
    "collective-permute": "move",
}
_OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]*)\(")
_CALLED = re.compile(
    r"(?:calls|body|branch_computations|true_computation|false_computation)="
    r"\{?((?:%[\w.-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%([\w.-]+)")
# The counter of a scan: from zero, by one.
_COUNTED = re.compile(r"ROOT .* compare\(%[\w.-]+, %([\w.-]+)\), direction=LT")
_CONSTANT = r"%{} = s32\[\]\S* constant\((\d+)\)"
_ARRAY = re.compile(r"\b[a-z]+(\d+)\w*\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,18})"')  # of more, it knows none
_PRODUCT = re.compile(
    r" = \w+\[([\d,]*)\]\S* convolution\(%([\w.-]+), %([\w.-]+)\),"
    r" (?:window=\{(.*?)\}, )?dim_labels=(\w+)_(\w+)->(\w+)"
)


def collectives(text: str) -> Iterator[tuple[str, int]]:
    """Kind and bytes of everything that a program sends, times the runs of its loops.

    Both branches of a conditional count. On TPUs, a reduce-scatter is a fusion of an
    all-reduce and a slice, and counts as an all-reduce.
    """
    for lines, times in _runs(text):
        # An asynchronous transfer is written where it starts, in every fusion that runs
        # meanwhile, and where it ends.
        if any('"AsyncCollectiveDone"' in line for line in lines[1:]):
            continue
        if lines[0].startswith("async_collective_fusion"):
            continue
        for line in lines[1:]:
            if not (found := _OPERATION.match(line)):
                continue
            _, result, operation = found.groups()
            if operation.endswith(("-done", "-update")):
                continue
            if operation.startswith(("reduce-scatter", "ragged-all-to-all")):
                raise NotImplementedError(f"How much does {operation} send?")
            if kind := _KINDS.get(operation.removesuffix("-start")):
                if times is None:
                    raise NotImplementedError("How often does a loop run that sends?")
                yield from [(kind, _bytes(result, operation))] * times


def cycles(text: str) -> float:
    """The sum of the estimates beside the operations, times the runs of each."""
    return sum(
        (math.nan if times is None else times) * int(found[1])
        for lines, times in _runs(text)
        for line in lines
        if (found := _CYCLES.search(line))
    )


def products_again(text: str) -> float:
    """The operations of products in loops, in all rounds after the first."""
    total = 0.0
    for lines, times in _runs(text):
        if times == 1:
            continue
        shapes = {
            found[1]: _sizes(array[2])
            for line in lines
            if (found := _OPERATION.match(line)) and (array := _ARRAY.search(found[2]))
        }
        for line in lines:
            if not (found := _PRODUCT.search(line)):
                continue
            if times is None or "group_count" in line:
                raise NotImplementedError("How much does a loop compute?")
            total += (times - 1) * _operations(found, shapes)
    return total


def _operations(found: re.Match[str], shapes: dict[str, list[int]]) -> float:
    """The operations of one product, which is a convolution on TPUs.

    Axes that both factors and the result have are spatial axes there, with strides and
    gaps. Products with the gaps must not count.
    """
    out, left, right, window, *labels = found.groups()
    of_left, of_right, of_out = (
        dict(zip(label, sizes, strict=True))
        for label, sizes in zip(
            labels, (shapes[left], shapes[right], _sizes(out)), strict=True
        )
    )
    given = dict(part.split("=") for part in (window or "").split())
    count = 2.0 * of_out["b"] * of_out["f"] * of_right["i"]
    axes = sorted(label for label in of_out if label.isdigit())
    per_axis = lambda name, default: (
        given[name].split("x") if name in given else [default] * len(axes)
    )
    settings = zip(
        *(
            per_axis(name, default)
            for name, default in (
                ("stride", "1"),
                ("pad", "0_0"),
                ("lhs_dilate", "1"),
                ("rhs_dilate", "1"),
            )
        ),
        strict=True,
    )
    for axis, (stride, pad, gap, step) in zip(axes, settings, strict=True):
        at = (
            np.arange(of_out[axis])[:, None] * int(stride)
            + np.arange(of_right[axis]) * int(step)
            - int(pad.split("_")[0])
        )
        inside = (at >= 0) & (at <= (of_left[axis] - 1) * int(gap))
        count *= np.sum(inside & (at % int(gap) == 0))
    return count


def _runs(text: str) -> Iterator[tuple[list[str], int | None]]:
    """The lines of each function, its name first, and how often it runs.

    ``None`` means a loop whose number of rounds is not in the text.
    """
    computations = _computations(text)
    times: Counter[str] = Counter()
    unknown = set()

    def run(name: str, often: int, known: bool) -> None:
        times[name] += often
        if not known:
            unknown.add(name)
        for line in computations[name]:
            trips: int | None = 1
            if " while(" in line:
                trips = _trips(line, computations)
            for group in _CALLED.findall(line):
                for called in re.findall(r"%([\w.-]+)", group):
                    run(called, often * (trips or 1), known and trips is not None)

    run("ENTRY", 1, True)
    for name, often in times.items():
        yield [name, *computations[name]], None if name in unknown else often


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    if found := _TRIPS.search(line):
        return int(found[1])
    condition = _CONDITION.search(line)
    lines = "\n".join(computations.get(condition[1], ())) if condition else ""
    counted = _COUNTED.search(lines)
    last = counted and re.search(_CONSTANT.format(re.escape(counted[1])), lines)
    return int(last[1]) if last else None


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each function of the program, by its name."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            name = "ENTRY" if line.startswith("ENTRY") else line[1:].split(" ")[0]
            found[name] = []
        elif line.startswith("  "):
            found[name].append(line)
    return found


def _sizes(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]


def _bytes(result: str, operation: str) -> int:
    sizes = [
        int(bits) // 8 * math.prod(_sizes(shape))
        for bits, shape in _ARRAY.findall(result)
    ]
    if operation in ("all-gather-start", "collective-permute-start"):
        sizes = sizes[len(sizes) // 2 :]  # the first half lists the inputs
    return sum(sizes)
