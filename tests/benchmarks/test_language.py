"""The study of language models: its decoder, its runs, and what it resumes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from benchmarks.lib import models
from benchmarks.quality.protocol import Results, read
from benchmarks.studies import language


@pytest.fixture
def small(monkeypatch):
    """The study with a tiny decoder and few steps."""
    tiny = {"STEPS": 8, "TUNING_STEPS": 4, "JUDGED": 10, "SEEDS": (0, 1), "BATCH": 2}
    tiny |= {"RATES": (1e-2, 1e-3), "CONTEXT": 8}
    tiny["model"] = models.Decoder(1, 16, 2, 256, jnp.float32, rotary=True)
    for name, value in tiny.items():
        monkeypatch.setattr(language, name, value)
    arms = {name: language.ARMS[name] for name in ("AdamW", "SAM, last quarter")}
    monkeypatch.setattr(language, "ARMS", arms)
    language.make_step.cache_clear()
    yield
    language.make_step.cache_clear()


def test_rotated_products_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 6))
    both = (models.rotated(jnp.broadcast_to(x, (1, 9, 2, 6))) for x in (q, k))
    scores = jnp.einsum("bqhd,bkhd->hqk", *both)
    for distance in (0, 1, 5):
        along = jnp.diagonal(scores, distance, 1, 2)
        np.testing.assert_allclose(along, along[:, :1] + 0 * along, atol=1e-5)
    assert abs(scores[0, 0, 0] - scores[0, 0, 1]) > 1e-2


def test_parts_of_a_text_share_no_block():
    text = np.arange(25 * language.BLOCK) // language.BLOCK
    found = language.parts(text.astype(np.uint8).tobytes() + b"rest")
    blocks = {name: set(part.tolist()) for name, part in found.items()}
    assert blocks["validation"] == {8, 18}
    assert blocks["test"] == {9, 19}
    assert blocks["train"] == set(range(25)) - {8, 9, 18, 19}


def test_matrices_are_rounded_to_the_nearest_of_15_levels():
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = language.model.init(jax.random.key(0), tokens)
    found = language.rounded(params)["params"]
    for name, inputs in {"q_0": 0, "out_1": (0, 1), "down_1": 0}.items():
        w, kernel = params["params"][name]["kernel"], found[name]["kernel"]
        step = jnp.abs(w).max(inputs, keepdims=True) / 7
        np.testing.assert_allclose(kernel / step, jnp.round(kernel / step), atol=1e-4)
        assert float((jnp.abs(w - kernel) / step).max()) <= 0.5 + 1e-4
        assert int(jnp.round(jnp.abs(kernel / step).max())) == 7
    embedding = found["Embed_0"]["embedding"]
    np.testing.assert_array_equal(embedding, params["params"]["Embed_0"]["embedding"])


def test_a_late_arm_goes_on_from_adamw_as_one_run_would(small, tmp_path):
    arm, rho = language.ARMS["SAM, last quarter"], 0.5
    found = language.trained(arm, 1e-2, rho, 0, tmp_path)
    params = language.model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    tx = language.optimizer(1e-2, 8.0, rho, 6)
    opt_state = tx.init(params)
    for tokens in language.batches(language.corpora()["code"]["train"], 0, 8):

        def loss(p, tokens=tokens):
            logits = language.model.apply(p, tokens[:, :-1])
            return language.loss_of(logits, tokens)

        grad_fn = jax.grad(loss)
        updates, opt_state = tx.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        params = optax.apply_updates(params, updates)
    assert int(optax_sam.metrics(opt_state)["ascents"]) == 2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        *(found, params),
    )


def test_a_cut_study_goes_on_and_refuses_other_settings(small, tmp_path, monkeypatch):
    def complete(path, late=lambda: False):
        language.Study(Results(path), late).complete()
        return [line for line in read(path) if "row" in line]

    whole = complete(tmp_path / "once.jsonl")
    # Two rates and the other seed by AdamW, and two radii of two seeds.
    assert len(whole) == 3 + 4
    path, left = tmp_path / "cut.jsonl", iter([False, False, True])
    with pytest.raises(language.OutOfTime):
        complete(path, lambda: next(left))
    assert len(read(path)) == 1 + 2
    plain = lambda lines: [{**line, "cpu_seconds": 0} for line in lines]
    assert plain(complete(path)) == plain(whole)
    rate = language.chosen_rate(whole)
    own = [x for x in whole if x["values"] == {"rate": rate, "rho": 0.0}]
    mean = np.mean([x["tuning"][-1][1] - x["code"] for x in own])
    _, _, adamw, late, _ = language.markdown(whole)["forgetting"].splitlines()
    assert len(own) == 2
    assert adamw.startswith(f"| AdamW |  | 1 | {mean:.3f} | ")
    assert late.startswith("| SAM, last quarter | 0.2 | 1.25 | ")
    monkeypatch.setattr(language, "STEPS", 9)
    with pytest.raises(SystemExit, match="other settings"):
        complete(path)
