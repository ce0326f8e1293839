"""The head of the page: what was done, what it saved, what it cost, and whether the budget was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from attnopt.report.cells import bytes_text, cell_text, scaled
from attnopt.report.data.plans import COSTS
from attnopt.report.page.examined import phase_of
from attnopt.report.page.pieces import Part, facts

MARKS = {"good": "✓", "bad": "✕", "open": "?", "plain": ""}


class Tile(NamedTuple):
    """One figure of the strip. state: "good", "bad", "open" (not known), or "plain" where it is no verdict."""

    label: str
    value: str
    detail: str
    state: str


def strip(data: Mapping[str, Any]) -> list[Tile]:
    """The four figures to read first, of the page's data: of a plan, else of compiled graphs, else of a profile."""
    if plan := data.get("plan"):
        return [_changed(data, plan), _faster(data, plan), _loss(plan), _budget(plan)]
    if graphs := data.get("graphs"):
        return _compiled(graphs)
    if profile := data.get("profile"):
        return _profiled(profile)
    return []


def _changed(data: Mapping[str, Any], plan: Mapping[str, Any]) -> Tile:
    heads = [head for row in plan["sites"].values() for head in row]
    changed = sum(not head["dense"] for head in heads)
    detail = f"{_percent(plan['density'])} of the dense query-key pairs at {plan['lengths']['planned']} tokens"
    counts = (data.get("graphs") or {}).get("counts")
    if counts and counts["sites"]:
        detail += f"; {counts['rewritten']} of {counts['sites']} attentions rewritten"
    return Tile("Heads changed", f"{changed} of {len(heads)}", detail, "plain")


def _faster(data: Mapping[str, Any], plan: Mapping[str, Any]) -> Tile:
    rows = [r for r in data.get("bench") or () if r.get("variant") == "attnopt planned" and r.get("times_inductor")]
    if rows:
        row = max(rows, key=lambda r: r["length"])
        detail = f"as fast as inductor at {row['length']} tokens, measured"
        if row.get("times_exact"):
            detail += f"; {row['times_exact']:.2f}× exact mode"
        return Tile("Speed", f"{row['times_inductor']:.2f}×", detail, "plain")
    predicted = plan["predicted"]
    detail = f"{plan['objective']} against dense, predicted: {COSTS.get(predicted['cost'], predicted['cost'])}"
    return Tile("Speed", f"{predicted['speedup']:.2f}×", detail, "plain")


