"""m-sharpness in one program: the numbers of as many devices, at SAM's cost."""

import functools

import harness
import jax
import jax.numpy as jnp
import methods_lib as lib
import optax
import problems
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import METHODS

import optax_sam
from optax_sam import micro_sharpness
from optax_sam.parts import Blend, When, ascent_rule

SHARDS = 4
FORMS = ("unroll", "scan", "vmap")
# ESAM selects examples of a shard by their losses, which are asked for otherwise.
MEMBERS = [m for m in METHODS if "axis_name" in m.static and m.needs == "grad_fn"]
PROBLEM = problems.mlp()


def cut(batch, num_shards=SHARDS):
    return jax.tree.map(lambda x: x.reshape(num_shards, -1, *x.shape[1:]), batch)


def of_shards(shards, loss_fn=PROBLEM.loss_fn):
    """The gradients of a shard, by its number."""
    return lambda p, i: jax.grad(loss_fn)(p, jax.tree.map(lambda x: x[i], shards))


def step_of(tx):
    """A compiled step of an optimizer that starts with shards."""

    def step(params, state, batch, ascend=None):
        grad_fn = of_shards(cut(batch))
        updates, state = tx.update(None, state, params, grad_fn=grad_fn, ascend=ascend)
        return optax.apply_updates(params, updates), state

    return step


def mapped_step_of(tx):
    """The same on a named axis."""

    def step(params, state, batch, ascend=None):
        def of_shard(shard):
            grad_fn = lambda p: jax.grad(PROBLEM.loss_fn)(p, shard)
            return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

        over_shards = jax.vmap(of_shard, axis_name="shards", out_axes=None)
        updates, state = over_shards(cut(batch))
        return optax.apply_updates(params, updates), state

    return step


def run(step, tx, steps=6):
    params = PROBLEM.params()
    return harness.run(jax.jit(step), params, tx.init(params), PROBLEM, steps)


def cases():
    """Every method one shard after another; the other forms where rules decide."""
    decide = ("vsam", "ae_sam", "friendly_sam")
    for method in MEMBERS:
        if method.variant:  # it differs in its rule or numbers, not in what is averaged
            continue
        for form in FORMS if method.name in decide else ("unroll",):
            marks = (
                []
                if method.name in ("sam", "vsam", "random_sam")
                else [pytest.mark.slow]
            )
            yield pytest.param(method, form, marks=marks, id=f"{method.name}-{form}")


@pytest.mark.parametrize(("method", "form"), [*cases()])
def test_equals_the_named_axis(method, form, x64):
    """Parameters and the whole state, for every method that has ``axis_name``."""
    member, sgd = method.build(axis_name="shards"), optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(member, sgd)
    ours = optax.chain(micro_sharpness(member, SHARDS, method=form), sgd)
    harness.assert_close(run(step_of(ours), ours), run(mapped_step_of(tx), tx), 1e-10)


def test_around_a_whole_optimizer(x64):
    """Also one that bypasses the optimizer's momentum."""
    settings = {"learning_rate": 0.05, "rho": 0.1, "axis_name": "shards"}
    whole = optax_sam.wsam(optax.adam(0.05), **settings)
    tx = micro_sharpness(whole, SHARDS)
    harness.assert_close(run(step_of(tx), tx), run(mapped_step_of(whole), whole), 1e-10)


@pytest.mark.parametrize("num_shards", [1, SHARDS])
def test_sam_by_hand(num_shards, x64):
    """The mean of the shards' perturbed gradients; one shard is the whole batch."""
    params = PROBLEM.params()
    grad = of_shards(cut(PROBLEM.batch(0), num_shards))

    @jax.jit
    def ascended(i):
        g = grad(params, i)
        e = optax.tree.scale(0.3 / optax.tree.norm(g), g)
        return grad(optax.tree.add(params, e), i)

    tx = micro_sharpness(optax_sam.sam(0.3, axis_name="shards"), num_shards)
    emitted = lambda params: tx.update(None, tx.init(params), params, grad_fn=grad)
    d, _ = jax.jit(emitted)(params)
    found = [ascended(i) for i in range(num_shards)]
    mean = jax.tree.map(lambda *x: sum(x) / num_shards, *found)
    harness.assert_close_in_size(d, mean, 1e-12)


