"""What the tests of prefills over lists of blocks share: cases, arguments, attention with every mask written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """heads: those that are served, of four; pads: "" or where padding is; bounds: of the served heads, None for none;
    listed: the share of the blocks that causality leaves, or, where `above`, of all; dims: of q and k, and of v."""

    length: int
    keys: int
    block: int = 16
    heads: tuple[int, ...] = (0, 1, 3)
    kv_heads: int = 2
    batch: int = 2
    window: int = 0
    pads: str = ""
    bounds: tuple[float, ...] | None = None
    listed: float = 0.5
    dims: tuple[int, int] = (64, 32)
    above: bool = False


BOUNDED = (-torch.inf, -1.0, -0.2)
CASES = {
    "square": Case(100, 100),
    "whole blocks": Case(128, 128, block=32),
    "all listed": Case(90, 90, listed=1.0),
    "nothing listed": Case(50, 50, listed=0.0),
    "few listed": Case(150, 150, listed=0.1),
    "one token": Case(1, 1),
    "no token": Case(0, 7),
    "no batch": Case(20, 20, batch=0),
    "fewer tokens than a block": Case(37, 37, block=64),
    "a chunk behind others": Case(50, 133),
    "a token behind others": Case(1, 70, block=32),
    "a chunk off the blocks of keys": Case(64, 151, block=32),
    "blocks of 128": Case(140, 300, block=128),
    "one KV head": Case(70, 70, kv_heads=1),
    "as many KV heads": Case(70, 70, kv_heads=4, heads=(2, 0)),
    "window": Case(120, 120, window=30),
    "window below a block": Case(100, 130, block=32, window=5),
    "pads with holes": Case(100, 100, pads="holes"),
    "pads on the left, window": Case(100, 100, pads="left", window=33),
    "pads on the right, chunk": Case(60, 100, pads="right"),
    "only pads": Case(40, 40, pads="all"),
    "above the diagonal": Case(70, 120, above=True),
    "threshold, above the diagonal": Case(70, 120, above=True, bounds=BOUNDED),
    "threshold": Case(150, 150, bounds=BOUNDED, listed=0.8),
    "threshold, whole lists": Case(128, 128, bounds=BOUNDED, listed=1.0),
    "threshold, chunk, pads, window": Case(90, 133, bounds=BOUNDED, pads="holes", window=70, listed=0.8),
    "threshold, blocks of 64": Case(260, 260, block=64, bounds=(-0.5, -0.1, -0.3)),
}


def arguments(case: Case, dtype: torch.dtype = torch.float64, total: int = 4) -> dict[str, Any]:
    """What a prefill takes by name, but for its outputs. q, k, v: (B, N, heads, dim) in memory; keys differ in loudness
    from block to block, so that thresholds skip some. Behind a list stands what is no block."""
    generator = torch.Generator().manual_seed(case.length + case.keys)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    rows, columns = -(-case.length // case.block), -(-case.keys // case.block)
    q = normal(case.batch, case.length, total, case.dims[0])
    k, v = (normal(case.batch, case.keys, case.kv_heads, d) for d in case.dims)
    k *= (0.1 + torch.rand(columns, generator=generator)).repeat_interleave(case.block)[: case.keys, None, None]
    last = (torch.arange(rows) * case.block + case.block).clamp(max=case.length) - 1 + case.keys - case.length
    keep = torch.rand(case.batch, len(case.heads), rows, columns, generator=generator) < case.listed
    if not case.above:
        keep &= torch.arange(columns) * case.block <= last[:, None]
    index = torch.arange(columns)
    column = torch.arange(case.keys)
    pads = {
        "": None,
        "holes": torch.rand(case.batch, case.keys, generator=generator) < 0.6,
        "left": column >= torch.tensor([[case.keys // 2], [3]]),
        "right": column < torch.tensor([[case.keys], [case.keys - 40]]),
        "all": column >= torch.tensor([[case.keys], [20]]),
    }
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return {
        "q": q, "k": k, "v": v, "heads": torch.tensor(case.heads, dtype=torch.int32),
        "counts": keep.sum(-1, dtype=torch.int32),
        "blocks": torch.where(keep, index, 2**30).sort(-1).values.int(),
        "bounds": torch.tensor(case.bounds or [-torch.inf] * len(case.heads)),
        "scale": 0.2, "pad": pads[case.pads], "window": case.window, "block": case.block,
    }  # fmt: skip


def outputs(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse, full of NaN: what a call leaves as it was shows."""
    q, v = given["q"], given["v"]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), torch.nan, dtype=q.dtype).transpose(1, 2)
    return out, torch.full((q.shape[0], len(given["heads"]), q.shape[2]), torch.nan, dtype=wide)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, counts: Tensor, blocks: Tensor, bounds: Tensor, scale: float,
    pad: Tensor | None, window: int, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out (B, h, N, Dv), lse and skipped by one soft-max over all keys, in float64, with every mask as (N, M)."""
    served, (length, keys) = heads.long(), (q.shape[2], k.shape[2])
    group = served // (q.shape[1] // k.shape[1])
    scores = q.double()[:, served] @ k.double()[:, group].mT * scale
    i, j = torch.arange(length)[:, None] + keys - length, torch.arange(keys)
    keep = ((j <= i) & (i - j < (window or keys + 1))).expand(scores.shape)
    if pad is not None:
        keep = keep & pad[:, None, None]
    listed, skipped = torch.zeros_like(keep), torch.zeros_like(counts)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        b, n, r = place
        rows = slice(r * block, (r + 1) * block)
        ids = blocks[b, n, r, : int(counts[b, n, r])].tolist()
        for c in ids[:1] + ids[:0:-1]:
            columns = slice(c * block, (c + 1) * block)
            before = scores[b, n, rows].masked_fill(~(keep & listed)[b, n, rows], -torch.inf).amax(-1)
            here = scores[b, n, rows, columns].masked_fill(~keep[b, n, rows, columns], -torch.inf).amax(-1)
            kept = here > -torch.inf
            if kept.any() and (here < before + bounds[n])[kept].all():
                skipped[b, n, r] += 1
            else:
                listed[b, n, rows, columns] = True
    scores = scores.masked_fill(~(keep & listed), -torch.inf)
    weights = scores.softmax(-1).masked_fill(~(keep & listed), 0.0)
    return weights @ v.double()[:, group], scores.logsumexp(-1), skipped
