"""Curvature of one network in float64, by PyHessian, by curvlinops and by this package.

A small network on the digits has equal weights and data in PyTorch and in JAX. It is
small enough for dense matrices. Errors are differences from these, as root mean squares
over seeds. Needs PyTorch and both packages, which are not dependencies of the project:

    pip install torch curvlinops-for-pytorch pyhessian
    python benchmarks/studies/curvature_peers.py [--seeds 5] [--out FILE]
    python benchmarks/studies/curvature_peers.py --report [FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
import scipy.stats
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.lib.tables import table
from optax_sam import sharpness

NAME = "curvature_peers.json"
HIDDEN, EXAMPLES, BATCH = 16, 500, 128  # the last batch is a short one
PEERS = "PyHessian", "curvlinops", "optax_sam"
# The rows: the quantities, by name.
ROWS = {
    "product": "Hessian times a vector",
    "largest": "largest eigenvalue",
    "fifth": "fifth largest eigenvalue",
    "smallest": "smallest eigenvalue",
    "trace": "trace",
    "diagonal": "diagonal",
    "density": "density, Wasserstein distance / range",
    "ggn": "GGN times a vector",
    "fisher": "Fisher matrix times a vector",
    "empirical": "empirical Fisher matrix times a vector",
    "layer_norm": "Hessian times a vector, network with `LayerNorm`",
}
Found = Iterator[tuple[str, Any, int | None]]  # the row, what was found, the products


def logits(params: Any, batch: Any) -> jax.Array:
    """The network; weights are ``(out, in)``, in the order of PyTorch's modules."""
    first, bias, *norm, last, last_bias = params
    h = batch[0] @ first.T + bias
    if norm:
        gain, offset = norm
        h = h - h.mean(-1, keepdims=True)
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * gain + offset
    return jnp.tanh(h) @ last.T + last_bias


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    """Of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """The mean over a batch."""
    return cross_entropy(logits(params, batch), batch).mean()


def data() -> Any:
    """Digits, as one batch."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x[:EXAMPLES] / 16), jnp.asarray(y[:EXAMPLES])


def trained(whole: Any, *, layer_norm: bool) -> list[jax.Array]:
    """The weights after some steps of descent."""
    draw = np.random.default_rng(0).normal
    shapes: list[tuple[int, ...]] = [(HIDDEN, 64), (HIDDEN,)]
    shapes += [(HIDDEN,)] * 2 * layer_norm + [(10, HIDDEN), (10,)]
    start = [jnp.asarray(draw(size=s) / s[-1] ** 0.5) for s in shapes]
    step = lambda w, _: (
        jax.tree.map(lambda w, g: w - 0.5 * g, w, jax.grad(loss_fn)(w, whole)),
        None,
    )
    return jax.lax.scan(step, start, length=200)[0]


def batches_of(whole: Any) -> list[Any]:
    """The batches of a loader."""
    return [[a[i : i + BATCH] for a in whole] for i in range(0, EXAMPLES, BATCH)]