@pytest.mark.parametrize("form", ["scan", *map(lib.later, ("unroll", "vmap"))])
def test_shards_on_devices_are_shards_in_one_program(form, x64):
    """Two on each of two devices, under ``shard_map``, are four."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    build = functools.partial(optax_sam.vsam, 0.1, window=4, num_slices=2)
    some = micro_sharpness(build(axis_name=("shards", "data")), 2, method=form)
    alone = micro_sharpness(build(axis_name="shards"), SHARDS)

    def step_of(tx, num_shards):
        def step(params, state, batch):
            grad_fn = of_shards(cut(batch, num_shards))
            d, state = tx.update(None, state, params, grad_fn=grad_fn)
            return jax.tree.map(lambda w, x: w - 0.2 * x, params, d), state

        return step

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": False}
    on_devices = jax.shard_map(step_of(some, 2), mesh=mesh, **specs)
    found = run(on_devices, alone, 16)
    harness.assert_close(found, run(step_of(alone, SHARDS), alone, 16), 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_decides_and_counts_as_one(form):
    """A decision for all shards, and no second gradient where it is not to ascend."""
    rule, counter = optax_sam.when.every_k(3), harness.Counter()
    member = optax_sam.sam(0.1, when=rule, axis_name="shards")
    tx = micro_sharpness(member, SHARDS, method=form)
    grad = counter(of_shards(cut(PROBLEM.batch(0))))

    @jax.jit
    def step(params, state):
        return tx.update(None, state, params, grad_fn=grad)

    params = PROBLEM.params()
    state, calls = tx.init(params), []
    each_time = 1 if form == "vmap" else SHARDS  # all at once
    for _ in range(5):
        before = counter.read()
        _, state = step(params, state)
        calls.append((counter.read() - before) // each_time)
    assert calls == [2, 1, 1, 2, 1]
    assert optax_sam.metrics(state)["ascents"] == 2
    assert list(optax_sam.ascent_plan(state)[:3]) == [False, True, False]


def test_one_bad_shard_rejects_the_ascent_of_all():
    params, shards = PROBLEM.params(), cut(PROBLEM.batch(0))
    grad = of_shards(shards)

    def grad_fn(p, i):
        away = optax.tree.norm(optax.tree.sub(p, params)) > 0
        bad = jnp.where((jnp.asarray(i) == 2) & away, jnp.nan, 1.0)
        return jax.tree.map(lambda x: x * bad, grad(p, i))

    tx = micro_sharpness(optax_sam.sam(0.1, axis_name="shards"), SHARDS, method="scan")
    d, state = jax.jit(
        lambda params: tx.update(None, tx.init(params), params, grad_fn=grad_fn)
    )(params)
    assert int(optax_sam.metrics(state)["rejected_ascents"]) == 1
    g = jax.grad(PROBLEM.loss_fn)(params, PROBLEM.batch(0))
    harness.assert_close_in_size(d, g, 1e-6)


LARGE = functools.partial(problems.mlp, (32, 288, 320, 10), batch_size=128)


def compiled(member, form, gradient=None, problem=LARGE, num_shards=SHARDS):
    problem = problem()
    tx = micro_sharpness(member, num_shards, method=form)

    def step(params, state, batch):
        grads = None if gradient is None else gradient(params, batch)
        grad_fn = of_shards(cut(batch, num_shards), problem.loss_fn)
        d, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return jax.tree.map(lambda w, x: w - 0.1 * x, params, d), state

    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step).lower(params, state, batch).compile()


@functools.cache
def flops_of_gradient():
    problem = LARGE()
    params = jax.eval_shape(problem.params)
    batch = jax.eval_shape(lambda: problem.batch(0))
    lowered = jax.jit(jax.grad(problem.loss_fn)).lower(params, batch)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("form", "incoming"), [("unroll", True), ("scan", False), ("vmap", False)]
)
def test_cost_is_that_of_sam(form, incoming):
    """Two gradients, also if the one that comes in is computed, and dropped."""
    gradient = jax.grad(LARGE().loss_fn) if incoming else None
    program = compiled(optax_sam.sam(axis_name="shards"), form, gradient)
    ratio = program.cost_analysis()["flops"] / flops_of_gradient()
    # The body of a loop is counted once. Norms and offsets are those of four
    # parameters, where a shard has 32 examples.
    assert ratio == pytest.approx(2 / SHARDS if form == "scan" else 2, abs=0.08)


SUMMED = (optax_sam.sam, optax_sam.gsam, optax_sam.random_sam)


@pytest.mark.parametrize("build", SUMMED, ids=lambda build: build.__name__)
def test_a_loop_keeps_the_same_for_any_number_of_shards(build):
    """Sums of the gradients and what one shard needs; with a cache a tree per shard."""
    sizes = (256, 256, 256, 10)
    small = functools.partial(problems.mlp, sizes, batch_size=16)
    params = problems.mlp(sizes).params(jnp.float32)
    tree = sum(x.nbytes for x in jax.tree.leaves(params))
    assert all(temporary("scan", small, build, n) < 5.5 * tree for n in (4, 16))
    assert temporary("scan", small, optax_sam.vsam, 16) > 16 * tree


def temporary(form, problem, build=optax_sam.sam, num_shards=8):
    """Bytes of a step with shards."""
    member = build(axis_name="shards")
    program = compiled(member, form, problem=problem, num_shards=num_shards)
    return program.memory_analysis().temp_size_in_bytes


def test_a_loop_keeps_the_activations_of_one_shard():
    sizes = (32, *[64] * 4, 10)
    large = functools.partial(problems.mlp, sizes, batch_size=4096, num_batches=1)
    member = optax_sam.sam(axis_name="shards")

    def temporary(form):
        program = compiled(member, form, problem=large, num_shards=8)
        return program.memory_analysis().temp_size_in_bytes

    assert temporary("scan") < temporary("vmap") / 2


@pytest.mark.parametrize("form", FORMS)
def test_what_is_emitted_and_kept_has_the_kind_of_the_members(form):
    """In half precision too; nothing is run."""
    params = harness.tree(dtype="bfloat16")
    member = optax_sam.vsam(0.1, window=4, num_slices=2, axis_name="shards")
    tx, state = micro_sharpness(member, SHARDS, method=form), member.init(params)
    back = lambda p, i: jax.tree.map(lambda x: x * (1 + i), p)
    update = functools.partial(tx.update, None, grad_fn=back)
    found = jax.eval_shape(update, state, params)
    assert harness.kinds(found) == harness.kinds((params, state))


def test_dispatched():
    """Both kinds of step, by the decisions of the one member."""
    member = optax_sam.sam(0.1, when=optax_sam.when.every_k(2), axis_name="shards")
    tx = optax.chain(micro_sharpness(member, SHARDS), optax.sgd(0.1))
    step = optax_sam.dispatch(step_of(tx), donate_argnums=(0, 1))
    params = PROBLEM.params()
    actual = harness.run(step, params, tx.init(params), PROBLEM, 6)
    harness.assert_close(actual, run(step_of(tx), tx), 1e-5)
    assert optax_sam.metrics(actual[1])["ascents"] == 3


def test_convolutions_are_written_out():
    """By default, up to eight shards; all else goes through a loop."""
    member = optax_sam.sam(0.1, axis_name="shards")
    image, kernel = jnp.ones((1, 1, 5, 5)), jnp.ones((1, 1, 3, 3))
    inside = jax.jit(lambda w: jax.lax.conv(image, w, (1, 1), "SAME"))
    for layer, limit in ((lambda w: w @ w, 0), (inside, 8)):
        gradient = jax.grad(lambda w, i: jnp.sum(layer(w)) * i)  # noqa: B023
        for num_shards in (limit, limit + 1):
            tx = micro_sharpness(member, max(num_shards, 1))
            update = functools.partial(tx.update, None, grad_fn=gradient)
            text = str(jax.make_jaxpr(update)(member.init(kernel), kernel))
            assert ("scan[" in text) == (num_shards > limit or limit == 0)


def test_refused_arguments_and_calls():
    member, params = optax_sam.sam(0.1, axis_name="shards"), harness.tree()
    for message, changes in (
        ("num_shards must be an integer >= 1", {"num_shards": 0}),
        ("num_shards sets a shape or a loop", {"num_shards": jnp.array(2)}),
        ('method must be "unroll"', {"method": "pmap"}),
        (
            r"needs a transformation.*axis_name='shards'",
            {"transformation": optax_sam.sam},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            micro_sharpness(**{"transformation": member, "num_shards": 2, **changes})
    tx = micro_sharpness(member, 2)
    less, of_batch = lambda p, i: p["layer"], lambda p, batch=(1, 1), i=0: p
    no_shard = (None, lambda p: p, lambda: 1, 3)
    for message, w, extra in (
        (r"needs the parameters: tx\.update", None, {"grad_fn": lambda p, i: p}),
        *(("the number of a shard", params, {"grad_fn": f}) for f in no_shard),
        ("the number of the shard", params, {"grad_fn": of_batch}),
        ("into shards", params, {"per_example_loss_fn": lambda p, i=None: 0}),
        (r"sam: the gradient at w.*structure", params, {"grad_fn": less}),
        # An error of the caller's own stays as it is.
        ("^mine", params, {"grad_fn": raising}),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(None, tx.init(params), w, **extra)
    # A default is no reason.
    d, _ = tx.update(None, tx.init(params), params, grad_fn=lambda p, i=None: params)
    harness.assert_equal(d, params)


@pytest.mark.parametrize("form", FORMS)
def test_where_jax_tracks_what_varies(form, x64):
    """Sums over shards work inside shard_map as it is; stacks are refused there."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    params, shards = PROBLEM.params(), cut(PROBLEM.batch(0))

    def emitted(member, check_vma):
        tx = micro_sharpness(member(axis_name=("shards", "data")), 2, method=form)

        def on_device(params, shards):
            local = jax.lax.pcast(params, "data", to="varying") if check_vma else params
            grad_fn = of_shards(shards)
            return tx.update(None, tx.init(params), local, grad_fn=grad_fn)[0]

        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        mapped = jax.shard_map(on_device, mesh=mesh, check_vma=check_vma, **specs)
        return jax.jit(mapped)(params, shards)

    tracked, whole = (emitted(optax_sam.sam, x) for x in (True, False))
    harness.assert_close(tracked, whole, 1e-10)
    with pytest.raises(ValueError, match="shard_map.*check_vma=False"):
        emitted(optax_sam.friendly_sam, True)


