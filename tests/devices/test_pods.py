"""Every method's training step, compiled for TPU pods by the TPU's own compiler.

``make test-pods`` runs these tests, in an environment with libtpu; no TPU is needed.
"""

import functools
import importlib.util

import harness
import jax
import jax.numpy as jnp
import optax
import problems
import pytest
from jax.sharding import PartitionSpec as P
from registry import BY_NAME, METHODS, OTHERS, grad_fn_only

import optax_sam
import optax_sam.linen

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "libtpu is missing, so no pod was compiled for; run make test-pods",
        allow_module_level=True,
    )

from benchmarks.lib import models  # noqa: E402
from benchmarks.pods import programs  # noqa: E402

pytestmark = pytest.mark.slow

CHIPS = 256
POD = "v5e:16x16"
# Four layers of 8192 units and 256 examples per chip: 1.07 GB of parameters beside
# activations of 8 MB, so that memory shows what is kept of the parameters.
WIDTH, DEPTH, PER_CHIP = 8192, 4, 256
WEIGHTS = DEPTH * (WIDTH + 1) * WIDTH
TREE = 4 * WEIGHTS


def mesh_and_specs(layout, params):
    """The pod, and where each leaf of the parameters lies on it."""
    if layout == "FSDP x TP":
        by_rank = {2: P("data", "model"), 1: P("model")}
        return programs.pod(POD, 16), jax.tree.map(lambda x: by_rank[x.ndim], params)
    mesh = programs.pod(POD)
    place = programs.fsdp(mesh) if layout == "FSDP" else lambda leaf: P()
    return mesh, jax.tree.map(place, params)


@functools.cache
def program(layout, method=None, **ascend):
    """The costs of a method's step, or of plain training."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {
        f"layer{i}": {"kernel": shape(WIDTH, WIDTH), "bias": shape(WIDTH)}
        for i in range(DEPTH)
    }
    mesh, specs = mesh_and_specs(layout, params)
    examples = PER_CHIP * mesh.shape["data"]
    batch = shape(examples, WIDTH), jax.ShapeDtypeStruct((examples,), jnp.int32)
    # The loss alone, of a problem that allocates nothing.
    loss_fn = problems.mlp((1,) * (DEPTH + 1), 1, 1).loss_fn
    tx = optax.with_extra_args_support(optax.sgd(0.1, momentum=0.9))
    extra_args = grad_fn_only
    if method is not None:
        tx, extra_args = method.optimizer(), method.extra_args
    step = functools.partial(harness.make_step(tx, loss_fn, extra_args), **ascend)
    compiled = programs.compile_step(
        lambda *arguments: (step(*arguments), None),
        mesh,
        tx,
        params,
        specs,
        (batch, P("data")),
    )
    return programs.read(compiled)


def local_tree(layout):
    """Bytes of a tree like the parameters on one chip."""
    return TREE if layout == "data parallel" else TREE / CHIPS


def assert_costs(method, layout, actual, gradients):
    """As much as so many plain gradients, and no more but what is accounted for."""
    plain = program(layout)
    trees = local_tree(layout)
    flops = actual.flops
    if method.factory is optax_sam.random_sam:
        # A normal number is 139 operations (counted). XLA may draw it again where it is
        # used. Each chip draws its own.
        drawn = (flops - gradients * plain.flops) / (trees / 4)
        assert 100 < drawn < 280
        flops -= drawn * trees / 4
    # Norms and offsets are a few operations for each weight, which costs its gradient
    # 1,500 at 256 examples; up to 0.7 % is counted where no weight is sharded.
    assert flops == pytest.approx(gradients * plain.flops, rel=0.01)

    # Beyond gradients only scalars are summed, three at most for each gradient and
    # axis of the mesh; and R-SAM's draws for biases that are cut along one axis only.
    axes = 2 if layout == "FSDP x TP" else 1
    assert actual.reduced == pytest.approx(gradients * plain.reduced, rel=2e-4)
    assert actual.reductions <= gradients * (plain.reductions + 3 * axes)
    # Parameters are gathered as often as they are used, no more at a time.
    assert actual.gathered == gradients * plain.gathered
    assert actual.gathers == gradients * plain.gathers
    assert actual.largest_gather == plain.largest_gather
    assert actual.moved == gradients * plain.moved

    # Scalars take 512 bytes each. Biases lie on the axis model alone.
    held = actual.arguments - plain.arguments - method.trees * trees
    assert 0 <= held < 32 * 1024
    # Gradients, offset and perturbed point, and two whole leaves (of four) on their
    # way to a gradient or from one.
    allowed = 4 * trees + 2 * plain.largest_gather
    if method.factory in (BY_NAME["sampa"].factory, BY_NAME["mrwp"].factory):
        allowed += plain.temporaries  # two gradients at once
    assert actual.temporaries - plain.temporaries < allowed


# Each reduces, draws or gathers in a way of its own.
DIFFERENT = ("sam", "vsam", "look_layer_sam", "esam", "random_sam", "gam", "sampa")


def cases():
    """A method, where it lies, and the step: ascended, skipped, or either."""
    named = [m for m in METHODS + OTHERS if not m.variant]
    yield from ((m, "FSDP", True) for m in named)
    for layout in ("data parallel", "FSDP x TP"):
        yield from ((BY_NAME[name], layout, True) for name in DIFFERENT)
    # Of a conditional both branches are counted: the second gradient is in one alone.
    for m in named:
        if m.skips:
            yield from ((m, "FSDP x TP", ascend) for ascend in (False, None))
    yield BY_NAME["vsam"], "data parallel", None


@pytest.mark.parametrize(
    ("method", "layout", "ascend"), [*cases()], ids=lambda x: getattr(x, "name", x)
)
def test_a_step_costs_its_gradients_and_scalars(method, layout, ascend):
    gradients = 1 if ascend is False else method.uses_incoming + method.calls
    actual = program(layout, method, ascend=ascend)
    assert_costs(method, layout, actual, gradients)


LAYERS, LARGE_WIDTH, HIDDEN, VOCABULARY = 8, 256, 1024, 512
TASKS = {
    "resnet": models.resnet(image=32, stages=(1, 1), width=16, classes=16),
    "decoder": models.decoder(length=128, blocks=1, width=256, vocabulary=512),
    "scanned": models.seven_billion(
        length=128,
        layers=LAYERS,
        width=LARGE_WIDTH,
        heads=2,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
    ),
}


def model_program(name, topology, tx):
    """The costs of a step with a model's own layers, statistics among them."""
    mesh = programs.pod(topology, 4 if name == "decoder" else 1)
    task = TASKS[name].on(mesh)
    params, model_state = task.init()
    whole = lambda leaf: P()
    specs = jax.tree.map(programs.fsdp(mesh) if name == "scanned" else whole, params)
    if name == "decoder":
        specs = models.tensor_parallel(params)

    def loss_fn(params, model_state, batch):
        logits, model_state = task.logits(params, model_state, batch[0])
        return task.losses(logits, batch[1]).mean(), model_state

    def step(params, opt_state, model_state, batch):
        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
        more, grads, grad_fn = value_and_grad(params, model_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), opt_state), more

    compiled = programs.compile_step(
        step,
        mesh,
        tx,
        params,
        specs,
        (model_state, P()),
        (task.batch(mesh.size), P("data")),
    )
    return programs.read(compiled)


