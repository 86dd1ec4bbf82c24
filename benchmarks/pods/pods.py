"""The cost of each method on TPU pods of 8 to 256 chips, by the TPU's compiler.

No TPU is needed. Whole training steps are compiled for chips that are not there. The
program shows operations, what is sent between chips, memory, and the compiler's
estimate of the time. "Ideal" is the estimate for the plain step, plus, for each further
gradient, the estimate for a program of one gradient and nothing else.

    make bench-pods [ARGS="--only decoder"]
    python benchmarks/pods/pods.py --report

Each row is written when it is done, and a row in the file is not made again.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

import optax_sam
import optax_sam.linen
from benchmarks.lib import costs, models, study, tables
from benchmarks.pods import programs

RESULTS = study.RESULTS / "pods.json"
TASKS = {
    "ResNet-50": models.resnet(),
    "decoder": models.decoder(),
    "decoder, 4 times the batch": models.decoder(per_chip=16),
    "7 billion": models.seven_billion(),
}
LOOPED = {"7 billion"}  # their estimates in seconds count one round of each loop
LAYOUTS = "data parallel", "FSDP", "FSDP x TP"
# The chips over which FSDP x TP cuts the axis model: a side of the pod.
MODEL_PARALLEL = {"2x4": 4, "8x8": 8, "16x16": 16, "4x4x8": 8, "4x8x8": 8}
# Shards of m-SAM; each shard has a sequence of each chip.
SHARDS = 4


# A function from the base optimizer and the number of examples to the whole optimizer.
Build = Callable[[Any, int], Any]


def first(member: Any) -> Build:
    """Puts a method before the base optimizer."""
    return lambda base, _: optax.chain(member, base)


METHODS: dict[str, Build] = {
    "plain": lambda base, _: optax.with_extra_args_support(base),
    "sam": first(optax_sam.sam()),
    "vsam": first(optax_sam.vsam()),
    "looksam": first(optax_sam.looksam()),
    "gsam": first(optax_sam.gsam()),
    "msam": lambda base, _: optax_sam.msam(base, rho=3.0),
    "m_sam": first(
        optax_sam.micro_sharpness(optax_sam.sam(axis_name="shards"), SHARDS)
    ),
    "asam": first(optax_sam.asam()),
    # It keeps one example less than gamma says, and the chips must divide this number.
    "esam": lambda base, n: optax.chain(optax_sam.esam(gamma=0.5 + 1 / n), base),
    "esam_unplaced": first(optax_sam.esam()),
    "ae_sam": first(optax_sam.ae_sam()),
    "ae_looksam": first(optax_sam.ae_looksam()),
    "look_layer_sam": first(optax_sam.look_layer_sam()),
    "renyi_sam": first(optax_sam.renyi_sam()),
    "random_sam": first(optax_sam.random_sam(0.1)),
    "gnp": first(optax_sam.gnp()),
    "friendly_sam": first(optax_sam.friendly_sam()),
    "sam_on": first(optax_sam.sam_on()),
    "fisher_sam": first(optax_sam.fisher_sam()),
    "amp": first(optax_sam.amp()),
    "gam": first(optax_sam.gam()),
    "stable_sam": first(optax_sam.stable_sam()),
    "wsam": lambda base, _: optax_sam.wsam(base, learning_rate=1e-3),
    "sampa": lambda base, _: optax_sam.sampa(base),
    "mesa": lambda base, _: optax.chain(base, optax_sam.mesa()),
}


# ESAM's half of the batch less one example; and the cost of all shards together.
_PRICED_AS = {"esam_unplaced": "esam", "m_sam": "sam"}


@functools.cache
def promised(method: str) -> costs.Cost:
    """The promised cost of a perturbed step."""
    build = METHODS[_PRICED_AS.get(method, method)]
    # The training loop reports the loss at the parameters.
    forwards = method in costs.WITHOUT_FIRST
    return costs.cost(build(costs.BASE, costs.EXAMPLES), forwards=forwards)


class Row(NamedTuple):
    """A program to compile; ``None`` means the form with a conditional."""

    model: str
    layout: str
    topology: str
    method: str
    ascend: bool | None = None

    @property
    def name(self) -> str:
        """The name in the tables."""
        forms = {True: "", False: ", ascend=False", None: ", ascend=None"}
        skips = self.method in ("vsam", "looksam", "ae_sam", "ae_looksam")
        return self.method + (forms[self.ascend] if skips else "")


_SIX = (
    ("sam", True),
    ("vsam", True),
    ("vsam", False),
    ("vsam", None),
    ("looksam", True),
    ("gsam", True),
    ("msam", True),
)
_NAMED = {"plain", "esam_unplaced", "m_sam", *dict(_SIX)}
_ALL = (*_SIX, *((name, True) for name in METHODS if name not in _NAMED))
_LARGE = (*_SIX[:4], ("msam", True), ("m_sam", True))
_ESAM = ("esam", True), ("esam_unplaced", True)
GROUPS = (
    ("ResNet-50", "data parallel", "v5e:2x4", _SIX[:1]),
    ("ResNet-50", "data parallel", "v5e:16x16", _SIX),
    ("ResNet-50", "data parallel", "v6e:16x16", _SIX[:1]),
    ("ResNet-50", "data parallel", "v5p:4x4x8", _SIX[:1]),
    ("decoder", "data parallel", "v5e:2x4", _SIX[:2]),
    ("decoder", "data parallel", "v5e:16x16", _SIX[:2]),
    ("decoder, 4 times the batch", "data parallel", "v5e:16x16", _SIX[:2]),
    ("decoder", "FSDP", "v5e:2x4", (*_SIX[:4], *_ESAM)),
    ("decoder", "FSDP", "v5e:8x8", _SIX[:4]),
    ("decoder", "FSDP", "v5e:16x16", _ALL),
    ("decoder", "FSDP", "v6e:16x16", _SIX[:4]),
    ("decoder", "FSDP", "v5p:4x4x8", _SIX[:4]),
    ("decoder", "FSDP x TP", "v5e:2x4", _SIX[:4]),
    ("decoder", "FSDP x TP", "v5e:16x16", _SIX[:4]),
    ("decoder", "FSDP x TP", "v6e:16x16", _SIX[:4]),
    ("decoder", "FSDP x TP", "v5p:4x4x8", _SIX[:4]),
    ("7 billion", "FSDP", "v6e:16x16", _LARGE),
    ("7 billion", "FSDP", "v5p:4x8x8", _LARGE),
    ("7 billion", "FSDP x TP", "v6e:16x16", _LARGE),
    ("7 billion", "FSDP x TP", "v5p:4x8x8", _LARGE),
)


def rows() -> Iterator[Row]:
    """All rows; each group begins with the row that the others are compared with."""
    for *group, methods in GROUPS:
        yield Row(*group, "plain")
        yield Row(*group, "gradient")
        for method, ascend in methods:
            yield Row(*group, method, ascend)


def shard(batch: Any, i: Any) -> Any:
    """The examples of a shard, equally many of each chip, so that none is sent."""
    return jax.tree.map(lambda x: x.reshape(-1, SHARDS, *x.shape[1:])[:, i], batch)


def train_step(task: models.Task, row: Row, tx: Any, mesh: Any) -> Callable[..., Any]:
    """One step with all arguments that any method needs; unused ones cost nothing.

    The step of ``gradient`` returns the gradients alone, in place of the parameters.
    """

    def step(params: Any, opt_state: Any, model_state: Any, batch: Any, last: Any):
        def loss_fn(params: Any, model_state: Any, batch: Any) -> Any:
            x, y = batch
            logits, model_state = task.logits(params, model_state, x)
            losses = task.losses(logits, y)
            loss = losses.mean()
            if row.method == "mesa":
                average = optax_sam.mesa_params(opt_state)
                past, _ = task.logits(average, model_state, x)
                loss += optax_sam.trajectory_loss(logits, past)
            return loss, (model_state, losses)

        def per_example_loss_fn(params: Any, indices: Any = None) -> Any:
            chosen = batch
            if indices is not None:
                chosen = [a[indices] for a in batch]
            if indices is not None and row.method != "esam_unplaced":
                spread = NamedSharding(mesh, P("data"))
                chosen = jax.lax.with_sharding_constraint(chosen, spread)
            logits, _ = task.logits(params, model_state, chosen[0])
            return task.losses(logits, chosen[1])

        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)

        def on_shard(params: Any, i: Any) -> Any:
            return value_and_grad(params, model_state, shard(batch, i))[2](params)

        if row.method == "m_sam":  # it does not report the loss of the whole batch
            updates, opt_state = tx.update(None, opt_state, params, grad_fn=on_shard)
            return (optax.apply_updates(params, updates), opt_state), None
        value, grads, grad_fn = value_and_grad(params, model_state, batch)
        loss, (new_state, losses) = value
        if row.method == "gradient":
            return (grads, opt_state), (loss, new_state)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=grad_fn,
            previous_grad_fn=value_and_grad(params, model_state, last)[2],
            per_example_loss_fn=per_example_loss_fn,
            per_example_losses=losses,
            ascend=row.ascend,
        )
        return (optax.apply_updates(params, updates), opt_state), (loss, new_state)

    return step


def compiled(row: Row) -> dict[str, Any]:
    """Compiles one row."""
    start = time.perf_counter()
    shape = row.topology.split(":")[1]
    parallel = MODEL_PARALLEL[shape] if row.layout == "FSDP x TP" else 1
    mesh = programs.pod(row.topology, parallel)
    task = TASKS[row.model].on(mesh)
    rows = mesh.shape["data"]  # groups of chips that share their examples
    params, model_state = task.init()
    if row.layout == "FSDP x TP":
        specs = models.tensor_parallel(params)
    else:
        place = programs.fsdp(mesh) if row.layout == "FSDP" else lambda leaf: P()
        specs = jax.tree.map(place, params)
    if row.method == "gradient":
        tx = optax.identity()
    else:
        tx = METHODS[row.method](task.optimizer, rows * task.per_chip)
    batch = task.batch(rows), P("data")
    program = programs.read(
        programs.compile_step(
            train_step(task, row, tx, mesh),
            mesh,
            tx,
            params,
            specs,
            (model_state, P()),
            batch,
            batch,
        )
    )
    return {
        **row._asdict(),
        "chips": mesh.size,
        **program._asdict(),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def compared(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cells of the table, each row against the plain step of its group."""
    found = {Row(*(x[k] for k in Row._fields)): x for x in results}
    for row in rows():
        plain, gradient = (
            found.get(row._replace(method=name, ascend=None))
            for name in ("plain", "gradient")
        )
        this = found.get(row)
        if row.method == "gradient" or not (this and plain and gradient):
            continue
        needed = 1.0 if row.ascend is False else promised(row.method).whole
        unit = "cycles" if row.model in LOOPED else "seconds"
        ideal = None
        if plain[unit] and gradient[unit]:
            ideal = plain[unit] + (needed - 1) * gradient[unit]
        ratio = lambda key: this[key] / plain[key] if plain[key] else None  # noqa: B023
        beyond = lambda key: (this[key] - plain[key]) / 2**20  # noqa: B023
        yield {
            "group": (row.model, row.layout, row.topology, this["chips"]),
            "method": row.name,
            "promised": f"{needed:.2f}",
            "flops": f"{ratio('flops'):.3f}",
            "reduced": _pair(ratio("reduced"), this["reductions"]),
            "gathered": _pair(ratio("gathered"), this["gathers"]),
            "moved": _pair(ratio("moved"), this["moves"]),
            "state": f"{beyond('arguments'):.1f}",
            "peak": f"{beyond('temporaries'):.0f}",
            "time": f"{this[unit] / ideal:.3f}" if ideal else "",
            "largest": f"{this['largest_gather'] / 2**20:,.0f}",
            "held": f"{this['arguments'] / 2**20:,.0f}",
            "temporaries": f"{this['temporaries'] / 2**20:,.0f}",
        }


