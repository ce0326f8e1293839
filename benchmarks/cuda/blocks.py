"""Prefill over lists of blocks, one sequence, bfloat16: random lists, and thresholds that skip three blocks of four.

What is timed is the kernel alone, with the lists at hand; what choosing them takes is what a candidate pays.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.reference_blocks import prefill as reference
from attnopt.codegen.self_check import TOLERANCE
from attnopt.codegen.self_check_blocks import BOUND, inputs_of, lists_of
from attnopt.codegen.self_check_prefill import SCALE
from attnopt.codegen.spec import BlockPrefill
from benchmarks import timing
from benchmarks.cuda.baselines import sdpa
from benchmarks.cuda.check import Check
from benchmarks.cuda.device import Budget, Device
from benchmarks.cuda.prefill import BEST, SLOW_FROM, best, right
from benchmarks.cuda.prefill import TOLERANCE as TOLERANCE_BF16
from benchmarks.record import Aim, Row
from benchmarks.spans import ROWS, Sizes, dense, inputs

PER_WORK, UNBOUNDED = "best SDPA / blocks saved", "the same without thresholds"
# Query heads of a check: it visits one block after the other.
CHECKED = 2
# Of LOUD blocks one has scores that are larger by APART, so that a threshold of exp(-APART / 2) skips the others.
LOUD, APART = 4, 16.0
# The speed-up that the authors of BLASST (arXiv:2512.12087) give for thresholds that skip three quarters.
WANTED_SKIPPING = 1.62


class Case(NamedTuple):
    """One block in `sparse` is listed; bounded: by a threshold that skips all but one of LOUD."""

    block: int
    sparse: int
    bounded: bool = False

    @property
    def name(self) -> str:
        listed = "all listed" if self.sparse == 1 else f"1/{self.sparse} listed"
        return f"blocks of {self.block}, {listed}{', thresholds' if self.bounded else ''}"


CASES = (Case(64, 8), Case(128, 8), Case(64, 2), Case(64, 1, bounded=True))


def output(prefill: Callable[..., Tensor], inputs: Sequence[Tensor], *given: object) -> Tensor:
    """Of the heads that a check serves, in the dtype of the inputs."""
    out = torch.empty_like(inputs[0])
    prefill(*inputs, *given, out)
    return out[:, :CHECKED]


def block_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Every size of a block, more keys than queries, padding with holes, a threshold for every other head."""
    target, heads = device.target_of("block_prefill"), torch.arange(CHECKED, dtype=torch.int32, device=device.where)
    length = sizes.checked[-2]
    forms = [(block, "bfloat16", dim) for dim in sizes.dims for block in (64, 128, 16, 32)]
    for block, dtype, dim in [*forms, (64, "float16", sizes.dims[0]), (64, "float32", sizes.dims[0])]:
        for padded in (False, True) if block == 64 and dtype == "bfloat16" else (False,):
            spec = BlockPrefill(target, dtype, sizes.heads, sizes.kv_heads, dim, dim, block, padded)
            keys = length + 3 * block + 5
            inputs = inputs_of(spec, 2, length, keys, device.where)
            lists = lists_of(block, (2, CHECKED), length, keys, device.where)
            bounds = torch.full((CHECKED,), BOUND, device=device.where)
            bounds[1::2] = -torch.inf
            pad = torch.rand(2, keys, device=device.where) > 0.1 if padded else None
            given = heads, *lists, bounds, SCALE, pad, keys // 2 if padded else 0
            what = f"of {block}, D = {dim}, {dtype}, {length} of {keys} tokens{', padded' if padded else ''}"
            yield Check(
                "blocks", what, lambda spec=spec, x=inputs, g=given: output(load(spec).prefill, x, *g),
                lambda x=inputs, g=given, b=block: output(reference, [t.double() for t in x], *g, b), TOLERANCE[dtype],
            )  # fmt: skip


