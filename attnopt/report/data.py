"""What attnopt found out, as plain JSON data: the source of --json, of the terminal's tables and of the page alike.

graphs_json(reports)    every site of every graph, what was done to it or why it was left alone; equal rows folded
plan_json(plan)         every head's span at the planned length, distinct spans, density, figures
profile_json(profile)   where every head's mass lies and what dropping keys costs it, in nats per token
records_json(records)   the verify search, predicted against measured
environment()           versions and hardware
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from attnopt import __version__, settings
from attnopt.cost import device_name, kept_pairs
from attnopt.ir import GraphReport, Miss, Refusal, Site, page
from attnopt.plan import Plan, fold
from attnopt.planner.verify import Record
from attnopt.registry import CANDIDATES
from attnopt.report.cells import fold_rows, short_source
from attnopt.report.profile_map import profile_json

__all__ = [
    "constraint_texts", "environment", "graphs_json", "plan_facts", "plan_json", "profile_json", "records_json",
]  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "numpy", "scipy", "safetensors")


# Graphs


def graphs_json(reports: Sequence[GraphReport]) -> dict[str, Any]:
    """graphs: one record each. rows: all sites, misses and refusals, folded, for people. counts and total times."""
    graphs = [_graph(n, report) for n, report in enumerate(reports)]
    sites = [site for graph in graphs for site in graph["sites"]]
    times: Counter[str] = Counter()
    for graph in graphs:
        for step in graph["passes"]:
            times[step["name"]] += step["milliseconds"]
    return {
        "graphs": graphs,
        "rows": _folded(graphs),
        "counts": {
            "graphs": len(graphs),
            "sites": len(sites),
            "rewritten": sum(site["lowering"] != "" for site in sites),
            "left_alone": sum(site["lowering"] == "" for site in sites),
            "not_recognised": sum(len(graph["misses"]) for graph in graphs),
            "graphs_left_alone": sum(graph["fallback"] != "" for graph in graphs),
        },
        "pass_milliseconds": dict(times),
    }


def _graph(index: int, report: GraphReport) -> dict[str, Any]:
    rewrites = {rewrite.site.name: rewrite for rewrite in report.rewrites}
    reasons: dict[str, list[str]] = {}
    for refusal in report.refusals:
        reasons.setdefault(refusal.path, []).append(refusal.reason)
    sites = []
    for site in report.sites:
        done = rewrites.get(site.name)
        sites.append({
            **_site(site),
            "lowering": done.lowering if done else "",
            "note": done.note if done else "",
            "choices": fold(done.choices) if done else {},
            "reasons": reasons.get(site.name, []),
            "seen": [_seen(refusal) for refusal in report.refusals if refusal.path == site.name],
        })  # fmt: skip
    known = {site.name for site in report.sites}
    return {
        "index": index,
        "plan": report.plan,
        "fallback": report.fallback,
        "fallback_code": report.fallback_code,
        "notes": list(report.notes),
        "sites": sites,
        "refusals": [
            asdict(refusal) | _seen(refusal) | {"known_site": refusal.path in known} for refusal in report.refusals
        ],
        "misses": [asdict(miss) | _seen(miss) for miss in report.misses],
        "passes": [asdict(step) for step in report.history],
        "rules": dict(report.rules),
    }


def _seen(reason: Miss | Refusal) -> dict[str, str]:
    """The operation a reason was seen at, without the node's name so that equal layers fold, and its page."""
    found = re.search(r"\((.*)\)", reason.node)
    return {"op": found[1] if found else "", "page": page(reason.code)}


def _site(site: Site) -> dict[str, Any]:
    facts = asdict(site)
    mask = {"mask": str(site.mask), "mask_kind": site.mask.kind, "padded": site.mask.padded}
    return facts | mask | {"name": site.name, "extras": site.extras}


