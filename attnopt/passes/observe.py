"""Put an observer in the place of each region; it computes the same and accumulates statistics on the way.

    sdpa(q, k, v, is_causal=True)  ->  observer(q, k, v, pad)

Used by the profiler and by measurement runs, on graphs that are executed eagerly, never through inductor.
"""

from __future__ import annotations

from torch.fx import Node

from attnopt.ir import Region
from attnopt.passes.lower_planned import unlike_spans
from attnopt.passes.program import Builder, Program
from attnopt.passes.span import key_padding


def run(program: Program) -> None:
    assert program.observer is not None
    for region in program.pending:
        no = unlike_spans(region)
        if no is not None:
            program.refuse(region, no)
            continue
        program.replace(region, lambda r: insert(program, r), "observed")


def insert(program: Program, region: Region) -> Node:
    assert program.observer is not None
    builder = Builder(program.gm, region.out)
    pad = key_padding(builder, region) if region.loads else None
    node = program.gm.graph.call_function(program.observer(region), (region.q, region.k, region.v, pad))
    q, v = region.q.meta["val"], region.v.meta["val"]
    # In q's layout and dtype: the output's own may be another, and is restored from this one.
    node.meta = {**region.out.meta, "val": q.new_empty(*q.shape[:3], v.shape[3])}
    return node