def decisive(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements that speak for the plan: of the final split where there are any, else all."""
    final = [m for m in plan["measured"] if m["split"] == "final"]
    return final or list(plan["measured"])


def _loss(plan: Mapping[str, Any]) -> Tile:
    if not plan["measured"]:
        nats = plan["predicted"]["kl_nats_per_token"]
        return Tile("Cost in quality", f"{nats:.3g}", "nats per token, predicted; nothing measured yet", "plain")
    worst = max(decisive(plan), key=lambda m: m["increase"])
    where = f"the {worst['split']} text at {worst['length']} tokens"
    if plan["budget"]["kind"] == "loss":
        value, told = f"{worst['increase']:+.2f} %", f"loss on {where}; at most {worst['upper_95']:.2f} % (95 %)"
    else:
        value = f"{worst['increase']:.3g}"
        told = f"nats per token on {where}; at most {worst['upper_95']:.3g} (95 %)"
    return Tile("Cost in quality", value, told, "plain")


def _budget(plan: Mapping[str, Any]) -> Tile:
    budget = plan["budget"]
    asked = f"{budget['limit']:g} {budget['unit']}"
    if plan["edited"]:
        return Tile("Budget kept", "not known", f"edited after it was measured; the budget is {asked}", "open")
    if not plan["measured"]:
        return Tile("Budget kept", "not known", f"nothing measured yet; the budget is {asked}", "open")
    spare = budget["limit"] - max(m["upper_95"] for m in decisive(plan))
    if spare >= 0:
        return Tile("Budget kept", "yes", f"{asked}; {spare:.2g} to spare", "good")
    return Tile("Budget kept", "no", f"{asked}; exceeded by {-spare:.2g}", "bad")


def _compiled(graphs: Mapping[str, Any]) -> list[Tile]:
    counts = graphs["counts"]
    sites, done, missed = counts["sites"], counts["rewritten"], counts["not_recognised"]
    where = f"{counts['graphs']} graph{'' if counts['graphs'] == 1 else 's'}"
    return [
        Tile("Attentions rewritten", f"{done} of {sites}", f"recognised in {where}",
             "good" if sites and done == sites else "plain"),
        Tile("Left alone", str(counts["left_alone"]), "recognised, with the reason below", "plain"),
        Tile("Not recognised", str(missed), "looks like attention, with the reason below" if missed else
             "nothing else looks like attention", "open" if missed else "good"),
        _saved(graphs) or _spent(graphs, where),
    ]  # fmt: skip


def _saved(graphs: Mapping[str, Any]) -> Tile | None:
    """Of the first phase, at its longest length; None where nothing was counted."""
    rows = [row for row in graphs.get("savings") or () if row["pairs_before"]]
    if not rows:
        return None
    first = [row for row in rows if phase_of(row) == phase_of(rows[0])]
    row = max(first, key=lambda r: r["length"])
    before, after = row["pairs_before"], row["pairs_after"]
    where = phase_of(row) + (f" at {row['length']} tokens" if row["length"] else "") + ", exact mode"
    held = sum(row[name] for name in ("mask_bytes", "repeated_bytes", "scores_bytes"))
    if before == after and held:
        return Tile("Memory saved", bytes_text(held), f"{where}: masks, copies of K and V, scores not made", "plain")
    value = ("at least " if row["at_most"] else "") + _percent(1 - after / before)
    return Tile("Query-key pairs saved", value, f"{where}: {scaled(before)} to {scaled(after)}", "plain")


def _spent(graphs: Mapping[str, Any], where: str) -> Tile:
    spent, whole = sum(graphs["pass_milliseconds"].values()), graphs["counts"]["graphs_left_alone"]
    return Tile(
        "Time in passes", f"{spent / 1000:.2f} s" if spent >= 1000 else f"{spent:.0f} ms",
        f"{whole} of {where} left alone as a whole" if whole else where, "plain",
    )  # fmt: skip


def _profiled(profile: Mapping[str, Any]) -> list[Tile]:
    totals = profile["totals"]
    if not totals:
        return []
    longest = max(profile["lengths"], key=lambda row: row["length"])
    return [
        Tile("Heads", cell_text(totals["heads"]), f"in {len(profile['sites'])} attentions", "plain"),
        Tile("Local heads", cell_text(totals["local_heads"]), "most of their mass is near", "plain"),
        Tile("Sink heads", cell_text(totals["sink_heads"]), "half of their mass is on the first keys", "plain"),
        Tile("Longest text", cell_text(longest["length"]), f"tokens; {longest['samples']} samples", "plain"),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tiles(tiles: Sequence[Tile]) -> str:
    shown = []
    for label, value, detail, state in tiles:
        mark = f'<span class="mark" aria-hidden="true">{MARKS[state]}</span>' if MARKS[state] else ""
        shown.append(
            f'<div class="tile {state}"><dt>{escape(label)}</dt><dd class="value">{escape(value)}{mark}</dd>'
            f'<dd class="detail">{escape(detail)}</dd></div>'
        )
    return f'<dl class="strip">{"".join(shown)}</dl>'


def summary(data: Mapping[str, Any]) -> list[Part]:
    parts = []
    if tiles := strip(data):
        parts.append((_tiles(tiles), ""))
    if data.get("summary"):
        parts.append((facts(data["summary"]), ""))
    return parts


def notes(data: Mapping[str, Any]) -> list[Part]:
    return [("<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in data["notes"]) + "</ul>", "")]
