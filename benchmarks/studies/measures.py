"""The cost and memory of each measure, and of 50,000 images in batches from the host.

Products, or passes over the data, are counted while a measure runs with its defaults.
Its memory is the memory of the compiled program, for ten million parameters. The table
also has the coverage of standard errors from ``coverage.py``. It takes three minutes on
two cores.

    python benchmarks/studies/measures.py [--out FILE]
    python benchmarks/studies/measures.py --report [FILE]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.lib.tables import table
from benchmarks.studies import coverage
from optax_sam import sharpness


class Measure(NamedTuple):
    """A measure with its defaults, the unit of its cost, and the kind of its error."""

    name: str
    run: Callable[..., Any]
    unit: str
    error: str
    coverage: str = ""


def measure(title: str, unit: str, error: str, cover: str = "", **options: Any) -> Any:
    """A measure of the package, by its name, with its arguments beside the data."""
    function = getattr(sharpness, title.split(",")[0])
    run = lambda loss_fn, params, batches: function(
        loss_fn=loss_fn, params=params, batches=batches, **options
    )
    return Measure(title, run, unit, error, cover)


def product(loss_fn: Any, params: Any, batches: Any) -> Any:
    """One product with a vector."""
    return sharpness.hvp(loss_fn, params, batches, params)


def noise(loss_fn: Any, params: Any, batches: Any) -> Any:
    """The tolerated noise, for minus the loss as the metric."""
    metric = lambda params, batch: -loss_fn(params, batch)
    return sharpness.pac_bayes_flatness(metric, params, batches, 0)


PAIR = sharpness.gl_pair("first", sharpness.GLBlock("second", rank_axis=0))
SE, SE_BIAS, BOUND = "standard error", "standard error, with bias", "lower bound"
PLAIN = {"method": "hutchinson"}
MEASURES = [
    Measure("hvp", product, "products", "exact"),
    measure("hessian_eigenvalues", "products", "residual", "largest eigenvalue", key=0),
    measure("hessian_trace, XTrace", "products", SE, "trace, XTrace", key=0,
            method="xtrace"),
    measure("hessian_trace, Hutchinson", "products", SE, "trace, Hutchinson", key=0,
            **PLAIN),
    measure("hessian_diagonal, XDiag", "products", SE, "diagonal, XDiag", key=0,
            method="xdiag"),
    measure("hessian_diagonal, Hutchinson", "products", SE, "diagonal, Hutchinson",
            key=0, **PLAIN),
    measure("hessian_frobenius_norm", "products", SE, "Frobenius norm", key=0),
    measure("spectral_sum", "products", SE_BIAS, "sum", key=0, fn=jnp.abs),
    measure("spectral_density", "products", SE, "density", key=0),
    measure("renyi_entropy", "products", SE_BIAS, "Renyi", key=0),
    measure("average_sharpness", "passes", SE, "average sharpness", key=0, rho=0.1),
    Measure("pac_bayes_flatness", noise, "passes", SE, "PAC-Bayes drop"),
    measure("sam_sharpness", "passes", "exact", rho=0.1),
    measure("worst_case_sharpness", "passes", BOUND, rho=0.1),
    measure("keskar_sharpness", "passes", BOUND),
    measure("geodesic_sharpness", "passes", BOUND, rho=0.1, gl_pairs=[PAIR]),
]  # fmt: skip


def two_layers(params: Any, batch: jax.Array) -> jax.Array:
    """The loss of a network without a bias."""
    return jnp.mean((jnp.tanh(batch @ params["first"]) @ params["second"]) ** 2)


def cost(case: Measure) -> list[float]:
    """Evaluations of one batch, and temporary memory in parameter vectors."""
    small = {"first": jnp.ones((20, 10)), "second": jnp.ones((10, 20)) / 9}
    with sharpness.progress(two_layers) as counted:
        run = functools.partial(case.run, counted)
        jax.block_until_ready(jax.jit(run)(small, jnp.ones((1, 1, 20))))
        count = counted.count
    shape = lambda *x: jax.ShapeDtypeStruct(x, "float32")
    hidden = 500 if "geodesic" in case.name else 5000  # pairs must have a low rank
    outer = 5_000_000 // hidden
    large = {"first": shape(outer, hidden), "second": shape(hidden, outer)}
    need = sharpness.memory(case.run, two_layers, large, shape(1, 8, outer))
    return [count, round(need.parameter_vectors, 1)]


IMAGES, PIXELS, BATCH, EXPERTS = 50_000, 784, 1000, 50


def images() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Drawn images in batches of a thousand, each batch for another expert."""
    for i in range(IMAGES // BATCH):
        rng = np.random.default_rng(i)
        labels = rng.integers(10, size=BATCH)
        pixels = rng.integers(128, size=(BATCH, PIXELS)) + 12 * labels[:, None]
        expert = np.full(BATCH, i % EXPERTS)
        yield pixels.astype("uint8"), labels, expert


def of_experts(params: Any, batch: Any) -> jax.Array:
    """The loss of a network with the weights of the batch's expert."""
    pixels, labels, expert = batch
    own = expert[0] % len(params["in"])
    first, second = params["in"][own], params["out"][own]
    hidden = jnp.tanh(pixels.astype(first.dtype) / 255 @ first)
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ second, labels)
    return losses.mean()


