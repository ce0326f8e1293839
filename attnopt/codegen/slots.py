"""Which slot of a ragged cache a token has, and which token a slot holds: in closed form, no positions are stored.

A KV head has `capacity` slots, the first `sink` of them for the tokens at the positions below `sink`, the rest a ring:

    slot(p) = p                                  where p < sink
              sink + (p - sink) mod ring         elsewhere                    ring = capacity - sink
    held(s) = s                                  where s < sink
              last - (last - s) mod ring         elsewhere                    last = n - 1, n tokens seen

A slot is empty where held(s) is not one of the tokens that could have it: below 0 or beyond last for a sink, below
`sink` in the ring. After a rollback of r tokens the r newest slots hold tokens that held() takes for those one ring
earlier; these lie outside every window as long as r <= ring - window, which is the slack a cache is made with. It is
the rolling buffer of Jiang et al. ("Mistral 7B", arXiv:2310.06825, section 2) beside the kept first tokens of Xiao et
al. (arXiv:2309.17453).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.errors import CacheFull


def slots(positions: Tensor, capacity: int, sink: int) -> Tensor:
    """The slot of each position, int of the same shape; counted from the first slot of the KV head."""
    return torch.where(positions < sink, positions, sink + (positions - sink) % max(1, capacity - sink))


def held(n: Tensor | int, capacity: int, sink: int, first: int | None = None) -> Tensor:
    """The position that each slot holds after n tokens, -1 where it is empty: n int (...,) -> int64 (..., capacity), or
    of the `first` slots only."""
    count = torch.as_tensor(n).long()[..., None]
    slot = torch.arange(capacity if first is None else first, device=count.device)
    last = count - 1
    ring = last - (last - slot) % max(1, capacity - sink)
    found = torch.where(slot < sink, slot, ring)
    empty = (found > last) | (found < torch.where(slot < sink, 0, sink))
    return found.masked_fill(empty, -1)


def survives(positions: Tensor, after: Tensor | int, capacity: int, sink: int) -> Tensor:
    """Which tokens are still in the cache once it has seen `after` of them: bool, of the shape of `positions`."""
    return (positions < sink) | (positions >= after - (capacity - sink))


def refuse_overflow(tokens: int, slots: int, n: Tensor, valid: Tensor | None, table: Tensor) -> None:
    """Raise CacheFull where a head that holds every token (its window is wider than its ring) has too few slots;
    ValueError where n is negative or the table is not that of the cache."""
    rows = table.tolist()
    total = sum(row[1] for row in rows)
    if total != slots:
        raise ValueError(f"the table has {total} slots, the cache {slots}")
    if n.numel() and int(n.min()) < 0:
        raise ValueError(f"n is negative: {n.tolist()}")
    room = min((capacity for _, capacity, sink, window in rows if window > capacity - sink), default=None)
    if room is None or not n.numel():
        return
    after = n + (tokens if valid is None else valid.sum(1))
    most = int(after.max())
    if most > room:
        raise CacheFull(
            f"The cache holds {room} tokens of a row, and this would be {most}.",
            "Make it with a larger max_length.",
        )
