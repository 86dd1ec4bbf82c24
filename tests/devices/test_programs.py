"""The reader of compiled programs, and the page on pods. No TPU compiler is needed."""

import json
import math
from collections import Counter

import pytest

# Two all-reduces of several arrays, one of them in a loop of three rounds; an
# all-gather that goes on beside a product; a permutation in two parts.
PROGRAM = """\
%body.1 (param: (f32[8])) -> (f32[8]) {
  %all-reduce.1 = (f32[8]{0}, bf16[2,4]{1,0}) all-reduce(%x, %y), to_apply=%add
}

%fused.1 (param: f32[4]) -> f32[16] {
  %all-gather.1 = f32[16]{0} all-gather(%param), dimensions={0}
  ROOT %c.1 = (f32[16]) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (param: f32[4]) -> f32[16] {
  %all-gather.2 = f32[16]{0} all-gather(%param), dimensions={0}
}

%fused.2 (param: f32[4]) -> f32[16] {
  %all-gather.3 = f32[16]{0} all-gather(%param), dimensions={0}
  ROOT %c.2 = f32[16] custom-call(%a), custom_call_target="AsyncCollectiveDone"
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[4]) -> f32[16] {
  %start = (f32[16]) fusion(%p), kind=kCustom, calls=%fused.1
  %work = f32[16] fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
  %done = f32[16] fusion(%p), kind=kCustom, calls=%fused.2
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%p), to_apply=%add
  %loop = (f32[8]) while(%t), condition=%cond, body=%body.1, TRIPS
  %sent = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p), channel_id=1
  ROOT %arrived = f32[4]{0} collective-permute-done(%sent)
}
"""


def test_what_a_program_sends(benchmark):
    programs = benchmark("programs")
    trips = 'backend_config={"known_trip_count":{"n":"3"}}'
    sent = Counter(programs.collectives(PROGRAM.replace("TRIPS", trips)))
    assert sent == {
        ("gather", 64): 1,
        ("reduce", 4): 1,
        ("reduce", 48): 3,
        ("move", 16): 1,
    }
    with pytest.raises(NotImplementedError, match="loop"):
        list(programs.collectives(PROGRAM))


def test_the_study_is_whole_and_costs_are_those_promised(benchmark):
    """``make test-pods`` compiles and asserts for small models."""
    pods = benchmark("pods")
    results = json.loads(pods.RESULTS.read_text())["rows"]
    found = {pods.Row(*(x[k] for k in pods.Row._fields)) for x in results}
    assert found == set(pods.rows())
    for cells in pods.compared(results):
        name, _, form = cells["method"].partition(", ")
        if name == "esam_unplaced":
            continue
        # Norms, offsets and R-SAM's draws are next to nothing beside a gradient.
        assert float(cells["flops"]) < 1.01 * float(cells["promised"]), cells
        passes = 1
        if form != "ascend=False":
            cost = pods.promised(name)
            passes = math.ceil(cost.gradients) + cost.forwards
        for key in ("reduced", "gathered", "moved"):
            # Of sums of scalars, two for each gradient are seen in three digits.
            sent = float(cells[key].split(" ")[0] or 0)
            assert sent <= passes * 1.001, cells