def test_a_second_method_in_the_member_gets_the_mean(x64):
    """It has the mean of the first, as on devices, and not the shards again."""
    parts = [build(0.1, axis_name="shards") for build in (optax_sam.sam, optax_sam.gnp)]
    member, sgd = optax.chain(*parts), optax.sgd(0.1)
    tx, ours = (
        optax.chain(member, sgd),
        optax.chain(micro_sharpness(member, SHARDS), sgd),
    )
    harness.assert_close(run(step_of(ours), ours), run(mapped_step_of(tx), tx), 1e-10)


def raising(p, i):
    raise ValueError("mine")


def one_shards_norm(part):
    """A method with a part that stores a norm without averaging it."""
    start = lambda params: jnp.zeros(())
    parts = {
        "ascent": ascent_rule(
            lambda g, state, params, step, **extra: (g, optax.tree.norm(g)), start
        ),
        "when": When(
            start,
            now=lambda state, g, step: (True, state),
            observe=lambda state, g, g_s, step: optax.tree.norm(g_s),
        ),
        "blend": Blend(start, lambda g, g_s, state, step: (g_s, optax.tree.norm(g_s))),
    }
    chosen = {"ascent": optax_sam.ascent.l2(0.1), part: parts[part]}
    return optax_sam.sharpness_aware(**chosen, axis_name="shards")


@pytest.mark.parametrize(
    "member",
    [
        optax_sam.sam(0.1),
        optax_sam.sam(0.1, axis_name="other"),
        optax_sam.msam(optax.sgd(0.1, momentum=0.9)),
        *map(one_shards_norm, ("ascent", "when", "blend")),
    ],
    ids=["no axis", "another axis", "msam", "ascent", "when", "blend"],
)
def test_a_member_that_does_not_average_is_refused(member):
    params = harness.tree()
    tx = micro_sharpness(member, 2)
    grad_fn = lambda p, i: jax.tree.map(lambda x: x * (1.0 + i), p)
    update = functools.partial(tx.update, None, grad_fn=grad_fn)
    words = "does not average over 'shards'|of axis_name='shards'.*step.mean"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(update, tx.init(params), params)