class Dense:
    """The matrices themselves, from formulas and one batch.

    Attributes:
      H: the Hessian of the mean loss.
      matrices: Hessian, GGN, Fisher and empirical Fisher matrix, by row.
      eigenvalues: the eigenvalues of the Hessian, ascending.
    """

    def __init__(self, params: Any, whole: Any) -> None:
        """Computes them all."""
        w, unravel = ravel_pytree(params)
        self.H = np.asarray(jax.hessian(lambda w: loss_fn(unravel(w), whole))(w))
        z = logits(params, whole)
        J = np.asarray(jax.jacrev(lambda w: logits(unravel(w), whole))(w))
        p = np.asarray(jax.nn.softmax(z))
        curvature = np.einsum("nc,cd->ncd", p, np.eye(10)) - p[:, :, None] * p[:, None]
        ggn = np.einsum("nci,ncd,ndj->ij", J, curvature, J, optimize=True) / EXAMPLES
        residual = p - np.eye(10)[np.asarray(whole[1])]
        each = np.einsum("nc,nci->ni", residual, J)
        E = each.T @ each / EXAMPLES
        self.matrices = {"product": self.H, "layer_norm": self.H, "ggn": ggn}
        self.matrices |= {"fisher": ggn, "empirical": E}
        self.eigenvalues = np.linalg.eigvalsh(self.H)

    def error(self, row: str, found: Any, v: Any) -> float:
        """The error relative to the exact value, in l2 for vectors."""
        values = self.eigenvalues
        if row == "density":
            nodes, weights = found
            distance = scipy.stats.wasserstein_distance(nodes, values, weights)
            return float(distance / np.ptp(values))
        if row in self.matrices:
            exact: Any = self.matrices[row] @ v
        elif row == "diagonal":
            exact = np.diag(self.H)
        else:
            places = {"largest": -1, "fifth": -5, "smallest": 0}
            exact = np.trace(self.H) if row == "trace" else values[places[row]]
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def of_optax_sam(params: Any, batches: Any, v: Any, seed: int) -> Found:
    """The results of this package."""
    _, unravel = ravel_pytree(params)
    flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
    H = sharpness.hessian(loss_fn, params, batches)
    yield "product", flat(sharpness.hvp(loss_fn, params, batches, unravel(v))), 1
    top = sharpness.eigenvalues(H, seed, k=5, num_matvecs=40).eigenvalues
    yield "largest", sharpness.eigenvalues(H, seed).eigenvalues[0], 20
    yield "fifth", top[4], 40
    options: Any = dict(which="SA", num_matvecs=80)
    yield "smallest", sharpness.eigenvalues(H, seed, **options).eigenvalues[0], 80
    yield "trace", sharpness.trace(H, seed).estimate, 100
    yield "diagonal", flat(sharpness.diagonal(H, seed).estimate), 100
    found = sharpness.spectral_density(H, seed, num_lanczos=100, num_probes=1)
    yield "density", (found.nodes.ravel(), found.weights.ravel()), 100
    mean = lambda z, batch: cross_entropy(z, batch).mean()
    G = sharpness.ggn(logits, mean, params, batches)
    losses = lambda params, batch: cross_entropy(logits(params, batch), batch)
    F = sharpness.fisher(logits, params, batches)
    E = sharpness.empirical_fisher(losses, params, batches)
    for row, operator in {"ggn": G, "fisher": F, "empirical": E}.items():
        yield row, operator.times(v), 1


def torch_network(params: Any) -> Any:
    """The same network in PyTorch."""
    import torch
    from torch import nn

    norm = [nn.LayerNorm(HIDDEN)] * (len(params) == 6)
    net = nn.Sequential(
        nn.Linear(64, HIDDEN), *norm, nn.Tanh(), nn.Linear(HIDDEN, 10)
    ).double()
    for ours, theirs in zip(params, net.parameters(), strict=True):
        theirs.data = torch.tensor(np.asarray(ours))
    return net


def torch_batches(batches: Any) -> Any:
    """The same batches in PyTorch."""
    import torch

    return [[torch.tensor(np.asarray(x)) for x in batch] for batch in batches]


def of_pyhessian(params: Any, batches: Any, v: Any, seed: int) -> Found:
    """The results of PyHessian, with its defaults."""
    import pyhessian
    import torch

    torch.manual_seed(seed)
    net = torch_network(params)
    loss = torch.nn.CrossEntropyLoss()
    options: Any = dict(dataloader=torch_batches(batches), cuda=False)
    found = pyhessian.hessian(net, loss, **options)
    flat = lambda parts: torch.cat([x.flatten() for x in parts]).detach().numpy()
    product, products = found.dataloader_hv_product, [0]

    def counted(v: Any) -> Any:
        products[0] += 1
        return product(v)

    found.dataloader_hv_product = counted

    def spent() -> int:
        number, products[0] = products[0], 0
        return number

    parts = torch.split(torch.tensor(v), [x.numel() for x in net.parameters()])
    shaped = [x.view_as(w) for x, w in zip(parts, net.parameters(), strict=True)]
    yield "product", flat(counted(shaped)[1]), spent()
    yield "largest", found.eigenvalues()[0][0], spent()
    yield "fifth", found.eigenvalues(top_n=5)[0][4], spent()
    yield "trace", np.mean(found.trace()), spent()
    try:
        nodes, weights = found.density()
    except RuntimeError:  # torch.eig, which PyTorch 1.13 has removed
        return
    yield "density", (np.ravel(nodes), np.ravel(weights)), spent()


