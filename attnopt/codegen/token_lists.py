"""Which heads of a table of rules select tokens and which list each attends to, and how lists are divided on a GPU.

All of it follows from tables that the host knows, once per table: nothing here depends on what is selected.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.codegen.reference_token_step import COUNT, RECENT, SINK, SOURCE
from attnopt.codegen.work_list import WORKERS, read_table

# Keys of a list that a program looks at together: parts of lists are whole blocks.
BLOCK = 32
# Programs that an SM holds at once in the model, which is not measured.
PER_SM = 4


class Readers(NamedTuple):
    """heads int32 (h,): the query heads that attend to lists of one tensor; most: tokens that these have at most;
    parts: programs of a list, with its sink and recent keys; chunk: keys of each."""

    heads: Tensor
    most: int
    parts: int
    chunk: int


class TokenLists(NamedTuple):
    """heads int32 (h,): the query heads that select themselves; places int32 (H,): where each stands among these, -1
    for others; room: slots that a row of their scores has; readers: of the layer's own lists, and of those of each
    source, None where nobody reads them."""

    heads: Tensor
    places: Tensor
    room: int
    readers: tuple[Readers | None, ...]


def token_lists(rules: Tensor, table: Tensor, batch: int) -> TokenLists:
    """Of rules int32 (H, 6) and table int32 (G, 4) on any device, where the result lies too; kept per values and batch.

    A table on a GPU is read once, before a graph is captured.
    """
    return _built(read_table(rules), rules.shape[0], read_table(table), table.shape[0], batch, rules.device)


@lru_cache(maxsize=256)
def _built(
    flat: tuple[int, ...], heads: int, segments: tuple[int, ...], groups: int, batch: int, device: torch.device
) -> TokenLists:
    workers = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else WORKERS
    width, share = len(flat) // heads, heads // groups
    rows = [flat[width * h : width * (h + 1)] for h in range(heads)]
    capacities = [segments[len(segments) // groups * (h // share) + 1] for h in range(heads)]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device)

    def readers_of(source: int) -> Readers | None:
        found = [h for h, row in enumerate(rows) if row[COUNT] and max(row[SOURCE], -1) == source]
        if not found:
            return None
        longest = max(rows[h][COUNT] + sum(min(rows[h][c], capacities[h]) for c in (SINK, RECENT)) for h in found)
        most = max(rows[h][COUNT] for h in found)
        return Readers(tensor(found), most, *divided(longest, batch * len(found), PER_SM * workers))

    own = [h for h, row in enumerate(rows) if row[COUNT] and row[SOURCE] < 0]
    places = [own.index(h) if h in own else -1 for h in range(heads)]
    room = -(-max((capacities[h] for h in own), default=0) // 64) * 64
    sources = range(-1, max((row[SOURCE] for row in rows), default=-1) + 1)
    return TokenLists(tensor(own), tensor(places), room, tuple(map(readers_of, sources)))


def divided(longest: int, lists: int, slots: int) -> tuple[int, int]:
    """(parts of a list, keys of a part) for `lists` lists of at most `longest` keys, where a GPU runs `slots` programs
    at once: no more parts than keep it busy."""
    blocks = -(-longest // BLOCK)
    wanted = max(1, min(blocks, slots // max(1, lists)))
    chunk = -(-blocks // wanted) * BLOCK
    return -(-longest // chunk), chunk
