"""Makes every table that a CPU can make, one part after another, and times the parts.

    python benchmarks/bench.py [--data fashion_mnist_20k.npz] [--parts lsq protocol]

Results go to out/bench, and never replace the committed ones. The data set is
Fashion-MNIST, an .npz or its folder, see README.md. Without it, its parts run on digits
alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
OUT = Path("out/bench")


def commands(data: Path | None) -> dict[str, list[str]]:
    """The parts by name: a script and its arguments."""
    fashion = ["--data", str(data)] if data else []
    return {
        "step_cost": ["--rounds", "3"],
        "lsq": [],
        "correlation": fashion,
        "coverage": [],
        "measures": [],
        "protocol": ["--task", "digits"],  # Fashion-MNIST takes an hour more
    }


def run(part: str, arguments: list[str]) -> tuple[float, bool]:
    """Runs a part. Returns the seconds, and whether it succeeded."""
    out = OUT / f"{part}.{'jsonl' if part == 'protocol' else 'json'}"
    out.unlink(missing_ok=True)  # most scripts would add to an existing file
    (script,) = HERE.glob(f"*/{part}.py")
    command = [sys.executable, str(script), *arguments, "--out", str(out)]
    print(f"\n{part}: {' '.join(command[1:])}\n", flush=True)
    begin = time.perf_counter()
    done = subprocess.run(command, check=False)
    return time.perf_counter() - begin, done.returncode == 0


def main() -> None:
    """Runs the parts, and prints their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Fashion-MNIST: .npz, or its folder")
    parts = list(commands(None))
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    if options.data and not options.data.exists():
        parser.error(f"--data: there is no file {options.data}")
    if not options.data:
        print("Fashion-MNIST is left out. Give it as DATA=fashion_mnist.npz (make).")
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = commands(options.data)
    times = {part: run(part, wanted[part]) for part in options.parts}
    print("\n| part | minutes | results |\n| --- | --- | --- |")
    for part, (seconds, well) in times.items():
        print(f"| {part} | {seconds / 60:.1f} | {'made' if well else 'FAILED'} |")
    total = sum(seconds for seconds, _ in times.values())
    print(f"| all | {total / 60:.1f} | {OUT} |")
    if not all(well for _, well in times.values()):
        raise SystemExit("parts failed: their errors are above")


if __name__ == "__main__":
    main()
