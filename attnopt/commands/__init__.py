"""What each command does: load, call one stage, print. No stage is reimplemented here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attnopt import backend, hf, text
from attnopt.codegen import native
from attnopt.commands.common import Progress, emit, load, say, stages, token_ids, writable
from attnopt.commands.distilling import distill
from attnopt.commands.explaining import explain
from attnopt.commands.planning import calibrate, plan
from attnopt.commands.profiling import merge, profile
from attnopt.errors import OptionError, PlanError
from attnopt.ir import GraphReport
from attnopt.plan import Plan
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.data import environment, graphs_json, plan_facts, plan_json, profile_json
from attnopt.report.page import write_page
from attnopt.report.profile_map import draw_profile

__all__ = ["COMMANDS", "Progress", "bench_rows", "emit", "examine_model", "run", "say", "stages", "writable"]

INTERRUPTED = {
    "profile": "What was profiled so far is kept beside the output; run the same command again to go on.",
    "distill": "What was fitted and tried so far is kept beside the output; run the same command again to go on.",
    "calibrate": "The lengths that were timed are kept; run the same command again to go on.",
}


def run(args: argparse.Namespace) -> None:
    COMMANDS[args.command](args)


def unrun(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """A call that answers with zeros where a traced graph has numbers, or the graph itself where its results may steer
    what comes after it (integers, booleans, sizes known only at run time): a long input then costs no memory."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    results = [n.meta.get("example_value") for n in output.args[0]]
    for held in results:
        static = isinstance(held, torch.Tensor) and all(isinstance(size, int) for size in held.shape)
        if not static or not held.dtype.is_floating_point:
            return gm.forward

    def zeros(held: torch.Tensor) -> torch.Tensor:
        # Small ones are real: code between two graphs may write to them.
        small = held.numel() <= 2**20
        return torch.zeros(held.shape if small else (), dtype=held.dtype, device=held.device).expand(held.shape)

    return lambda *_: tuple(map(zeros, results))


@torch.no_grad()
def examine_model(loaded: hf.Loaded, length: int, padded: bool = False) -> list[GraphReport]:
    """The reports of one traced forward; nothing is compiled by inductor, and nothing is run that need not be."""
    found: list[GraphReport] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        report = backend.rewrite(gm, inputs, backend.Options()).report
        found.append(report)
        return unrun(gm)

    ids = token_ids(loaded, length).to(next(loaded.model.parameters()).device)
    kwargs: dict[str, Any] = {"use_cache": False} if hasattr(getattr(loaded.model, "config", None), "use_cache") else {}
    if padded:
        kwargs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(length // 4, device=ids.device), 0)
    torch.compile(loaded.model, backend=look, dynamic=False)(ids, **kwargs)
    return found


def examine(args: argparse.Namespace) -> None:
    if args.length < 2:
        raise OptionError("--length must be at least 2.", "Attention over one token has nothing to save.")
    page = writable(args.html) if args.html else None
    loaded = load(args)
    with stages() as progress:
        progress("tracing", 0, 1)
        reports = examine_model(loaded, args.length, args.padded)
        progress("tracing", 1, 1)
    data = graphs_json(reports)
    if page is not None:
        write_page(page, {"title": f"attnopt examine {args.model}", "graphs": data, "environment": environment()})
    emit(args, data, lambda: terminal.print_graphs(reports))


def is_plan(path: str) -> bool:
    """Whether a file is meant to be a plan: it is text that starts with a brace."""
    if not Path(path).exists():
        raise PlanError(f"There is no file {path}.", "Give a plan (JSON) or a profile (safetensors).")
    with open(path, "rb") as f:
        return f.read(64).lstrip()[:1] == b"{"


def shown_file(args: argparse.Namespace) -> str:
    """The file of `show FILE`, `show profile FILE` or `show plan FILE`, which is then of that kind."""
    *kind, file = args.file
    if kind and kind not in (["profile"], ["plan"]):
        raise OptionError(f"One file is shown at a time, not {' and '.join(args.file)}.", "Give the file alone.")
    if kind and is_plan(file) != (kind == ["plan"]):
        raise OptionError(f"{file} is not a {kind[0]}.", f"Try `attnopt show {file}`.")
    return str(file)


def show(args: argparse.Namespace) -> None:
    file = shown_file(args)
    page = writable(args.html) if args.html else None
    pictures = [writable(name) for name in (args.svg, args.png) if name]
    for picture, name in zip(pictures, [n for n in ("svg", "png") if getattr(args, n)], strict=True):
        if picture.suffix != f".{name}":
            raise OptionError(f"--{name} {picture} does not end in .{name}.", f"Call it {picture.stem}.{name}.")
    if is_plan(file):
        if pictures:
            raise OptionError("Pictures are drawn of profiles.", "Give a profile, or --html for a page of the plan.")
        held = Plan.load(file)
        data: dict[str, Any] = {"plan": plan_json(held)}
        summary, draw = plan_facts(data["plan"]), lambda: terminal.print_plan(held)
    else:
        seen = Profile.load(file)
        data = {"profile": profile_json(seen)}
        for picture in pictures:
            draw_profile(data["profile"], picture)
        summary, draw = [], lambda: terminal.print_profile(seen)
    if page is not None:
        write_page(page, {"title": f"attnopt show {file}", "summary": summary, **data})
    emit(args, data, draw)


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


def check_plan(held: Plan, loaded: hf.Loaded) -> None:
    """PlanError where the plan is of another model; the backend sees no weights and could not tell."""
    from attnopt.fingerprint import fingerprint_of
    from attnopt.profiler import discover

    ids = token_ids(loaded, 64).to(next(loaded.model.parameters()).device)
    sites = list(discover(loaded.model, ids).sites.values())
    held.check(sites, fingerprint_of(loaded.model, sites))


def bench(args: argparse.Namespace) -> None:
    held = Plan.load(args.plan) if args.plan else None
    loaded = load(args)
    if held is not None:
        check_plan(held, loaded)
    tokens = text.stream(args.text, loaded.tokenizer, "final") if loaded.tokenizer is not None else None
    rows: list[dict[str, Any]] = []
    with stages() as progress:
        for n in args.lengths:
            ids = token_ids(loaded, n) if tokens is None else text.sequences(tokens, n, 1, "final")
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


def env(args: argparse.Namespace) -> None:
    data = {**environment(), "compiled CPU kernel": native.told()}

    def draw() -> None:
        for key, value in data.items():
            print(f"{key}: {value}" if not isinstance(value, dict) else f"{key}:")
            for name, held in value.items() if isinstance(value, dict) else ():
                print(f"  {name}: {held}")

    emit(args, data, draw)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "examine": examine, "profile": profile, "merge": merge, "distill": distill, "calibrate": calibrate, "plan": plan,
    "show": show, "explain": explain, "bench": bench, "env": env,
}  # fmt: skip
