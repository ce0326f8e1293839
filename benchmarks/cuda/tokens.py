"""A step of decoding whose heads select the tokens that they read, one layer, one sequence, bfloat16: selecting,
reusing a selection, reading that of another layer, against the same cache read whole and the best SDPA.

Each is one call of `attnopt::attend_tokens`, as generation makes it, and one CUDA graph. LAYERS is what a model of 32
layers would then take, laid out as in TidalDecode (Yang et al., arXiv:2410.05076).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from attnopt import ops  # noqa: F401  registers the operators
from attnopt.codegen.reference_tokens import TokenRule, channels_of
from benchmarks import timing
from benchmarks.cuda.baselines import Call, sdpa
from benchmarks.cuda.check import Check, random
from benchmarks.cuda.decode import graph_of, right
from benchmarks.cuda.device import Budget, Device
from benchmarks.cuda.prefill import BEST
from benchmarks.record import Aim, Row, relative_error
from benchmarks.spans import Sizes, dense
from benchmarks.token_decode import COUNT, FEATURES, RECENT, SINK, TOLERANCE, Side, expected

# Layers that read everything, that select, and that read what those selected.
LAYERS = {"dense": 2, "selected": 2, "behind": 28}
AS_TIDAL = "attention of 32 layers, best SDPA / ours"
# The speed-up of decoding that its authors give.
WANTED = 2.1


def rule_of(sizes: Sizes, **more: int) -> TokenRule:
    count, recent = max(2, COUNT // sizes.shrink), max(1, RECENT // sizes.shrink)
    return TokenRule(count, SINK, recent, **more)


def tokens_of(sizes: Sizes, dim: int, dtype: str, length: int, device: Device) -> list[Tensor]:
    """q (1, H, N, D), k and v (1, G, N, D)."""
    return [random(device, dtype, 1, h, length, dim) for h in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]


def sides_of(sizes: Sizes, tokens: list[Tensor]) -> dict[str, Side]:
    often, narrow = rule_of(sizes), rule_of(sizes, channels=min(FEATURES, tokens[0].shape[3] // 2))
    sides = {"selected": Side(tokens, often), "reused": Side(tokens, rule_of(sizes, every=1 << 16))}
    sides |= {"channels": Side(tokens, narrow), "dense": Side(tokens, None)}
    return sides | {"behind": Side(tokens, often, sides["selected"].picked)}


def wanted_of(sizes: Sizes, tokens: list[Tensor]) -> dict[str, Tensor]:
    """What each side gives, in float64."""
    q, k, length, scale = *tokens[:2], tokens[0].shape[2], tokens[0].shape[3] ** -0.5
    features = channels_of(q[:, :, :-1], k[:, :, :-1], min(FEATURES, q.shape[3] // 2))
    selected = expected(tokens, scale, rule_of(sizes))
    narrow = expected(tokens, scale, rule_of(sizes), features)
    whole = expected(tokens, scale, TokenRule(length, 0, length))
    return {"selected": selected, "reused": selected, "behind": selected, "channels": narrow, "dense": whole}


def token_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Every kind of step, twice: where a selection is made, and the next one, which may reuse it."""
    for dtype in ("bfloat16", "float16", "float32"):
        for dim in sizes.dims if dtype == "bfloat16" else sizes.dims[:1]:
            for length in sizes.checked[:2]:
                tokens = tokens_of(sizes, dim, dtype, length, device)
                yield Check(
                    "tokens", f"D = {dim}, {dtype}, {length} tokens",
                    lambda t=tokens: tuple(side.step() for _ in range(2) for side in sides_of(sizes, t).values()),
                    lambda t=tokens: tuple(wanted_of(sizes, t)[name] for _ in range(2) for name in sides_of(sizes, t)),
                    TOLERANCE["float32" if dtype == "float32" else "bfloat16"],
                )  # fmt: skip


@torch.no_grad()
def measure(device: Device, sizes: Sizes, dim: int, length: int, seconds: float, notes: list[str]) -> Row:
    torch.manual_seed(0)
    tokens = tokens_of(sizes, dim, "bfloat16", length, device)
    sides, wanted = sides_of(sizes, tokens), wanted_of(sizes, tokens)
    error = max(relative_error(side.step(), wanted[name]) for name, side in sides.items())
    calls: dict[str, Call] = {name: graph_of(name, side.step, device, notes) for name, side in sides.items()}
    q, few = tokens[0][:, :, -1:].contiguous(), torch.zeros(1, dtype=torch.int64, device=device.where)
    theirs = right(sdpa(q, *tokens[1:], dim**-0.5, dense(sizes), notes), wanted["dense"], few, notes)
    calls |= {b.name: graph_of(b.name, b.call, device, notes) for b in theirs}
    times = device.times(calls, seconds)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    pairs = {name: timing.ratio(times["dense"], times[name]) for name in sides if name != "dense"}
    if theirs:
        best = min((b.name for b in theirs), key=median.__getitem__)
        pairs[BEST] = timing.ratio(times[best], times["behind"])
        ours = [sum(n * times[name][at] for name, n in LAYERS.items()) for at in range(len(times[best]))]
        pairs[AS_TIDAL] = timing.ratio([sum(LAYERS.values()) * t for t in times[best]], ours)
    ratios, lower = ({name: found[n] for name, found in pairs.items()} for n in (0, 1))
    named = {"kernel": "tokens", "dim": dim, "context": length, "selected": rule_of(sizes).count}
    return Row(named, error, TOLERANCE["bfloat16"], ratios, lower, {n: 1e3 * x for n, x in median.items()})


def section(device: Device, sizes: Sizes, copy: float, budget: Budget) -> list[Row]:
    """Rows of every context and head dimension that there is time for."""
    order = [(length, dim) for length, _ in sizes.contexts for dim in sizes.dims]
    rows: list[Row] = []

    def one(at: int, length: int, dim: int) -> None:
        rows.append(measure(device, sizes, dim, length, 0.5 * budget.left / (len(order) - at), budget.notes))
        print(f"  {rows[-1]}", flush=True)

    for at, (length, dim) in enumerate(order):
        budget.attempt(f"{length} tokens, D = {dim}", partial(one, at, length, dim))
    return rows


def aims(rows: list[Row], least: int = 32768) -> list[Aim]:
    """What was set for selected tokens, judged by the worst case; unmeasured where there is none."""
    of = [r for r in rows if not r.wrong and r.case["context"] >= least]
    found = [r.lower[AS_TIDAL] for r in of if AS_TIDAL in r.lower]
    what = f"tokens, {COUNT} of {least} keys and more, 28 of 32 layers reuse: times as fast as the best SDPA"
    return [Aim(what, WANTED, min(found, default=None))]
