"""SAM for language models: loss, forgetting and 4-bit weights of a small decoder.

Decoders learn the source code of Python's standard library, byte by byte, in less than
an epoch. AdamW trains some of them, also for half and for twice the steps. For others,
SAM or Functional-SAM goes before AdamW, from the first step or from a late one
(``when.after``). Then the weights of each decoder are rounded to 4 bits. Each decoder
also learns the text of Python's language reference, which shows how much code it
forgets.

    python benchmarks/studies/language.py
    python benchmarks/studies/language.py --report [FILE]

Each run is a line of JSON in ``--out``, and existing runs are not repeated. After
``--seconds`` the process ends after its run, with status 75 while there is more to do.
The same command continues.
"""

from __future__ import annotations

import functools
import pickle
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

import optax_sam
from benchmarks.lib import networks, study
from benchmarks.lib.models import Decoder
from benchmarks.lib.tables import table
from benchmarks.quality.protocol import UNFINISHED, Results, read
from benchmarks.quality.report import interval
from optax_sam import when

Line = dict[str, Any]
Measure = Callable[[Line], float]
WIDTH, BLOCKS, HEADS = 128, 2, 4
CONTEXT, BATCH = 64, 8  # bytes of a sequence, sequences of a step
STEPS, TUNING_STEPS = 1000, 120
SEEDS = 0, 1, 2
RATES = 1e-3, 2e-3, 4e-3, 8e-3  # AdamW tries them with the first seed
RHOS = 0.05, 0.2
LATE_RHOS = 0.2, 0.8  # larger, because fewer steps are perturbed
BLOCK = 4096  # bytes that go to one part of a text
JUDGED = 320  # sequences of held-out text
BITS = 4
NEVER = 10**6  # more steps than there are

model = Decoder(BLOCKS, WIDTH, HEADS, 256, jnp.float32, rotary=True)


class Arm(NamedTuple):
    """An optimizer that learns the code.

    Attributes:
      after: the share of the steps before SAM begins; ``None`` for AdamW.
      rhos: the radii.
      functional: whether it is Functional-SAM.
      length: steps, relative to the study's.
    """

    after: float | None = None
    rhos: tuple[float, ...] = (0.0,)
    functional: bool = False
    length: float = 1

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return round(self.length * STEPS)

    @property
    def begin(self) -> int:
        """The number of steps of AdamW alone."""
        return self.steps if self.after is None else round(self.after * self.steps)

    @property
    def gradients(self) -> float:
        """Gradient evaluations of a run, where one of AdamW is 1."""
        return (2 * self.steps - self.begin) / STEPS


ARMS = {
    "AdamW": Arm(),
    "AdamW, half": Arm(length=0.5),
    "AdamW, twice": Arm(length=2),
    "SAM": Arm(0, RHOS),
    "Functional-SAM": Arm(0, RHOS, functional=True),
    "SAM, last quarter": Arm(0.75, LATE_RHOS),
    "SAM, last tenth": Arm(0.9, LATE_RHOS),
}


