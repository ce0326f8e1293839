"""`attnopt plan` and `attnopt calibrate`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attnopt import hf, settings, text
from attnopt.codegen.spec import SpanPrefill
from attnopt.commands.common import (
    check_device,
    check_forward,
    emit,
    load,
    note,
    say,
    sites_of,
    stages,
    writable,
    wrote,
)
from attnopt.commands.reporting import Known, plan_report, traced
from attnopt.cost import CostTable, Roofline, break_even, device, load_or_measure, path_of
from attnopt.errors import AttnoptError, BudgetError, OptionError
from attnopt.fitted import Fitted
from attnopt.ir import Site
from attnopt.plan import Budget, Constraints, sidecar
from attnopt.planner.costs import spec_of
from attnopt.planner.make import Made
from attnopt.planner.verify import LEAST_SEQUENCES, Record
from attnopt.profile_file import Profile
from attnopt.progress import Progress
from attnopt.report import terminal
from attnopt.report.data import page_data, plan_json, profile_json, records_json
from attnopt.report.page import write_page

# Verified beyond the profiled lengths: the planned one, or twice the longest where that is farther than this.
FARTHEST = 4


def plan(args: argparse.Namespace) -> None:
    from attnopt.planner.tried import allowed_families

    if args.samples < LEAST_SEQUENCES:
        raise OptionError(
            f"--samples {args.samples} are too few sequences to bound what a plan loses.",
            f"Ask for {LEAST_SEQUENCES} or more.",
        )
    out = writable(args.out)
    page = writable(args.html) if args.html else None
    rooflines = rooflines_of(args)
    if args.fitted is not None and sidecar.beside(out).resolve() in (
        Path(p).resolve() for p in (args.fitted, args.profile)
    ):
        raise OptionError(f"{sidecar.beside(out)} will hold what the plan needs.", "Give another --out.")
    sidecar.refuse_overwriting(out)
    held = Profile.load(args.profile)
    fitted = Fitted.load(args.fitted) if args.fitted is not None else None
    allowed_families(args.allow, fitted)
    loaded = load(args)
    check_forward(loaded)
    tried: list[Record] = []
    try:
        made = searched(args, loaded, held, fitted, rooflines, out, tried)
    except BudgetError as error:
        if page is not None:
            refused = [("no plan", error.problem), ("remedy", error.remedy)]
            told = {"summary": refused, "records": records_json(tried), "profile": profile_json(held)}
            write_page(page, page_data(f"attnopt plan {args.model}, refused", told))
            raise BudgetError(error.problem, f"{error.remedy} {page} has the search and the profile.".strip()) from None
        raise
    notes = [*made.notes, *([made.verified.undecided] if made.verified.undecided else [])]
    if page is None:
        report: dict[str, Any] = {"plan": plan_json(made.plan, made.sites)}
    else:
        report = plan_report(made.plan, known_of(made, held, fitted, loaded, notes))
        write_page(page, page_data(f"attnopt plan {args.model}", report))
    search = records_json(made.verified.records)
    data = {"plan_file": str(out), "plan": report["plan"], "search": search, "notes": notes}

    def show() -> None:
        terminal.print_records(search)
        terminal.print_plan(report["plan"])
        for line in notes:
            say(line)
        wrote(out, page)

    emit(args, data, show)


def searched(
    args: argparse.Namespace, loaded: hf.Loaded, held: Profile, fitted: Fitted | None, tables: Any, out: Path,
    tried: list[Record],
) -> Made:  # fmt: skip
    """The plan, written to `out`; each point is added to `tried` as it is measured. What was measured lies beside it
    until then, and stays where no plan keeps the budget."""
    from attnopt.planner.make import make_plan
    from attnopt.probe import Probe

    target = next(loaded.model.parameters()).device
    lengths = args.verify_lengths or verified_lengths(held.lengths, args.length, loaded.model)

    def split(which: str) -> dict[int, torch.Tensor]:
        tokens = text.stream(args.text, loaded.tokenizer, which, 2 * args.samples * max(lengths))
        return {n: text.sequences(tokens, n, args.samples, which).to(target) for n in lengths}

    partial = out.with_name(out.name + ".partial")
    begun = partial.exists()
    budget = Budget("loss", args.max_loss_increase) if args.max_kl is None else Budget("kl", args.max_kl)
    probe = Probe(loaded.tokenizer, split="final") if args.probe and loaded.tokenizer is not None else None
    with stages(args.progress) as progress:
        progress("reading text", 0, 0)
        try:
            made = make_plan(
                loaded.model, args.model, held, split("verify"), split("final"), budget, args.length, tables=tables,
                objective=args.objective, constraints=constraints_of(args), fitted=fitted, allow=args.allow,
                exact=args.exact, probe=probe, probe_documents=args.probe, seed=args.seed, progress=progress,
                report=tried.append, partial=partial, tell=note,
            )  # fmt: skip
        except BudgetError as error:
            kept = f"What was measured is kept in {partial}, for another budget."
            raise BudgetError(error.problem, f"{error.remedy} {kept}".strip()) from None
        except AttnoptError:
            # What an earlier run left is for a later one.
            if not begun:
                partial.unlink(missing_ok=True)
            raise
    made.plan.save(out)
    partial.unlink(missing_ok=True)
    return made


def known_of(made: Made, profile: Profile, fitted: Fitted | None, loaded: hf.Loaded, notes: Sequence[str]) -> Known:
    """What a plan's page can say where it was just made."""
    graphs, untraced = traced(loaded, made.plan)
    device, said = next(loaded.model.parameters()).device.type, [*notes, *untraced]
    return Known(profile, fitted, made.sites, made.tables, made.verified.records, graphs, said, device)


