"""How an emitted step of heads that select tokens checks and times itself: ``check(spec, step)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.reference_token_step import relabel
from attnopt.codegen.reference_token_step import step as reference
from attnopt.codegen.self_check import TOLERANCE, Check, Race
from attnopt.codegen.spec import TokenStep

SCALE = 0.2
# Tokens of the cache, and batch entries, that are timed, by type of device.
TIMED = {"cuda": (32768, 16), "cpu": (16384, 1)}
# What the query heads take in turn: keys that are selected, sink, recent keys, steps, features, source.
RULES = ((6, 2, 4, 1, 0, -1), (5, 0, 1, 3, 0, -1), (7, 1, 2, 1, 4, -1), (6, 2, 4, 1, 0, 0))
FEATURES = 4


def check(spec: TokenStep, step: Callable[..., None]) -> NoReturn:
    """Compare the function of an emitted file with the reference, time it against SDPA on all keys, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, step, device), _races(spec, step, device))


def state(
    spec: TokenStep, length: int, batch: int, dtype: torch.dtype, rows: Sequence[tuple[int, ...]], device: torch.device
) -> dict[str, Tensor]:
    """The tensors of a step, with no token yet and nothing selected."""
    capacity = -(-length // 16) * 16
    own, features = dict(device=device), max(row[4] for row in rows)
    table = [(group * capacity, capacity, 0, 1 << 30) for group in range(spec.kv_heads)]
    slots = spec.kv_heads * capacity
    return {
        "keys": torch.full((batch, slots, spec.head_dim), torch.nan, dtype=dtype, **own),
        "values": torch.full((batch, slots, spec.head_dim_v), torch.nan, dtype=dtype, **own),
        "n": torch.zeros(batch, dtype=torch.int32, **own),
        "table": torch.tensor(table, dtype=torch.int32, **own),
        "rules": torch.tensor(rows, dtype=torch.int32, **own),
        "similar": torch.tensor([0.5 * (row[3] > 1) for row in rows], **own),
        "picked": torch.full((batch, spec.heads, max(row[0] for row in rows)), -1, dtype=torch.int32, **own),
        "asked": torch.zeros(batch, spec.heads, spec.head_dim, dtype=dtype, **own),
        "age": torch.full((batch, spec.heads), -1, dtype=torch.int32, **own),
        "chosen": torch.arange(features, **own).repeat(batch, spec.kv_heads, 1),
        "labels": torch.zeros(batch, features, slots, dtype=dtype, **own),
    }


def put(held: dict[str, Tensor], k: Tensor, v: Tensor) -> None:
    """Write the keys k (B, G, T, D) and values of T new tokens, and count them."""
    rows, tokens = held["table"].tolist(), k.shape[2]
    for entry, seen in enumerate(held["n"].tolist()):
        for group, (start, *_) in enumerate(rows):
            here = slice(start + seen, start + seen + tokens)
            held["keys"][entry, here], held["values"][entry, here] = k[entry, group], v[entry, group]
    held["n"] += tokens


def call(step: Callable[..., None], held: dict[str, Tensor], q: Tensor, sources: list[Tensor], out: Tensor) -> None:
    names = ("rules", "similar", "picked", "asked", "age")
    given = (held["keys"], held["values"], held["n"], None, held["table"], *(held[name] for name in names))
    step(q, *given, sources, held["chosen"], held["labels"], SCALE, out)


def _checks(spec: TokenStep, step: Callable[..., None], device: torch.device) -> Iterator[Check]:
    batch, prompt, length = 2, 43, 48
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    rows = [RULES[h % len(RULES)] for h in range(spec.heads)]

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, length, dim, device=device).to(dtype)

    q, k, v = normal(spec.heads, spec.head_dim), normal(spec.kv_heads, spec.head_dim), None
    v = normal(spec.kv_heads, spec.head_dim_v)
    source = torch.stack([torch.randperm(prompt, device=device)[:7] for _ in range(batch * spec.heads)])
    source = source.sort(-1).values.view(batch, spec.heads, 7).int()

    def run(kernel: Callable[..., None], wide: bool, more: int = 0) -> tuple[Tensor, ...]:
        kind = torch.float64 if wide else dtype
        own = [(row[0], row[1], row[2] + more, *row[3:]) for row in rows]
        held, found = state(spec, length, batch, kind, own, device), []
        put(held, k[:, :, :prompt].to(kind), v[:, :, :prompt].to(kind))
        relabel(q[:, :, :prompt], None, held["keys"], held["n"], held["table"], held["chosen"], held["labels"])
        for at in range(prompt, length):
            put(held, k[:, :, at : at + 1].to(kind), v[:, :, at : at + 1].to(kind))
            out = torch.full((batch, spec.heads, 1, spec.head_dim_v), torch.nan, dtype=kind, device=device)
            call(kernel, held, q[:, :, at : at + 1].to(kind), [source], out)
            found.append(out)
        return torch.cat(found, 2), held["picked"].double(), held["age"].double()

    expected = partial(run, reference, True)
    tolerance = TOLERANCE[spec.dtype]
    yield Check(
        "out and what is selected", partial(run, step, False), expected, tolerance, partial(run, reference, True, 1)
    )


def _races(spec: TokenStep, step: Callable[..., None], device: torch.device) -> Iterator[Race]:
    """256 keys beside 4 sinks and 64 recent ones, of all there are: selected in this step, and in an earlier one."""
    if spec.target == "reference":
        return
    length, batch = TIMED[device.type]
    dtype = getattr(torch, spec.dtype)

    def normal(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, device=device).to(dtype)

    q, k = normal(spec.heads, 1, spec.head_dim), normal(spec.kv_heads, length, spec.head_dim)
    v = normal(spec.kv_heads, length, spec.head_dim_v)
    calls: dict[str, Callable[[], object]] = {}
    for name, every in (("reused", 1 << 30), ("selected", 1)):
        held = state(spec, length, batch, dtype, [(256, 4, 64, every, 0, -1)] * spec.heads, device)
        held["similar"].zero_()
        put(held, k, v)
        out = torch.empty_like(q[..., :1]).expand(-1, -1, -1, spec.head_dim_v).contiguous()
        calls[name] = partial(call, step, held, q, [], out)
    calls["SDPA, grouped"] = partial(F.scaled_dot_product_attention, q, k, v, scale=SCALE, enable_gqa=True)
    yield Race(f"N = {length}, batch {batch}, 324 keys", calls)
