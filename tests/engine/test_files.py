"""A state goes through a file, and the training goes on as if it had not."""

import flax.serialization
import harness
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import problems
from harness import each_part
from registry import OTHERS

import optax_sam


def through_msgpack(state, path, target):
    del path
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def through_orbax(state, path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def resume(method, through, path):
    """Ten steps, a file, ten more; and the same without the file."""
    problem = problems.mlp()
    tx, step = harness.compiled(method)
    params = problem.params()
    half = harness.run(step, params, tx.init(params), problem, 10)
    whole = harness.run(step, *half, problem, 10, first=10)
    target = problem.params(), tx.init(problem.params())
    restored = through(half, path, target)
    harness.assert_equal(restored, half)
    kinds_after = jax.tree.map(jnp.asarray, restored)
    assert harness.kinds(kinds_after) == harness.kinds(half)
    readers = [optax_sam.metrics] if method.calls else []
    for reader in readers + [optax_sam.ascent_plan][: method.lookahead * method.calls]:
        harness.assert_equal(reader(restored[1]), reader(half[1]))
    resumed = harness.run(step, *restored, problem, 10, first=10)
    harness.assert_equal(resumed, whole)


@each_part(quick="vsam friendly_sam", more=OTHERS)
def test_resume_from_msgpack(method, tmp_path):
    resume(method, through_msgpack, tmp_path)


@each_part(quick="vsam", more=[])
def test_resume_from_orbax(method, tmp_path):
    resume(method, through_orbax, tmp_path)
