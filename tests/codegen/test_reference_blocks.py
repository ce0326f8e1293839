"""The reference of prefills over lists of blocks against one soft-max with the mask written out, and what skips."""

from __future__ import annotations

import pytest
import torch
from listed import CASES, arguments, outputs, written_out

from attnopt.codegen.emit import load
from attnopt.codegen.reference_blocks import prefill
from attnopt.codegen.spec import BLOCKS, BlockPrefill


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_mask_written_out(name: str) -> None:
    given = arguments(CASES[name])
    out, lse = outputs(given)
    skipped = prefill(**given, out=out, lse=lse)
    expected, sums, count = written_out(**given)
    served = given["heads"].long()
    torch.testing.assert_close(out[:, served], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, sums, rtol=1e-12, atol=1e-12)
    assert skipped.dtype == torch.int32 and torch.equal(skipped, count)
    assert bool(skipped.any()) == name.startswith("threshold")
    others = [h for h in range(4) if h not in served.tolist()]
    assert out[:, others].isnan().all()
    empty = lse == -torch.inf
    assert (out[:, served][empty] == 0).all()
    assert bool(empty.any()) or name not in {"few listed", "only pads", "pads with holes", "window below a block"}
    assert bool(empty.all()) == (name in {"nothing listed", "no token", "no batch"})


def by_hand(scores: list[list[float]], bound: float, pad: list[bool] | None = None) -> tuple[int, float]:
    """Blocks skipped by the last 16 of 16 C tokens, and the mass of exp(score) of its first row. scores[row][c]: of all
    keys of block c."""
    rows, blocks = len(scores), len(scores[0])
    length = 16 * blocks
    q = torch.zeros(1, 1, 16, rows, dtype=torch.float64)
    q[0, 0, torch.arange(16), torch.arange(16).clamp(max=rows - 1)] = 1
    k = torch.tensor(scores, dtype=torch.float64).T.repeat_interleave(16, 0)[None, None]
    out, lse = torch.empty(1, 1, 16, 1, dtype=torch.float64), torch.empty(1, 1, 16, dtype=torch.float64)
    counts, lists = torch.tensor([[[blocks]]], dtype=torch.int32), torch.arange(blocks, dtype=torch.int32)
    mask = None if pad is None else torch.tensor(pad).repeat_interleave(16)[None]
    skipped = prefill(
        q, k, torch.ones(1, 1, length, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32), counts,
        lists[None, None, None], torch.tensor([bound]), 1.0, mask, 0, 16, out, lse,
    )  # fmt: skip
    return int(skipped), float(lse[0, 0, 0].exp())


def mass(*scores: float, diagonal: float) -> float:
    """Whole blocks of a score, and the one key of the diagonal that the first row sees."""
    return float(16 * torch.tensor(scores, dtype=torch.float64).exp().sum() + torch.tensor(diagonal).double().exp())


def test_the_first_is_visited_first_then_from_the_last_downward() -> None:
    # 3 before 2 before 1: 2 is below the 3rd, and 1 is not. From the left, 3 would be below 1 as well.
    skipped, found = by_hand([[0.0, 3.0, 1.0, 2.0]], -0.5)
    assert skipped == 1 and found == pytest.approx(mass(0.0, 3.0, diagonal=2.0))
    # The first counts for all.
    skipped, found = by_hand([[9.0, 3.0, 1.0, 2.0]], -0.5)
    assert skipped == 3 and found == pytest.approx(16 * 8103.083927575384)


def test_less_than_the_bound_below_the_largest_is_visited() -> None:
    assert by_hand([[1.0, 0.5, 1.0]], -0.5)[0] == 0
    assert by_hand([[1.0, 0.5, 1.0]], -0.499)[0] == 1
    assert by_hand([[1.0, -1e30, 1.0]], -torch.inf)[0] == 0


def test_one_row_keeps_a_block() -> None:
    low, high = [5.0, 0.0, 5.0], [5.0, 4.9, 5.0]
    assert by_hand([low] * 16, -1.0)[0] == 1
    skipped, found = by_hand([low] * 15 + [high], -1.0)
    assert skipped == 0 and found == pytest.approx(mass(5.0, 0.0, diagonal=5.0))


def test_pads_are_neither_visited_nor_skipped() -> None:
    assert by_hand([[9.0, 0.0, 0.0, 0.0]], -1.0, [True, False, True, True])[0] == 2
    # Nor do they count as the first.
    assert by_hand([[9.0, 0.0, 0.0, 0.0]], -1.0, [False, True, True, True])[0] == 0


def test_mass_skipped_is_below_its_bound() -> None:
    """Of every row, for each block skipped: lambda * block of what the row has visited."""
    given = arguments(CASES["threshold, whole lists"])
    out, lse = outputs(given)
    skipped = prefill(**given, out=out, lse=lse)
    whole, full = torch.empty_like(out), torch.empty_like(lse)
    prefill(**{**given, "bounds": torch.full((3,), -torch.inf)}, out=whole, lse=full)
    lost = torch.expm1(full - lse)
    most = given["bounds"].double().exp()[:, None] * 16 * skipped.repeat_interleave(16, -1)[..., : lost.shape[-1]]
    assert (lost <= most + 1e-12).all() and bool((lost > 0).any())


def test_blocks_are_those_of_a_matrix_unit() -> None:
    assert BLOCKS == (16, 32, 64, 128)
    with pytest.raises(ValueError, match="blocks of 48 keys"):
        BlockPrefill("reference", "float32", 4, 2, 16, 16, 48, False)


def test_emitted_module() -> None:
    given = arguments(CASES["pads with holes"], torch.float32)
    block = given.pop("block")
    out, lse = outputs(given)
    load(BlockPrefill("reference", "float32", 4, 2, 64, 32, block, True)).prefill(**given, out=out, lse=lse)
    expected, sums, _ = written_out(**given, block=block)
    torch.testing.assert_close(out[:, given["heads"].long()].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
