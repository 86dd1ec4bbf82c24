"""The trajectories of tests/data/parity, and the losses that were trained."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from reference import vsam

DATA = pathlib.Path(__file__).parents[1] / "data" / "parity"
RUNS = json.loads((DATA / "runs.json").read_text())
PROBLEM = dict(np.load(DATA / "problem.npz"))
TENSORS = ("layer0/kernel", "layer0/bias", "layer1/kernel", "layer1/bias")


def mlp(w, x, y):
    h = jnp.tanh(x @ w["layer0/kernel"] + w["layer0/bias"])
    z = h @ w["layer1/kernel"] + w["layer1/bias"]
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(y)), y])


def quad(w, A, b):
    return 0.5 * w["w"] @ A @ w["w"] + b @ w["w"]


LOSSES = {"mlp": mlp, "quad": quad}


def runs(*methods):
    """The names of the recorded runs of some methods, with their variants."""
    return [name for name in RUNS if name.removeprefix("quad_").startswith(methods)]


def initial(name):
    if RUNS[name]["problem"] == "quad":
        return {"w": PROBLEM["quad/w0"]}
    return {leaf: PROBLEM[f"init/{leaf}"] for leaf in TENSORS}


def data(name, t):
    if RUNS[name]["problem"] == "quad":
        return PROBLEM["quad/A"], PROBLEM["quad/b"]
    batch = slice(64 * (t % 8), 64 * (t % 8) + 64)
    return PROBLEM["X"][batch], PROBLEM["y"][batch]


def transcribed_vsam(name):
    """The transcription with the hyperparameters of a run."""
    h = RUNS[name]["hyperparameters"]
    return vsam.VSAM(
        h["rho"],
        h["beta"],
        tail=TENSORS[-h["last_layer"] :],
        K=h["K"],
        m=h["m"],
        a=h["a"],
        max_rate=h["max_rate"],
        warmup=h["warmup_steps"],
    )


def arrays(name):
    return dict(np.load(DATA / f"{name}.npz"))


def saved(name):
    """Step -> parameters after it."""
    trees = {}
    for key, value in arrays(name).items():
        if key.startswith("step"):
            step, leaf = key.split("/", 1)
            trees.setdefault(int(step.removeprefix("step")), {})[leaf] = value
    return trees


def atol(name, step):
    suggested = RUNS[name]["suggested_atol"]
    return float(
        suggested if RUNS[name]["problem"] == "quad" else suggested[f"step{step:03}"]
    )


def deviation(a, b):
    assert sorted(a) == sorted(b)
    return max(float(np.max(np.abs(np.asarray(a[leaf]) - b[leaf]))) for leaf in b)
