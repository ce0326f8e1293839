"""Compare ways to run one model: interleaved in one process, medians and ratios, correctness checked first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.instrument import many_graphs
from attnopt.plan import Plan

Call = Callable[[Tensor, "Tensor | None"], Tensor]
# Relative Frobenius error of the logits against eager in the same dtype that an exact variant may have; a bf16 model
# differs from itself by up to 2e-2 when a kernel rounds in another order (measured on the demo model at 8192 tokens).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Row:
    """One variant at one length: median milliseconds, its ratio to `baseline` (above 1 is faster), error to eager."""

    variant: str
    length: int
    dtype: str
    milliseconds: float
    ratio: float
    error: float
    first_call: float


def variants(model: nn.Module, plan: Plan | None = None, cache: bool = True) -> dict[str, Call]:
    """eager; inductor without and with a cache; attnopt exact; attnopt with `plan`."""

    def call(compiled: Callable[..., Any], use_cache: bool) -> Call:
        def run(ids: Tensor, mask: Tensor | None) -> Tensor:
            kwargs = {} if mask is None else {"attention_mask": mask}
            if hasattr(getattr(model, "config", None), "use_cache"):
                kwargs["use_cache"] = use_cache
            out = compiled(ids, **kwargs)
            return out if isinstance(out, Tensor) else out.logits

        return run

    made = {
        "eager": call(model, False),
        "inductor": call(torch.compile(model, backend="inductor", dynamic=False), False),
        "attnopt exact": call(torch.compile(model, backend="attnopt", dynamic=False), False),
    }
    if cache:
        made["inductor, cache"] = call(torch.compile(model, backend="inductor", dynamic=False), True)
        made["attnopt exact, cache"] = call(torch.compile(model, backend="attnopt", dynamic=False), True)
    if plan is not None:
        made["attnopt planned"] = call(
            torch.compile(model, backend="attnopt", options={"plan": plan}, dynamic=False), False
        )
    return made


@torch.no_grad()
def compare(
    calls: Mapping[str, Call],
    ids: Tensor,
    mask: Tensor | None = None,
    rounds: int = 5,
    baseline: str = "attnopt exact",
    dtype: str = "",
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Time `calls` on token ids (B, N), one call of each per round in turn. `error` counts rows whose mask is set."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, float] = {}
    first: dict[str, float] = {}
    wanted: Tensor | None = None
    with many_graphs():
        for name, call in calls.items():
            started = time.perf_counter()
            found = call(ids, mask).float()
            first[name] = time.perf_counter() - started
            kept = found if mask is None else found[mask.bool()]
            wanted = kept if wanted is None else wanted
            errors[name] = ((kept - wanted).norm() / wanted.norm()).item()
            del found, kept
            if progress is not None:
                progress(name)
        for _ in range(rounds):
            for name, call in calls.items():
                synchronize(ids)
                started = time.perf_counter()
                call(ids, mask)
                synchronize(ids)
                seconds[name].append(time.perf_counter() - started)
            if progress is not None:
                progress("round")
    medians = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    base = medians.get(baseline, next(iter(medians.values())))
    return [Row(name, ids.shape[1], dtype, ms, base / ms, errors[name], first[name]) for name, ms in medians.items()]


def synchronize(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
