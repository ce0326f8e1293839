"""Traced graphs as plain data: every site, what was done to it or why not; and what examining a model adds to that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from attnopt.cost import device_name
from attnopt.examine import Examined, Saving
from attnopt.ir import GraphReport, Miss, Refusal, Site, page
from attnopt.plan import fold
from attnopt.report.cells import fold_rows, short_source

# What a row has for itself where it folds with others.
OWN = ("site", "node")


def graphs_json(reports: Sequence[GraphReport]) -> dict[str, Any]:
    """graphs: one record each. rows: all sites, misses and refusals, folded, for people. counts and total times."""
    return _whole([_graph(n, report) for n, report in enumerate(reports)])


def examined_json(found: Examined) -> dict[str, Any]:
    """The same of a model that was examined. graphs: with phase, cache, savings and timings. savings: summed over the
    graphs of a phase, counts for one sequence. breaks, recompiles, notes; machine: what timings were taken on."""
    graphs = []
    for n, graph in enumerate(found.graphs):
        made = _graph(n, graph.report)
        for site in made["sites"]:
            site["mask"] = _with_names(site["mask"], graph.inputs)
            site["extras"] = [_with_names(text, graph.inputs) for text in site["extras"]]
        graphs.append(made | {
            "phase": graph.phase,
            "cache": graph.cache,
            "savings": [_saving(saving) for saving in graph.savings],
            "timings": [{**asdict(t), "ratio": t.ratio} for t in graph.timings],
        })  # fmt: skip
    return {
        **_whole(graphs),
        "savings": _summed(graphs),
        "breaks": [asdict(b) | {"source": short_source(b.source)} for b in found.breaks],
        "recompiles": [asdict(r) | {"source": short_source(r.source), "causes": list(r.causes)}
                       for r in found.recompiles],
        "notes": list(found.notes),
        "machine": device_name(found.device) if any(g.timings for g in found.graphs) else "",
    }  # fmt: skip


def _with_names(text: str, inputs: Sequence[str]) -> str:
    """A formula with what the model calls its inputs in place of what the traced graph does: ``arg3_1[b, j]``."""

    def name(found: re.Match[str]) -> str:
        at = int(found[1])
        return inputs[at] if at < len(inputs) else found[0]

    return re.sub(r"\barg(\d+)_1\b", name, text)


def _whole(graphs: list[dict[str, Any]]) -> dict[str, Any]:
    times: Counter[str] = Counter()
    for graph in graphs:
        for step in graph["passes"]:
            times[step["name"]] += step["milliseconds"]
    phases = dict.fromkeys((graph["phase"], graph["cache"]) for graph in graphs)
    of_phase = {key: [g for g in graphs if (g["phase"], g["cache"]) == key] for key in phases}
    return {
        "graphs": graphs,
        "rows": _folded(graphs),
        "counts": _counts(graphs),
        "phases": [{"phase": key[0], "cache": key[1], **_counts(of_phase[key])} for key in phases],
        "pass_milliseconds": dict(times),
    }


def _counts(graphs: Sequence[dict[str, Any]]) -> dict[str, int]:
    sites = [site for graph in graphs for site in graph["sites"]]
    return {
        "graphs": len(graphs),
        "sites": len(sites),
        "rewritten": sum(site["lowering"] != "" for site in sites),
        "left_alone": sum(site["lowering"] == "" for site in sites),
        "not_recognised": sum(len(graph["misses"]) for graph in graphs),
        "graphs_left_alone": sum(graph["fallback"] != "" for graph in graphs),
    }


def _saving(saving: Saving) -> dict[str, Any]:
    totals = {"pairs_before": saving.pairs_before, "pairs_after": saving.pairs_after, "at_most": saving.at_most}
    return asdict(saving) | totals


def _summed(graphs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each phase and length. otherwise: of attentions that become something else at that length than as
    traced, how many become what; "" is nothing."""
    numbers = ("pairs_before", "pairs_after", "mask_bytes", "repeated_bytes", "scores_bytes", "unsized")
    rows: dict[Any, dict[str, Any]] = {}
    for graph in graphs:
        for saving in graph["savings"]:
            key = {"phase": graph["phase"], "cache": graph["cache"], "length": saving["length"]}
            empty = {**key, **dict.fromkeys(numbers, 0), "at_most": False, "otherwise": {}}
            row = rows.setdefault(tuple(key.values()), empty)
            row.update({name: row[name] + saving[name] for name in numbers})
            row["at_most"] = row["at_most"] or saving["at_most"]
            traced = {site["name"]: site["lowering"] for site in graph["sites"]}
            for counted in saving["sites"]:
                if (becomes := counted["lowering"]) != traced.get(counted["site"], becomes):
                    row["otherwise"][becomes] = row["otherwise"].get(becomes, 0) + 1
    return list(rows.values())


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
    return {
        "index": index,
        "phase": "",
        "cache": "",
        "savings": [],
        "timings": [],
        "plan_id": report.plan,
        "fallback": report.fallback,
        "fallback_code": report.fallback_code,
        "notes": list(report.notes),
        "sites": sites,
        "refusals": [asdict(refusal) | _seen(refusal) for refusal in report.refusals],
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
        phase = {"phase": graph["phase"], "cache": graph["cache"]}
        for site in graph["sites"]:
            rows.append({
                **phase,
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
                "node": "",
            })  # fmt: skip
        known = {site["name"] for site in graph["sites"]}
        rows += [phase | _bare(refusal, "left alone") for refusal in graph["refusals"] if refusal["path"] not in known]
        for miss in graph["misses"]:
            rows.append(phase | _bare(miss, "not recognised"))
        if graph["fallback"]:
            whole = Refusal(graph["fallback"], code=graph["fallback_code"])
            rows.append(phase | _bare(asdict(whole) | _seen(whole), "left alone"))
    out = []
    # A node's name has a number of its own: that of the first stands for those of equal layers.
    for name, members in fold_rows(rows, lambda r: r["site"], lambda r: tuple(r[k] for k in r if k not in OWN)):
        names = Counter(row["site"] for row in members)
        out.append(members[0] | {"site": name, "layers": len(names), "graphs": max(names.values())})
    return out


def _bare(reason: dict[str, Any], state: str) -> dict[str, Any]:
    """The row of what is no site."""
    blank = dict.fromkeys(("pattern", "heads", "dim", "dtype", "mask"), "")
    return {
        "site": reason["path"] or "graph", **blank, "state": state, "done": "", "why": reason["reason"],
        "source": short_source(reason["source"]), "op": reason["op"], "page": reason["page"],
        "node": reason["node"],
    }  # fmt: skip


def _pair(one: int, two: int) -> str:
    """A size that K may have fewer of than q; 0 stands for one known at run time only."""
    return (str(one) if one else "?") if one == two else f"{one}/{two}"
