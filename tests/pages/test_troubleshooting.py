"""The page on what goes wrong: its claims, and the errors that it lists."""

import importlib
import re
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_sam

PAGE = harness.page("troubleshooting.md")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def listed():
    """All that the package raises, and how the page lists it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        errors = importlib.import_module("errors")
        return errors.errors(), errors.listing()


# A remedy is an instruction, a range, or the call to write.
REMEDY = re.compile(
    r"\b(must|needs|wraps|write|pass|give|put|leave|take|choose|use|make|build|mark|map"
    r"|drop|describe|say|select|return|merge|keep|look|needed|pip install)\b"
    r"|\b(tx|rule)\.update\(",
    re.IGNORECASE,
)


def test_every_raise_is_read(listed):
    """Those with a message of ours; the rest hand on what was raised before."""
    package = Path(optax_sam.__file__).parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    raised = re.findall(r"\n\s+raise (?:\w+\.)*(\w+)\(", source)
    assert len(listed[0]) == len(raised) - raised.count("AttributeError") > 140


def test_each_says_what_to_do(listed):
    errors, listing = listed
    for error in errors:
        assert error.kind in ("ValueError", "ImportError", "TypeError")
        words = re.findall(r"\w+", error.message)
        assert len(words) >= 5, error
        assert REMEDY.search(error.message), error
        assert "`" not in error.message  # the page shows it as code
        assert f"- `{error.message}`" in listing


def test_a_message_is_read_as_it_is_raised(listed):
    """Nested texts, names of texts in other modules and filled in values."""
    beginning = lambda words: [x for x in listed[0] if x.message.startswith(words)]
    (of_esam,) = beginning("esam needs per_example")
    (of_summary,) = beginning("There is no method")
    method, params = optax_sam.esam(), harness.tree()
    with pytest.raises(ValueError, match="esam needs") as raised:
        method.update(params, method.init(params), params)
    assert str(raised.value) == of_esam.message
    with pytest.raises(ValueError, match="method called") as raised:
        optax_sam.summary("vsm", params)
    shown = map(re.escape, re.split(r"\.\.\.|<\w+>", of_summary.message))
    assert re.fullmatch(".*".join(shown), str(raised.value))


def test_the_first_lines_run(capsys):
    block, _ = harness.code("troubleshooting.md")
    exec(block, {})
    assert "gradients when perturbed  2" in capsys.readouterr().out


def test_the_metrics_are_named_as_they_are():
    named = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.M)) - {"deleted"}
    params = harness.tree()
    known = set()
    for tx in (optax_sam.sam(), optax_sam.msam(optax.sgd(0.1, momentum=0.9))):
        known |= optax_sam.metrics(tx.init(params)).keys()
    assert named <= known
    assert len(named) >= 5


PARAMS = {"w": jnp.ones(2)}


def loss_fn(p):
    return jnp.sum(p["w"] ** 2)


def updated(tx, compile=lambda update: update, **extra):
    extra = {"grad_fn": jax.grad(loss_fn), **extra}
    grads = jax.grad(loss_fn)(PARAMS)
    return compile(tx.update)(grads, tx.init(PARAMS), PARAMS, **extra)


def test_behind_the_optimizer_the_loss_rises():
    updates, _ = updated(optax.chain(optax.sgd(0.1), optax_sam.sam(0.05)))
    assert loss_fn(optax.apply_updates(PARAMS, updates)) > loss_fn(PARAMS)


def test_equal_norms_show_a_constant_grad_fn():
    grads = jax.grad(loss_fn)(PARAMS)
    _, state = updated(optax_sam.sam(0.05), grad_fn=lambda p: grads)
    found = optax_sam.metrics(state)
    assert found["ascended_norm"] == found["gradient_norm"]
    _, state = updated(optax_sam.sam(0.05))
    assert optax_sam.metrics(state)["ascended_norm"] > found["gradient_norm"]


# Errors that are raised elsewhere, by what provokes them.


def with_line_search(**extra):
    search = optax.scale_by_backtracking_linesearch(5)
    return updated(optax.chain(optax_sam.sam(), search), **extra)


def donated_twice():
    step = jax.jit(lambda p: optax.tree.scale(2.0, p), donate_argnums=0)
    params = {"w": jnp.ones(2)}
    return step(params), step(params)


def live_module():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(optax_sam.sam(), optax.sgd(0.1))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        loss = lambda module: jnp.sum(module(jnp.ones((3, 2))) ** 2)

        def at(params):
            nnx.update(module, params)
            return loss(module)

        optimizer.update(module, nnx.grad(loss)(module), grad_fn=jax.grad(at))

    step(module, optimizer)


def without_forward_derivative():
    kernel = jax.custom_vjp(jnp.sin)
    kernel.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))
    inner = jax.custom_vjp(jnp.cos)
    inner.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-kernel(x) * g,))
    loss_fn = lambda w, batch: jnp.sum(inner(w) * jnp.mean(batch))
    optax_sam.sharpness.hessian_trace(loss_fn, jnp.ones(2), jnp.ones((1, 1)), 0)


ELSEWHERE = {
    "custom_vjp": without_forward_derivative,
    "keyword argument 'grad_fn'": lambda: updated(optax.scale(-0.1)),
    "extra_args['grad_fn']": lambda: updated(
        optax.chain(optax_sam.sam(), optax.sgd(0.1)), jax.jit
    ),
    "'value', 'grad', and 'value_fn'": with_line_search,
    "unbound axis name": lambda: updated(optax_sam.sam(axis_name="i")),
    "Cannot mutate Param": live_module,
    "deleted": donated_twice,
}


ROWS = [
    row[0].strip("`")
    for row in harness.table("troubleshooting.md", "Errors of JAX, Optax and Flax")
]


@pytest.mark.parametrize("row", ROWS)
def test_errors_that_are_raised_elsewhere(row):
    assert len(ROWS) == len(ELSEWHERE)
    (provoke,) = [error for part, error in ELSEWHERE.items() if part in row]
    with pytest.raises(Exception, match=re.escape(row)):
        provoke()


def test_the_remedy_for_line_searches():
    value, grad = jax.value_and_grad(loss_fn)(PARAMS)
    value_fn = lambda p, grad_fn: loss_fn(p)
    updates, _ = with_line_search(value=value, grad=grad, value_fn=value_fn)
    assert harness.is_finite(updates)
