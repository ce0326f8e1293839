"""Attention as people write it: many spellings of few families, a family being one and the same mathematics.

Each family has inputs, the record a site of it must have, and a reference that spells the formula out. Every spelling
takes the family's inputs, after `layout` where it wants them arranged otherwise, and returns (B, heads, Sq, Dv), after
`restore` where it returns something else. Sizes differ pairwise: 12 query heads, 4 KV heads, 8 features, 13 positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import qkv

HEADS, KV_HEADS, DIM, DIM_V = 12, 4, 8, 10
GROUP = HEADS // KV_HEADS
SCALE = DIM**-0.5
INF = float("inf")
sdpa = F.scaled_dot_product_attention

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """`canonical` is the site's record as a regular expression, the names of loads being L0, L1, ... in order."""

    canonical: str
    inputs: Callable[[int, int], Inputs]
    reference: Callable[..., Tensor]


@dataclass(frozen=True)
class Spelling:
    name: str
    family: str
    fn: Callable[..., Any]
    layout: Callable[..., Inputs]
    restore: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


FAMILIES: dict[str, Family] = {}
SPELLINGS: list[Spelling] = []


def as_given(*inputs: Tensor) -> Inputs:
    return inputs


def spelling(
    *families: str, layout: Callable[..., Inputs] = as_given, restore: Callable[[Tensor], Tensor] = lambda out: out
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a spelling of the families named."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        SPELLINGS.extend(Spelling(fn.__name__, family, fn, layout, restore) for family in families)
        return fn

    return add


def normalised(canonical: str) -> str:
    """The record with its loads named in order of appearance; a sink's logit keeps its name."""
    names: dict[str, str] = {}

    def rename(found: re.Match[str]) -> str:
        return names.setdefault(found[1], f"L{len(names)}") + "["

    record, _, keep = canonical.partition(" keep ")
    record, sink, _ = record.partition(" sink=logit[h]")
    return re.sub(r"([A-Za-z_]\w*)\[", rename, f"{record} keep {keep}").replace(" keep ", f"{sink} keep ")


# --- families: the formula, written once without any cleverness -------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = SCALE, keep: Tensor | None = None, bias: Tensor | None = None,
    cap: float = 0.0, column: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(cap(scale q k^T) + bias, where keep) v, with `column` one more key of that score and of value zero."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if cap:
        s = cap * torch.tanh(s / cap)
    if bias is not None:
        s = s + bias
    if keep is not None:
        s = s.masked_fill(~keep, -INF)
    if column is not None:
        s = torch.cat([s, column.expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1)[..., : k.shape[2]]
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def rows(q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])[:, None]


def columns(k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2])[None, :]


def lower(q: Tensor, k: Tensor) -> Tensor:
    """j <= i."""
    return columns(k) <= rows(q)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def softmax_of(s: Tensor, keep: Tensor) -> Tensor:
    return F.softmax((s * SCALE).masked_fill(~keep, -INF), -1)


def flat(t: Tensor) -> Tensor:
    return t.reshape(-1, *t.shape[2:])


def swapped(*inputs: Tensor) -> Inputs:
    """(B, S, H, D)."""
    return tuple(t.transpose(1, 2).contiguous() if t.ndim == 4 else t for t in inputs)


