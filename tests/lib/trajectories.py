"""Trajectories of the package beside the transcriptions' and the recorded ones.

A test file of a method hands its settings to :func:`ten_steps` and
:func:`recorded_runs`, which make the tests.
"""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import side_by_side
from methods_lib import later
from reference import ae_sam, base, gsam, sam
from side_by_side import package, problem, reference

TOLERANCE = 1e-10
STEPS = 10

double = pytest.mark.usefixtures("x64")

# The transcriptions on the same steps.


def rising(first):
    """A schedule, for the package and for the transcriptions."""
    return lambda t: first * (1 + 0.05 * t)


def every(k, direction, phase=0):
    """A direction on some steps, and the plain gradient on the others."""
    return lambda t, w, grad: grad(w) if (t + phase) % k else direction(t, w, grad)


def biases(w):
    """The leaves of masks, by name."""
    return [leaf for leaf in w if "bias" in leaf]


def mask_of_biases(params):
    return {leaf: leaf in biases(params) for leaf in params}


class Fresh:
    """Makes a direction with a memory, a new one for each training."""

    def __init__(self, make):
        self.make = make


def trend(threshold, **settings):
    """AE-SAM's direction with a threshold by step."""

    def fresh():
        method = ae_sam.AESAM(rho=0.3, delta=0.5, **settings)
        return lambda t, w, grad: method.direction(w, grad, threshold(t))

    return Fresh(fresh)


def direction_of(entry):
    return entry.make() if isinstance(entry, Fresh) else entry


def each_way(cases):
    """Parametrizes a test by names of cases and whether to compile them.

    The first case, and one whose loop is compiled anyway; in CI all.
    """
    soon = lambda i, name: i == 0 or "loop" in name
    quick = [(name, soon(i, name)) for i, name in enumerate(cases)]
    slow = [later(name, True) for name, compiled in quick if not compiled]
    return pytest.mark.parametrize(("name", "compiled"), quick + slow)


def steps_and_seeds(tx, compiled):
    """A step, and the seeds of the problems to train; nothing is compiled for one."""
    if compiled:
        return side_by_side.compiled(tx), range(3)
    return side_by_side.uncompiled(tx), range(1)


def ten_steps(cases, apart=("plain", "sam")):
    """Two tests of cases: the steps are the transcription's; and all cases differ.

    ``cases`` are, by name, the package's member and the emitted gradient as a function
    of ``t``, ``w`` and ``grad``, or a :class:`Fresh` one. They also differ from what
    ``apart`` names.
    """

    @double
    @each_way(cases)
    def equals(name, compiled):
        member, entry = cases[name]
        tx = side_by_side.optimizer(member)
        step, seeds = steps_and_seeds(tx, compiled)
        for seed in seeds:
            w, batches = problem(seed, STEPS)
            trajectory, _ = package(step, w, tx.init(w), batches)
            expected = reference(direction_of(entry), w, batches)
            side_by_side.assert_equal(trajectory, expected)

    def differ():
        w, batches = problem(0, STEPS)
        others = {
            "plain": lambda t, w, grad: grad(w),
            "sam": lambda t, w, grad: sam.sam(w, grad, 0.3),
        }
        directions = [others[name] for name in apart]
        directions += [direction_of(entry) for _, entry in cases.values()]
        assert_apart(reference(direction, w, batches)[-1] for direction in directions)

    return equals, differ


def assert_apart(ends):
    for a, b in itertools.combinations(ends, 2):
        assert recorded.deviation(a, b) > 1e-4


# The trajectories that were recorded from the authors' code.


def hyperparameters(name):
    return recorded.RUNS[name]["hyperparameters"]


def schedule(name, array):
    """A recorded hyperparameter by step."""
    values = recorded.arrays(name)[array]
    return lambda count: jnp.asarray(values)[count]


def base_optimizer(name):
    """What the authors' base optimizer does, behind a member or wrapped."""
    h, after = hyperparameters(name), []
    if "clip_global_norm" in h:
        after.append(optax.clip_by_global_norm(h["clip_global_norm"]))
    if h.get("weight_decay"):
        after.append(optax.add_decayed_weights(h["weight_decay"]))
    lr = schedule(name, "lr_used") if "gsam" in name else h["lr"]
    sgd = optax.sgd(lr, momentum=h["momentum"], nesterov=h.get("nesterov", False))
    return optax.chain(*after, sgd)


