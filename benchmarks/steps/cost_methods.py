"""The methods whose steps are timed, and the training step that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_sam
import optax_sam.linen
from benchmarks.lib import costs
from benchmarks.steps.cost_models import Subject, subject
from optax_sam import when

NUM_BATCHES = 4
SHARDS = 4  # shards of m-SAM in one program
OPAQUE, TRANSPARENT = "optax.contrib.sam, opaque", "optax.contrib.sam, transparent"
VSAM = {"window": 10, "num_slices": 5, "warmup_steps": 20, "max_rate": 0.4}


class Method(NamedTuple):
    """A method of the table.

    Attributes:
      build: makes the whole optimizer from the base optimizer and the subject.
      summed: whether :func:`optax_sam.summary` counts its gradients; otherwise it has
        two.
      divisor: the gradient at ``w`` uses one example in this number.
      forms: the programs to time: ``""`` if all steps are equal; else ``"ascended"``,
        ``"skipped"``, ``"dispatched"`` between these two, or ``"conditional"``.
      calls: calls of the training step for a step of the method.
      needs: ``"norms"`` for normalization layers, ``"rows"`` for one row of logits for
        each example. The method does not apply to a model without them.
      written_out: builds the method without a loop, because the compiler counts the
        body of a loop once.
    """

    build: Callable[[optax.GradientTransformation, Subject], Any]
    summed: bool = True
    divisor: int = 1
    forms: tuple[str, ...] = ("",)
    calls: int = 1
    needs: str = ""
    written_out: Callable[[optax.GradientTransformation, Subject], Any] | None = None


def first(member: Any, *args: Any, **kwargs: Any) -> Method:
    """Puts a method before the base optimizer."""
    return Method(lambda base, _: optax.chain(member, base), *args, **kwargs)


def contrib_sam(base: Any, opaque: bool) -> Any:
    """Optax's own SAM, with the calls of our steps."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(base, ascent, opaque_mode=opaque)

    def init(params: Any) -> Any:
        # Its cache is the array of the parameters, which are donated too.
        return jax.tree.map(jnp.copy, tx.init(params))

    def update(g: Any, state: Any, params: Any, *, grad_fn: Any, **extra: Any) -> Any:
        return tx.update(g, state, params, grad_fn=lambda p, _: grad_fn(p))

    return optax.GradientTransformationExtraArgs(init, update)


def micro(base: Any, subject: Subject, **how: Any) -> Any:
    """m-SAM with a few shards of the batch."""
    del subject
    member = optax_sam.sam(axis_name="shards")
    return optax.chain(optax_sam.micro_sharpness(member, SHARDS, **how), base)


MIXED = "dispatched", "conditional"
EACH = "ascended", "skipped", *MIXED
METHODS = {
    "SGD": Method(lambda base, _: optax.with_extra_args_support(base)),
    OPAQUE: Method(lambda base, _: contrib_sam(base, True), summed=False),
    "sam": first(optax_sam.sam()),
    TRANSPARENT: Method(lambda base, _: contrib_sam(base, False), False, calls=2),
    "sam_5": first(optax_sam.sam(when=when.every_k(5)), forms=MIXED),
    "sam, quarter batch": first(optax_sam.sam(), divisor=4),
    "sam, 2 ascents": first(optax_sam.sam(num_ascent_steps=2)),
    "vsam": first(optax_sam.vsam(**VSAM), forms=EACH),
    "vsam_a": first(optax_sam.vsam(**VSAM, reuse_decay=0.0), forms=MIXED),
    "looksam": first(optax_sam.looksam(), forms=EACH),
    "look_layer_sam": first(optax_sam.look_layer_sam(), forms=MIXED[:1]),
    "ae_sam": first(optax_sam.ae_sam(), forms=MIXED[1:]),
    "ae_looksam": first(optax_sam.ae_looksam(), forms=MIXED[1:]),
    "asam": first(optax_sam.asam()),
    "gsam": first(optax_sam.gsam()),
    # Half of the examples: ESAM keeps one less than gamma says.
    "esam": Method(
        lambda base, subject: optax.chain(
            optax_sam.esam(gamma=0.5 + 1 / subject.batch_size), base
        )
    ),
    "renyi_sam": first(optax_sam.renyi_sam()),
    "random_sam": first(optax_sam.random_sam(0.1)),
    "gnp": first(optax_sam.gnp()),
    "friendly_sam": first(optax_sam.friendly_sam()),
    "sam_on": first(optax_sam.sam_on(), needs="norms"),
    "fisher_sam": first(optax_sam.fisher_sam()),
    "amp": first(optax_sam.amp()),
    "gam": first(optax_sam.gam()),
    "stable_sam": first(optax_sam.stable_sam()),
    "wsam": Method(lambda base, _: optax_sam.wsam(base, learning_rate=0.01)),
    "sampa": Method(lambda base, _: optax_sam.sampa(base, learning_rate=0.01)),
    "m-sam, 4 shards": Method(
        micro, summed=False, written_out=functools.partial(micro, method="unroll")
    ),
    "msam": Method(lambda base, _: optax_sam.msam(base)),
    "mesa": Method(lambda base, _: optax.chain(base, optax_sam.mesa())),
    "saf": Method(
        lambda base, subject: optax.chain(
            optax_sam.saf(NUM_BATCHES * subject.batch_size, subject.classes), base
        ),
        needs="rows",
    ),
}
QUICK = "SGD", OPAQUE, "sam", "sam_5", "vsam"


