"""What a GPU's step of heads that select tokens takes from the tables, without a GPU."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.token_lists import BLOCK, divided, token_lists

TABLE = torch.tensor([[0, 48, 0, 1 << 30], [48, 100, 0, 1 << 30]], dtype=torch.int32)


def test_who_selects_and_who_reads_what() -> None:
    rows = [(9, 2, 5, 1, 0, -1), (0, 0, 0, 0, 0, -1), (4, 0, 1, 1, 0, 1), (200, 400, 1, 3, 0, -1)]
    found = token_lists(torch.tensor(rows, dtype=torch.int32), TABLE, 2)
    assert found.heads.tolist() == [0, 3] and found.places.tolist() == [0, -1, -1, 1]
    assert found.heads.dtype == found.places.dtype == torch.int32
    # Rows of scores are aligned, and as long as the longest of those who select needs.
    assert found.room == 128
    own, first, second = found.readers
    assert own is not None and (own.heads.tolist(), own.most) == ([0, 3], 200)
    # No more sinks than there are slots.
    assert own.parts * own.chunk >= 301 > (own.parts - 1) * own.chunk
    assert first is None and second is not None and (second.heads.tolist(), second.most) == ([2], 4)


def test_tables_that_only_read_others() -> None:
    found = token_lists(torch.tensor([(4, 0, 1, 1, 0, 0)] * 4, dtype=torch.int32), TABLE, 1)
    assert not found.heads.numel() and found.room == 0 and found.readers[0] is None


@pytest.mark.parametrize(("longest", "lists", "slots"), [(324, 32, 528), (324, 512, 528), (1, 1, 528), (5000, 1, 8)])
def test_no_more_parts_than_keep_a_gpu_busy(longest: int, lists: int, slots: int) -> None:
    parts, chunk = divided(longest, lists, slots)
    assert chunk % BLOCK == 0 and (parts - 1) * chunk < longest <= parts * chunk
    assert parts * lists <= max(slots, lists)
