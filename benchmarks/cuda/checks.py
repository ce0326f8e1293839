"""Every kernel against float64 on the device, before anything is timed. Memory starts out as NaN meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.reference_backward import backward as backward_reference
from attnopt.codegen.reference_decode import decode as decode_reference
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.reference_prefill import prefill_lse, span_mask
from attnopt.codegen.self_check import TOLERANCE, Results, error
from attnopt.codegen.spec import SpanBackward, SpanDecode, SpanPrefill
from attnopt.registry import TARGETS
from benchmarks.cuda.blocks import block_checks
from benchmarks.cuda.cache import cache_checks
from benchmarks.cuda.check import Check, prefill_inputs, random
from benchmarks.cuda.device import Budget, Device, poisoned
from benchmarks.cuda.linear import linear_checks
from benchmarks.cuda.masked import masked_checks
from benchmarks.cuda.tokens import token_checks
from benchmarks.record import Row
from benchmarks.spans import Sizes

# Sinks and windows that the heads take in turn: dense, inside a block, whole blocks, and beyond what there is.
SINKS, WINDOWS = (0, 5, 64, 100), (2**30, 1, 300, 2000)
DTYPES = ("bfloat16", "float16", "float32")


def forms(sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Dtypes and head dimensions: what is timed comes first, and every dtype at the first dimension."""
    yield from (("bfloat16", dim) for dim in sizes.dims)
    yield from ((dtype, sizes.dims[0]) for dtype in DTYPES[1:])


def span_tables(sizes: Sizes, device: Device) -> tuple[Tensor, Tensor]:
    """sinks, windows int32 (H,)."""
    sinks, windows = (
        torch.tensor([values[h % 4] for h in range(sizes.heads)], dtype=torch.int32, device=device.where)
        for values in (SINKS, WINDOWS)
    )
    return sinks, windows


