"""``jit`` on eight devices: the numbers of one, in shardings that stay.

``conftest.py`` asks XLA for the eight devices before JAX starts.
"""

import functools

import harness
import hosts
import jax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import BY_NAME, METHODS, OTHERS, each

import optax_sam

STEPS = 12
SPECS = {"layer0": {"kernel": P("data", "model"), "bias": P("model")}}
VSAM = BY_NAME["vsam"]
replicated = functools.partial(jax.tree.map, lambda spec: P(*[None] * len(spec)))
PROBLEM = problems.mlp((8, 8), batch_size=16)


def trees_like(params, tree, of_them, of_others):
    """The tree with each of its trees like the parameters, and other leaf, replaced."""
    structure = jax.tree.structure(params)
    is_like = lambda x: jax.tree.structure(x) == structure
    choose = lambda x: of_them if is_like(x) else of_others
    return jax.tree.map(choose, tree, is_leaf=is_like)


def compiled(method, tx):
    return jax.jit(harness.make_step(tx, PROBLEM.loss_fn, method.extra_args))


@functools.cache
def on_one_device(method):
    """Parameters and state, on the host."""
    params, tx = PROBLEM.params(), method.optimizer()
    trained = harness.run(compiled(method, tx), params, tx.init(params), PROBLEM, STEPS)
    return jax.device_get(trained)


def train(method, mesh, specs):
    """Parameters and state, on the host; their shardings stay."""
    tx = method.optimizer()
    on_mesh = lambda spec: NamedSharding(mesh, spec)

    def assert_placed():
        for (path, x), sharding in zip(
            jax.tree.leaves_with_path(trained), jax.tree.leaves(placed), strict=True
        ):
            name = jax.tree_util.keystr(path)
            assert x.sharding.is_equivalent_to(sharding, x.ndim), name

    with jax.set_mesh(mesh):
        start = PROBLEM.params()
        params = jax.device_put(start, jax.tree.map(on_mesh, specs))
        trained = params, tx.init(params)
        # The parameters, the optimizer's momentum, and what the method keeps.
        like_them = trees_like(start, trained, True, False)
        assert sum(jax.tree.leaves(like_them)) == 2 + method.trees
        placed = jax.tree.map(on_mesh, trees_like(start, trained, specs, P()))
        step = compiled(method, tx)
        for t in range(STEPS):
            assert_placed()
            batch = jax.device_put(PROBLEM.batch(t), on_mesh(P("data")))
            trained = step(*trained, batch)
        assert_placed()
    assert step._cache_size() == 1  # one program, from the first step on
    return jax.device_get(trained)


def mesh_of(shape, axes=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axes, axes))


@pytest.mark.parametrize("layout", ["data_parallel", "fsdp"])
@each(*(m for m in METHODS + OTHERS if not m.variant), slow=lambda m: m is not VSAM)
def test_every_method(method, layout, x64):
    """In FSDP and tensor parallel; in data parallel with explicit axes."""
    mesh, specs = mesh_of((2, 4)), SPECS
    if layout == "data_parallel":
        mesh, specs = mesh_of((8, 1), AxisType.Explicit), replicated(SPECS)
    trained = train(method, mesh, specs)
    harness.assert_close(trained, on_one_device(method), 1e-10)


def test_the_decisions_of_one_device(x64):
    """Over 200 steps; parameters and state are split, vSAM's rings too."""
    actual = hosts.train("split", jax.devices())
    hosts.assert_equal(actual, hosts.on_one_device("conditional"))


def test_a_scan_of_sharded_steps(x64):
    tx, mesh = VSAM.optimizer(), mesh_of((2, 4))
    step = harness.make_step(tx, PROBLEM.loss_fn)

    def body(carry, batch):
        return step(*carry, batch), optax_sam.ascends_next(carry[1])

    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = jax.tree.map(place, PROBLEM.params(), SPECS)
    start = params, tx.init(params)
    batches = jax.tree.map(lambda x: place(x, P(None, "data")), PROBLEM.batches(STEPS))
    trained, decisions = jax.jit(lambda *xs: jax.lax.scan(body, *xs))(start, batches)
    expected = on_one_device(VSAM)
    assert decisions.sum() == harness.ascents(expected) < STEPS
    harness.assert_close(jax.device_get(trained), expected, 1e-10)