def loss_fn(name):
    """The loss of a run, with the L2 term of those that have one."""
    plain = recorded.LOSSES[recorded.RUNS[name]["problem"]]
    l2 = hyperparameters(name).get("l2_reg", 0.0)

    def loss(w, batch):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return plain(w, *batch) + 0.5 * l2 * squares

    return loss


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def descend(name, tx, ascend=None, given=None, extra=lambda given, w: {}):
    """``w_0, ..., w_T`` and the states, as one tree each: one compiled loop.

    ``ascend`` are decisions, one per step; ``extra`` makes further arguments of each
    step's share of ``given`` and the weights.
    """
    loss, steps = loss_fn(name), recorded.RUNS[name]["steps"]
    quad = recorded.RUNS[name]["problem"] == "quad"
    batches = stacked([recorded.data(name, t) for t in range(steps)])
    before = jax.tree.map(lambda x: np.concatenate([x[:1], x[:-1]]), batches)

    def step(carry, rows):
        (w, state), (batch, previous, decision, given) = carry, rows
        grad_fn = lambda p: jax.grad(loss)(p, batch)

        def losses(p, indices=None):
            """The loss of each example; the quadratic counts as one."""
            if quad:
                return loss(p, batch)[None]
            some = batch if indices is None else [x[indices] for x in batch]
            one = lambda *example: loss(p, jax.tree.map(lambda x: x[None], example))
            return jax.vmap(one)(*some)

        arguments = {
            "grad_fn": grad_fn,
            "previous_grad_fn": lambda p: jax.grad(loss)(p, previous),
            "per_example_loss_fn": losses,
            **extra(given, w),
        }
        update = lambda ascend: (
            lambda: tx.update(grad_fn(w), state, w, ascend=ascend, **arguments)
        )
        if ascend is None:
            updates, state = update(None)()
        else:
            updates, state = jax.lax.cond(decision, update(True), update(False))
        w = optax.apply_updates(w, updates)
        return (w, state), (w, state)

    w = jax.tree.map(jnp.asarray, recorded.initial(name))
    start = w, tx.init(w)
    rows = batches, before, ascend, given
    later = jax.jit(lambda start: jax.lax.scan(step, start, rows)[1])(start)
    join = lambda x, xs: np.concatenate([np.asarray(x)[None], np.asarray(xs)])
    return jax.tree.map(join, start, later)


def assert_met(name, tx, **kwargs):
    """Every stored step and norm is met; returns the states, before each step."""
    trajectory, states = descend(name, tx, **kwargs)
    saved, arrays = recorded.saved(name), recorded.arrays(name)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(trajectory))
    for t, wanted in saved.items():
        w = jax.tree.map(lambda x: x[t], trajectory)  # noqa: B023
        assert recorded.deviation(w, wanted) < recorded.atol(name, t), t
        conformance.hold(recorded.RUNS[name]["source"], w, wanted, t)
    if "param_norm" in arrays:
        square = lambda x: np.sum(x[1:] ** 2, axis=tuple(range(1, x.ndim)))
        norms = np.sqrt(sum(map(square, jax.tree.leaves(trajectory))))
        atol = recorded.atol(name, max(saved))
        np.testing.assert_allclose(norms, arrays["param_norm"], rtol=0, atol=atol)
    return states


# The transcriptions on the recorded steps.


class Batch:
    """The batch of a step: gradients, losses, and a record of the gradients taken."""

    def __init__(self, name, t):
        self.quad = recorded.RUNS[name]["problem"] == "quad"
        self.l2 = hyperparameters(name).get("l2_reg", 0.0)
        self.data = recorded.data(name, t)
        self.losses_taken, self.norms_taken = [], []

    def grad(self, w, kept=slice(None)):
        """The gradient of the mean loss, here over the examples kept."""
        if self.quad:
            loss, g = base.quad(w, *self.data)
        else:
            loss, g = base.mlp(w, *(column[kept] for column in self.data))
        g = base.add(g, w, self.l2)
        self.losses_taken.append(loss + self.l2 * base.norm(w) ** 2 / 2)
        self.norms_taken.append(base.norm(g))
        return g

    def losses(self, w):
        """The loss of each example; the quadratic counts as one."""
        if self.quad:
            return np.array([base.quad(w, *self.data)[0]])
        return base.mlp_losses(w, *self.data)


