"""``jit`` on eight devices: the numbers of one, in shardings that stay."""

import functools

import harness
import jax
import problems
import pytest
import transformer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import BY_NAME, METHODS, OTHERS, each

STEPS = 12
SLOW = pytest.mark.slow
# Shapes of the mesh ("data", "model"), on each of which one and the same split of the
# parameters over both axes is another layout.
LAYOUTS = {
    "data_parallel": (8, 1),  # without the split
    "fsdp": (8, 1),
    "tensor_parallel": (1, 8),
    "fsdp_and_tensor_parallel": (2, 4),
}
SPECS = {"layer0": {"kernel": P("data", "model"), "bias": P("model")}}
replicated = functools.partial(jax.tree.map, lambda spec: P(*[None] * len(spec)))
regression = functools.partial(problems.mlp, (8, 8), batch_size=16)


def shardings(tree, mesh, specs):
    """Those of parameters for all in the tree that is like them, replicas elsewhere."""
    structure = jax.tree.structure(specs)
    is_like_them = lambda x: jax.tree.structure(x) == structure
    place = lambda x: specs if is_like_them(x) else P()
    chosen = jax.tree.map(place, tree, is_leaf=is_like_them)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), chosen)


def assert_placed(tree, wanted):
    for (path, x), sharding in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(wanted), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), jax.tree_util.keystr(path)


def compiled(method, tx, problem, **options):
    step = harness.make_step(tx, problem.loss_fn, method.extra_args)
    return jax.jit(step, **options)


@functools.cache
def on_one_device(method, problem):
    """Parameters and state, on the host."""
    problem, tx = problem(), method.optimizer()
    params, step = problem.params(), compiled(method, tx, problem)
    trained = harness.run(step, params, tx.init(params), problem, STEPS)
    return jax.device_get(trained)


def train(method, problem, mesh, specs, pinned=False):
    """Parameters and state, on the host; their shardings stay.

    ``pinned``: the step is told so. Else XLA may spread what was replicated.
    """
    tx = method.optimizer()
    with jax.set_mesh(mesh):
        start = problem.params()
        params = jax.device_put(start, shardings(start, mesh, specs))
        trained = params, tx.init(params)
        placed = shardings(trained, mesh, specs)
        # The parameters, the optimizer's momentum, and what the method keeps.
        assert count_like(start, trained) == 2 + method.trees
        options = {"out_shardings": placed} if pinned else {}
        step = compiled(method, tx, problem, **options)
        for t in range(STEPS):
            assert_placed(trained, placed)
            batch = jax.device_put(problem.batch(t), NamedSharding(mesh, P("data")))
            trained = step(*trained, batch)
        assert_placed(trained, placed)
    assert step._cache_size() == 1  # one program, from the first step on
    return jax.device_get(trained)


def count_like(params, tree):
    """How many trees like the parameters there are in another."""
    structure = jax.tree.structure(params)
    is_like = lambda x: jax.tree.structure(x) == structure
    return sum(map(is_like, jax.tree.leaves(tree, is_leaf=is_like)))


def mesh_of(shape, axes=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axes, axes))


named = [m for m in METHODS + OTHERS if not m.variant]


@each(*named, slow=lambda m: m.name != "vsam")
def test_every_method_in_fsdp_and_tensor_parallel(method, x64):
    trained = train(method, regression(), mesh_of((2, 4)), SPECS)
    harness.assert_close(trained, on_one_device(method, regression), 1e-10)


@each(*named, slow=lambda m: m.name != "vsam")
def test_every_method_in_data_parallel_with_explicit_axes(method, x64):
    mesh = mesh_of((8, 1), AxisType.Explicit)
    trained = train(method, regression(), mesh, replicated(SPECS))
    harness.assert_close(trained, on_one_device(method, regression), 1e-10)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param(layout, shape, marks=[] if shape == (2, 4) else [SLOW], id=layout)
        for layout, shape in LAYOUTS.items()
    ],
)
def test_a_transformer(layout, shape, x64):
    method = BY_NAME["vsam"]
    specs = transformer.SPECS
    if layout == "data_parallel":
        specs = replicated(specs)
    problem = transformer.transformer
    trained = train(method, problem(), mesh_of(shape), specs, pinned=True)
    harness.assert_close_in_size(trained, on_one_device(method, problem), 1e-11)


@SLOW
def test_a_transformer_with_explicit_axes(x64):
    method = BY_NAME["vsam"]
    mesh = mesh_of((2, 4), AxisType.Explicit)
    trained = train(method, transformer.explicit(), mesh, transformer.SPECS)
    wanted = on_one_device(method, transformer.transformer)
    harness.assert_close_in_size(trained, wanted, 1e-11)