def constraints_of(args: argparse.Namespace) -> Constraints:
    kind, amount = args.max_kv_memory or ("", 0.0)
    return Constraints(
        min_speedup=args.min_speedup,
        max_kv_memory=amount if kind == "share" else None,
        max_kv_bytes=int(amount) if kind == "bytes" else None,
        max_rules=args.max_rules,
        protect=tuple(args.protect),
        protect_top=args.protect_top,
        dense_below=args.dense_below,
        retrieval=args.retrieval,
    )


def verified_lengths(profiled: Sequence[int], planned: int, model: torch.nn.Module) -> list[int]:
    """The profiled lengths and one beyond them, as far as the model's positions reach."""
    longest = max(profiled)
    beyond = planned if longest < planned <= FARTHEST * longest else 2 * longest
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or beyond
    return sorted({*profiled, min(beyond, most)})


def rooflines_of(args: argparse.Namespace) -> Any:
    """From sites to their tables, of the device asked for; None where costs are to be measured here."""
    if args.device_preset is None:
        if args.tensor_parallel != 1 or args.devices is not None:
            raise OptionError(
                "--tensor-parallel and --devices are about a device that is not at hand.",
                "Name it with --device-preset, for example h100.",
            )
        return None
    chosen = device(args.device_preset, args.devices)

    def tables(sites: Sequence[Site]) -> dict[str, Roofline]:
        return {
            s.name: Roofline(chosen, s.dtype, s.heads, s.kv_heads, s.head_dim, s.head_dim_v, args.tensor_parallel)
            for s in sites
        }

    return tables


def calibrate(args: argparse.Namespace) -> None:
    from attnopt.planner.costs import windows_at
    from attnopt.profiler import DEFAULT_GRID

    check_device(args.device)
    specs = specs_of(args)
    windows = windows_at(DEFAULT_GRID.windows, args.lengths)
    sinks, rows = [max(DEFAULT_GRID.sinks)], []
    with stages(args.progress) as progress:
        for n, spec in enumerate(specs):
            started = time.perf_counter()
            what = f"timing {spec.heads} heads, {spec.dtype}, kernel {n + 1} of {len(specs)}"
            table = load_or_measure(
                spec, args.lengths, windows, sinks, device=args.device, rounds=args.rounds,
                progress=named(progress, what),
            )  # fmt: skip
            rows.append(calibrated(spec, table, time.perf_counter() - started))

    def show() -> None:
        for row in rows:
            print(
                f"{row['heads']} heads, {row['kv_heads']} KV heads of {row['head_dim']}, {row['dtype']}, "
                f"{row['target']}: {row['entries']} times in {row['seconds']:.0f} s"
            )
            for at in row["lengths"]:
                print(
                    f"  {at['length']:>7} tokens: dense {at['dense_ms']:.4g} ms a head, the cheapest window "
                    f"{at['least_ms']:.4g} ms; {at['group_ms']:.3g} ms for each further span of a layer"
                )
            below = row["break_even"]
            longest = row["lengths"][-1]["length"]
            said = f"saves from {below} tokens on" if below <= longest else f"saves nothing up to {longest} tokens"
            print(f"  a window {said}\n  {row['path']}")

    emit(args, {"tables": rows}, show)


def named(progress: Progress, what: str) -> Callable[[int, int, str], None]:
    return lambda done, of, at: progress(f"{what}: {at}", done, of)


def calibrated(spec: SpanPrefill, table: CostTable, seconds: float) -> dict[str, Any]:
    """What was measured, as JSON."""
    lengths = [
        {
            "length": n,
            "dense_ms": table.cost(n, 0, n),
            "least_ms": min(ms for (at, _, _), ms in table.entries if at == n),
            "group_ms": table.group_cost(n),
        }
        for n in table.lengths
    ]
    return {
        "path": str(path_of(table.key)), "id": table.id, "target": spec.target, "dtype": spec.dtype,
        "heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim, "key": dict(table.key),
        "entries": len(table.entries), "lengths": lengths, "break_even": break_even(table), "seconds": seconds,
    }  # fmt: skip


def specs_of(args: argparse.Namespace) -> list[SpanPrefill]:
    """The kernels to time: those of a model's sites, or of the sizes given; once for every dtype."""
    dtypes = [str(hf.dtype_of(name)).removeprefix("torch.") for name in args.dtype.split(",")]
    target = settings.target(args.device.split(":")[0])
    if args.model is None:
        if args.heads is None or args.head_dim is None:
            raise OptionError("There is nothing to time.", "Give --model, or --heads and --head-dim.")
        kv_heads = args.kv_heads or args.heads
        if args.heads % kv_heads:
            raise OptionError(f"{args.heads} heads do not share {kv_heads} KV heads evenly.", "Use a divisor.")
        wide = args.head_dim_v or args.head_dim
        return [SpanPrefill(target, d, args.heads, kv_heads, args.head_dim, wide, False) for d in dtypes]
    if any(size is not None for size in (args.heads, args.kv_heads, args.head_dim, args.head_dim_v)):
        raise OptionError("--model has sizes of its own.", "Give either --model, or --heads and --head-dim.")
    return list(dict.fromkeys(spec for d in dtypes for spec in model_specs(args, d, target)))


def model_specs(args: argparse.Namespace, dtype: str, target: str) -> list[SpanPrefill]:
    loaded = load(argparse.Namespace(**{**vars(args), "dtype": dtype}))
    check_forward(loaded)
    return [spec_of(site, target) for site in sites_of(loaded)]
