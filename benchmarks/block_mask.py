"""FlexAttention's BlockMask of per-head spans in closed form: `create_block_mask` would fill H · N² booleans."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.spans import Spans

BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(spans: Spans, device: torch.device, offset: int = 0) -> MaskMod:
    """(b, h, i, j) -> whether query i + offset of head h keeps key j. The tables are captured, so that other values of
    them compile nothing."""
    sinks, windows = spans.tables(device)

    def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i + offset - j
        return (back >= 0) & ((j < sinks[h]) | (back < windows[h]))

    return kept


def blocks(sink: int, window: int, queries: int, length: int, offset: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries has to visit, and which of them it keeps whole: bool (rows, columns).

    A block that sinks and window keep only together counts as partial, which costs time and changes nothing.
    """
    first = torch.arange(0, queries, block)[:, None] + offset
    last = (first + block - 1).clamp(max=offset + queries - 1)
    start = torch.arange(0, length, block)[None, :]
    end = (start + block - 1).clamp(max=length - 1)
    # The least and the most that a key lies behind a query.
    nearest, farthest = (first - end).clamp(min=0), last - start
    live = (start <= last) & ((start < sink) | (nearest < window))
    whole = (end <= first) & ((end < sink) | (farthest < window))
    # The kernel skips no bounds check in a block that is cut off.
    whole = whole & (end - start == block - 1)
    return live, whole


def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 (rows,) and column indices int32 (rows, columns), the chosen ones first and in order."""
    order = torch.sort(chosen.to(torch.int8), dim=1, descending=True, stable=True).indices
    return chosen.sum(1).to(torch.int32), order.to(torch.int32)


def block_mask(spans: Spans, queries: int, length: int, device: torch.device, block: int = BLOCK) -> BlockMask:
    """For `queries` queries that are the last of `length` keys. Batch entries share it."""
    offset = length - queries
    by_span: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    for span in zip(spans.sinks, spans.windows, strict=True):
        if span not in by_span:
            live, whole = blocks(*span, queries, length, offset, block)
            by_span[span] = tuple(x.to(device) for x in (*lists(live & ~whole), *lists(whole)))
    heads = [by_span[span] for span in zip(spans.sinks, spans.windows, strict=True)]
    partial_count, partial, whole_count, whole = (torch.stack(parts)[None] for parts in zip(*heads, strict=True))
    return BlockMask.from_kv_blocks(
        partial_count, partial, whole_count, whole, BLOCK_SIZE=block, mask_mod=mask_mod(spans, device, offset),
        seq_lengths=(queries, length), compute_q_blocks=False,
    )  # fmt: skip


@contextlib.contextmanager
def many_shapes() -> Iterator[None]:
    """Room for every shape that is measured: beyond Dynamo's limit FlexAttention would silently run uncompiled."""
    names = ("recompile_limit", "accumulated_recompile_limit")
    with torch._dynamo.config.patch({**dict.fromkeys(names, 1024), "fail_on_recompile_limit_hit": True}):
        yield
