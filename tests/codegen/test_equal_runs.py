"""Where the positions of a number lie, against every position compared with every other."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.equal_runs import equal_runs, kept_runs

NUMBERS = {
    "any order": torch.randint(0, 4, (2, 3, 15), generator=torch.Generator().manual_seed(0)),
    "side by side": torch.randint(0, 4, (2, 15), generator=torch.Generator().manual_seed(1)).sort(-1).values,
    "falling": torch.arange(9).flip(0)[None] // 2,
    "one number": torch.zeros(1, 5, dtype=torch.int32),
    "one position": torch.tensor([[3]]),
    "come back": torch.tensor([[1, 1, 2, 2, 1, 1]]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_first_last_and_whole(name: str) -> None:
    ids = NUMBERS[name]
    count = ids.shape[-1]
    first, last, whole = equal_runs(ids)
    equal = ids[..., :, None] == ids[..., None, :]
    i, j = torch.arange(count)[:, None], torch.arange(count).expand(equal.shape)
    assert torch.equal(first, torch.where(equal, j, count).amin(-1).int())
    assert torch.equal(last, torch.where(equal, j, -1).amax(-1).int())
    unbroken = (equal | (j < first[..., None]) | (j > i)).all(-1)
    assert torch.equal(whole, torch.where(unbroken, first, count))


def test_nothing() -> None:
    assert equal_runs(torch.zeros(2, 0, dtype=torch.long)).shape == (3, 2, 0)


@pytest.mark.parametrize("seed", range(6))
def test_kept_keys(seed: int) -> None:
    """On the left, on the right, on both sides, anywhere, and none."""
    place = torch.arange(11)
    anywhere = torch.rand(2, 11, generator=torch.Generator().manual_seed(seed)) > 0.5
    for flags in (place[None] >= seed, place[None] <= seed, (place >= seed) & (place < 8), anywhere, place < 0):
        first, end, whole_first, whole_end = kept_runs(flags)
        kept = (place >= first[..., None]) & (place < end[..., None])
        whole = (place >= whole_first[..., None]) & (place < whole_end[..., None])
        assert not (flags & ~kept).any() and not (whole & ~flags).any()
        assert torch.equal(whole.any(-1), (flags == kept).all(-1) & flags.any(-1))
        assert not flags.any() or bool(flags.gather(-1, first[..., None].long().clamp(max=10)).any())
    assert kept_runs(torch.zeros(2, 0, dtype=torch.bool)).shape == (4, 2)
