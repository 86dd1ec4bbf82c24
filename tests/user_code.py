"""What users write, for the type checker: `make lint` reads it, and a test runs it.

Each type is stated. A line marked as an error is one, and mypy says so if it is not.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from optax_sam import ascent, blend, when

# A member in a chain, with schedules, rules and masks.
method = optax_sam.sam(
    rho=optax.linear_schedule(0.02, 0.1, 100),
    when=when.every_k(5),
    mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
)
assert_type(method, optax.GradientTransformationExtraArgs)
tx = optax.chain(method, optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
assert_type(tx, optax.GradientTransformationExtraArgs)

# Around an optimizer, and from parts.
optimizer = optax_sam.msam(optax.sgd(0.1, momentum=0.9), rho=3.0)
assert_type(optimizer, optax.GradientTransformationExtraArgs)
own = optax_sam.sharpness_aware(
    ascent.l2(0.05), when.bernoulli(0.5, key=0), blend.reuse_difference(0.7)
)
assert_type(own, optax.GradientTransformationExtraArgs)
assert_type(when.every_k(5), when.When)
assert_type(blend.take_ascended(), blend.Blend)


def loss_fn(params: optax.Params, x: jax.Array) -> jax.Array:
    """A line through the origin."""
    return jnp.mean((x @ params["w"] - 1.0) ** 2)


def train_step(
    params: optax.Params,
    opt_state: optax.OptState,
    x: jax.Array,
    ascend: bool | None = None,
) -> tuple[optax.Params, optax.OptState]:
    """One step, in the form that dispatch compiles."""
    grad_fn = lambda p: jax.grad(loss_fn)(p, x)
    updates, opt_state = tx.update(
        grad_fn(params), opt_state, params, grad_fn=grad_fn, ascend=ascend
    )
    return optax.apply_updates(params, updates), opt_state


step = optax_sam.dispatch(train_step, donate_argnums=(0, 1))
params: optax.Params = {"w": jnp.zeros((3, 1))}
opt_state = tx.init(params)
for _ in range(2):
    params, opt_state = step(params, opt_state, jnp.ones((4, 3)))

# A loss, its gradients, and the function for the optimizer.
value_and_grad = optax_sam.value_and_grad(loss_fn, axis_name=None, loss_scale=2.0**10)
loss, grads, grad_fn = value_and_grad(params, jnp.ones((4, 3)))
updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

# The parts that need an extra are there after `import optax_sam` alone.
product = optax_sam.sharpness.hvp(loss_fn, params, jnp.ones((1, 4, 3)), params)
helpers = (
    optax_sam.linen.TrainState,
    optax_sam.linen.value_and_grad,
    optax_sam.nnx.value_and_grad,
    optax_sam.nnx.grad_fn,
    optax_sam.equinox.value_and_grad,
    optax_sam.equinox.grad_fn,
    optax_sam.plots.loss_line,
)

# Readers.
assert_type(optax_sam.metrics(opt_state), dict[str, jax.Array])
assert_type(optax_sam.ascends_next(opt_state), bool | jax.Array)
assert_type(optax_sam.ascent_plan(opt_state), np.ndarray)
price = optax_sam.summary(tx, params)
assert_type(price, optax_sam.Summary)
assert_type(price.gradients, float)
assert_type(price.needs, tuple[str, ...])
assert_type(optax_sam.static_args(optax_sam.vsam), tuple[str, ...])

# What is refused without running: the package's types are real.
mistakes = (
    lambda: optax_sam.sam(num_ascent_steps="two"),  # type: ignore[arg-type]
    lambda: optax_sam.sam(when=blend.take_ascended()),  # type: ignore[arg-type]
    lambda: optax_sam.sam(radius=0.05),  # type: ignore[call-arg]
    lambda: optax_sam.wsam(optax.sgd(0.1)),  # type: ignore[call-arg]
    lambda: optax_sam.gsam(0.05, 0.4),  # type: ignore[call-arg]
    lambda: optax_sam.samm(0.05),  # type: ignore[attr-defined]
    lambda: optax_sam.sharpness.hpv,  # type: ignore[attr-defined]
    lambda: optax_sam.linen.grad_fn,  # type: ignore[attr-defined]
    lambda: optax_sam.value_and_grad(loss_fn, axis="data"),  # type: ignore[call-arg]
)
