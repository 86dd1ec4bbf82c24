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
    hlo = benchmark("hlo")
    trips = 'backend_config={"known_trip_count":{"n":"3"}}'
    sent = Counter(hlo.collectives(PROGRAM.replace("TRIPS", trips)))
    assert sent == {
        ("gather", 64): 1,
        ("reduce", 4): 1,
        ("reduce", 48): 3,
        ("move", 16): 1,
    }
    with pytest.raises(NotImplementedError, match="loop"):
        list(hlo.collectives(PROGRAM))


# Scores of 2 examples and 3 heads, 4 x 5 of 8 products each, as TPUs write them, and a
# layer of 16 x 8 x 32; in a loop of six rounds, which another runs twice.
LOOPS = """\
%scores (l: f32[3,2,8], r: f32[3,2,8]) -> f32[3,2,4,5] {
  %l = f32[2,3,8,4]{3,2,1,0} parameter(0)
  %r = f32[2,5,3,8]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,3,4,5]{3,2,1,0} convolution(%l, %r), \
window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01fb_0o1i->01bf, \
backend_config={"estimated_cycles":"70"}
}

%layer (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %x = f32[16,8]{1,0} get-tuple-element(%p), index=1
  %w = f32[8,32]{1,0} constant({...})
  %y = f32[16,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, \
backend_config={"estimated_cycles":"30"}
  %s = f32[2,3,4,5] fusion(%x, %y), kind=kOutput, calls=%scores
}

%cond (p: (s32[], f32[16,8])) -> pred[] {
  %six = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %six), direction=LT
}

%shard (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  ROOT %layers = (s32[], f32[16,8]) while(%p), condition=%cond, body=%layer
}

ENTRY %main (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %more = f32[4] fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"5"}
  %none = f32[4] fusion(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %w = (s32[]) while(%p), condition=%c, body=%shard, "known_trip_count":{"n":"2"}
}
"""


def test_a_loop_counts_as_often_as_it_runs(benchmark):
    hlo = benchmark("hlo")
    assert hlo.cycles(LOOPS) == 2 * 6 * (70 + 30) + 5
    one = 2 * (16 * 8 * 32 + 2 * 3 * 4 * 5 * 8)
    assert hlo.products_again(LOOPS) == (2 * 6 - 1) * one
    with pytest.raises(NotImplementedError, match="loop"):
        hlo.products_again(LOOPS.replace("direction=LT", "direction=GT"))


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
        if name == "m_sam":
            passes *= pods.SHARDS  # each sends what a whole batch does
        for key in ("reduced", "gathered", "moved"):
            # Of sums of scalars, two for each gradient are seen in three digits.
            sent = float(cells[key].split(" ")[0] or 0)
            assert sent <= passes * 1.001, cells