def of_curvlinops(params: Any, batches: Any, v: Any, seed: int) -> Found:
    """The results of curvlinops, with eigenvalues by SciPy, as on its pages."""
    import curvlinops
    import torch
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    torch.manual_seed(seed)
    np.random.seed(seed)
    net = torch_network(params)
    weights = list(net.parameters())
    data = torch_batches(batches)
    make = lambda kind, **options: getattr(curvlinops, f"{kind}LinearOperator")(
        net, torch.nn.CrossEntropyLoss(), weights, data, **options
    )
    vector = torch.tensor(v)
    H = make("Hessian", check_deterministic=False)
    yield "product", (H @ vector).detach().numpy(), 1
    products, A = [0], H.to_scipy()

    def counted(v: Any) -> Any:
        products[0] += 1
        return A @ v

    B = scipy.sparse.linalg.LinearOperator(A.shape, counted, dtype=A.dtype)
    ends = []
    for row, k, which in (
        ("smallest", 1, "SA"), ("largest", 1, "LA"), ("fifth", 5, "LA")
    ):  # fmt: skip
        options: Any = dict(k=k, which=which, return_eigenvectors=False)
        values = scipy.sparse.linalg.eigsh(B, **options)
        ends.append(min(values))
        yield row, ends[-1], products[0]
        products[0] = 0
    yield "trace", float(curvlinops.xtrace(H, 100)), 100
    yield "diagonal", curvlinops.xdiag(H, 100).detach().numpy(), 100
    found = lanczos_approximate_spectrum(
        H, 100, num_points=4096, boundaries=tuple(ends[:2])
    )
    yield "density", tuple(x.detach().numpy() for x in found), 100
    yield "ggn", (make("GGN") @ vector).detach().numpy(), 1
    yield "fisher", (make("FisherMC", mc_samples=1) @ vector).detach().numpy(), 1
    yield "empirical", (make("EF") @ vector).detach().numpy(), 1


FOUND: dict[str, Callable[..., Found]] = {
    "PyHessian": of_pyhessian,
    "curvlinops": of_curvlinops,
    "optax_sam": of_optax_sam,
}


def measure(seeds: int) -> dict[str, Any]:
    """All rows of all packages."""
    whole = data()
    batches, rows = batches_of(whole), {row: {} for row in ROWS}
    for layer_norm in (False, True):
        params = trained(whole, layer_norm=layer_norm)
        dense = Dense(params, whole)
        v = np.random.default_rng(1).normal(size=len(dense.H))
        for peer, find in FOUND.items():
            errors: dict[str, list[float]] = {row: [] for row in ROWS}
            products: dict[str, list[float]] = {row: [] for row in ROWS}
            for seed in range(1 if layer_norm else seeds):
                for row, found, spent in find(params, batches, v, seed):
                    row = "layer_norm" if layer_norm else row
                    errors[row].append(dense.error(row, np.asarray(found), v))
                    products[row].append(spent)
                    if layer_norm:
                        break  # the product is the first
            for row, values in errors.items():
                if values:
                    rms = float(np.sqrt(np.mean(np.square(values))))
                    cell = {"error": rms, "products": float(np.mean(products[row]))}
                    rows[row][peer] = cell
        if not layer_norm:
            exact = {"parameters": len(v), "trace": float(np.trace(dense.H))}
            exact["largest"] = float(dense.eigenvalues[-1])
    return {"exact": exact, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """The error of each, and its products."""
    lines = []
    for row, what in ROWS.items():
        cells = []
        for peer in PEERS:
            found = results["rows"][row].get(peer)
            text = found and f"{found['error']:.1e} ({found['products']:.0f})"
            cells.append(text or "none")
        lines.append([what, *cells])
    return table(["relative error (products)", *PEERS], lines)


def main() -> None:
    """Measures and writes, or prints."""
    parser = study.parser(__doc__, NAME, out=study.RESULTS / NAME)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if not options.report:
        import torch

        jax.config.update("jax_enable_x64", True)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)  # more threads only wait for each other
        packages = "jax", "torch", "curvlinops-for-pytorch", "pyhessian"
        settings = {**study.environment(*packages), "seeds": options.seeds}
        study.write({"settings": settings, **measure(options.seeds)}, options.out)
    study.show(options, markdown)


if __name__ == "__main__":
    main()