def parts(text: bytes) -> dict[str, np.ndarray]:
    """Splits the blocks: of every ten, eight train, one chooses and one tests."""
    blocks = np.frombuffer(text, np.uint8)[: len(text) // BLOCK * BLOCK]
    blocks = blocks.reshape(-1, BLOCK)
    place = np.arange(len(blocks)) % 10
    chosen = {"train": place < 8, "validation": place == 8, "test": place == 9}
    return {name: blocks[rows].ravel() for name, rows in chosen.items()}


@functools.cache
def corpora() -> dict[str, dict[str, np.ndarray]]:
    """Source code, and English prose about the language; bytes."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return {
        "code": parts(b"".join(path.read_bytes() for path in modules)),
        "prose": parts("".join(topics[name] for name in sorted(topics)).encode()),
    }


def batches(text: np.ndarray, seed: int, steps: int) -> np.ndarray:
    """Sequences from anywhere, each with the byte that follows it."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(text) - CONTEXT, size=(steps, BATCH, 1))
    return text[starts + np.arange(CONTEXT + 1)].astype(np.int32)


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the bytes that follow, in nats."""
    return networks.losses(logits, tokens[:, 1:]).mean()


@jax.jit
def mean_loss(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean loss over batches of sequences."""
    one = lambda tokens: loss_of(model.apply(params, tokens[:, :-1]), tokens)
    return jax.lax.map(one, tokens).mean()


def judged(params: Any, corpus: str, part: str = "test") -> float:
    """The loss on sequences that are evenly spread over a text."""
    text = corpora()[corpus][part]
    starts = np.linspace(0, len(text) - CONTEXT - 1, JUDGED).astype(int)
    tokens = text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
    found = mean_loss(params, tokens.reshape(5, -1, CONTEXT + 1))
    return round(float(found), 5)


def rounded(params: Any) -> Any:
    """Rounds the matrices to the nearest of 15 levels, with a step for each output."""

    def nearest(path: Any, leaf: jax.Array) -> jax.Array:
        *_, layer, name = (key.key for key in path)
        if name != "kernel":
            return leaf
        inputs = (0, 1) if layer.startswith("out") else 0
        step = jnp.abs(leaf).max(inputs, keepdims=True) / (2 ** (BITS - 1) - 1)
        return jnp.round(leaf / step) * step

    return jax.tree.map_with_path(nearest, params)


def schedule(peak: Any, steps: Any) -> Callable[[Any], Any]:
    """A warm-up over a tenth, then the peak, then down to zero in the last quarter."""
    return lambda count: (
        (peak * jnp.minimum(1, (count + 1) / (0.1 * steps)))
        * jnp.minimum(1, (steps - count) / (0.25 * steps))
    )


def optimizer(peak: Any, steps: Any, rho: Any, begin: int) -> Any:
    """SAM from step ``begin`` on, then clipping, then AdamW."""
    return optax.chain(
        optax_sam.sam(rho, when=when.after(begin)),
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule(peak, steps), b2=0.98, weight_decay=0.1),
    )


@functools.cache
def make_step(begin: int, functional: bool) -> Callable[..., Any]:
    """A step of SAM from ``begin`` on, for all rates, lengths and radii."""

    def step(
        state: Any, tokens: Any, peak: Any, steps: Any, rho: Any, ascend: Any = None
    ) -> Any:
        params, opt_state = state
        net = lambda p, tokens: model.apply(p, tokens[:, :-1])
        if functional:
            both = optax_sam.functional_value_and_grad(net, loss_of)
            _, grads, grad_fn = both(params, tokens)
        else:
            grad_fn = jax.grad(lambda p: loss_of(net(p, tokens), tokens))
            grads = grad_fn(params)
        tx = optimizer(peak, steps, rho, begin)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, ascend=ascend
        )
        return optax.apply_updates(params, updates), opt_state

    return optax_sam.dispatch(step, donate_argnums=0)


def fresh(params: Any) -> Any:
    """The state before the first step."""
    return params, optimizer(0.0, 1, 0.0, NEVER).init(params)


def by_adamw(rate: float, seed: int, steps: int, until: int, saved: Path) -> Any:
    """AdamW's state after some steps, kept for the arms that go on from there."""
    if not until:
        tokens = jnp.zeros((1, CONTEXT), jnp.int32)
        return fresh(model.init(jax.random.key(seed), tokens))
    path = saved / f"{rate}-{seed}-{steps}-{until}.pickle"
    if not path.exists():
        marks = 0, *(arm.begin for arm in ARMS.values() if arm.steps == steps)
        last = max(mark for mark in marks if mark < until)
        state, step = by_adamw(rate, seed, steps, last, saved), make_step(NEVER, False)
        for tokens in batches(corpora()["code"]["train"], seed, steps)[last:until]:
            state = step(state, tokens, rate, float(steps), 0.0)
        saved.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads(path.read_bytes())


