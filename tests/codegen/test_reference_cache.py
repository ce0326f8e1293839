"""The reference step, which all others are compared with, against loops over single rows and keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnopt.cache import Layout
from attnopt.codegen import self_check_cache
from attnopt.codegen.emit import load
from attnopt.codegen.reference_cache import step
from attnopt.codegen.spec import CacheStep


def by_hand(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, spans: Tensor, scale: float) -> Tensor:
    """The whole sequence at once, one row and key at a time; q (B, H, T, D), float64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    share = q.shape[1] // k.shape[1]
    for entry, counts in enumerate(valid):
        tokens = counts.nonzero()[:, 0].tolist()
        for head, (sink, window) in enumerate(spans.tolist()):
            for i, row in enumerate(tokens):
                kept = [t for j, t in enumerate(tokens) if j <= i and (j < sink or i - j < window)]
                weights = [math.exp(scale * float(q[entry, head, row] @ k[entry, head // share, t])) for t in kept]
                for weight, t in zip(weights, kept, strict=True):
                    out[entry, head, row] += weight / sum(weights) * v[entry, head // share, t]
    return out


def test_a_prompt_a_chunk_and_tokens_are_the_attention_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, groups, tokens = 3, 6, 2, 24
    layout = Layout.of_spans([0, 1, 3, 2, 0, 0], [24, 3, 9, 4, 1, 6], groups, 30, slack=2)
    assert layout.whole == (True, False)
    table, spans = layout.tables()
    sizes = ((heads, 5), (groups, 5), (groups, 7))
    q, k, v = (torch.randn(batch, h, tokens, d, generator=generator, dtype=torch.float64) for h, d in sizes)
    valid = torch.rand(batch, tokens, generator=generator) < 0.8
    valid[1], valid[2, :9] = False, False
    # Nothing that was not written may be read: it would be NaN.
    cache = [torch.full((batch, layout.slots, d), torch.nan, dtype=torch.float64) for d in (5, 7)]
    n = torch.zeros(batch, dtype=torch.int32)
    found, at = [], 0
    for size in (10, 1, 1, 0, 7, 1, 4):
        new = (x[:, :, at : at + size] for x in (q, k, v))
        found.append(step(*new, *cache, n, valid[:, at : at + size], table, spans, 0.3, at == 0))
        at += size
    assert n.tolist() == valid.sum(1).tolist()
    wanted = by_hand(q, k, v, valid, spans, 0.3)
    torch.testing.assert_close(torch.cat(found, 2), wanted, atol=1e-12, rtol=0)
    narrower = by_hand(q, k, v, valid, spans - torch.tensor([0, 1]), 0.3)
    assert (wanted - narrower).abs().max() > 0.1


@pytest.mark.parametrize(
    "spec", [CacheStep("reference", "float64", 6, 3, 5, 7), CacheStep("reference", "float32", 1, 1, 4, 4)]
)
def test_the_emitted_file_is_that_step_and_agrees_with_itself(
    spec: CacheStep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(spec).step is step
    with pytest.raises(SystemExit) as done:
        self_check_cache.check(spec, load(spec).step)
    assert done.value.code == 0 and capsys.readouterr().out.count("  agrees  ") == 2


@pytest.mark.parametrize("mistake", ["writes first", "forgets the values", "counts padding"])
def test_a_wrong_step_is_named(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(q, k, v, keys, values, n, valid, table, spans, scale, fresh):  # type: ignore[no-untyped-def]
        cache, seen = [keys, values], n.clone()
        if mistake == "forgets the values":
            cache[1] = values.clone()
        if mistake == "counts padding":
            valid = None
        out = step(q, k, v, *cache, n, valid, table, spans, scale, fresh)
        if mistake == "writes first":
            # As if all of a chunk had been there for each of its tokens: a ring has lost what its first ones need.
            out = step(q, k, v, keys, values, seen, valid, table, spans, scale, False) if q.shape[2] > 1 else out
        return out

    with pytest.raises(SystemExit) as done:
        self_check_cache.check(CacheStep("reference", "float32", 4, 2, 8, 8), wrong)
    told = capsys.readouterr()
    assert done.value.code == 1 and "disagrees with the reference" in told.err and "WRONG" in told.out
