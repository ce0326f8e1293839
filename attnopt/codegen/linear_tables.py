"""The tables of heads with a linear far part on their device, and the segments of keys that its kernels work on."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.codegen.work_list import WORKERS, read_table

# Programs wanted for each SM: with one it waits while its only program loads.
PROGRAMS = 2
# Keys of the shortest segment: its state is as many bytes as 64 keys and values of 128 bfloat16 numbers.
LEAST = 512


class FarTables(NamedTuple):
    """heads, sinks, windows: int32 (h,) on the device of the inputs; groups: int32 (G + 1,), KV head g has the served
    heads groups[g] up to groups[g + 1]; keys: so many of the first keys are far from some row of some head."""

    heads: Tensor
    sinks: Tensor
    windows: Tensor
    groups: Tensor
    keys: int


def far_tables(
    heads: Tensor, sinks: Tensor, windows: Tensor, query_heads: int, kv_heads: int, length: int, device: torch.device
) -> FarTables:
    """Of heads, sinks and windows int (h,), for `length` keys.

    Kept for equal tables: a copy on every call would wait for the device, as would reading tables that lie there.
    """
    values = (read_table(x) for x in (heads, sinks, windows))
    return _made(*values, query_heads // kv_heads, kv_heads, length, device)


@lru_cache(maxsize=4096)
def _made(
    heads: tuple[int, ...],
    sinks: tuple[int, ...],
    windows: tuple[int, ...],
    share: int,
    kv_heads: int,
    length: int,
    device: torch.device,
) -> FarTables:
    if any(a >= b for a, b in pairwise(heads)):
        raise ValueError(f"served heads are {list(heads)}: each once, in ascending order")
    groups = [sum(h < g * share for h in heads) for g in range(kv_heads + 1)]
    far = [length - max(0, w) for s, w in zip(sinks, windows, strict=True) if s < length - max(0, w)]
    sent = [_sent(t, device) for t in (heads, sinks, windows, tuple(groups))]
    return FarTables(sent[0], sent[1], sent[2], sent[3], max(far, default=0))


def segments(keys: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many segments `keys` keys are divided into, and how many keys each has, a multiple of `block`.

    One where `programs` alone, heads times batch, keep the device busy: a second pass over the keys makes the states
    that segments begin with.
    """
    workers = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else WORKERS
    count = max(1, min(-(-PROGRAMS * workers // max(1, programs)), -(-keys // LEAST)))
    size = max(1, -(-keys // (count * block))) * block
    return max(1, -(-keys // size)), size


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A table int (n,) as int32 on `device`, sent there once."""
    if table.device == device and table.dtype == torch.int32:
        return table
    return _sent(read_table(table), device)


@lru_cache(maxsize=4096)
def _sent(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        # A window may be longer than an int32 is.
        return torch.tensor([min(x, 2**31 - 1) for x in values], dtype=torch.int32, device=device)