def cost(name: str) -> costs.Cost:
    """The cost of a step of a method."""
    method = METHODS[name]
    if not method.summed:  # a method of others, or the gradients of shards
        return costs.Cost(2)
    like = subject("MLP", "cpu", half=False)._replace(batch_size=costs.EXAMPLES)
    return costs.cost(method.build(costs.BASE, like), 1 / method.divisor)


def train_step(name: str, subject: Subject, tx: Any) -> Callable[..., Any]:
    """One step with all arguments that any method needs; unused ones cost nothing.

    ``step(params, opt_state, batch, last, ascend) -> (params, opt_state)``, where
    ``last`` is the batch of the step before.
    """

    def step(
        params: Any, opt_state: Any, batch: Any, last: Any, ascend: bool | None = None
    ) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            logits = subject.module.apply(params, batch["x"])
            losses = subject.losses(logits, batch["y"])
            loss = losses.mean()
            if name == "mesa":
                average = optax_sam.mesa_params(opt_state)
                past = subject.module.apply(average, batch["x"])
                loss += optax_sam.trajectory_loss(logits, past)
            elif name == "saf":
                past, known = optax_sam.saf_past_logits(opt_state, batch["indices"])
                loss += optax_sam.trajectory_loss(logits, past, where=known)
            return loss, (losses, logits)

        def per_example_loss_fn(params: Any, indices: Any = None) -> Any:
            chosen = batch if indices is None else {k: batch[k][indices] for k in batch}
            return loss_fn(params, chosen)[1][0]

        def of_shard(params: Any, shard: Any) -> Any:
            cut = lambda a: a.reshape(SHARDS, -1, *a.shape[1:])[shard]
            return jax.grad(loss_fn, has_aux=True)(params, jax.tree.map(cut, batch))[0]

        value_and_grad = optax_sam.linen.value_and_grad(loss_fn, has_aux=True)
        (_, (losses, logits)), grads, grad_fn = value_and_grad(params, batch)
        if name == "sam, quarter batch":
            _, grads, _ = value_and_grad(params, optax_sam.ascent_batch(batch))
        extra: dict[str, Any] = {"logits": logits} if name == "saf" else {}
        if name == "esam":
            extra["per_example_loss_fn"] = per_example_loss_fn
            extra["per_example_losses"] = losses
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=of_shard if name.startswith("m-sam") else grad_fn,
            previous_grad_fn=value_and_grad(params, last)[2],
            indices=batch["indices"],
            ascend=ascend,
            **extra,
        )
        return optax.apply_updates(params, updates), opt_state

    return step


def gradient(subject: Subject) -> Callable[..., Any]:
    """``(params, batch) -> grads`` and nothing else."""

    def of_batch(params: Any, batch: Any) -> Any:
        logits = lambda p: subject.module.apply(p, batch["x"])
        return jax.grad(lambda p: subject.losses(logits(p), batch["y"]).mean())(params)

    return of_batch


def forward(subject: Subject) -> Callable[..., Any]:
    """``(params, batch) -> losses`` and nothing else."""

    def of_batch(params: Any, batch: Any) -> Any:
        return subject.losses(subject.module.apply(params, batch["x"]), batch["y"])

    return of_batch


def rows(model: str, backend: str, chosen: list[str]) -> list[tuple[str, str]]:
    """The methods and forms that apply, the baseline first."""
    made = []
    for name, method in METHODS.items():
        if name != "SGD" and name not in chosen:
            continue
        if method.needs == "norms" and model == "MLP":
            continue
        if method.needs == "rows" and model == "transformer":
            continue
        forms = method.forms
        # A conditional costs several times the step there; one row shows this.
        if model == "CNN" and backend == "cpu" and name != "sam_5":
            forms = tuple(form for form in forms if form != "conditional")
        made += [(name, form) for form in forms]
    return made