@pytest.mark.parametrize(
    ("name", "topology"),
    [("resnet", "v5e:4x4"), ("decoder", "v6e:4x4")],
)
def test_models(name, topology):
    """BatchNorm with its statistics, attention, embeddings; on two kinds of chips."""
    base = optax.with_extra_args_support(TASKS[name].optimizer)
    plain = model_program(name, topology, base)
    sam = model_program(name, topology, optax.chain(optax_sam.sam(), base))
    assert sam.flops == pytest.approx(2 * plain.flops, rel=2e-3)
    assert sam.seconds < 2.03 * plain.seconds
    # One less may do: XLA joins what it sends, and gathers some for both passes.
    assert plain.reduced < sam.reduced <= 2 * plain.reduced
    assert plain.reductions < sam.reductions <= 2 * (plain.reductions + 3)
    assert sam.gathered <= 2 * plain.gathered
    assert sam.largest_gather == plain.largest_gather
    assert sam.moved <= 2 * plain.moved
    # Half of what small models keep for the backward pass: where XLA runs a part of
    # one pass beside a part of the other.
    assert sam.temporaries < 1.5 * plain.temporaries


def test_a_loop_over_layers_gathers_one_layer_at_a_time():
    base = optax.with_extra_args_support(TASKS["scanned"].optimizer)
    plain = model_program("scanned", "v6e:4x4", base)
    sam = model_program("scanned", "v6e:4x4", optax.chain(optax_sam.sam(), base))
    assert sam.flops == pytest.approx(2 * plain.flops, rel=0.01)
    assert sam.cycles < 2.1 * plain.cycles
    assert sam.reduced <= 2 * plain.reduced * 1.001
    assert sam.gathered <= 2 * plain.gathered
    # The embedding, or one layer's matrix, in float32 at most.
    one = 4 * LARGE_WIDTH * max(HIDDEN, VOCABULARY)
    assert 0 < sam.largest_gather <= one
    assert plain.largest_gather <= one
    stacks = LAYERS * LARGE_WIDTH * (4 * LARGE_WIDTH + 3 * HIDDEN) * 4
    assert sam.temporaries - plain.temporaries < stacks / 4