def swapped_back(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def tensors(**sizes: Any) -> Callable[[int, int], Inputs]:
    """Only q, k and v."""
    return lambda batch, length: qkv(batch, HEADS, length=length, **{"dim": DIM, **sizes})


def also(make: Callable[[int, int], Tensor], **sizes: Any) -> Callable[[int, int], Inputs]:
    """q, k, v and one more."""
    return lambda batch, length: (*tensors(**sizes)(batch, length), make(batch, length))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def padding(batch: int, length: int) -> Tensor:
    """True for a token: (B, S), the last positions of the first sample and one inside the last are padding."""
    keep = torch.ones(batch, length, dtype=torch.bool)
    keep[0, -3:] = False
    keep[-1, 2] = False
    return keep


def documents(batch: int, length: int) -> Tensor:
    """The document each position belongs to, (B, S): 0 0 0 0 0 1 1 1 1 1 2 ..., shifted by one in the second sample."""
    return (torch.arange(length)[None] + torch.arange(batch)[:, None]) // 5


def slopes(*_: int) -> Tensor:
    return torch.logspace(0, -3, HEADS, base=2.0)


def family(name: str, keep: str, inputs: Callable[[int, int], Inputs], kv: int = HEADS, **parts: Any) -> Any:
    """Register a family; `parts` are those of the record that are not the default, the decorated is its reference."""
    heads = f"{HEADS}" if kv == HEADS else f"{HEADS}/{kv}"
    scale, extra, dim = parts.get("scale", SCALE), parts.get("extra", ""), parts.get("dim", f"{DIM}")
    canonical = f"heads={parts.get('heads', heads)} dim={dim} scale={scale:.6g}{extra} keep {keep}"

    def add(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FAMILIES[name] = Family(canonical, inputs, reference)
        return reference

    return add


CAUSAL = "j <= i"
family("plain", "all", tensors())(attend)
family("grouped", "all", tensors(kv_heads=KV_HEADS), KV_HEADS)(attend)
family("wide", "all", tensors(dim_v=DIM_V), dim=f"{DIM}/{DIM_V}")(attend)
family("cross", "all", tensors(keys=7))(attend)
family("unscaled", "all", tensors(), scale=1.0)(lambda q, k, v: attend(q, k, v, scale=1.0))
family("causal", CAUSAL, tensors())(lambda q, k, v: attend(q, k, v, keep=lower(q, k)))
family("causal grouped", CAUSAL, tensors(kv_heads=KV_HEADS), KV_HEADS)(
    lambda q, k, v: attend(q, k, v, keep=lower(q, k))
)
family("causal one key head", CAUSAL, tensors(kv_heads=1), 1)(lambda q, k, v: attend(q, k, v, keep=lower(q, k)))
family("padded", r"L0\[b, j\]", also(padding))(lambda q, k, v, pad: attend(q, k, v, keep=pad[:, None, None]))
family("causal padded", rf"{CAUSAL} and L0\[b, j\]", also(padding))(
    lambda q, k, v, pad: attend(q, k, v, keep=pad[:, None, None] & lower(q, k))
)
WINDOW = 4
family("sliding", f"{CAUSAL} and i - j < {WINDOW}", tensors())(
    lambda q, k, v: attend(q, k, v, keep=lower(q, k) & (rows(q) - columns(k) < WINDOW))
)
family("band", rf"\|i - j\| < {WINDOW}", tensors())(
    lambda q, k, v: attend(q, k, v, keep=(rows(q) - columns(k)).abs() < WINDOW)
)
family("chunked", rf"{CAUSAL} and i // {WINDOW} == j // {WINDOW}", tensors())(
    lambda q, k, v: attend(q, k, v, keep=lower(q, k) & (rows(q) // WINDOW == columns(k) // WINDOW))
)
PREFIX = 5
family("prefix", ".+", tensors())(lambda q, k, v: attend(q, k, v, keep=lower(q, k) | (columns(k) < PREFIX)))
family("packed", rf"{CAUSAL} and (L\d\[b, [ij]\] == L\d\[b, [ij]\])", also(documents))(
    lambda q, k, v, doc: attend(q, k, v, keep=(lower(q, k) & (doc[:, :, None] == doc[:, None]))[:, None])
)
CACHED = 8
family("decoding", r"j <= i \+ .+", lambda b, n: qkv(b, HEADS, length=n - CACHED, keys=n, dim=DIM))(
    lambda q, k, v: attend(q, k, v, keep=columns(k) <= rows(q) + k.shape[2] - q.shape[2])
)
CAP = 5.0
family("capped", CAUSAL, tensors(), extra=" softcap=5")(lambda q, k, v: attend(q, k, v, cap=CAP, keep=lower(q, k)))
family("alibi", CAUSAL, also(slopes), extra=" bias=.+")(
    lambda q, k, v, m: attend(q, k, v, bias=m[:, None, None] * (columns(k) - rows(q)), keep=lower(q, k))
)
REACH = 20
family("relative", "all", also(lambda *_: normal(2 * REACH + 1, HEADS)), extra=" bias=.+")(
    lambda q, k, v, table: attend(q, k, v, bias=table[columns(k) - rows(q) + REACH].permute(2, 0, 1))
)
family("biased", "all", also(lambda b, n: normal(b, HEADS, n, n)), extra=r" bias=L0\[b, h, i, j\]")(
    lambda q, k, v, bias: attend(q, k, v, bias=bias)
)
family("sink", CAUSAL, also(lambda *_: normal(HEADS)), extra=r" sink=\w+\[h\]")(
    lambda q, k, v, sink: attend(q, k, v, keep=lower(q, k), column=sink[None, :, None, None])
)
family("off by one", "all", tensors(), extra=" sink=0")(
    lambda q, k, v: attend(q, k, v, column=torch.zeros(1, 1, 1, 1, dtype=q.dtype))
)


family("zero key", "all", tensors(), extra="( sink=0)?")(FAMILIES["off by one"].reference)
