"""What is left of SAM in half precision, and that scaled losses train the same.

The numbers are those of docs/guide/precision.md, and the loss scaling is its code.
"""

import functools

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods_lib import flattened as flat
from registry import METHODS, OTHERS

import optax_sam

RHO = 0.05
PAGE = "precision.md"


def share(arrived, meant):
    return arrived @ meant / (meant @ meant)


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / lengths if lengths else 0.0


def perturbed(params, g, rho=RHO, ascent_dtype=None):
    """The point that ``grad_fn`` is handed, and what the metric says of it."""
    points, tx = [], optax_sam.sam(rho, ascent_dtype=ascent_dtype)
    grad_fn = lambda p: points.append(p) or g
    _, state = tx.update(g, tx.init(params), params, grad_fn=grad_fn)
    return points[0], float(optax_sam.metrics(state)["survival"])


def by_contrib(params, g):
    """The same point, as ``optax.contrib.sam`` makes it."""
    points = []
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(optax.sgd(0.1), ascent, sync_period=2, opaque_mode=True)
    tx.update(g, tx.init(params), params, grad_fn=lambda p, i: points.append(p) or g)
    return points[-1]


@functools.cache
def normal():
    return jax.random.normal(jax.random.key(0), (1000, 1000))


def meant(rho=RHO):
    z = flat(normal())
    return rho * z / np.linalg.norm(z)


@pytest.mark.slow
def test_survival():
    """The metric is what an outsider measures at the point that was handed on."""
    for dtype, *cells in harness.table(PAGE, "The perturbation"):
        params, g = jnp.ones((1000, 1000), dtype), normal().astype(dtype)
        found = []
        for ascent_dtype in (None, "float32", "bfloat16"):
            point, metric = perturbed(params, g, ascent_dtype=ascent_dtype)
            assert point.dtype == (ascent_dtype or "float32")
            measured = share(flat(point) - 1, meant())
            assert metric == pytest.approx(measured, abs=0.005)
            found.append(metric)
        assert found[0] >= 0.95
        found.append(share(flat(by_contrib(params, g)) - 1, meant()))
        assert found == pytest.approx([float(x) for x in cells], abs=0.006)


def weights_in(layer, params):
    """Those that a layer multiplies by."""
    return flat(layer.apply({"params": params}, jnp.eye(1000, dtype=layer.dtype)))


@pytest.mark.slow
def test_survival_within_a_layer():
    initialized = nn.initializers.lecun_normal()(jax.random.key(1), (1000, 1000))
    starts = {"as initialized": initialized, "all 1": jnp.ones((1000, 1000))}
    rows = harness.table(PAGE, "Rounding inside a layer")
    assert len(rows) == 6
    for start, dtype, compute, *cells in rows:
        layer = nn.Dense(1000, use_bias=False, dtype=compute)
        params = {"kernel": starts[start].astype(dtype)}
        g, before, found = {"kernel": normal()}, weights_in(layer, params), []
        for rho in (RHO, RHO / 10):
            point, metric = perturbed(params, g, rho)
            arrived = weights_in(layer, point) - before
            found += [metric, share(arrived, meant(rho)), cosine(arrived, meant(rho))]
        del found[3]
        assert found == pytest.approx([float(x) for x in cells], abs=0.006), start


def test_gains_of_normalization_are_not_rounded():
    """Unlike kernels: gains of 1 that move by less than bfloat16 can show."""
    layer, x = nn.LayerNorm(dtype="bfloat16"), normal()[:64, :16]
    gain = lambda value: {
        "params": {"scale": jnp.full(16, value), "bias": jnp.zeros(16)}
    }
    apply = lambda value: flat(layer.apply(gain(value), x))
    wanted = 0.001 * flat(nn.LayerNorm().apply(gain(1.0), x))
    assert share(apply(1.001) - apply(1.0), wanted) == pytest.approx(1, abs=0.2)


# The difference of two gradients.


class Net(nn.Module):
    dtype: str | None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, dtype=self.dtype)(
            nn.tanh(nn.Dense(256, dtype=self.dtype)(x))
        )


@functools.cache
def classification():
    """Inputs and parameters that bfloat16 can hold, and labels."""
    exact = lambda tree: optax.tree.cast(optax.tree.cast(tree, "bfloat16"), "float32")
    x = exact(jax.random.normal(jax.random.key(0), (512, 64)))
    y = jnp.argmax(x @ jax.random.normal(jax.random.key(3), (64, 10)), -1)
    return exact(Net(None).init(jax.random.key(1), x)), x, y


def difference(dtype, compute, first=None):
    """The first gradient, and vSAM's difference of the second to it."""
    params, x, y = classification()
    net = Net(None if compute == "what it is given" else compute)
    x = x.astype(dtype if compute == "what it is given" else compute)
    tx = optax_sam.vsam(RHO)

    def loss_fn(p, x):
        logits = net.apply(p, x).astype("float32")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, x):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        g = grad_fn(optax.tree.cast(params, first))
        _, state = tx.update(g, tx.init(params), params, grad_fn=grad_fn, ascend=True)
        return g, state.blend.psf

    return map(flat, step(optax.tree.cast(params, dtype), x))


