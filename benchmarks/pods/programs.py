"""What XLA makes of a training step on a TPU pod, read from the compiled program.

libtpu compiles for chips that are not there, so a step on 256 of them is a program on
any machine. All chips run the same program; every number here is of one chip.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.pods import hlo


class Program(NamedTuple):
    """Costs of one step on each chip.

    Attributes:
      flops: floating-point operations; of what is in a loop products alone count as
        often as it runs, the rest once.
      seconds: the compiler's estimate of the arithmetic and of the memory's traffic,
        without what chips wait for each other; None if it has none for some operation,
        and if there are loops, of which it counts one round.
      cycles: the sum of the estimates that operations carry, as often as each runs;
        sums over chips and copies carry none.
      arguments: bytes of the parameters, the optimizer's state and the batch.
      temporaries: bytes beyond those, at their most.
      reductions: how many all-reduces and reduce-scatters; each has many arrays.
      reduced: bytes of the arrays before they are scattered.
      gathers: how many all-gathers.
      gathered: bytes of the arrays after that.
      largest_gather: bytes of the largest of them.
      moves: how many all-to-alls and permutations.
      moved: bytes of what arrives.
    """

    flops: float
    seconds: float | None
    cycles: float
    arguments: int
    temporaries: int
    reductions: int
    reduced: int
    gathers: int
    gathered: int
    largest_gather: int
    moves: int
    moved: int


def pod(topology: str, model_parallel: int = 1) -> Mesh:
    """Chips that are not there, ``"v5e:16x16"`` for instance, as data x model."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    shape = len(chips.devices) // model_parallel, model_parallel
    return topologies.make_mesh(chips, shape, ("data", "model"))


def fsdp(mesh: Mesh) -> Callable[[Any], P]:
    """Every leaf cut along its longest axis that the chips of ``data`` divide."""
    chips = mesh.shape["data"]

    def spec(leaf: Any) -> P:
        fitting = [i for i, size in enumerate(leaf.shape) if size % chips == 0]
        if not fitting:
            return P()
        cut = max(fitting, key=lambda i: leaf.shape[i])
        return P(*("data" if i == cut else None for i in range(leaf.ndim)))

    return spec


def place(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """The shapes of a tree, with the place of each; ``specs`` may be a prefix of it."""

    def placed(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, specs, tree, is_leaf=lambda x: isinstance(x, P))


# Products of what is gathered, as loops that send one part while they multiply another:
# the compiler counts a loop's operations once, so the gathers are left to stand alone.
_WITHOUT_LOOPS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compile_step(
    step: Callable[..., Any],
    mesh: Mesh,
    tx: optax.GradientTransformation,
    params: Any,
    specs: Any,
    *rest: tuple[Any, Any],
) -> Any:
    """``step(params, opt_state, *rest) -> (params, opt_state), more``, compiled.

    The state's trees lie as the parameters do; both are donated, and stay where they
    are. ``rest`` are further arguments, each with its specs.
    """
    state = jax.eval_shape(tx.init, params)
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    trained = place(mesh, (params, state), (specs, state_specs))
    stays = jax.tree.map(lambda x: x.sharding, trained), None
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=stays)
    placed = [place(mesh, tree, spec) for tree, spec in rest]
    return jitted.lower(*trained, *placed).compile(compiler_options=_WITHOUT_LOOPS)


def read(compiled: Any) -> Program:
    """The costs of a compiled step."""
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    text = compiled.as_text()
    # An operation without an estimate counts -1, far more than all others together.
    seconds = costs.get("optimal_seconds", -1)
    again = hlo.products_again(text)
    sent = list(hlo.collectives(text))
    count, total = Counter(kind for kind, _ in sent), Counter[str]()
    for kind, size in sent:
        total[kind] += size
    return Program(
        flops=costs["flops"] + again,
        seconds=seconds if seconds > 0 and not again else None,
        cycles=hlo.cycles(text),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        reductions=count["reduce"],
        reduced=total["reduce"],
        gathers=count["gather"],
        gathered=total["gather"],
        largest_gather=max((n for kind, n in sent if kind == "gather"), default=0),
        moves=count["move"],
        moved=total["move"],
    )
