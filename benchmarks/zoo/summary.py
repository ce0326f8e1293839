"""What the cells say together: shares by kind of model and by cell, what went wrong, every miss by reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attnopt.codegen.emit import write_atomically
from benchmarks.zoo.cells import BASE, COUNT

Record = dict[str, Any]
RAN = ("ok", "missed", "wrong", "broken")
# Shares aimed at, in percent: of attention calls recognised, and of masks in closed form.
AIMS = {"recognised": 99.0, "closed": 92.0}


def row(records: Iterable[Record]) -> Record:
    """Counts over cells: attention calls of the eager runs, what was recognised of them, what was wrong."""
    records = list(records)
    ran = [r for r in records if r["status"] in RAN and r["cell"] != "inductor count"]
    counted = [r for r in records if r["cell"] == "inductor count" and r["status"] == "ok"]
    calls = sum(r.get("calls", 0) for r in ran)
    sites = sum(min(r.get("sites", 0), r.get("calls", 0)) for r in ran)
    closed = sum(min(r.get("closed", r.get("sites", 0)), r.get("calls", 0)) for r in ran)
    unchecked = sum(len(r.get("unchecked", ())) for r in ran)
    return {
        "classes": len({r["class"] for r in ran}), "cells": len(ran), "calls": calls, "sites": sites, "closed": closed,
        "recognised": 100 * sites / calls if calls else 100.0, "closed share": 100 * closed / calls if calls else 100.0,
        "checked": sites - unchecked, "wrong": sum(r["status"] == "wrong" for r in ran),
        **{s: sum(r["status"] == s for r in records) for s in ("broken", "timed out", "untraceable")},
        "fused by inductor": sum(r["fused"] for r in counted),
        "calls inductor saw": sum(r["calls"] for r in counted),
    }  # fmt: skip


def grouped(records: list[Record], field: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record[field]].append(record)
    return found


OUTSIDE = "it is in no graph: torch.compile breaks the graph there and runs it eagerly"


def misses(records: list[Record]) -> list[Record]:
    """Reasons with the sites and classes they hit, most first. An unnamed one counts calls that no miss explains."""
    hits: dict[str, Counter[str]] = defaultdict(Counter)
    example: dict[str, Record] = {}
    for record in records:
        if record["status"] not in RAN or record["cell"] == "inductor count":
            continue
        named = [*record.get("misses", ()), *({"reason": f"the graph: {f}"} for f in record.get("fallbacks", ()))]
        for miss in named:
            hits[miss["reason"]][record["class"]] += 1
            example.setdefault(miss["reason"], miss)
        silent = record.get("calls", 0) - record.get("sites", 0) - len(named)
        if silent > 0 and not record.get("fallbacks") and not record.get("broken"):
            outside = min(silent, record.get("outside", 0))
            for reason, count in ((OUTSIDE, outside), ("no site and no reason", silent - outside)):
                if count:
                    hits[reason][record["class"]] += count
    rows = [
        {"reason": reason, "sites": sum(classes.values()), "classes": sorted(classes), **place(example.get(reason, {}))}
        for reason, classes in hits.items()
    ]
    return sorted(rows, key=lambda r: (-r["sites"], r["reason"]))


def place(miss: Record) -> Record:
    return {k: miss[k] for k in ("path", "source") if miss.get(k)}


def said(record: Record) -> str:
    return "; ".join(record.get("wrong") or record.get("broken") or [record.get("reason", "")])


def summarise(records: list[Record], versions: dict[str, str]) -> Record:
    """Everything that the table, the figure and the document show."""
    built = {r["class"] for r in records if r["status"] not in ("not built", "not offered", "not applicable")}
    unbuilt = {r["class"]: r for r in records if r["status"] == "not built" and r["class"] not in built}
    realised: Counter[str] = Counter()
    for record in records:
        realised.update(record.get("realised", {}))

    def named(status: str) -> list[Record]:
        # Where inductor's own passes fail on a graph, its count is missing, and that is all.
        found = [r for r in records if r["status"] == status and r["cell"] != COUNT.name]
        return [{"class": r["class"], "cell": r["cell"], "what": said(r)} for r in found]

    return {
        "versions": versions, "built": len(built), "seconds": round(sum(r["seconds"] for r in records), 1),
        # How many cells ran under which sources of the matcher.
        "matchers": dict(Counter(r.get("versions", versions).get("matcher", "") for r in records).most_common()),
        "total": row(records), "base": row(r for r in records if r["cell"] in {c.name for c in BASE}),
        "kinds": {k: row(v) for k, v in grouped(records, "kind").items()},
        "cells": {k: row(v) for k, v in grouped(records, "cell").items()}, "realised": dict(realised.most_common()),
        "wrong": named("wrong"), "broken": named("broken"), "timed out": named("timed out"),
        "untraceable": named("untraceable"), "misses": misses(records),
        "unchecked": dict(Counter(u.split(": ", 1)[-1] for r in records for u in r.get("unchecked", ())).most_common()),
        "not built": [{"class": n, "kind": r["kind"], "what": r["reason"]} for n, r in sorted(unbuilt.items())],
    }  # fmt: skip


HEADER = (
    "classes",
    "cells",
    "attention calls",
    "recognised",
    "closed masks",
    "checked by value",
    "wrong",
    "broken",
    "inductor",
)


def columns(counts: Record) -> list[str]:
    fused, seen = counts["fused by inductor"], counts["calls inductor saw"]
    return [
        str(counts["classes"]), str(counts["cells"]), str(counts["calls"]), f"{counts['recognised']:.1f} %",
        f"{counts['closed share']:.1f} %", str(counts["checked"]), str(counts["wrong"]), str(counts["broken"]),
        f"{100 * fused / seen:.1f} %" if seen else "",
    ]  # fmt: skip


def show(result: Record, console: Console) -> None:
    """The tables on a terminal."""
    for title, rows in (("by kind of model", result["kinds"]), ("by cell", result["cells"])):
        table = Table(title=title)
        for n, name in enumerate(("", *HEADER)):
            table.add_column(name, justify="right" if n else "left")
        for name, counts in [*rows.items(), ("all", result["total"])]:
            table.add_row(name, *columns(counts))
        console.print(table)
    for name in ("wrong", "broken", "timed out"):
        for one in result[name]:
            console.print(f"{name}: {one['class']} {one['cell']}: {one['what']}", markup=False, highlight=False)
    for miss in result["misses"]:
        classes = ", ".join(miss["classes"][:4]) + (" ..." if len(miss["classes"]) > 4 else "")
        console.print(f"{miss['sites']:5d} missed: {miss['reason']} ({classes})", markup=False, highlight=False)
    console.print(
        f"{result['built']} classes built, {len(result['not built'])} not; {result['seconds']:.0f} s of cells"
    )


def listed(counts: Record) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def document(result: Record) -> str:
    """docs/coverage.md."""
    v, total = result["versions"], result["total"]
    lines = [
        "<!-- Generated by `python -m benchmarks.match_zoo --keep` from benchmarks/results/match_zoo.json. -->",
        "# Coverage: which attention is recognised", "",
        f"{result['built']} classes of transformers {v['transformers']}, built from small random configurations, run "
        f"with torch {v['torch']} on a CPU. Every attention call of the eager run is expected as a site; every "
        "recovered mask is compared, position by position, with the mask that the run realised; outputs are compared "
        "with eager's. Vision-language classes are given text alone; vision encoders are among the vision classes.", "",
        *(
            f"- {where}: {held['recognised']:.1f} % of {held['calls']} calls are recognised "
            f"(aim {AIMS['recognised']:g} %), "
            f"{held['closed share']:.1f} % with a mask in closed form (aim {AIMS['closed']:g} %)"
            for where, held in (("static, float32, with and without padding", result["base"]), ("in all cells", total))
        ),
        f"- cells with a wrong mask or output: {total['wrong']}",
        f"- cells with an exception or an extra graph: {total['broken']}",
        *(
            [f"- versions of the matcher's sources that cells ran under, by digest: {listed(result['matchers'])}"]
            if len(result["matchers"]) > 1 else []
        ), "",
    ]  # fmt: skip
    for title, rows in (("By kind of model", result["kinds"]), ("By cell", result["cells"])):
        lines += [f"## {title}", "", f"| | {' | '.join(HEADER)} |", "|---|" + "---:|" * len(HEADER)]
        lines += [f"| {name} | {' | '.join(columns(counts))} |" for name, counts in [*rows.items(), ("all", total)]]
        lines.append("")
    lines += ["## Misses, by reason", "", "| reason | sites | classes |", "|---|---:|---|"]
    lines += [f"| {cell(m['reason'])} | {m['sites']} | {', '.join(m['classes'])} |" for m in result["misses"]]
    for title, name in (("Wrong", "wrong"), ("Broken", "broken"), ("Timed out", "timed out"),
                        ("Not traced by torch.compile itself", "untraceable")):  # fmt: skip
        if result[name]:
            lines += ["", f"## {title}", "", "| class | cell | what |", "|---|---|---|"]
            lines += [f"| {o['class']} | {o['cell']} | {cell(o['what'])} |" for o in result[name]]
    lines += ["", "## Masks that the runs realised", "", "| mask | calls |", "|---|---:|"]
    lines += [f"| {cell(mask)} | {count} |" for mask, count in result["realised"].items()]
    lines += ["", "## Not built", "", "| class | kind | reason |", "|---|---|---|"]
    lines += [f"| {o['class']} | {o['kind']} | {cell(o['what'])} |" for o in result["not built"]]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text that stays inside a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")[:300]


def figure(result: Record, path: Path) -> None:
    """Recognised, closed and fused-by-inductor shares by kind of model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [*result["kinds"].items(), ("all", result["total"])]
    fig, axes = plt.subplots(figsize=(8, 0.7 * len(kinds) + 1.2))
    series = [("recognised", "recognised", "#1f6f8b"), ("closed share", "mask in closed form", "#99c1b9")]
    for n, (field, label, colour) in enumerate(series):
        axes.barh(
            [y + 0.27 * n for y in range(len(kinds))], [c[field] for _, c in kinds], 0.25, label=label, color=colour
        )
    fused = [100 * c["fused by inductor"] / c["calls inductor saw"] if c["calls inductor saw"] else 0 for _, c in kinds]
    if any(fused):
        axes.barh([y + 0.54 for y in range(len(kinds))], fused, 0.25, label="fused by inductor", color="#d88c51")
    axes.set_yticks([y + 0.27 for y in range(len(kinds))], [f"{k} ({c['calls']} calls)" for k, c in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of attention calls, %")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def write(folder: Path, result: Record, records: list[Record]) -> None:
    """match_zoo.json (summary and records), match_zoo.md and match_zoo.svg in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r) for r in records)
    text = json.dumps(result, indent=1)[:-2] + ',\n "records": [\n' + lines + "\n]}\n"
    write_atomically(folder / "match_zoo.json", text)
    write_atomically(folder / "match_zoo.md", document(result))
    figure(result, folder / "match_zoo.svg")