def rate(h, t):
    """The learning rate of a run in step t."""
    if "T_max" in h:
        cosine = (1.0 + np.cos(np.pi * t / h["T_max"])) / 2
        return h["lr_min"] + (h["lr"] - h["lr_min"]) * cosine
    if h.get("schedule") == "linear":
        return h["lr_max"] + (h["lr_min"] - h["lr_max"]) * t / h["T"]
    return h["lr"]


def radius(h, t):
    """The radius of a run in step t."""
    if "rho_max" not in h:
        return h["rho"]
    lr_max = h.get("lr_max", h.get("lr"))
    return gsam.tied_radius(rate(h, t), lr_max, h["lr_min"], h["rho_max"], h["rho_min"])


def assert_near(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def assert_is_recorded(name, trajectory, losses):
    """Compare a trajectory, its norms and the losses of each step, as far as stored."""
    run, saved = recorded.arrays(name), recorded.saved(name)
    assert max(saved) >= len(losses) - 10  # the long runs store their end in norms
    for t, w in saved.items():
        assert recorded.deviation(trajectory[t], w) < TOLERANCE, t
    if "param_norm" in run:
        assert_near([base.norm(w) for w in trajectory[1:]], run["param_norm"])
    if "losses" in run:
        taken = np.full_like(run["losses"], np.nan)
        for row, losses_taken in zip(taken, losses, strict=True):
            first = losses_taken[: len(row)]
            row[: len(first)] = first
        # Relative as well, because one run diverges to losses in the hundreds.
        np.testing.assert_allclose(taken, run["losses"], rtol=TOLERANCE, atol=TOLERANCE)


def assert_descends_as_recorded(name, direction):
    """Compare direction(t, w, batch); returns the trajectory and the batches."""
    h, steps = hyperparameters(name), recorded.RUNS[name]["steps"]
    batches = [Batch(name, t) for t in range(steps)]
    trajectory = base.descend(
        recorded.initial(name),
        steps,
        lambda t, w: direction(t, w, batches[t]),
        lr=[rate(h, t) for t in range(steps)],
        momentum=h["momentum"],
        weight_decay=h.get("weight_decay", 0.0),
        nesterov=h.get("nesterov", False),
    )
    assert_is_recorded(name, trajectory, [batch.losses_taken for batch in batches])
    return trajectory, batches


def runs(count, *methods):
    """Parametrizes a test by the recorded runs of methods, which are so many."""
    names = recorded.runs(*methods)
    assert len(names) == count
    return pytest.mark.parametrize("name", names)


def runs_of_package(count, *methods):
    """As ``runs``, but all after the first of the network are left to CI.

    The transcription meets them all, and the package the transcription.
    """
    names = runs(count, *methods).args[1]
    first, *others = sorted(names, key=lambda name: name.startswith("quad_"))
    return pytest.mark.parametrize("name", [first, *map(later, others)])


def recorded_runs(count, *methods, member, direction):
    """Two tests: the transcription meets each of the recorded runs, and the package.

    ``member(name, h)`` is the package's and ``direction(h)`` makes the emitted gradient
    as a function of ``t``, ``w`` and ``grad``, from the hyperparameters of a run.
    """

    @runs(count, *methods)
    def transcription(name):
        emitted = direction(hyperparameters(name))
        taken = lambda t, w, batch: emitted(t, w, batch.grad)
        assert_descends_as_recorded(name, taken)

    @double
    @runs_of_package(count, *methods)
    def met(name):
        ours = member(name, hyperparameters(name))
        assert_met(name, optax.chain(ours, base_optimizer(name)))

    return transcription, met
