"""The head of the page: what was done, what it saved, what it cost, and whether the budget was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from attnopt.report.cells import cell_text, counted, phase_of, scaled
from attnopt.report.data.plans import costs_text, density_text, timed
from attnopt.report.page.pieces import Part, facts
from attnopt.units import bytes_text

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
    totals = plan["totals"]
    detail = density_text(plan)
    counts = (data.get("graphs") or {}).get("counts")
    if counts and counts["sites"]:
        detail += f"; {counts['rewritten']} of {counts['sites']} attentions rewritten"
    return Tile("Heads changed", f"{totals['replaced']} of {totals['heads']}", detail, "plain")


def _faster(data: Mapping[str, Any], plan: Mapping[str, Any]) -> Tile:
    rows = [r for r in data.get("bench") or () if r.get("variant") == "attnopt planned" and r.get("times_inductor")]
    if rows:
        row = max(rows, key=lambda r: r["length"])
        detail = f"as fast as inductor at {row['length']} tokens, measured"
        if row.get("times_exact"):
            detail += f"; {row['times_exact']:.2f}× exact mode"
        return Tile("Speed", f"{row['times_inductor']:.2f}×", detail, "plain")
    predicted = plan["predicted"]
    told = costs_text(predicted) + (" before it was edited" if plan["edited"] else "")
    if timed(predicted):
        return Tile("Speed", f"{predicted['speedup']:.2f}×", f"{plan['objective']} against dense, {told}", "plain")
    dense, planned = predicted["dense_cost"], predicted["planned_cost"]
    detail = f"{plan['objective']}: {dense:.3g} to {planned:.3g} {predicted['unit']}, {told}"
    return Tile("Cost against dense", _percent(planned / dense) if dense else "not known", detail, "plain")


def _loss(plan: Mapping[str, Any]) -> Tile:
    totals, name = plan["totals"], "Cost in quality"
    if plan["edited"]:
        return Tile(name, "not known", "edited after it was measured", "open")
    if not plan["measured"]:
        return Tile(name, f"{totals['predicted']:.3g}", "nats per token, predicted; nothing measured yet", "plain")
    where = f"the {totals['split']} text at {totals['length']} tokens"
    if plan["budget"]["kind"] == "loss":
        told = f"loss on {where}; at most {totals['upper_95']:.2f} % (95 %)"
        return Tile(name, f"{totals['increase']:+.2f} %", told, "plain")
    told = f"nats per token on {where}; at most {totals['upper_95']:.3g} (95 %)"
    return Tile(name, f"{totals['increase']:.3g}", told, "plain")


def _budget(plan: Mapping[str, Any]) -> Tile:
    budget, totals = plan["budget"], plan["totals"]
    asked = f"{budget['limit']:g} {budget['unit']}"
    if totals["budget_kept"] is None:
        why = "edited after it was measured" if plan["edited"] else "nothing measured yet"
        return Tile("Budget kept", "not known", f"{why}; the budget is {asked}", "open")
    if totals["budget_kept"]:
        told = "; ".join([asked, f"{totals['margin']:.2g} to spare", *totals["lost"]])
        return Tile("Budget kept", "yes", told, "open" if totals["lost"] else "good")
    return Tile("Budget kept", "no", f"{asked}; exceeded by {-totals['margin']:.2g}", "bad")


def _compiled(graphs: Mapping[str, Any]) -> list[Tile]:
    counts = graphs["counts"]
    sites, done, missed = counts["sites"], counts["rewritten"], counts["not_recognised"]
    where = counted(counts["graphs"], "graph")
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
        return Tile("Bytes not written", bytes_text(held), f"{where}: masks, copies of K and V, scores", "plain")
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
