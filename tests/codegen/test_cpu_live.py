"""The compiled attention to a written cache against the reference in float64: masks, layouts, tokens, head sharing."""

from __future__ import annotations

import resource
import sys

import pytest
import torch
from ragged import relative
from torch import Tensor

from attnopt.codegen import live_cpu, native
from attnopt.codegen.reference_live import attend as reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
COLUMNS = 700


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:  # type: ignore[no-untyped-def]
    if reason := native.unusable(request.param):
        pytest.skip(reason)
    return request.param


def inputs(share: int, tokens: int, dtype: torch.dtype, dims: tuple[int, int] = (64, 32)) -> tuple[Tensor, ...]:
    """q, and k and v as views of buffers with slots ahead of heads; what no mask below shows is NaN."""
    generator = torch.Generator().manual_seed(share + tokens)
    q = torch.randn(3, tokens, 2 * share, dims[0], generator=generator).to(dtype).transpose(1, 2)
    k, v = (torch.randn(3, COLUMNS, 2, d, generator=generator).to(dtype).transpose(1, 2) for d in dims)
    for x in (k, v):
        x[:, :, 690:] = torch.nan
        x[:, :, 130:134] = torch.nan
    return q, k, v


def masks(tokens: int) -> dict[str, Tensor]:
    column, row = torch.arange(COLUMNS), torch.arange(tokens)[:, None]
    written = (column < 690) & ~((column >= 130) & (column < 134))
    filled = ((column <= 600 + row) & written)[None, None]
    left = (column >= torch.tensor([0, 40, 599])[:, None])[:, None, None]
    # In few enough runs for the kernel.
    scattered = (torch.rand(3, 1, tokens, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.3) & (column < 150)
    nothing = filled & left
    nothing[1, 0, -1] = False
    return {
        "filled": filled,
        "a row for all tokens": filled[:, :, :1],
        "padded": filled & left,
        "window": filled & (column > 300 + row),
        "scattered": scattered & written,
        "a row without keys": nothing,
        "none": filled & False,
        "every other column of a wider one": (filled & left).repeat_interleave(2, -1)[..., ::2],
    }


@pytest.mark.parametrize(("share", "tokens"), [(1, 1), (4, 1), (12, 1), (3, 3), (4, 16)])
def test_matches_the_reference(share: int, tokens: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(share, tokens, dtype)
    wide = q.double(), k.double(), v.double()
    for name, keep in masks(tokens).items():
        expected = reference(*wide, keep, 0.2)
        found = native.live(q, k, v, keep, 0.2)
        assert found is not None and found.transpose(1, 2).is_contiguous()
        assert relative(found, expected) <= TOLERANCE[dtype], name
        assert (found[expected.abs().sum(-1) == 0] == 0).all(), name
        for kind in {torch.float32, dtype}:
            for hidden in (-torch.inf, torch.finfo(kind).min):
                bias = torch.randn(keep.shape, generator=torch.Generator().manual_seed(2)).to(kind)
                bias = bias.masked_fill(~keep, hidden)
                found = native.live(q, k, v, bias, 0.2)
                if not keep.any(-1).all():
                    assert found is None, name
                    continue
                assert found is not None
                expected = reference(*wide, bias.double().masked_fill(~keep, -torch.inf), 0.2)
                assert relative(found, expected) <= TOLERANCE[dtype], name


def test_no_mask_and_one_column(dtype: torch.dtype) -> None:
    for share, tokens, columns in ((2, 1, 1), (1, 3, 1), (4, 16, 1), (2, 1, 77), (1, 2, 513)):
        q, k, v = inputs(share, tokens, dtype)
        k, v = (x[:, :, :columns].nan_to_num() for x in (k, v))
        found = native.live(q, k, v, None, 0.2)
        assert found is not None
        assert relative(found, reference(q.double(), k.double(), v.double(), None, 0.2)) <= TOLERANCE[dtype]


def test_more_pieces_than_one_go_has(dtype: torch.dtype) -> None:
    """Every other of 128 columns is a run, for each of 32 KV heads, and leaves 64 rows of 34 floats."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, h, t, 32, generator=generator).to(dtype) for h, t in ((32, 16), (8, 128), (8, 128)))
    keep = (torch.arange(128) % 2 == 1)[None, None, None].repeat(4, 1, 1, 1)
    keep[2, ..., :50] = False
    found = native.live(q, k, v, keep, 0.2)
    assert found is not None
    assert relative(found, reference(q.double(), k.double(), v.double(), keep, 0.2)) <= TOLERANCE[dtype]


def test_a_column_more_or_less_is_out_of_tolerance(dtype: torch.dtype) -> None:
    q, k, v = inputs(4, 1, dtype)
    expected = reference(q.double(), k.double(), v.double(), torch.arange(COLUMNS)[None, None, None] < 100, 0.2)
    for end in (99, 101):
        found = native.live(q, k, v, torch.arange(COLUMNS)[None, None, None] < end, 0.2)
        assert found is not None and relative(found, expected) > 5 * TOLERANCE[dtype]


def test_two_threads_change_little(dtype: torch.dtype) -> None:
    """Heads are shared in pieces, and sums are taken in another order."""
    q, k, v = inputs(4, 1, dtype)
    keep, before = masks(1)["padded"], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = native.live(q, k, v, keep, 0.2)
    finally:
        torch.set_num_threads(before)
    assert found is not None
    assert relative(found, reference(q.double(), k.double(), v.double(), keep, 0.2)) <= TOLERANCE[dtype]


def test_very_many_short_runs_are_left(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel would take several times as long; it still takes as many in wider buffers, and 64 anywhere."""
    q, k, v = inputs(4, 1, dtype)
    asked: list[object] = []
    monkeypatch.setattr(live_cpu, "_attend", lambda *a, run=live_cpu._attend: asked.append(a) or run(*a))
    column = torch.arange(COLUMNS)
    for runs, left in ((64, False), (65, True)):
        keep = ((column % 2 == 0) & (column < 2 * runs))[None, None, None]
        assert (native.live(q, k, v, keep, 0.2) is None) == left
        found = live_cpu.attend(q, k, v, keep, 0.2)
        assert relative(found, reference(q.double(), k.double(), v.double(), keep, 0.2)) <= TOLERANCE[dtype]
        assert len(asked) == left
    wide = torch.arange(65 * 32) % 32 == 0
    k, v = (torch.ones(3, 2, len(wide), d, dtype=dtype) for d in (64, 32))
    assert native.live(q, k, v, wide[None, None, None], 0.2) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_goes_after_a_large_call() -> None:
    """1250 pieces leave 64 rows of 130 floats each: 42 MB."""
    if reason := native.unusable():
        pytest.skip(reason)
    q, k, v = (torch.ones(1, h, t, d) for h, t, d in ((4, 16, 32), (1, 40000, 32), (1, 40000, 128)))
    keep = (torch.arange(40000) % 32 == 0)[None, None, None]

    def resident() -> int:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[1]) * resource.getpagesize()

    before = resident()
    assert native.live(q, k, v, keep, 0.2) is not None
    assert resident() - before < 20 * 2**20


def test_masks_of_another_type_are_left(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 1, dtype)
    assert native.live(q, k, v, torch.zeros(1, 1, 1, COLUMNS, dtype=torch.float64), 0.2) is None
