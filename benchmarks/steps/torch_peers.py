"""The cost of SAM and related methods in PyTorch, as ratios to PyTorch's own SGD.

It trains the MLP and the CNN of ``step_cost.py`` with the same batches, interleaved
with SGD, by the classes of ``pytorch_optimizer``, called as in its documentation. The
report has the ratios of both frameworks side by side; do not compare the times
themselves. It needs PyTorch, which is not a dependency of the project:

    pip install torch pytorch_optimizer
    python benchmarks/steps/torch_peers.py [--rounds 9] [--out FILE]
    python benchmarks/steps/torch_peers.py --report [FILE]
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import study
from benchmarks.lib.tables import table

NAME = "torch_peers_cpu.json"
# The name of each method there and here.
PEERS = {"SAM": "sam", "GSAM": "gsam", "WSAM": "wsam", "LookSAM": "looksam"}
SIZES = {  # as in ``cost_models.py`` on a CPU: classes, batch size, steps in a block
    "MLP": (10, 128, 10),
    "CNN": (10, 16, 5),
}


def model(name: str) -> Any:
    """The network of that name in ``cost_models.py``."""
    from torch import nn

    if name == "MLP":
        widths = 3072, 512, 512, 512
        hidden = zip(widths, widths[1:], strict=False)
        layers = [x for a, b in hidden for x in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10))
    features, layers = 3, []
    for size, stride in zip((72, 144, 288, 288), (2, 2, 2, 1), strict=True):
        conv = nn.Conv2d(features, size, 3, stride, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(8, size), nn.ReLU()]
        features = size
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *pool, nn.Linear(features, 10))


class Fixed:
    """A constant radius, in place of GSAM's scheduler."""

    def step(self) -> float:
        """The radius."""
        return 0.05


def stepper(method: str, name: str) -> Any:
    """A function of a batch that takes one training step."""
    import pytorch_optimizer as peers
    import torch

    torch.manual_seed(0)
    net, loss_fn = model(name), torch.nn.CrossEntropyLoss()
    sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
    if method == "SGD":
        optimizer = sgd(net.parameters())
    elif method == "GSAM":
        base = sgd(net.parameters())
        optimizer = peers.GSAM(net.parameters(), base, net, Fixed(), alpha=0.05)
    elif method == "WSAM":
        optimizer = peers.WSAM(net, net.parameters(), torch.optim.SGD, **settings)
    else:
        more = {"k": 5} if method == "LookSAM" else {}
        kind = getattr(peers, method)
        optimizer = kind(net.parameters(), torch.optim.SGD, **more, **settings)

    def step(x: Any, y: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = loss_fn(net(x), y)
            loss.backward()
            return loss

        if method == "GSAM":
            optimizer.set_closure(loss_fn, x, y)
            optimizer.step()
            return
        closure()
        optimizer.step(*(() if method == "SGD" else (closure,)))

    return step


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Each method's time as a ratio to SGD's, from blocks before and after."""
    import torch

    classes, size, steps = SIZES[name]
    torch.manual_seed(1)
    batches = [
        (torch.randn(size, 3, 32, 32), torch.randint(0, classes, (size,)))
        for _ in range(4)
    ]

    def block(step: Any) -> float:
        start = time.perf_counter()
        for i in range(steps):
            step(*batches[i % len(batches)])
        return (time.perf_counter() - start) / steps

    all_steps = {method: stepper(method, name) for method in ("SGD", *PEERS)}
    for step in all_steps.values():
        block(step)
    plain, ratios = [], {method: [] for method in PEERS}
    for _ in range(rounds):
        for method in PEERS:
            before = block(all_steps["SGD"])
            seconds = block(all_steps[method])
            sgd = (before + block(all_steps["SGD"])) / 2
            plain.append(sgd)
            ratios[method].append(seconds / sgd)
    return {
        "parameters": sum(x.numel() for x in model(name).parameters()),
        "sgd_ms": round(1e3 * statistics.median(plain), 3),
        "to_sgd": {
            method: [round(x, 4) for x in statistics.quantiles(values, n=4)]
            for method, values in ratios.items()
        },
    }


def markdown(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The table with the ratios of both frameworks."""
    lines = []
    for name, peers in theirs["models"].items():
        rows = ours["models"][name]["rows"]
        found = {(row["method"], row["form"]): row["to_sgd"][1] for row in rows}
        for peer, method in PEERS.items():
            here = found.get((method, ""), found.get((method, "dispatched")))
            low, middle, high = peers["to_sgd"][peer]
            there = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            lines.append([name, peer, there, f"{here:.2f}"])
    header = ["model", "method", "PyTorch: time / SGD (quartiles)", "JAX: time / SGD"]
    return table(header, lines)


def main() -> None:
    """Times and writes, or prints."""
    parser = study.parser(__doc__, NAME, out=study.RESULTS / NAME)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not options.report:
        import torch

        settings = {
            "torch": torch.__version__,
            "pytorch_optimizer": version("pytorch_optimizer"),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
        }
        models = {name: measure(name, options.rounds) for name in SIZES}
        study.write({"settings": settings, "models": models}, options.out)
    ours = study.read(study.RESULTS / "step_cost_cpu.json")
    study.show(options, lambda theirs: markdown(theirs, ours))


if __name__ == "__main__":
    main()
