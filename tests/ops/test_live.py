"""`attnopt::live_attention` against a soft-max written out over every column, in float64: any mask, any strides."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from attnopt import ops  # noqa: F401
from attnopt.codegen import live_cpu

SLOTS, BATCH, KV_HEADS, DIM = 37, 3, 2, 32
live = torch.ops.attnopt.live_attention


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks(tokens: int) -> dict[str, Tensor]:
    """bool (B | 1, 1, T | 1, C): what a static cache comes with, and what none ever had."""
    column, row = torch.arange(SLOTS), torch.arange(tokens)[:, None]
    filled = (column <= 11 + row)[None, None]
    padded = filled & (column >= torch.tensor([0, 3, 9])[:, None])[:, None, None]
    interior = padded & ~((column > 4) & (column < 8))
    lengths = (column < torch.tensor([4, 33, 20])[:, None])[:, None, None]
    nothing = padded.clone()
    nothing[1] = False
    scattered = torch.rand(BATCH, 1, tokens, SLOTS, generator=torch.Generator().manual_seed(1)) < 0.2
    return {
        "filled": filled, "one row for all": filled[:, :, :1], "padded": padded, "interior": interior,
        "lengths": lengths, "an entry without keys": nothing, "nothing": filled & False, "all": filled | True,
        "every other column of a wider one": padded.repeat_interleave(2, -1)[..., ::2],
        "scattered": scattered, "the last column": (column == SLOTS - 1)[None, None, None],
    }  # fmt: skip


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Over all columns, K and V repeated; rows that keep nothing are 0."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(share, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        added = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        scores = scores + added
    return (scores.softmax(-1).nan_to_num(0.0)) @ v


@pytest.mark.parametrize(("target", "native"), [("cpu", "1"), ("cpu", "0"), ("reference", "1"), ("triton", "1")])
def test_agrees_with_float64(target: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that share KV heads or not, one and more tokens, values of another size, K and V as views."""
    monkeypatch.setenv("ATTNOPT_TARGET", target)
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    for tokens, share, dim_v, scale in [(1, 4, DIM, 0.2), (1, 1, 64, 0.2), (3, 2, DIM, -0.3), (40, 2, 5, 0.2)]:
        q = normal(BATCH, KV_HEADS * share, tokens, DIM)
        k = normal(BATCH, SLOTS, KV_HEADS, DIM, seed=1).transpose(1, 2)
        v = normal(BATCH, KV_HEADS, SLOTS, dim_v, seed=2)
        for (name, keep), kind in product(masks(tokens).items(), ("bool", "added")):
            mask = keep
            if kind == "added":
                mask = normal(*keep.shape, seed=3).masked_fill(~keep, -torch.inf)
            found = live(q, k, v, mask, scale)
            expected = written_out(q, k, v, mask, scale)
            torch.testing.assert_close(
                found.double(), expected, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert found.transpose(1, 2).is_contiguous()
        found, expected = live(q, k, v, None, scale).double(), written_out(q, k, v, None, scale)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_dead_columns_are_not_read() -> None:
    """What lies outside the kept columns may be anything. In front of the first and behind the last, NaN."""
    q, k, v = normal(2, 4, 1, DIM), normal(2, 2, SLOTS, DIM, seed=1), normal(2, 2, SLOTS, DIM, seed=2)
    column = torch.arange(SLOTS)
    keep = ((column >= 5) & (column <= 20))[None, None, None]
    expected = written_out(q, k, v, keep, 0.2)
    for x in (k, v):
        x[:, :, :5] = torch.nan
        x[:, :, 21:] = torch.nan
    torch.testing.assert_close(live(q, k, v, keep, 0.2).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("written", [torch.nan, torch.inf])
def test_hidden_columns_between_kept_ones(native: str, written: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no row keeps may be anything there too, with few rows and with many, of KV heads that share a mask."""
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    column = torch.arange(SLOTS)
    for tokens, batch in ((1, 1), (3, BATCH), (40, BATCH)):
        q = normal(BATCH, 4, tokens, DIM)
        k, v = (normal(BATCH, KV_HEADS, SLOTS, DIM, seed=n) for n in (1, 2))
        keep = ((column < 20) & (column != 7) & (column != 11)).repeat(batch, 1, tokens, 1)
        keep[:, :, :, -1] = True
        for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)):
            expected = written_out(q, k, v, keep, 0.2)
            dirty = [x.masked_fill(~keep[:, 0, 0, None, :, None], written) for x in (k, v)]
            torch.testing.assert_close(live(q, *dirty, mask, 0.2).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("target", "native"), [("cpu", "1"), ("cpu", "0"), ("triton", "1"), ("reference", "1")])
def test_the_least_number_everywhere_is_an_average(target: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wider dtype than q's too, in which it has no number."""
    monkeypatch.setenv("ATTNOPT_TARGET", target)
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        q, k, v = (normal(1, h, t, DIM, seed=h).to(narrow) for h, t in ((4, 2), (2, SLOTS), (2, SLOTS)))
        mask = torch.zeros(1, 1, 2, SLOTS, dtype=wide)
        mask[:, :, 0] = torch.finfo(wide).min
        mask[:, :, 1, 5:] = torch.finfo(wide).min
        found = live(q, k, v, mask, 0.2).double()
        mean = v.double().mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(found[:, :, 0], mean, rtol=1e-2, atol=2e-3)
        few = written_out(q[:, :, 1:], k[:, :, :5], v[:, :, :5], None, 0.2)
        torch.testing.assert_close(found[:, :, 1:], few, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [1, 20])
def test_entries_that_keep_other_columns_are_read_apart(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of torch's operators: what an entry does not keep is NaN, also where another entry keeps it."""
    monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    calls: list[int] = []
    read = live_cpu._read
    monkeypatch.setattr(live_cpu, "_read", lambda *a: calls.append(a[1].shape[2]) or read(*a))
    q, k, v = normal(4, 8, tokens, 8), normal(4, 2, 3000, 8, seed=1), normal(4, 2, 3000, 8, seed=2)
    column = torch.arange(3000)
    first, end = (torch.tensor(x)[:, None, None, None] for x in ([0, 2900, 7, 0], [40, 3000, 1500, 0]))
    keep = ((column >= first) & (column < end)).repeat(1, 1, tokens, 1)
    keep[0, 0, -1] = False
    keep[0, 0, 0, :40] = True
    expected = written_out(q, k, v, keep, 0.3)
    dead = ~keep.any(2, keepdim=True).mT
    found = live(q, *(x.masked_fill(dead, torch.nan) for x in (k, v)), keep, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    assert calls == [40, 100, 1493]


def test_bfloat16() -> None:
    q, k, v = (normal(*s, seed=n).bfloat16() for n, s in enumerate([(2, 8, 1, 64), (2, 2, 300, 64), (2, 2, 300, 64)]))
    keep = (torch.arange(300) < 201)[None, None, None]
    torch.testing.assert_close(live(q, k, v, keep, 0.2).double(), written_out(q, k, v, keep, 0.2), rtol=2e-2, atol=1e-2)


def test_live_columns() -> None:
    found = {name: live_cpu.live_columns(mask.contiguous()) for name, mask in masks(2).items()}
    assert found["filled"] == [(0, 13, True)] and found["one row for all"] == [(0, 12, True)]
    assert found["padded"] == [(0, 13, True), (3, 13, True), (9, 13, True)] == found["interior"]
    assert found["an entry without keys"] == [(0, 13, True), (0, 0, False), (9, 13, True)]
    assert found["nothing"] == [(0, 0, False)] and found["all"] == [(0, SLOTS, True)]
    assert found["the last column"] == [(SLOTS - 1, SLOTS, True)]
    later = torch.tensor([[False, False, True, False], [False] * 4])[None, None]
    assert live_cpu.live_columns(later) == [(2, 3, False)]


@pytest.mark.parametrize("tokens", [1, 3])
def test_registration(tokens: int) -> None:
    q, k = normal(BATCH, 4, tokens, DIM), normal(BATCH, KV_HEADS, SLOTS, DIM, seed=1)
    torch.library.opcheck(live.default, (q, k, k, masks(tokens)["padded"], 0.25))


def test_refusals() -> None:
    q, k = normal(1, 2, 1, DIM), normal(1, 2, 5, DIM)
    with pytest.raises(RuntimeError, match="no gradient"):
        live(q.requires_grad_(), k, k, None, 0.2)
    with pytest.raises(ValueError, match=r"int64 \(5,\)"):
        live(q.detach(), k, k, torch.ones(5, dtype=torch.int64), 0.2)
    with pytest.raises(ValueError, match="the mask has 4 columns, the cache 5"):
        live(q.detach(), k, k, torch.ones(1, 1, 1, 4, dtype=torch.bool), 0.2)


def test_sizes_and_types_that_do_not_belong_together_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernel would have read them, and whatever it would have read instead."""
    q, k, v = normal(2, 4, 1, DIM), normal(2, 2, SLOTS, DIM), normal(2, 2, SLOTS, DIM)
    mask = torch.ones(2, 1, 1, SLOTS, dtype=torch.bool)
    wrong = {
        "fewer values than keys": (q, k, v[:, :, :-1], mask),
        "one row of keys for two": (q, k[:1], v[:1], None),
        "keys of another size": (q, k[..., :-1], v, mask),
        "keys of another dtype": (q, k.bfloat16(), v, mask),
        "values of another dtype": (q, k, v.double(), mask),
        "heads that do not share": (q[:, :3], k, v, mask),
        "a mask for each head": (q, k, v, mask.expand(-1, 4, -1, -1)),
        "a mask of another batch": (normal(4, 4, 1, DIM), normal(4, 2, SLOTS, DIM), normal(4, 2, SLOTS, DIM), mask),
        "a mask of one column": (q, k, v, mask[..., :1]),
    }
    for native in ("1", "0"):
        monkeypatch.setenv("ATTNOPT_NATIVE", native)
        for given in wrong.values():
            with pytest.raises(ValueError, match=r"expected|columns"):
                live(*given, 0.2)
