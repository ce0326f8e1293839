"""What is counted as saved, against masks made in full and graphs looked at by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.examine.calls import Call, Phase
from attnopt.examine.savings import ALL, FILLED, KEPT, pairs
from attnopt.examine.trace import Trace
from attnopt.hf import Loaded
from attnopt.ir import Load, Mask
from attnopt.passes import pays

LENGTH = 48


def kept(mask: Mask, queries: int, keys: int, offset: int) -> int:
    """The same with every pair looked at."""
    i, j = torch.arange(queries)[:, None] + offset, torch.arange(keys)[None]
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if mask.causal:
        keep &= j <= i
    if mask.window is not None:
        keep &= (i - j).abs() < mask.window if mask.symmetric else i - j < mask.window
    if mask.chunk:
        keep &= i // mask.chunk == j // mask.chunk
    return int(keep.sum())


@pytest.mark.parametrize("mask", [
    Mask(), Mask(causal=True), Mask(causal=True, window=5), Mask(window=5, symmetric=True), Mask(window=5),
    Mask(causal=True, chunk=8), Mask(chunk=7), Mask(causal=True, window=100),
    Mask(causal=True, loads=(Load("pad", ("b", "j")),)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("queries", "keys", "offset"), [(20, 20, 0), (1, 33, 32), (7, 20, 13), (20, 7, 0)])
def test_pairs_are_those_of_the_mask(mask: Mask, queries: int, keys: int, offset: int) -> None:
    assert pairs(mask, queries, keys, offset) == kept(mask, queries, keys, offset)


def test_every_lowering_is_counted_in_one_way() -> None:
    named = (pays.SPAN, pays.FEATURE, pays.RUNS, pays.PACKED, pays.PADDING, pays.AS_IT_WAS, pays.PRINTED,
             pays.DOCUMENTS, pays.LIVE, pays.GROWN, "SDPA without a mask", "SDPA is_causal",
             "SDPA, chunks of 8 as a batch", "SDPA with a mask of one row")  # fmt: skip
    for name in named:
        assert sum(name.startswith(ways) for ways in (KEPT, FILLED, ALL)) == 1, name


class Written(nn.Module):
    """Two written-out attentions of four heads of eight over two KV heads under one additive mask."""

    def __init__(self, window: int | None = None, leak: bool = False) -> None:
        super().__init__()
        self.embed, self.window, self.leak = nn.Embedding(100, 32), window, leak

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        x = self.embed(ids).unflatten(-1, (4, 8)).transpose(1, 2)
        at = torch.arange(ids.shape[1])
        keep = at[None] <= at[:, None]
        if self.window is not None:
            keep = keep & (at[:, None] - at[None] < self.window)
        mask = torch.where(keep, 0.0, float("-inf"))
        for _ in range(2):
            k = x[:, :2].repeat_interleave(2, 1)
            x = torch.softmax(x @ k.mT * 8**-0.5 + mask, -1) @ k
        return (x, mask.exp()) if self.leak else x


def traced(model: nn.Module, *lengths: int) -> Trace:
    torch._dynamo.reset()
    ids = torch.arange(LENGTH)[None] % 100
    trace = Trace(
        Loaded(model.eval(), None, "x"), Phase("prefill", "", (Call("", (ids,)),), frozenset({LENGTH})), lengths
    )
    with torch.no_grad():
        trace.run(dynamic=False)
    return trace


def test_a_causal_site_is_counted_at_chosen_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNOPT_ALWAYS")
    (graph,) = traced(Written(), 64, 1000).graphs
    for saving, n in zip(graph.savings, (64, 1000), strict=True):
        assert saving.length == n and saving.pairs_before == 2 * 4 * n * n and not saving.at_most
        assert saving.pairs_after == 2 * 4 * n * (n + 1) // 2
        # One mask for both; K and V of all four heads; scores of all four heads; float32.
        assert saving.mask_bytes == 4 * n * n
        assert saving.repeated_bytes == 2 * 4 * n * (8 + 8) * 4 and saving.scores_bytes == 2 * 4 * n * n * 4


class AsManyHeads(nn.Module):
    """As many heads, of four, as tokens are traced, under a mask that every head has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, LENGTH * 4)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        x = self.embed(ids).unflatten(-1, (LENGTH, 4)).transpose(1, 2)
        mask = torch.ones(n, n, dtype=torch.bool).tril().expand(1, LENGTH, n, n).contiguous()
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_as_many_heads_as_tokens_are_no_length() -> None:
    (graph,) = traced(AsManyHeads(), 1000).graphs
    assert graph.savings[0].mask_bytes == LENGTH * 1000 * 1000
    assert graph.savings[0].pairs_before == LENGTH * 1000 * 1000


def test_a_mask_that_is_read_elsewhere_is_still_made() -> None:
    (graph,) = traced(Written(leak=True), 64).graphs
    assert graph.report.rewrites and graph.savings[0].mask_bytes == 0


def test_what_does_not_pay_at_one_length_may_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNOPT_ALWAYS")
    (graph,) = traced(Written(window=16), LENGTH, 4096).graphs
    short, long = graph.savings
    assert all("span kernel" not in site.lowering for site in short.sites)
    assert all(site.lowering == "span kernel, window 16" for site in long.sites)
    assert long.pairs_after == 2 * 4 * (16 * 17 // 2 + (4096 - 16) * 16)
    assert short.pairs_after == short.pairs_before and short.mask_bytes == 0 < long.mask_bytes