def lse_of(q: Tensor, k: Tensor, sinks: Tensor, windows: Tensor, scale: float) -> Tensor:
    """Natural logarithm of every row's soft-max sum, (B, H, N)."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return scores.masked_fill(~span_mask(q.shape[2], sinks, windows), float("-inf")).logsumexp(-1)


def prefill_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Lengths that are whole blocks (tensor descriptors, where the kernel has them) and that are not (pointers)."""
    sinks, windows = span_tables(sizes, device)
    for dtype, dim in forms(sizes):
        for padded in (False, True) if dtype == "bfloat16" else (False,):
            for length in sizes.checked:
                q, k, v = prefill_inputs(sizes, dim, length, dtype, device)
                spec = SpanPrefill(device.target, dtype, sizes.heads, sizes.kv_heads, dim, dim, padded)
                dropped = torch.tensor([[length // 3], [0]], device=device.where)
                pad = torch.arange(length, device=device.where) >= dropped if padded else None
                given = sinks, windows, dim**-0.5, pad
                what = f"D = {dim}, {dtype}, {length} tokens" + (", padded" if padded else "")
                yield Check(
                    "prefill", what, lambda spec=spec, x=(q, k, v), g=given: load(spec).prefill(*x, *g),
                    lambda x=(q, k, v), g=given: reference(*(t.double() for t in x), *g), TOLERANCE[dtype],
                )  # fmt: skip
                if not padded and dtype != "float16":
                    yield Check(
                        "prefill", f"{what}, LSE", lambda spec=spec, x=(q, k, v), g=given: lse_found(spec, x, g),
                        lambda q=q, k=k, s=given[2]: lse_of(q.double(), k.double(), sinks, windows, s),
                        # Kept in float32 whatever the dtype is.
                        TOLERANCE["float32"],
                    )  # fmt: skip


def lse_found(spec: SpanPrefill, inputs: tuple[Tensor, ...], given: tuple[object, ...]) -> Tensor:
    return load(spec).prefill_lse(*inputs, *given)[1]


def decode_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Segments of all lengths, empty ones too; the slots that are not filled hold NaN, which must not be read."""
    heads, groups = sizes.heads, sizes.kv_heads
    for dtype, dim in forms(sizes):
        for tokens, positioned in ((1, False), (1, True), (3, True)):
            lengths = [sizes.checked[0] // (g + 1) for g in range(groups)]
            starts = torch.tensor([0, *lengths], device=device.where).cumsum(0).to(torch.int32)
            slots = int(starts[-1])
            segment = starts[1:] - starts[:-1]
            filled = torch.stack([segment, segment // 2, torch.zeros_like(segment)]).to(torch.int32)
            q = random(device, dtype, 3, heads, tokens, dim)
            k, v = (random(device, dtype, 3, slots, dim) for _ in range(2))
            place = torch.arange(slots, device=device.where) - starts[:-1].repeat_interleave(segment)
            empty = place >= filled.repeat_interleave(segment, 1)
            found_k, found_v = (x.masked_fill(empty[:, :, None], float("nan")) for x in (k, v))
            more: tuple[Tensor, ...] = ()
            if positioned:
                at = torch.full((3,), sizes.checked[0] - tokens, dtype=torch.int32, device=device.where)
                more = (*span_tables(sizes, device), place.to(torch.int32), at)
            spec = SpanDecode(device.target, dtype, heads, groups, dim, dim, tokens, positioned)
            held = (starts, filled, dim**-0.5, *more)
            yield Check(
                "decode", f"D = {dim}, {dtype}, {tokens} tokens" + (", positioned" if positioned else ""),
                lambda spec=spec, x=(q, found_k, found_v), h=held: load(spec).decode(*x, *h),
                lambda x=(q, k, v), h=held: decode_reference(*(t.double() for t in x), *h), TOLERANCE[dtype],
            )  # fmt: skip


def backward_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """All three gradients, from the output and logsumexp that float64 gives."""
    sinks, windows = span_tables(sizes, device)
    for dtype, dim in forms(sizes):
        for length in sizes.checked:
            q, k, v = prefill_inputs(sizes, dim, length, dtype, device)
            dout = random(device, dtype, *q.shape)
            wide = [x.double() for x in (dout, q, k, v)]
            given = sinks, windows, dim**-0.5
            out, lse = prefill_lse(*wide[1:], *given)
            spec = SpanBackward(device.target, dtype, sizes.heads, sizes.kv_heads, dim, dim, False)
            held = dout, q, k, v, out.to(q.dtype), lse.float(), *given
            yield Check(
                "backward", f"D = {dim}, {dtype}, {length} tokens",
                lambda spec=spec, held=held: gradients(load(spec).backward(*held)),
                lambda held=(*wide, out, lse, *given): gradients(backward_reference(*held)), TOLERANCE[dtype],
            )  # fmt: skip


def gradients(found: tuple[Tensor, ...]) -> Results:
    """Each by itself; of one token together, since those of q and k are exactly 0 then."""
    return torch.cat([x.flatten() for x in found]) if found[0].shape[2] == 1 else found


# Kernels that are timed come first.
CHECKS: dict[str, Callable[[Sizes, Device], Iterator[Check]]] = {
    "span_prefill": prefill_checks,
    "block_prefill": block_checks,
    "span_decode": decode_checks,
    "span_backward": backward_checks,
    "masked_prefill": masked_checks,
    "linear_prefill": linear_checks,
    "cache_step": cache_checks,
    "token_step": token_checks,
}


def row_of(check: Check) -> Row:
    """A row without ratios; a kernel that raises is wrong."""
    case = {"check": check.kernel, "what": check.what}
    try:
        with poisoned(), torch.no_grad():
            found = check.found()
        away = error(found, check.expected())
    except Exception as failure:
        said = (str(failure).strip().splitlines() or [""])[0][:160]
        return Row({**case, "raised": f"{type(failure).__name__}: {said}"}, float("inf"), check.tolerance, {}, {}, {})
    return Row(case, away, check.tolerance, {}, {}, {})


def section(device: Device, sizes: Sizes, budget: Budget) -> list[Row]:
    """Every check there is time for; wrong ones are printed, and the rest as one line a kernel."""
    rows: list[Row] = []
    for kernel, family in CHECKS.items():
        if f"{device.target_of(kernel)} {kernel}" not in TARGETS:
            budget.notes.append(f"{kernel}: the {device.target_of(kernel)} target has no such kernel yet")
            continue
        torch.manual_seed(0)
        for check in family(sizes, device):
            if not budget.allows(f"{check.kernel}, {check.what}"):
                continue
            rows.append(row_of(check))
            if rows[-1].wrong:
                print(f"  {rows[-1]}", flush=True)
    for kernel in dict.fromkeys(r.case["check"] for r in rows):
        of = [r for r in rows if r.case["check"] == kernel]
        right = sum(not r.wrong for r in of)
        worst = max((r.error / r.tolerance for r in of), default=0.0)
        print(f"  {kernel}: {right} of {len(of)} right, the largest error {worst:.2f} of its tolerance", flush=True)
    return rows
