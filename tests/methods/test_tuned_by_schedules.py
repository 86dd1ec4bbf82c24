"""Numbers of methods that may be schedules are read at the step."""

import harness
import jax
import numpy as np
import pytest
from methods_lib import RHO, answering

import optax_sam

TUNED = {
    "gnp": (optax_sam.gnp, {"alpha": 0.8}),
    "friendly_sam": (optax_sam.friendly_sam, {"sigma": 0.7, "decay": 0.6}),
    "fisher_sam": (optax_sam.fisher_sam, {"eta": 2.0}),
    "sam_on": (optax_sam.sam_on, {"eta": 0.2, "adapt": True, "mask": None}),
    "stable_sam": (optax_sam.stable_sam, {}),
}


@pytest.mark.parametrize("name", TUNED)
def test_schedules_are_read_at_the_step(name, x64):
    """Each by itself, on the third step, against the number that it has there."""
    factory, settings = TUNED[name]
    w, g, g_s = (harness.tree(seed) for seed in range(3))
    settings = {"rho": RHO, **settings}
    member = factory(**settings)
    state = member.init(w)
    for _ in range(2):  # so that there is an average
        _, state = member.update(g_s, state, w, grad_fn=lambda p: g)

    def step(member, state):
        grad_fn, points = answering(g_s)
        d, after = member.update(g, state, w, grad_fn=grad_fn)
        return d, points, after.ascent

    before = step(member, state)
    for argument, value in settings.items():
        if isinstance(value, float):
            schedule = lambda t, x=value: x * (1.3 - 0.3 * (t < 2))
            later = step(factory(**settings | {argument: schedule}), state)
            wanted = step(factory(**settings | {argument: 1.3 * value}), state)
            harness.assert_close(later, wanted, 1e-12)
            changed = zip(*map(jax.tree.leaves, (later, before)), strict=True)
            assert any(np.max(np.abs(x * 1.0 - y)) > 1e-6 for x, y in changed)