@pytest.mark.slow
def test_the_difference_of_two_gradients():
    g, psf = difference("float32", "float32")
    size = np.linalg.norm
    text = harness.page(PAGE)
    assert f"{100 * size(psf) / size(g):.1f} % of the gradient" in text.replace(
        "\n", " "
    )
    rows = harness.table(PAGE, "Methods that subtract the two gradients")
    assert len(rows) == 6
    for dtype, compute, taken, *cells in rows:
        first = "float32" if "copy" in taken else None
        for kind in compute.split(", or "):
            found_g, found_psf = difference(dtype, kind, first)
            found = size(found_g - g) / size(g), size(found_psf - psf) / size(psf)
            wanted = [float(x) for x in cells]
            # Releases of XLA differ by half a hundredth.
            assert found == pytest.approx(wanted, abs=0.012, rel=0.05), (dtype, kind)
            assert (found[1] < 1e-3) == (first is not None)


# Scaled losses.


# For the gradients of this problem to be short of AMP's radius.
UNPROJECTED = {"amp": {"epsilon": 10.0, "inner_lr": 0.01}}


def trained(method, scale):
    """Without a compiler, since many programs are small: the decisions are Python's."""
    problem = problems.quadratic()
    settings = dict(UNPROJECTED.get(method.name, {}))
    if "learning_rate" in method.settings:
        settings["learning_rate"] = 0.1 / scale
    tx = method.optimizer(optax.sgd(0.1 / scale, momentum=0.9), **settings)
    loss_fn = lambda params, b: scale * problem.loss_fn(params, b)
    step = harness.make_step(tx, loss_fn, method.extra_args)
    params, decisions = problem.params(), []
    state = tx.init(params)
    for b in np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32):
        params, state = step(params, state, b)
        decisions.append(harness.ascents(state))
    return params, decisions


ENTRIES = [method for method in METHODS + OTHERS if not method.variant]


@pytest.mark.slow
def test_scaled_gradients_take_the_same_steps():
    """To the bit, but for the methods of the table."""
    named = {row[0].strip("`") for row in harness.table(PAGE, "Loss scaling")}
    unequal = set()
    for method in ENTRIES:
        (one, chosen), (two, also) = trained(method, 1.0), trained(method, 1024.0)
        assert chosen == also, method.name
        if not np.array_equal(flat(one), flat(two)):
            unequal.add(method.name)
    assert unequal == named


def test_loss_scaling():
    """Each overflow of either gradient is seen, and the scale gives way."""
    page = harness.defined(PAGE, "scaled_step")
    # From a scale that overflows on the first step to one that does not.
    assert 2.0**8 < page["scale"] < 2.0**24
    assert page["failures"](page["opt_state"]) == np.log2(2.0**24 / page["scale"])

    step, tx = page["scaled_step"], page["tx"]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 4)), "float32")
    batch = x, jnp.argmax(x[:, :3], axis=1)
    w = lambda *shape: jnp.asarray(rng.normal(size=shape), "float32")
    start = {"hidden": w(4, 8), "out": w(8, 3)}

    @jax.jit
    def both(params, scale):
        grad_fn = lambda p: page["unscaled"](p, batch, scale)
        g = grad_fn(params)
        offset = optax.tree.scale(RHO / optax.tree.norm(g), g)
        return g, grad_fn(optax.tree.add(params, offset))

    # The largest scale that the first gradient stands, and a second one does not.
    low, high = 2.0**10, 2.0**24
    for _ in range(40):
        middle = (low + high) / 2
        fits = harness.is_finite(both(start, middle)[0])
        low, high = (middle, high) if fits else (low, middle)
    g, g_s = both(start, low)
    assert harness.is_finite(g)
    assert not harness.is_finite(g_s)

    params, state, scale = step(start, tx.init(start), low, 0, batch)
    harness.assert_close(params, optax.tree.add_scale(start, -0.1, g), 1e-6)
    assert optax_sam.metrics(state)["rejected_ascents"] == 1
    assert (state.total_notfinite, scale) == (0, low / 2)

    params, state, scale = step(start, state, 2 * high, 0, batch)
    harness.assert_equal(params, start)
    assert (state.total_notfinite, scale) == (1, high)
    assert harness.member_state(state).count == 1

    # What remains of a gradient that is too small.
    assert not np.any(flat(both(start, 1e-7)[0]))


def test_a_dynamic_scale():
    """The block of the page: the scale falls until both gradients are finite."""
    names = harness.defined(PAGE, "scaled_step")
    (block,) = [b for b in harness.code(PAGE) if "def dynamic_step(" in b]
    exec(block, names)
    assert 2.0**10 < names["dynamic_scale"].scale < 2.0**24
    assert names["dynamic_scale"].fin_steps > 3
    found = optax_sam.metrics(names["dynamic_state"])
    assert found["ascents"] == names["dynamic_scale"].fin_steps
    assert found["rejected_ascents"] == 0
    assert names["loss"] < np.log(3)


def test_a_first_gradient_at_a_float32_copy():
    """The lines of the page: nothing is rounded in between."""
    loss_fn = lambda p, x: jnp.sum((p["w"].astype("float32") - x) ** 2)
    params = {"w": jnp.array([1.0, 3.0], "bfloat16")}
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(0.1))
    names = {"loss_fn": loss_fn, "batch": 0.123, "params": params, "tx": tx}
    names |= {"jax": jax, "jnp": jnp, "optax": optax, "opt_state": tx.init(params)}
    (block,) = [b for b in harness.code(PAGE) if "tree.cast(params, jnp.float32)" in b]
    exec(block, names)
    wanted = 2 * (np.float32([1, 3]) - np.float32(0.123))
    np.testing.assert_allclose(names["grads"]["w"], wanted, rtol=1e-6)