def _folded(graphs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per distinct outcome: site or miss, equal layers and equal graphs together."""
    rows: list[dict[str, Any]] = []
    for graph in graphs:
        for site in graph["sites"]:
            rows.append({
                "site": site["name"],
                "pattern": site["pattern"],
                "heads": _pair(site["heads"], site["kv_heads"]),
                "dim": _pair(site["head_dim"], site["head_dim_v"]),
                "dtype": site["dtype"],
                "mask": ", ".join([site["mask"], *site["extras"]]),
                "state": "rewritten" if site["lowering"] else "left alone",
                "done": site["lowering"],
                "why": "; ".join([site["note"]] * bool(site["note"]) + site["reasons"]),
                "source": short_source(site["source"]),
                "op": ", ".join(dict.fromkeys(s["op"] for s in site["seen"])),
                "page": ", ".join(dict.fromkeys(s["page"] for s in site["seen"])),
            })  # fmt: skip
        for refusal in graph["refusals"]:
            if not refusal["known_site"]:
                rows.append(_bare(refusal, "left alone"))
        for miss in graph["misses"]:
            rows.append(_bare(miss, "not recognised"))
        if graph["fallback"]:
            whole = Refusal(graph["fallback"], code=graph["fallback_code"])
            rows.append(_bare(asdict(whole) | _seen(whole), "left alone"))
    out = []
    for name, members in fold_rows(rows, lambda r: r["site"], lambda r: tuple(v for k, v in r.items() if k != "site")):
        names = Counter(row["site"] for row in members)
        out.append(members[0] | {"site": name, "layers": len(names), "graphs": max(names.values())})
    return out


def _bare(reason: dict[str, Any], state: str) -> dict[str, Any]:
    """The row of what is no site."""
    blank = dict.fromkeys(("pattern", "heads", "dim", "dtype", "mask"), "")
    return {
        "site": reason["path"] or "graph", **blank, "state": state, "done": "", "why": reason["reason"],
        "source": short_source(reason["source"]), "op": reason["op"], "page": reason["page"],
    }  # fmt: skip


def _pair(one: int, two: int) -> str:
    """A size that K may have fewer of than q; 0 stands for one known at run time only."""
    return (str(one) if one else "?") if one == two else f"{one}/{two}"


# Plan


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan with every head's span worked out at the planned length. kept: share of the dense head's pairs; far:
    what stands in for the keys outside the span ("linear", "mean"), "gone" where no attention is left."""
    length = plan.lengths.planned
    sites: dict[str, list[dict[str, Any]]] = {}
    spans: Counter[tuple[str, int, int, float, bool, str, str]] = Counter()
    for name, choices in plan.choices.items():
        heads: list[dict[str, Any]] = []
        for choice, sink, window in zip(choices, *plan.tables(name, length), strict=True):
            dense = window >= length
            sink, window = (0, length) if dense else (sink, window)
            kept = kept_pairs(length, sink, window) / kept_pairs(length, 0, length)
            kind, far = choice.candidate, CANDIDATES[choice.candidate].far
            spans[str(choice), sink, window, kept, dense, kind, far] += 1
            heads.append({
                "choice": str(choice), "sink": sink, "window": window, "kept": kept, "dense": dense,
                "candidate": kind, "far": far,
            })  # fmt: skip
        sites[name] = heads
    ordered = sorted(spans.items(), key=lambda item: (-item[0][3], item[0][0]))
    every: list[float] = [head["kept"] for heads in sites.values() for head in heads]
    return {
        "id": plan.id,
        "model": plan.model,
        "fingerprint": plan.fingerprint.structure,
        "budget": {**asdict(plan.budget), "unit": plan.budget.unit},
        "objective": plan.objective,
        "constraints": {
            **asdict(plan.constraints),
            "protect": list(plan.constraints.protect),
            "allow": list(plan.constraints.allow),
        },
        "lengths": {
            "profiled": list(plan.lengths.profiled),
            "planned": length,
            "verified": list(plan.lengths.verified),
        },
        "min_length": plan.min_length,
        "predicted": asdict(plan.predicted),
        "measured": [asdict(m) for m in plan.measured],
        "edited": plan.edited,
        "cost_table": plan.cost_table,
        "calibration": plan.calibration,
        "seed": plan.seed,
        "versions": dict(plan.versions),
        "sites": sites,
        "spans": [
            {
                "choice": choice,
                "sink": sink,
                "window": window,
                "kept": kept,
                "dense": dense,
                "heads": count,
                "candidate": kind,
                "far": far,
            }
            for (choice, sink, window, kept, dense, kind, far), count in ordered
        ],
        "candidates": dict(Counter(choice.candidate for choices in plan.choices.values() for choice in choices)),
        "density": sum(every) / len(every) if every else 1.0,
    }


# Where a cost comes from, in words.
COSTS = {
    "measured": "measured on this device",
    "roofline": "a roofline, not measured",
    "density": "pairs counted, not measured",
    "bytes": "bytes counted, not measured",
}


def constraint_texts(asked: Mapping[str, Any]) -> list[str]:
    """What was asked for besides the budget, in words."""
    words = {
        "min_speedup": "at least {:g} times as fast",
        "max_kv_memory": "at most {:.1%} of the KV cache",
        "max_kv_bytes": "at most {} bytes of KV cache",
        "max_rules": "at most {} spans a layer",
        "protect_top": "the {} heads whose removal hurts most stay dense",
        "dense_below": "dense under {} tokens",
        "retrieval": "a nat per answer of the probe counts as {:g} nats per token",
    }
    found = [text.format(asked[name]) for name, text in words.items() if asked[name] is not None]
    found += [f"dense: {', '.join(asked['protect'])}"] if asked["protect"] else []
    return found + ([f"weighed besides spans: {', '.join(asked['allow'])}"] if asked.get("allow") else [])


def plan_facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plan's figures as (label, value), of the data of `plan_json`."""
    predicted, budget = plan["predicted"], plan["budget"]
    lengths = plan["lengths"]
    facts = [
        ("model", f"{plan['model']} ({plan['fingerprint']})"),
        ("budget", f"{budget['limit']:g} {budget['unit']}"),
        ("lengths", f"planned {lengths['planned']}, profiled {_list(lengths['profiled'])}, "
                    f"verified {_list(lengths['verified'])}"),
        ("predicted", f"{predicted['kl_nats_per_token']:.3g} nats per token; {plan['objective']} "
                      f"{predicted['dense_cost']:.4g} -> {predicted['planned_cost']:.4g} {predicted['unit']}, "
                      f"{predicted['speedup']:.2f}x ({COSTS.get(predicted['cost'], predicted['cost'])})"),
    ]  # fmt: skip
    if predicted["kv_memory"] < 1:
        facts.append(("KV cache", f"{100 * predicted['kv_memory']:.1f} % of dense at {lengths['planned']}"))
    if predicted["gap"] is not None:
        facts.append(("exact plan", f"at most {predicted['gap']:.2f} % cheaper than the front's"))
    asked = constraint_texts(plan["constraints"])
    if asked:
        facts.append(("constraints", "; ".join(asked)))
    for m in plan["measured"]:
        facts.append((f"measured ({m['split']}, {m['length']})", (
            f"increase {m['increase']:.4g}, at most {m['upper_95']:.4g} {budget['unit']}; loss "
            f"{m['dense_loss']:.4f} -> {m['planned_loss']:.4f} nats per token on {m['tokens']} tokens"
            + ("" if m["kl"] is None else f"; KL {m['kl']:.3g}")
            + ("" if m["top1"] is None else f"; same next token {100 * m['top1']:.2f} %")
            + ("" if m["planned_retrieval"] is None else
               f"; retrieval {100 * m['dense_retrieval']:.0f} -> {100 * m['planned_retrieval']:.0f} %")
        )))  # fmt: skip
    if not plan["measured"]:
        facts.append(("measured", "nothing yet"))
    if plan["edited"]:
        facts.append(("edited", "the measurements belong to other choices than these"))
    if plan["min_length"]:
        stays = " but for pruned heads" if "pruned" in plan["candidates"] else ""
        facts.append(("break-even", f"under {plan['min_length']} tokens every site runs dense{stays}"))
    if set(plan["candidates"]) - {"dense", "sink_window"}:
        facts.append(("heads", ", ".join(f"{n} {name}" for name, n in plan["candidates"].items())))
    facts.append(("density", f"{100 * plan['density']:.1f} % of the dense query-key pairs at {lengths['planned']}"))
    return facts


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "none"


# Search and environment


def records_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The verify search: the figures of the worst length beside the prediction, and every measurement."""
    return [
        {
            "step": record.step,
            "predicted": record.predicted,
            "cost": record.cost,
            "increase": finite(record.worst.increase),
            "upper_95": finite(record.worst.upper_95),
            "length": record.worst.length,
            "holds": record.holds,
            "measured": [{k: finite(v) for k, v in asdict(m).items()} for m in record.measured],
        }
        for record in records
    ]


def finite(value: Any) -> Any:
    """JSON has no infinity: null stands for what has no bound."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions, hardware, compiler and attnopt's variables as they are now."""
    cuda = torch.cuda.is_available()
    return {
        "attnopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "compiler": _compiler(),
        "variables": {name: os.environ.get(name, default) for name, (default, _) in settings.VARIABLES.items()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The C++ compiler that inductor would find, by the first line of its --version."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            try:
                run = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
            except (OSError, subprocess.SubprocessError):
                continue
            return run.stdout.splitlines()[0] if run.stdout else name
    return None