def made_loud(q: Tensor, k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of these, scores times D^-0.5 larger by APART at every LOUD-th block of keys, the first among them."""
    q, k = q.clone(), k.clone()
    level = (APART * q.shape[3] ** 0.5) ** 0.5
    of = torch.arange(k.shape[2], device=k.device) // block % LOUD == 0
    q[..., 0], k[..., 0] = level, level * of.to(k.dtype)
    return q, k


def error_at(found: Tensor, q: Tensor, k: Tensor, v: Tensor, case: Case, counts: Tensor, blocks: Tensor) -> float:
    """Relative Frobenius error of some rows of the first head and the last against float64."""
    if not bool(found.isfinite().all()):
        return float("inf")
    length, share = q.shape[2], q.shape[1] // k.shape[1]
    rows = torch.linspace(0, length - 1, min(ROWS, length), device=q.device).long()
    j = torch.arange(length, device=q.device)
    away = norm = 0.0
    for head in (0, q.shape[1] - 1):
        listed = torch.zeros(len(rows), -(-length // case.block) + 1, dtype=torch.bool, device=q.device)
        at = rows // case.block
        held = torch.arange(blocks.shape[3], device=q.device) < counts[0, head, at, None]
        listed.scatter_(1, blocks[0, head, at].long().where(held, listed.shape[1] - 1), True)
        keep = listed[:, j // case.block] & (j <= rows[:, None])
        if case.bounded:
            keep &= j // case.block % LOUD == 0
        scores = q[0, head, rows].double() @ k[0, head // share].double().T * q.shape[3] ** -0.5
        expected = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v[0, head // share].double()
        away += float((found[0, head, rows].double() - expected).square().sum())
        norm += float(expected.square().sum())
    return (away / norm) ** 0.5


@torch.no_grad()
def measure(device: Device, sizes: Sizes, case: Case, length: int, seconds: float, notes: list[str]) -> Row:
    """All heads of a layer, against the best dense kernel and, of thresholds, against going without."""
    dim = sizes.dims[0]
    q, k, v = inputs(sizes, dim, length, device.where)
    if case.bounded:
        q, k = made_loud(q, k, case.block)
    spec = BlockPrefill(
        device.target_of("block_prefill"), "bfloat16", sizes.heads, sizes.kv_heads, dim, dim, case.block, False
    )
    heads = torch.arange(sizes.heads, dtype=torch.int32, device=device.where)
    counts, blocks = lists_of(case.block, (1, sizes.heads), length, length, device.where, case.sparse)
    out = torch.empty_like(q)
    free = torch.full((sizes.heads,), -torch.inf, device=device.where)
    bounds = torch.full_like(free, -APART / 2) if case.bounded else free
    run = partial(load(spec).prefill, q, k, v, heads, counts, blocks)
    own = partial(run, bounds, dim**-0.5, None, 0, out)
    skipped = own()
    error = error_at(out, q, k, v, case, counts, blocks)
    slow = ("efficient",) if length >= SLOW_FROM else ()
    held = sdpa(q, k, v, dim**-0.5, dense(sizes), notes, slow)
    calls = {"attnopt": own, **{b.name: b.call for b in right(held, q, k, v, dim**-0.5, notes)}}
    if case.bounded:
        calls[UNBOUNDED] = partial(run, free, dim**-0.5, None, 0, torch.empty_like(q))
    times = device.times(calls, seconds)
    ratios, lower = {}, {}
    against = {BEST: best(times, "SDPA"), UNBOUNDED: UNBOUNDED if case.bounded else None}
    for label, name in against.items():
        if name is not None:
            ratios[label], lower[label] = timing.ratio(times[name], times["attnopt"])
    side = -(-length // case.block)
    visited = int(counts.sum()) - int(skipped.sum())
    if BEST in ratios:
        saved = sizes.heads * side * (side + 1) / 2 / visited
        ratios[PER_WORK], lower[PER_WORK] = ratios[BEST] / saved, lower[BEST] / saved
    named = {"kernel": "blocks", "lists": case.name, "dim": dim, "length": length, "skipped": int(skipped.sum())}
    return Row(named, error, TOLERANCE_BF16, ratios, lower, {n: 1e3 * statistics.median(t) for n, t in times.items()})


def section(device: Device, sizes: Sizes, matmul: float, budget: Budget) -> list[Row]:
    """Rows of every case and length there is time for, the most telling first."""
    rows: list[Row] = []
    order = [(case, length) for length in sizes.lengths for case in CASES]

    def one(at: int, case: Case, length: int) -> None:
        rows.append(measure(device, sizes, case, length, 0.5 * budget.left / (len(order) - at), budget.notes))
        print(f"  {rows[-1]}", flush=True)

    for at, (case, length) in enumerate(order):
        budget.attempt(f"{case.name}, {length} tokens", partial(one, at, case, length))
    return rows


def aims(rows: list[Row], least: int = 16384) -> list[Aim]:
    """What was set for lists of blocks, judged by the worst case; unmeasured where there is none."""
    of = [r for r in rows if not r.wrong and r.case["length"] >= least]

    def worst(name: str, thresholds: bool) -> float | None:
        among = [r for r in of if r.case["lists"].endswith("thresholds") is thresholds]
        return min((r.ratios[name] for r in among if name in r.ratios), default=None)

    at = f"from {least} tokens"
    return [
        Aim(
            f"lists of blocks, {at}: times as fast as the best SDPA over the blocks saved", 0.70, worst(PER_WORK, False)
        ),
        Aim(f"thresholds that skip 3/4, {at}: times as fast as the best SDPA", WANTED_SKIPPING, worst(BEST, True)),
        Aim(f"thresholds that skip 3/4, {at}: times as fast as without", 1.5, worst(UNBOUNDED, True)),
    ]
