"""The costs of a training step on a TPU pod, read from the compiled program.

libtpu compiles for chips that are not there, so any machine can compile a step for 256
chips. All chips run the same program; every number here is for one chip.
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
      flops: floating-point operations. In a loop, products count as often as the loop
        runs, and other operations once.
      seconds: the compiler's estimate for arithmetic and memory traffic, without the
        time that chips wait for each other. It counts one round of a loop, so it is
        ``None`` if there are loops, or if an operation has no estimate.
      cycles: the sum of the estimates beside the operations, times the runs of each;
        sums over chips and copies have no estimate.
      arguments: bytes of the parameters, the optimizer's state and the batch.
      temporaries: further bytes, at the peak.
      reductions: how many all-reduces and reduce-scatters; each has many arrays.
      reduced: bytes of the arrays before they are scattered.
      gathers: how many all-gathers.
      gathered: bytes of the gathered arrays.
      largest_gather: bytes of the largest gathered array.
      moves: how many all-to-alls and permutations.
      moved: bytes of the arrays that arrive.
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
    """Cuts every leaf along its longest axis that the chips of ``data`` divide."""
    chips = mesh.shape["data"]

    def spec(leaf: Any) -> P:
        fitting = [i for i, size in enumerate(leaf.shape) if size % chips == 0]
        if not fitting:
            return P()
        cut = max(fitting, key=lambda i: leaf.shape[i])
        return P(*("data" if i == cut else None for i in range(leaf.ndim)))

    return spec


def place(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """The shapes of a pytree with shardings; ``specs`` may be a prefix of it."""

    def placed(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(placed, specs, tree, is_leaf=lambda x: isinstance(x, P))


# XLA would write a product of a gathered array as a loop that sends one part while it
# multiplies another. The compiler counts a loop's operations once, so this is off.
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

    The pytrees of the state are sharded like the parameters; both are donated and keep
    their shardings. ``rest`` are further arguments, each with its specs.
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
