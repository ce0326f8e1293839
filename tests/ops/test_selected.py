"""attnopt::selected_attention: heads put beside others, short and empty inputs, chunks, counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import ops
from attnopt.candidates import Number
from attnopt.ops import selected
from attnopt.registry import CANDIDATES

HEADS, KV_HEADS, DIM, SCALE, BLOCK = 4, 2, 32, 0.3, 16
SERVED = torch.tensor([1, 2], dtype=torch.int32)
FEW: dict[str, Number] = {"mass": 0.25, "count": 2, "alike": -1.0, "block": BLOCK, "skip": 0.0}
WHOLE: dict[str, Number] = {**FEW, "mass": 1.0, "count": 1 << 20}


def inputs(
    length: int, queries: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(length)
    sizes = (HEADS, queries or length), (KV_HEADS, length), (KV_HEADS, length)
    q, k, v = (torch.randn(2, *size, DIM, generator=drawn).to(dtype) for size in sizes)
    return q, k, v


def table(*rows: dict[str, Number]) -> Tensor:
    return torch.tensor([CANDIDATES["pooled"].settings(row) for row in rows], dtype=torch.float64)


def call(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor | None, heads: Tensor, *rows: dict[str, Number],
    pad: Tensor | None = None, window: int = 0, least: int = 0, site: str = "",
) -> Tensor:  # fmt: skip
    given = heads, f"pooled/{BLOCK}", table(*rows), pad, SCALE, window, least, site
    return ops.selected_attention(q, k, v, near, *given)


def dense(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None, window: int = 0) -> Tensor:
    i = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    j = torch.arange(k.shape[2])
    keep = (j <= i) & (i - j < (window or k.shape[2]))
    keep = keep[None, None] if pad is None else keep & pad[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True, scale=SCALE)
    return out.masked_fill(~keep.any(-1, keepdim=True), 0.0)


PAD = torch.arange(70).repeat(2, 1) >= torch.tensor([[33], [0]])


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("pad", [None, PAD], ids=["", "padded"])
def test_heads_are_put_beside_the_others(target: str, pad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head by its own settings; the others as they were, and the tensor they came in untouched."""
    monkeypatch.setenv("ATTNOPT_TARGET", target)
    q, k, v = inputs(70)
    near = torch.randn(2, 70, HEADS, DIM).transpose(1, 2)
    before = near.clone()
    out = call(q, k, v, near, SERVED, FEW, WHOLE, pad=pad)
    assert torch.equal(near, before) and torch.equal(out[:, [0, 3]], before[:, [0, 3]])
    assert out.transpose(1, 2).is_contiguous()
    wide = [x.double() for x in (q, k, v)]
    few = CANDIDATES["pooled"].reference(*wide, FEW, SCALE, pad=pad)
    torch.testing.assert_close(out[:, 1].double(), few[:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, 2].double(), dense(*wide, pad)[:, 2], rtol=1e-4, atol=1e-5)
    # It would be seen if the settings of the two were exchanged.
    assert float((few[:, 1] - dense(*wide, pad)[:, 1]).abs().max()) > 0.01


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_inputs_of_a_block_or_less_are_dense(length: int) -> None:
    q, k, v = inputs(length)
    heads = torch.arange(HEADS, dtype=torch.int32)
    out = call(q, k, v, None, heads, *[FEW] * HEADS)
    assert out.shape == q.shape
    torch.testing.assert_close(out, dense(q, k, v), rtol=1e-4, atol=1e-5)


def test_below_the_least_length_nothing_is_selected() -> None:
    q, k, v = inputs(70)
    near, heads = torch.randn_like(q), torch.arange(HEADS, dtype=torch.int32)
    found = call(q, k, v, near, SERVED, FEW, FEW, least=71)
    assert torch.equal(found, near) and found.data_ptr() != near.data_ptr()
    assert not torch.equal(call(q, k, v, near, SERVED, FEW, FEW, least=70), near)
    # Where no other operator has the heads, it makes them itself: dense, within the model's own window.
    for window in (0, 9):
        found = call(q, k, v, None, heads, *[FEW] * HEADS, least=71, window=window)
        torch.testing.assert_close(found, dense(q, k, v, window=window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 20])
def test_a_chunk_of_a_prompt_is_its_last_rows(window: int) -> None:
    """Where every block is visited; fewer are not comparable, since a chunk selects by the queries there are."""
    q, k, v = inputs(70)
    heads = torch.arange(HEADS, dtype=torch.int32)
    for queries in (1, 7, 23, 64):
        found = call(q[:, :, 70 - queries :], k, v, None, heads, *[WHOLE] * HEADS, window=window)
        expected = dense(q, k, v, window=window)[:, :, 70 - queries :]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        few = call(q[:, :, 70 - queries :], k, v, None, heads, *[FEW] * HEADS, window=window)
        assert bool(few.isfinite().all())


