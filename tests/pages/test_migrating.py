"""What docs/start/migrating.md says is equal, is; and its code runs."""

import functools

import harness
import jax
import jax.numpy as jnp
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.mlp((3, 8, 8, 2))
# Absolute, of weights of size 1: theirs has no guard beside the norm.
STEPS, TOLERANCE, RHO = 30, 1e-12, 0.05
SGD = optax.sgd(0.03, momentum=0.9)
ADAMW = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.1))


def contrib(base, sync_period=2, ascent=None, **options):
    ascent = ascent or optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(base, ascent, sync_period=sync_period, **options)


opaque = functools.partial(contrib, opaque_mode=True)


def gradient(params, batch):
    return jax.grad(PROBLEM.loss_fn)(params, batch)


def trained(tx):
    """Parameters after a scan over the steps; ``grad_fn`` as both packages call it."""

    def step(carry, batch):
        params, state = carry
        grad_fn = lambda p, *i: gradient(p, batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return run(PROBLEM.params(), PROBLEM.batches(STEPS))


def test_opaque_mode_of_two_ascent_steps(x64):
    """Not projected: ``num_ascent_steps`` is something else."""
    rule = optax_sam.ascent.n_step(RHO, 2, project=False)
    members = {
        "alike": optax_sam.sharpness_aware(rule),
        "projected": optax_sam.sam(RHO, num_ascent_steps=2),
    }
    expected = trained(opaque(SGD, sync_period=3))
    for name, member in members.items():
        found = trained(optax.chain(member, SGD))
        apart = optax.tree.norm(optax.tree.sub(found, expected), ord=jnp.inf)
        assert (apart <= TOLERANCE) == (name == "alike")


def test_transparent_mode_on_repeated_batches(x64):
    theirs = contrib(ADAMW)

    def step(carry, batch):
        params, state = carry
        updates, state = theirs.update(gradient(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params, batches):
        twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batches)
        return jax.lax.scan(step, (params, theirs.init(params)), twice)[0][0]

    expected = run(PROBLEM.params(), PROBLEM.batches(STEPS))
    found = trained(optax.chain(optax_sam.sam(RHO), ADAMW))
    harness.assert_close(found, expected, 0, atol=TOLERANCE)


def test_opaque_mode_other_ascents_and_schedules(x64):
    sgd, rho = SGD, harness.linear(0.1, 0.0, STEPS)
    clip, plainly = optax.clip_by_global_norm(1e-3), optax.scale(RHO)
    falling = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    for ours, theirs in (
        (optax_sam.sam(RHO), opaque(sgd)),
        # Not normalized.
        (optax_sam.sharpness_aware(plainly), opaque(sgd, ascent=optax.sgd(RHO))),
        # Schedules stand still unless the second optimizer's state is kept.
        (optax_sam.sam(rho), opaque(sgd, ascent=falling, reset_state=False)),
        (optax_sam.sam(0.1), opaque(sgd, ascent=falling, reset_state=True)),
        # What stood in front shaped the ascent alone.
        (optax_sam.sam(RHO), optax.chain(clip, opaque(sgd))),
    ):
        found, expected = trained(optax.chain(ours, sgd)), trained(theirs)
        harness.assert_close(found, expected, 0, atol=TOLERANCE)


def test_size_of_the_state():
    """One copy of the parameters less than in transparent mode."""
    params = problems.mlp((32, 64, 10)).params()
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    adam = optax.adam(0.01)
    ours = size(optax.chain(optax_sam.sam(RHO), adam).init(params))
    assert ours < size(adam.init(params)) + 100
    assert ours + size(params) - 100 < size(contrib(adam).init(params))


def test_a_zero_gradient():
    params = {"w": jnp.ones(3)}
    none = lambda p, *i: jax.tree.map(lambda x: 0 * x, p)
    emitted = [
        tx.update(none(params), tx.init(params), params, grad_fn=none)[0]
        for tx in (optax_sam.sam(RHO), opaque(optax.identity()))
    ]
    assert list(map(harness.is_finite, emitted)) == [True, False]


@pytest.mark.parametrize("adaptive", [False, True])
def test_two_step_wrapper(adaptive, x64):
    """The PyTorch wrapper around SGD with decay and momentum, written out."""
    rho, lr, momentum, decay, limit = 0.1, 0.1, 0.9, 5e-2, 0.2
    everywhere = jax.tree.map
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))

    def step(carry, batch):
        w, buffer = carry
        g = gradient(w, batch)
        sizes = everywhere(jnp.abs if adaptive else jnp.ones_like, w)
        scale = rho / (norm(everywhere(jnp.multiply, sizes, g)) + 1e-12)
        e = everywhere(lambda s, x: s**2 * x * scale, sizes, g)  # first_step
        g = gradient(everywhere(jnp.add, w, e), batch)
        # PyTorch adds 1e-6 to this norm.
        shrink = jnp.minimum(1, limit / norm(g))
        g = everywhere(lambda x, p: shrink * x + decay * p, g, w)  # second_step
        buffer = everywhere(lambda b, x: momentum * b + x, buffer, g)
        return (everywhere(lambda p, b: p - lr * b, w, buffer), buffer), None

    start = PROBLEM.params()
    zeros = everywhere(jnp.zeros_like, start)
    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, PROBLEM.batches(STEPS))[0])
    expected, _ = run(start, zeros)
    sam = optax_sam.asam(rho, adapt=True, eta=0.0) if adaptive else optax_sam.sam(rho)
    ours = optax.chain(
        sam,
        optax.clip_by_global_norm(limit),
        optax.add_decayed_weights(decay),
        optax.sgd(lr, momentum=momentum),
    )
    harness.assert_close(trained(ours), expected, TOLERANCE)


def test_the_code_of_the_page_runs():
    blocks = harness.code("migrating.md")
    blocks = [block for block in blocks if "(PyTorch)" not in block]
    assert len(blocks) == 4

    @jax.jit
    def results(params, batch):
        names = {"jax": jax, "optax": optax, "optax_sam": optax_sam}
        names |= {"loss_fn": PROBLEM.loss_fn, "params": params, "batch": batch}
        emitted = []
        for block in blocks[:2]:
            exec(block, names)
            emitted.append(names["updates"])
        for block in blocks[2:]:
            exec(block, names)
        reached = optax.apply_updates(params, emitted[0])
        state = names["tx"].init(params)
        loss = names["train_step"](params, state, batch)[2]
        return emitted, (names["p"], reached), (loss, PROBLEM.loss_fn(params, batch))

    for pair in results(PROBLEM.params(), PROBLEM.batch(0)):
        harness.assert_close(*pair, 1e-5)