def network(width: int, num_experts: int, dtype: str) -> dict[str, jax.Array]:
    """Its weights: ten million for 254 hidden units and 50 experts."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[1] ** 0.5, dtype)
    shapes = (num_experts, PIXELS, width), (num_experts, width, 10)
    return dict(zip(("in", "out"), (draw(*shape) for shape in shapes), strict=True))


def peak() -> int:
    """The most bytes in memory since the last call (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def streamed(dtype: str, measures: dict[str, Any], params: Any) -> dict[str, Any]:
    """Memory beside a batch and the weights, and the largest difference to a stack."""
    rows, found = {}, {}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    batch = sum(x.nbytes for x in next(images()))
    run = lambda f, batches: jax.device_get(f(of_experts, params, batches, 0))
    for name, f in measures.items():
        run(f, [next(images())])  # compiles
        peak()
        before = peak()
        found[name] = run(f, images)
        rows[name] = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
        if size > 10 * batch:
            rows[name]["vectors"] = round((peak() - before - batch) / size, 1)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *images())
    for name, f in measures.items():
        whole = jax.jit(lambda p, b, f=f: f(of_experts, p, b, 0))(params, stacked)
        pairs = zip(*map(jax.tree.leaves, (found[name], whole)), strict=True)
        off = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
        rows[name]["difference"] = float(f"{off:.1g}")
    return {f"{name}, {dtype}": row for name, row in rows.items()}


def top(*args: Any) -> Any:
    """Eigenvalues, after few steps."""
    return sharpness.hessian_eigenvalues(*args, k=2, num_matvecs=4).eigenvalues


def trace(*args: Any) -> Any:
    """The trace, from few probes."""
    return sharpness.hessian_trace(*args, num_matvecs=2, method="hutchinson")


def density(*args: Any) -> Any:
    """The density, after few steps."""
    few = {"num_lanczos": 4, "num_probes": 2, "num_grid": 50}
    return sharpness.spectral_density(*args, **few).density


def renyi(*args: Any) -> Any:
    """An entropy, after few steps."""
    few = {"num_top_matvecs": 4, "num_lanczos": 4, "num_probes": 2}
    return sharpness.renyi_entropy(*args, alpha=1.5, **few).value


def markdown(results: Any) -> dict[str, str]:
    """The cost of each measure, the kind of its error, and how often it holds."""
    held = study.read(study.RESULTS / "coverage.json")
    lines = []
    for case in MEASURES:
        count, vectors = results["rows"][case.name]
        name, _, method = case.name.partition(", ")
        share = coverage.held(held, case.coverage) if case.coverage else ""
        title = f"`{name}`" + (f", {method}" if method else "")
        unit = case.unit if count > 1 else case.unit.removesuffix("s")
        lines.append([title, f"{count} {unit}", f"{vectors:.3g}", case.error, share])
    header = ["measure", "cost", "memory", "error", "true value within it"]
    rows = []
    for name, row in results["stream"].items():
        memory = f"{row['vectors']:g}" if "vectors" in row else ""
        size = f"{row['parameters']:,}"
        rows.append([name, size, memory, f"{row['difference']:g}"])
    stream = ["measure", "parameters", "memory", "largest difference"]
    return {"all": table(header, lines), "stream": table(stream, rows)}


def main() -> None:
    """Runs what the file lacks, and prints the tables."""
    options = study.parser(__doc__, "measures.json").parse_args()
    if not options.report:
        results = study.begun(study.environment(), options.out, rows={}, stream={})
        if not results["stream"]:
            large = network(254, EXPERTS, "float32")
            few = {"trace": trace, "eigenvalues": top}
            results["stream"] |= streamed("float32", few, large)
            jax.config.update("jax_enable_x64", True)
            every = few | {"density": density, "Renyi entropy": renyi}
            results["stream"] |= streamed("float64", every, network(10, 1, "float64"))
            jax.config.update("jax_enable_x64", False)
            study.write(results, options.out)
        for case in MEASURES:
            if case.name not in results["rows"]:
                results["rows"][case.name] = cost(case)
                study.write(results, options.out)
    study.show(options, markdown)


if __name__ == "__main__":
    main()
