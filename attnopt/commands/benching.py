"""`attnopt bench`: eager, inductor and attnopt timed in turn, or generation with several caches."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from attnopt import hf, text
from attnopt.commands.common import any_ids, check_forward, checked_sites, emit, load, stages
from attnopt.errors import OptionError
from attnopt.plan import Plan
from attnopt.progress import Progress
from attnopt.report import terminal


def bench_rows(
    loaded: hf.Loaded,
    ids: torch.Tensor,
    held: Plan | None,
    dtype: str,
    rounds: int,
    padded: bool,
    progress: Progress,
    cache: bool = True,
) -> list[dict[str, Any]]:
    """One row per variant at ids' length, from one interleaved run."""
    from attnopt.benchmark import compare, variants

    calls = variants(loaded.model, held, cache)
    mask = None
    if padded:
        mask = padded_mask(ids)
    done, total = 0, len(calls) + rounds

    def step(_: str) -> None:
        nonlocal done
        done += 1
        progress(f"timing at {ids.shape[1]}", done, total)

    progress(f"timing at {ids.shape[1]}", 0, total)
    rows = compare(calls, ids, mask, rounds, dtype=dtype, progress=step)
    base = next(r.milliseconds for r in rows if r.variant == "inductor")
    keys = ("variant", "length", "dtype", "milliseconds", "error")
    return [
        {k: v for k, v in asdict(r).items() if k in keys}
        | {"times_inductor": base / r.milliseconds, "times_exact": r.ratio}
        for r in rows
    ]


def padded_mask(ids: torch.Tensor) -> torch.Tensor:
    """An attention mask int64 (B, N) that hides the first eighth of each sequence."""
    mask = torch.ones_like(ids)
    mask[:, : ids.shape[1] // 8] = 0
    return mask


def bench(args: argparse.Namespace) -> None:
    held = Plan.load(args.plan) if args.plan else None
    loaded = load(args)
    check_forward(loaded)
    if args.generate and not hasattr(loaded.model, "generate"):
        raise OptionError(f"{args.model} has no method generate.", "Give a model of transformers, or leave it away.")
    if held is not None:
        checked_sites(held, loaded)
    tokens = text.stream(args.text, loaded.tokenizer, "final") if loaded.tokenizer is not None else None
    rows: list[dict[str, Any]] = []
    with stages(args.progress) as progress:
        for n in args.lengths:
            ids = any_ids(loaded, n) if tokens is None else text.sequences(tokens, n, 1, "final")
            ids = ids.to(next(loaded.model.parameters()).device)
            if args.generate:
                rows += generate_rows(loaded, ids, held, args, progress)
            else:
                rows += bench_rows(loaded, ids, held, args.dtype, args.rounds, args.padded, progress)
    title = "Generation, each token" if args.generate else "Benchmark"
    emit(args, {"bench": rows}, lambda: terminal.print_bench(rows, title))


def generate_rows(
    loaded: hf.Loaded, ids: torch.Tensor, held: Plan | None, args: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    """One row per cache after a prompt of ids' length, from one interleaved run."""
    from attnopt.hf.benchmark import DYNAMIC, STATIC, compare_decoding

    ids = ids.expand(args.batch, -1).contiguous()
    mask = padded_mask(ids) if args.padded else None
    done, total = 0, (3 + (held is not None)) * (args.rounds + 2)
    what = f"generating after {ids.shape[1]}"

    def step(_: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    rows = compare_decoding(loaded.model, ids, mask, held, args.generate, args.rounds, args.dtype, step)
    base = {r.variant: r.milliseconds for r in rows}
    return [
        asdict(r) | {"times_dynamic": base[DYNAMIC] / r.milliseconds, "times_static": base[STATIC] / r.milliseconds}
        for r in rows
    ]