def trained(arm: Arm, rate: float, rho: float, seed: int, saved: Path) -> Any:
    """The parameters after learning the code."""
    steps = arm.steps
    params, opt_state = by_adamw(rate, seed, steps, arm.begin, saved)
    # As if SAM had been in the chain from the start: AdamW's steps do not depend on it.
    state = params, optax.tree.set(opt_state, num_steps=np.int32(arm.begin))
    step = make_step(arm.begin, arm.functional)
    for tokens in batches(corpora()["code"]["train"], seed, steps)[arm.begin :]:
        state = step(state, tokens, rate, float(steps), rho)
    return state[0]


def tuned(params: Any, rate: float, seed: int) -> Iterator[tuple[int, Any]]:
    """The parameters at four times while they learn the prose, at a lower rate."""
    state, step = fresh(params), make_step(NEVER, False)
    tokens = batches(corpora()["prose"]["train"], seed, TUNING_STEPS)
    for i in range(TUNING_STEPS):
        state = step(state, tokens[i], rate / 3, float(TUNING_STEPS), 0.0)
        if (i + 1) % (TUNING_STEPS // 4) == 0:
            yield i + 1, state[0]


def measured(params: Any, rate: float, seed: int) -> dict[str, Any]:
    """All measurements of a trained decoder."""
    found = {
        "validation": judged(params, "code", "validation"),
        "code": judged(params, "code"),
        "code, 4 bits": judged(rounded(params), "code"),
        "prose": judged(params, "prose"),
    }
    curve = [
        [step, judged(now, "code"), judged(now, "prose")]
        for step, now in tuned(jax.tree.map(jnp.copy, params), rate, seed)
    ]
    return {**found, "tuning": curve}


class OutOfTime(Exception):
    """The process must end."""


class Study:
    """All runs of the study; a file may hold some of them.

    Args:
      results: the results in the file.
      late: whether the process must end.
    """

    def __init__(
        self, results: Results, late: Callable[[], bool] = lambda: False
    ) -> None:
        """Refuses a file of other settings."""
        self.results, self.late = results, late
        line = {"task": "language", "settings": settings()}
        known = results.lines.get(results.identity(line))
        if known is None:
            results.add(line | {"versions": study.environment("jax", "flax", "optax")})
        elif known["settings"] != line["settings"]:
            raise SystemExit(
                f"{results.path} holds runs of other settings or texts, which cannot be"
                " added to: remove it, or give another --out"
            )

    def run(self, name: str, rate: float, rho: float, seed: int) -> Line:
        """The line of a run, from the file or from a new run."""
        values = {"rate": rate, "rho": rho}
        line = {"task": "language", "row": name, "values": values, "seed": seed}
        key = self.results.identity(line)
        if key not in self.results.lines:
            if self.late():
                raise OutOfTime
            start, saved = (
                time.process_time(),
                self.results.path.with_suffix(".partial"),
            )
            params = trained(ARMS[name], rate, rho, seed, saved)
            line |= measured(params, rate, seed)
            line["cpu_seconds"] = round(time.process_time() - start, 1)
            self.results.add(line)
            print(f"{name}, {values}, {seed}: {line['code']:.3f}", flush=True)
        return self.results.lines[key]

    def complete(self) -> None:
        """Chooses the learning rate, then runs all arms, seed by seed."""
        for rate in RATES:
            self.run("AdamW", rate, 0.0, SEEDS[0])
        rate = chosen_rate([*self.results.lines.values()])
        for seed in SEEDS:
            for name, arm in ARMS.items():
                for rho in arm.rhos:
                    self.run(name, rate, rho, seed)


def settings() -> dict[str, Any]:
    """The settings that all runs of a file share."""
    return {
        "steps": [STEPS, TUNING_STEPS],
        "batch": [BATCH, CONTEXT],
        "network": [WIDTH, BLOCKS, HEADS],
        "bits": BITS,
        "judged": JUDGED,
        "rates": [*RATES],
        "bytes": {
            name: {part: len(text) for part, text in corpus.items()}
            for name, corpus in corpora().items()
        },
    }


def chosen_rate(lines: list[Line]) -> float:
    """AdamW's best learning rate on held-out code, with the first seed."""
    tried = [line for line in lines if line.get("row") == "AdamW"]
    tried = [line for line in tried if line["seed"] == SEEDS[0]]
    return min(tried, key=lambda line: line["validation"])["values"]["rate"]


def rise(line: Line) -> float:
    """The increase of the loss by rounding to 4 bits."""
    return line["code, 4 bits"] - line["code"]


def after(line: Line) -> float:
    """The loss on code after learning the prose."""
    return line["tuning"][-1][1]


def forgotten(line: Line) -> float:
    """The increase of the loss on code by learning the prose."""
    return after(line) - line["code"]


def learned(line: Line) -> float:
    """The loss on prose after learning it."""
    return line["tuning"][-1][2]


class Found:
    """The runs of a file, by row and radius, at the chosen learning rate."""

    def __init__(self, lines: list[Line]) -> None:
        """Sorts them."""
        rate, self.runs = chosen_rate(lines), {}
        for name, arm in ARMS.items():
            for rho in arm.rhos:
                of = [line for line in lines if line.get("row") == name]
                of = [x for x in of if x["values"] == {"rate": rate, "rho": rho}]
                if len(of) > 1:  # otherwise there is no interval
                    self.runs[name, rho] = {line["seed"]: line for line in of}
        self.base = self.runs.get(("AdamW", 0.0), {})

    def table(self, columns: dict[str, Measure], paired: dict[str, Measure]) -> str:
        """Means of some columns, and differences from AdamW with 95 % intervals."""
        header = ["row", "`rho`", "gradients / AdamW", *columns]
        header += [f"{name}, minus AdamW's" for name in paired]
        made = []
        for (name, rho), runs in self.runs.items():
            note = f" ({len(runs)} seeds)" * (len(runs) < len(self.base))
            cells = [name + note, f"{rho:g}" * bool(rho)]
            cells.append(f"{ARMS[name].gradients:g}")
            for measure in columns.values():
                cells.append(f"{np.mean([*map(measure, runs.values())]):.3f}")
            for measure in paired.values():
                gains = [measure(runs[s]) - measure(self.base[s]) for s in runs]
                mean, half = interval(gains)
                known = runs is not self.base
                cells.append(f"{mean:+.3f} ± {half:.3f}" * known)
            made.append(cells)
        return table(header, made)


def markdown(lines: list[Line]) -> dict[str, str]:
    """The tables of docs/results/language.md, by name."""
    found = Found(lines)
    code, rough = (lambda line: line["code"]), (lambda line: line["code, 4 bits"])
    return {
        "loss": found.table(
            {"loss on code": code, "4 bits add": rise},
            {"loss": code, "4 bits add": rise, "loss with 4 bits": rough},
        ),
        "forgetting": found.table(
            {"forgotten": forgotten, "loss on prose": learned},
            {
                "forgotten": forgotten,
                "loss on prose": learned,
                "loss on code, after it": after,
            },
        ),
    }


def main() -> None:
    """Trains and reports."""
    name = "language.jsonl"
    parser = study.parser(__doc__, name, out=Path("out", name))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    if not options.report:
        end = time.perf_counter() + options.seconds
        results = Results(options.out)
        try:
            Study(results, late=lambda: time.perf_counter() > end).complete()
        except OutOfTime:
            raise SystemExit(UNFINISHED) from None
    study.show(options, markdown, reader=read)


if __name__ == "__main__":
    main()
