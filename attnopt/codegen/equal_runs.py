"""Where the keys of a row's own document lie, and those that padding keeps, for kernels that leave out other blocks.

Computed on the device and without waiting for it. Documents may be numbered in any order and interleaved, padding may
be anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def equal_runs(ids: Tensor) -> Tensor:
    """ids (..., N), numbers of documents -> int32 (3, ..., N): first, last and whole.

    first, last: the first and the last position of a position's own number; whole: the first position from which on
    everything up to the position itself has its number, where that is all of them before it, else N.
    """
    count = ids.shape[-1]
    held, order = torch.sort(ids, dim=-1, stable=True)
    place = torch.arange(count, device=ids.device).expand(ids.shape)
    changes = held[..., 1:] != held[..., :-1]
    edge = changes.new_ones((*ids.shape[:-1], min(count, 1)))
    # In the sorted order the positions of one number lie side by side, the earliest first.
    begins = torch.cat([edge, changes], -1)
    ends = torch.cat([changes, edge], -1)
    begin = torch.where(begins, place, 0).cummax(-1).values
    end = torch.where(ends, place, count).flip(-1).cummin(-1).values.flip(-1)
    first, last = order.gather(-1, begin), order.gather(-1, end)
    # As many of them before a position as lie between the first and it: none of another number is in between.
    whole = torch.where(place - begin == order - first, first, count)
    found = torch.stack([first, last, whole])
    return torch.empty_like(found).scatter_(-1, order.expand(found.shape), found).to(torch.int32)


def kept_runs(flags: Tensor) -> Tensor:
    """flags bool (..., N) -> int32 (4, ...): first, end, whole_first and whole_end.

    Every kept key is in [first, end), and every key in [whole_first, whole_end) is kept: all of them where they lie
    side by side, else none.
    """
    count = flags.shape[-1]
    if not count:
        return flags.new_zeros((4, *flags.shape[:-1]), dtype=torch.int32)
    place = torch.arange(count, device=flags.device)
    first = torch.where(flags, place, count).amin(-1)
    end = torch.where(flags, place + 1, 0).amax(-1)
    unbroken = flags.sum(-1) == end - first
    whole = torch.where(unbroken, first, count), torch.where(unbroken, end, 0)
    return torch.stack([first, end, *whole]).to(torch.int32)
