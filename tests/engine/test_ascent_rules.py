"""The rules of ascent on random trees, beside their formulas."""

import harness
import hypothesis
import jax
import methods_lib as lib
import numpy as np
import pytest
from hypothesis import strategies as st

from optax_sam import ascent


def along(direction, size, radius):
    """``radius direction / size``; nothing where there is no size."""
    return radius * direction / size if size else 0 * direction


def adaptive(g, w):
    t = np.abs(w) + 0.01
    return along(t**2 * g, np.linalg.norm(t * g), 0.3)


def fisher(eta):
    metric = lambda g: 1 + eta * g**2
    return lambda g, w: along(g / metric(g), (g @ (g / metric(g))) ** 0.5, 0.3)


# The rule, its offset for flat gradients and weights, and the tolerance.
RULES = {
    "l2": (ascent.l2(0.3), lambda g, w: along(g, np.linalg.norm(g), 0.3), 1e-5),
    # In half precision |w| + eta is rounded to 11 or 8 bits.
    "adaptive": (ascent.adaptive(0.3, 0.01, adapt=True), adaptive, 0.03),
    "fisher": (ascent.fisher(0.3, 1.0), fisher(1.0), 1e-5),
    "fisher of a large metric": (ascent.fisher(0.3, 1e6), fisher(1e6), 1e-5),
}


@pytest.mark.parametrize("name", RULES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(lib.TREES, lib.seeds)
def test_one_gradient(name, description, seed):
    with harness.x64():
        rule, formula, rtol = RULES[name]
        g, w = lib.filled(description, seed), lib.filled(description, seed + 1)
        wanted = formula(lib.flattened(g), lib.flattened(w))
        np.testing.assert_allclose(
            lib.offset_of(rule, g, w), wanted, rtol=rtol, atol=1e-30
        )


@hypothesis.settings(max_examples=10)
@hypothesis.given(lib.TREES, lib.seeds, st.data())
def test_a_mask(description, seed, data):
    with harness.x64():
        g = lib.filled(description, seed)
        mask = jax.tree.map(lambda _: data.draw(st.booleans()), g)
        e = lib.offset_of(ascent.restrict(ascent.l2(0.5), mask), g, g)
        kept = lib.flattened(jax.tree.map(lambda x, kept: kept * x, g, mask))
        wanted = along(kept, np.linalg.norm(kept), 0.5)
        np.testing.assert_allclose(e, wanted, rtol=lib.ROUNDING, atol=0)


@pytest.mark.parametrize("project", [True, False])
@hypothesis.settings(max_examples=5)
@hypothesis.given(lib.TREES, lib.seeds, st.sampled_from([None, 0.01, 1.0]))
def test_several_steps(project, description, seed, step_size):
    with harness.x64():
        trees = [lib.filled(description, seed + i) for i in range(3)]
        length = lib.RHO if step_size is None else step_size
        rule = ascent.n_step(lib.RHO, 3, step_size=step_size, project=project)
        grad_fn, seen = lib.answering(*trees[1:])
        e, wanted = lib.offset_of(rule, trees[0], trees[0], grad_fn=grad_fn), 0.0
        for g in map(lib.flattened, trees):
            wanted = wanted + along(g, np.linalg.norm(g), length)
            if project and np.linalg.norm(wanted) > lib.RHO:
                wanted = along(wanted, np.linalg.norm(wanted), lib.RHO)
        assert len(seen) == 2
        np.testing.assert_allclose(e, wanted, rtol=1e-3, atol=1e-4 * length)
        assert not project or np.linalg.norm(e) <= lib.RHO * (1 + lib.ROUNDING)


@pytest.mark.parametrize("projection", ["leaf", "global"])
@hypothesis.settings(max_examples=5)
@hypothesis.given(lib.TREES, lib.seeds, st.sampled_from([0.0, 1e-3, 0.5]))
def test_raw_steps_lie_in_their_balls(projection, description, seed, epsilon):
    """In one for each leaf, so together within ``epsilon sqrt(n)``; and by hand."""
    with harness.x64():
        g, other = lib.filled(description, seed), lib.filled(description, seed + 1)

        def offset(radius):
            rule = ascent.raw_steps(radius, 0.3, 2, projection=projection)
            grad_fn, _ = lib.answering(other)
            return rule.update(g, None, g, grad_fn=grad_fn)[0]

        e = offset(epsilon)
        for ball in jax.tree.leaves(e) if projection == "leaf" else [e]:
            assert np.linalg.norm(lib.flattened(ball)) <= epsilon * (1 + lib.ROUNDING)
        wanted = 0.3 * (lib.flattened(g) + lib.flattened(other))
        atol = lib.ROUNDING * np.linalg.norm(wanted)
        np.testing.assert_allclose(lib.flattened(offset(1e9)), wanted, atol=atol)
