"""``shard_map`` on eight devices: replicas stay one, and are m-sharpness by hand.

Each device has rows of its own and carries its own parameters and state for 200 steps,
so that whatever differs between devices has time to grow.
"""

import dataclasses
import functools
import inspect

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import side_by_side
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import ae_sam, base, esam, looksam, m_sharpness, mrwp, random_sam, sam
from registry import BY_NAME, METHODS, OTHERS, each

import optax_sam
from optax_sam.keys import normal_like

DEVICES, STEPS, COMPARED = 8, 200, 40
W, BATCHES = side_by_side.problem(0, STEPS * DEVICES)
DATA = tuple(  # (steps, devices, rows of a device, ...)
    np.stack(a).reshape(STEPS, DEVICES, 8, *a[0].shape[1:])
    for a in zip(*BATCHES, strict=True)
)


def real(method):
    """The public factory, without what the registry makes up for it."""
    return dataclasses.replace(method, factory=inspect.unwrap(method.factory))


def has_axis_name(method):
    return "axis_name" in inspect.signature(method.factory).parameters


def keeps_something(method):
    """More than the counts of steps and ascents."""
    state = jax.eval_shape(real(method).build().init, W)
    if not isinstance(state, optax_sam.SharpnessAwareState):
        return True
    return bool(jax.tree.leaves((state.ascent, state.when, state.blend)))


def extra_args(gradient, batch):
    """All that any method asks for, of this device's rows."""

    def losses(p, indices=None):
        x, y = (a if indices is None else a[indices] for a in batch)
        return jax.vmap(lambda x, y: recorded.mlp(p, x[None], y[None]))(x, y)

    # For SAMPa, as if the batch before had been this one.
    return {
        "grad_fn": gradient,
        "previous_grad_fn": gradient,
        "per_example_loss_fn": losses,
        "logits": batch[0][:4, :2],
        "indices": jnp.arange(4),
    }


