"""What every method on the engine makes of masks, and of a radius of zero."""

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import numpy as np
from registry import every_method, every_skipping

import optax_sam


@every_method
def test_no_radius_and_no_leaf_is_the_base_optimizer(method, x64):
    """The second gradient is taken at the very weights, and emitted as it is."""
    params, g_s = harness.tree(), harness.tree(2)
    still = method.of_radius(0.0)
    for member in (method.build(**still), method.build(mask=False)):
        d, points, state = lib.ascended(member)
        assert len(points) == method.calls
        # R-SAM's first point is smoothed; it is masked, but not small with rho.
        for point in points if method.uses_incoming else points[-1:]:
            harness.assert_equal(point, params)
        harness.assert_emits(method, d, harness.tree(1), g_s, 1e-12)
        assert optax_sam.metrics(state)["survival"] == 1


@every_skipping
def test_no_radius_trains_as_the_base_optimizer(method, x64):
    still = method.build(**method.of_radius(0.0))
    harness.assert_close(lib.trained(still), lib.trained_by("sgd"), 1e-12)


@every_method
def test_masks(method, x64):
    """A mask that holds everything is none; what it leaves out stays in place."""
    params = harness.tree()
    everything = (
        None,
        True,
        {"layer": True, "gain": True},
        jax.tree.map(lambda _: True, params),
        lambda p: jax.tree.map(lambda _: True, p),
    )
    results = [lib.ascended(method.build(mask=mask)) for mask in everything]
    for result in results[1:]:
        harness.assert_equal(result, results[0])

    kernels = (
        {"layer": {"kernel": True, "bias": False}, "gain": False},
        lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    )
    results = [lib.ascended(method.build(mask=mask)) for mask in kernels]
    harness.assert_equal(results[1], results[0])
    d, points, _ = results[0]
    harness.assert_emits(method, d, harness.tree(1), harness.tree(2), 1e-12)
    for point in points:
        kernel = lambda tree: {"layer": {"kernel": tree["layer"]["kernel"]}}
        offset = jax.tree.map(jnp.subtract, kernel(point), kernel(params))
        g = kernel(harness.tree(1 if method.uses_incoming else 2))
        length = method.norm(offset, kernel(params), g)
        # R-SAM's first is noise, and GAM's later ones are of other lengths.
        of_rho = points[:1] if method.more_radii else points
        if point is of_rho[-1] or (method.uses_incoming and not method.more_radii):
            rho = method.settings[method.radius]
            np.testing.assert_allclose(length, rho, rtol=1e-9)
        harness.assert_equal(
            (point["gain"], point["layer"]["bias"]),
            (params["gain"], params["layer"]["bias"]),
        )
