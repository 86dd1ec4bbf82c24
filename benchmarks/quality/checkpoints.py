"""Checkpoints of the quality benchmark, and what is remembered of each epoch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.quality.step import State


class Epoch(NamedTuple):
    """What is known after an epoch.

    Attributes:
      seconds: that it took, without the evaluation.
      cold: whether something was compiled in it.
      loss: mean over its steps, at the parameters, with smoothed labels.
      accuracy: on the test set in percent, if that was looked at.
    """

    seconds: float
    cold: bool
    loss: float
    accuracy: float | None


def brief(x: Any) -> Any:
    """For JSON: six digits of a number, ``None`` for one that it cannot hold."""
    if not isinstance(x, float):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else None


def save(folder: Path, state: State, history: list[Epoch]) -> None:
    """Writes a checkpoint; what ``run.json`` names is complete."""
    import orbax.checkpoint as ocp

    leaves = {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(state))}
    name = f"epoch_{len(history)}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / name).absolute(), leaves)
        checkpointer.wait_until_finished()
    new = folder / "run.new"
    new.write_text(json.dumps({"leaves": name, "history": history}))
    new.replace(folder / "run.json")
    for old in folder.glob("epoch_*"):
        if old.name != name:
            shutil.rmtree(old)


def restore(folder: Path, like: State) -> tuple[State, list[Epoch]]:
    """Reads it, into arrays like these."""
    import orbax.checkpoint as ocp

    kept = json.loads((folder / "run.json").read_text())
    leaves, structure = jax.tree.flatten(like)
    target = {
        f"{i:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for i, x in enumerate(leaves)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore((folder / kept["leaves"]).absolute(), target)
    found = [jnp.array(found[name]) for name in sorted(found)]
    history = [Epoch(*epoch) for epoch in kept["history"]]
    return jax.tree.unflatten(structure, found), history