def trained(method, averaged_by, check_vma=False):
    """The trajectory of the parameters, after replicas were seen to be one.

    ``averaged_by`` the method, which is told the axis's name, or the user.
    """
    by_method = averaged_by == "method"
    # SAF records the rows of all devices, and has nothing to do with gradients.
    named = has_axis_name(method) and (by_method or not method.calls)
    tx = real(method).optimizer(**({"axis_name": "data"} if named else {}))

    def own(params):
        # Under check_vma, the gradient at what is known to be the same is a sum.
        return jax.lax.pcast(params, "data", to="varying") if check_vma else params

    def body(carry, batch):
        params, state = carry
        local = lambda p: jax.grad(recorded.mlp)(p, *batch)
        mean = lambda p: jax.lax.pmean(local(own(p)), "data")
        g, grad_fn = (local(own(params)), local) if by_method else (mean(params), mean)
        extra = extra_args(grad_fn, batch)
        updates, state = tx.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
        ascents = [member.num_ascents for member in harness.members(state)]
        return (params, state), (params, ascents)

    def on_device(params, state, data):
        (_, state), kept = jax.lax.scan(
            body, (params, state), jax.tree.map(lambda x: x[:, 0], data)
        )
        return jax.tree.map(lambda x: x[None], (state, *kept))

    mapped = jax.shard_map(
        on_device,
        mesh=jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P(None, "data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    params = jax.tree.map(jnp.asarray, W)
    run = jax.jit(mapped)
    of_devices = jax.device_get(run(params, tx.init(params), DATA))
    for path, x in jax.tree.leaves_with_path(of_devices):
        first = np.broadcast_to(x[:1], x.shape)
        np.testing.assert_array_equal(x, first, jax.tree_util.keystr(path))
    _, trajectory, ascents = jax.tree.map(lambda x: x[0], of_devices)
    if method.skips:
        assert 0 < ascents[0][-1] < STEPS
    return [jax.tree.map(lambda x, t=t: x[t], trajectory) for t in range(STEPS)]


# By hand, where something is kept of the gradients or drawn for a device.


def drawing_by_hand(of_device):
    """The mean of what each device makes of normals of its own."""

    @jax.jit
    def drawn(t, device):
        own = jax.random.fold_in(side_by_side.generator(0, t), device)
        return normal_like(own, W)

    def direction(t, w, grads):
        normals = [jax.device_get(drawn(t, i)) for i in range(DEVICES)]
        pairs = zip(grads, normals, strict=True)
        return m_sharpness.mean([of_device(w, *pair) for pair in pairs])

    return direction


def random_sam_by_hand(settings):
    def of_device(w, grad, normal):
        delta = random_sam.noise(w, normal, 5e-4)
        return random_sam.random_sam(w, grad, delta, **settings)

    return drawing_by_hand(of_device)


def mrwp_by_hand(settings):
    return drawing_by_hand(functools.partial(mrwp.mrwp, alpha=0.5, **settings))


def trend_by_hand(settings):
    controller = ae_sam.Controller(settings["decay"])
    ascends = lambda t, x: controller.decide(x, 0.0)
    alpha = settings.get("alpha", 0.0)
    return m_sharpness.Looking(settings["rho"], ascends, alpha).direction


def looking_by_hand(ascend, settings):
    rho, k, alpha = (settings[name] for name in ("rho", "k", "alpha"))
    ascends = lambda t, x: t % k == 0
    return m_sharpness.Looking(rho, ascends, alpha, ascend).direction


def vsam_by_hand(settings):
    return m_sharpness.VSAM(
        settings["rho"],
        side_by_side.draws(0, STEPS),
        settings.get("reuse_decay", 0.8),
        K=settings["window"],
        m=settings["num_slices"],
        warmup=settings["warmup_steps"],
    ).direction


def esam_by_hand(settings):
    draw = lambda t: jax.random.uniform(
        side_by_side.generator(settings["key"], t), (len(W),)
    )
    rows = jax.device_get(jax.vmap(draw)(jnp.arange(COMPARED)))
    u = [dict(zip(sorted(W), row, strict=True)) for row in rows]
    # Of the 8 examples of a device the authors' code keeps int(0.5 * 8) - 1.
    kept = {"gamma": 3 / 8, "select": esam.largest}
    return m_sharpness.ESAM(u, DEVICES, rho=settings["rho"], **kept).direction


# Name -> settings to a direction(t, w, grads), with a memory of its own.
BY_HAND = {
    "vsam": vsam_by_hand,
    "vsam_a": vsam_by_hand,
    "looksam": functools.partial(looking_by_hand, sam.ascend),
    "look_layer_sam": functools.partial(looking_by_hand, looksam.layerwise),
    "ae_sam": trend_by_hand,
    "ae_looksam": trend_by_hand,
    "esam": esam_by_hand,
    "random_sam": random_sam_by_hand,
    "mrwp": mrwp_by_hand,
    "friendly_sam": lambda s: m_sharpness.FriendlySAM(**s, lam=0.6).direction,
    "vasso": lambda s: m_sharpness.VaSSO(**s).direction,
}
SGD = {"lr": 0.1, "momentum": 0.9}  # as in the registry


def gradients(t, shards):
    """That on the rows of each shard; with one shard, on all rows."""
    x, y = (a[t].reshape(shards, -1, *a.shape[3:]) for a in DATA)

    def gradient(x, y):
        return lambda w, kept=slice(None): base.mlp(w, x[kept], y[kept])[1]

    return [gradient(*shard) for shard in zip(x, y, strict=True)]


def with_losses(t):
    """What ESAM takes for the gradient on each shard."""
    losses = lambda x, y: lambda w: base.mlp_losses(w, x, y)
    rows = zip(*(a[t] for a in DATA), strict=True)
    pairs = zip(gradients(t, DEVICES), rows, strict=True)
    return [(grad, losses(*shard)) for grad, shard in pairs]


def by_hand(method, shards):
    """The first steps of a training."""
    if method.name == "wsam":
        here = lambda t: gradients(t, shards)
        return m_sharpness.wsam(W, COMPARED, here, 0.1, 0.5, **SGD)
    direction = BY_HAND[method.name](method.settings)
    grads = with_losses if method.name == "esam" else lambda t: gradients(t, shards)
    return base.descend(W, COMPARED, lambda t, w: direction(t, w, grads(t)), **SGD)


def one_by_one(method):
    """The same with what the method alone emits on each shard, and keeps of none."""
    member = real(method).build()
    sgd = optax.sgd(SGD["lr"], momentum=SGD["momentum"])

    def step(carry, batches):
        params, state, trace = carry

        def emitted(*batch):
            gradient = lambda p: jax.grad(recorded.mlp)(p, *batch)
            extra = extra_args(gradient, batch)
            return member.update(gradient(params), state, params, **extra)

        d, states = jax.vmap(emitted)(*batches)
        d = jax.tree.map(lambda x: x.mean(0), d)
        updates, trace = sgd.update(d, trace)
        params = optax.apply_updates(params, updates)
        return (params, jax.tree.map(lambda x: x[0], states), trace), params

    params = jax.tree.map(jnp.asarray, W)
    start = params, member.init(params), sgd.init(params)
    run = jax.jit(lambda start, data: jax.lax.scan(step, start, data)[1])
    found = run(start, tuple(x[:COMPARED] for x in DATA))
    return [W, *(jax.tree.map(lambda x: x[t], found) for t in range(COMPARED))]  # noqa: B023


def assert_equal(trajectory, expected):
    """To 1e-9: LookSAM's epsilon of 1e-12 is not the transcription's."""
    for t, w in enumerate(expected[1:]):
        assert recorded.deviation(trajectory[t], w) < 1e-9, t


# The batteries.

NAMED = [m for m in METHODS + OTHERS if not m.variant]
ON_AN_AXIS = [m for m in NAMED if has_axis_name(m) and m.calls]
AVERAGED_BEFORE = [m for m in NAMED if m not in ON_AN_AXIS and keeps_something(m)]


@each(*ON_AN_AXIS, slow=lambda m: m.name not in ("vsam", "random_sam"))
def test_with_the_name_of_the_axis(method, x64):
    """m-sharpness; parameters, decisions and caches the same to the bit."""
    known = method.name in BY_HAND or method.name == "wsam"
    expected = by_hand(method, DEVICES) if known else one_by_one(method)
    assert_equal(trained(method, "method"), expected)


@pytest.mark.slow
def test_with_the_name_of_the_axis_under_check_vma(x64):
    method = BY_NAME["vsam"]
    assert_equal(trained(method, "method", check_vma=True), by_hand(method, DEVICES))


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_with_means_by_the_user(check_vma, x64):
    """The method on the batch of all devices, with one perturbation."""
    method = BY_NAME["vsam"]
    assert_equal(trained(method, "user", check_vma), by_hand(method, 1))


@each(*AVERAGED_BEFORE, slow=lambda m: True)
def test_replicas_of_methods_without_m_sharpness(method, x64):
    trained(method, "user")