def _pair(ratio: float | None, count: int) -> str:
    return "" if ratio is None else f"{ratio:.3f} ({count})"


COLUMNS = {
    "method": "method",
    "promised": "grads",
    "flops": "FLOPs",
    "reduced": "reduced",
    "gathered": "gathered",
    "moved": "moved",
    "state": "state",
    "peak": "temp",
    "time": "time",
}
# Columns for models that are about memory: all memory, and the largest all-gather.
FULL_COLUMNS = {
    **{key: COLUMNS[key] for key in COLUMNS if key not in ("state", "peak", "time")},
    "largest": "largest",
    "held": "held",
    "temporaries": "temp",
    "time": "time",
}


def by_group(results: list[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """The rows of each group in the results."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for cells in compared(results):
        groups.setdefault(cells["group"], []).append(cells)
    return groups


def title(group: Any, results: list[dict[str, Any]]) -> str:
    """The title of a group, with the cost of its plain step on each chip."""
    model, layout, topology, chips = group
    wanted = {"model": model, "layout": layout, "topology": topology, "method": "plain"}
    plain = next(x for x in results if wanted.items() <= x.items())
    memory = " and ".join(
        f"{plain[key] / 2**20:,.0f} MiB {word}"
        for key, word in (("arguments", "held"), ("temporaries", "temporary"))
    )
    kind = topology.split(":")[0]
    time = f", {plain['seconds'] * 1e3:.1f} ms" if plain["seconds"] else ""
    if model in LOOPED:
        time = f", {plain['cycles'] / 1e6:,.0f} million cycles"
    return (
        f"{model}, {layout}, {chips} {kind} chips"
        f" (plain: {plain['flops'] / 1e9:,.0f} GFLOP, {memory}{time})"
    )


def markdown(results: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of the page; models with a loop over layers have a separate one."""
    parts: dict[str, list[str]] = {"pods": [], "pods, 7 billion": []}
    for group, cells in by_group(results).items():
        looped = group[0] in LOOPED
        columns = FULL_COLUMNS if looped else COLUMNS
        rows = [[row[key] for key in columns] for row in cells]
        text = tables.table(list(columns.values()), rows)
        name = "pods, 7 billion" if looped else "pods"
        parts[name].append(f"**{title(group, results)}**\n\n{text}")
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


def save(results: list[dict[str, Any]], path: Path) -> None:
    """Writes all rows, in their order."""
    order = {row: i for i, row in enumerate(rows())}
    place = lambda x: order.get(Row(*(x[k] for k in Row._fields)), len(order))
    settings = {name: version(name) for name in ("jax", "libtpu", "optax", "flax")}
    settings["optimization_level"] = str(jax.config.jax_optimization_level)
    study.write({"settings": settings, "rows": sorted(results, key=place)}, path)


def main() -> None:
    """Compiles what is missing, and prints the tables."""
    parser = study.parser(__doc__, RESULTS.name, out=RESULTS)
    parser.add_argument("--only", default="", help="rows with this text in them")
    options = parser.parse_args()
    if options.report:
        study.show(options, lambda results: markdown(results["rows"]))
        return
    results = study.read(options.out, {"rows": []})["rows"]
    done = {Row(*(x[k] for k in Row._fields)) for x in results}
    missing = [r for r in rows() if r not in done and options.only in ", ".join(r[:4])]
    console = Console()
    with (
        study.progress(console=console) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        bar = progress.add_task("steps compiled", total=len(missing))
        try:
            for future in as_completed([pool.submit(compiled, row) for row in missing]):
                results.append(future.result())
                save(results, options.out)
                progress.advance(bar)
        finally:  # report a failure at once, not after all other rows
            pool.shutdown(wait=False, cancel_futures=True)
    for group, cells in by_group(results).items():
        heads = COLUMNS.values()
        table = Table(*heads, title=title(group, results), box=None, pad_edge=False)
        for row in cells:
            # Only ratios, so that the table fits a terminal.
            table.add_row(*(row[key].split(" (")[0] for key in COLUMNS))
        console.print(table, "")


if __name__ == "__main__":
    main()
