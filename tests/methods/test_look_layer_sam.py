"""Look-LayerSAM: LookSAM with a perturbation of each layer's own size."""

import harness
import numpy as np
from methods_lib import RHO, assert_apart, trained, trained_by
from reference import looksam
from trajectories import Fresh, rising, ten_steps

import optax_sam
from optax_sam import ascent, when

SIZE = rising(0.1)


def looking(**settings):
    method = looksam.LookSAM(ascend=looksam.layerwise, **settings)

    def direction(t, w, grad):
        method.rho = SIZE(t)
        return method.direction(t, w, grad)

    return direction


CASES = {
    "look_layer_sam": (
        optax_sam.look_layer_sam(SIZE, k=3, alpha=0.4),
        Fresh(lambda: looking(alpha=0.4, k=3)),
    ),
}
test_ten_steps_meet_the_reference, test_it_differs = ten_steps(CASES)


def test_without_reuse_or_on_every_step_it_is_the_layerwise_ascent(x64):
    rule = ascent.trust_ratio(RHO)
    for k, alpha in ((3, 0.0), (1, 0.7)):
        member = optax_sam.look_layer_sam(RHO, k=k, alpha=alpha)
        wanted = trained(optax_sam.sharpness_aware(rule, when.every_k(k)))
        harness.assert_close(trained(member), wanted, 1e-12)
    assert_apart(wanted, trained_by("sam"))


def test_the_trust_ratio_by_hand(x64):
    w, g = harness.tree(0), harness.tree(1)
    w["gain"], g["layer"]["bias"] = 0 * w["gain"], 0 * g["layer"]["bias"]
    rule = ascent.trust_ratio(0.1)
    e, _ = rule.update(g, rule.init(w), w)
    kernel = w["layer"]["kernel"], g["layer"]["kernel"], e["layer"]["kernel"]
    w_k, g_k, e_k = map(np.asarray, kernel)
    wanted = 0.1 * np.linalg.norm(w_k) * g_k / np.linalg.norm(g_k)
    np.testing.assert_allclose(e_k, wanted, rtol=1e-12)
    np.testing.assert_allclose(e["gain"], 0.1 * g["gain"], rtol=1e-12)
    np.testing.assert_array_equal(e["layer"]["bias"], 0)