def test_a_sample_of_pads_is_zero() -> None:
    q, k, v = inputs(40)
    pad = torch.ones(2, 40, dtype=torch.bool)
    pad[0] = False
    out = call(q, k, v, None, torch.arange(HEADS, dtype=torch.int32), *[FEW] * HEADS, pad=pad)
    assert float(out[0].abs().max()) == 0.0 and bool(out.isfinite().all()) and float(out[1].abs().max()) > 0


def test_what_is_visited_is_counted() -> None:
    q, k, v = inputs(70)
    selected.forget()
    for _ in range(2):
        call(q, k, v, torch.zeros_like(q), SERVED, FEW, WHOLE, site="here")
    call(q, k, v, torch.zeros_like(q), SERVED, FEW, WHOLE)
    causal, listed, skipped, calls = selected.tally["here"].T
    # Five rows of blocks, one to five each, of two samples, twice.
    assert causal.tolist() == [0, 60, 60, 0] and calls.tolist() == [0, 2, 2, 0] and not int(skipped.sum())
    assert int(listed[2]) == 60 and 2 * 2 * 5 <= int(listed[1]) < 60
    # A threshold that skips is seen.
    k[:, :, 20:50] *= 0.01
    call(8 * q, k, v, torch.zeros_like(q), SERVED, {**WHOLE, "skip": 40.0}, WHOLE, site="there")
    assert int(selected.tally["there"][1, 2]) > 0 and int(selected.tally["there"][2, 2]) == 0
    selected.forget()
    assert not selected.tally


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-9)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = inputs(50, dtype=dtype)
    out = call(q, k, v, None, torch.arange(HEADS, dtype=torch.int32), *[WHOLE] * HEADS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(*(x.double() for x in (q, k, v))), rtol=tolerance, atol=tolerance)


def chunk(
    slots: tuple[Tensor, ...], q: Tensor, heads: Tensor, row: dict[str, Number], least: int = 0
) -> tuple[Any, ...]:
    """What the operator takes for the last tokens of 70, of which `slots` hold all in one order for each KV head."""
    n, settings = torch.full((2,), 70, dtype=torch.int32), table(*[row] * len(heads))
    rest = f"pooled/{BLOCK}", settings, None, SCALE, 0, least, ""
    return q, *slots, n, [0, 80], torch.zeros(2, HEADS, q.shape[2], DIM), heads, *rest


def test_a_chunk_is_read_from_a_cache() -> None:
    q, k, v = inputs(70, 40)
    slots = tuple(F.pad(x, (0, 0, 0, 10), value=torch.nan).flatten(1, 2) for x in (k, v))
    heads = torch.arange(HEADS, dtype=torch.int32)
    given = chunk(slots, q, heads, FEW)
    torch.library.opcheck(ops.selected_chunk, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(ops.selected_chunk(*given), call(q, k, v, None, heads, *[FEW] * HEADS))
    found = ops.selected_chunk(*chunk(slots, q, heads, {**FEW, "skip": 70.0}, least=71))
    torch.testing.assert_close(found, dense(q, k, v), rtol=1e-4, atol=1e-5)
    # Only of the KV head that has them, and beside other heads.
    one, gone = torch.tensor([0, 1], dtype=torch.int32), list(chunk(slots, q, SERVED, FEW))
    gone[4:7] = [0, -1], torch.ones(2, HEADS, 40, DIM), one
    found = ops.selected_chunk(*gone)
    assert torch.equal(found[:, :2], call(q, k, v, gone[5], one, FEW, FEW)[:, :2]) and bool((found[:, 2:] == 1).all())


def test_it_has_no_gradient_and_says_so() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(20))
    out = call(q, k, v, None, torch.arange(HEADS, dtype=torch.int32), *[FEW] * HEADS)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        out.sum().backward()


def test_it_is_registered_as_it_should_be() -> None:
    q, k, v = inputs(33)
    given = q, k, v, torch.zeros_like(q), SERVED, f"pooled/{BLOCK}", table(FEW, FEW), None, SCALE, 0, 0, ""
    torch.library.opcheck(ops.selected_attention, given, test_utils=("test_schema", "test_faketensor"))
    for name in ("selected_attention", "selected_chunk"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.attnopt, name).default.tags
