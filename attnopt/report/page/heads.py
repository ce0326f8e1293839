"""The map of heads: one cell each, coloured by what is asked for, and the data of which the script draws their curves.

The map needs no script: a cell holds its class and letter of every measure, and the chosen radio button says which
of them the style sheet shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from attnopt.report.cells import at_longest, bucket, counted, far_sign, letter, rounded, short_labels
from attnopt.report.data.plans import kept_text, visited_text
from attnopt.report.page.pieces import Part, soft

SHADES = 8  # of the ramp in page.css
FEW = 16  # heads up to which cells are large
LEAST = 2.0**-SHADES
WITHOUT_SCRIPTS = "Without scripts a head has no curves; its figures are in its tooltip."

Values = dict[str, list[float | None]]  # site -> a value for each head


@dataclass(frozen=True)
class Measure:
    """Something the map can be coloured by. marks: site -> for each head its (shade, letter), shade "" where nothing is
    known of it. legend: (shade, letter, meaning). values are in `unit`, and what the threshold is compared with."""

    key: str
    label: str
    unit: str
    values: Values
    marks: Mapping[str, Sequence[tuple[str, str]]]
    legend: Sequence[tuple[str, str, str]]


def measures(data: Mapping[str, Any]) -> list[Measure]:
    """Every measure that the page's data allow: of the plan, of the profile, of the candidates."""
    found: list[Measure | None] = []
    if plan := data.get("plan"):
        found += [_chosen(plan), _kept(plan)]
    if profile := data.get("profile"):
        heads = at_longest(profile["sites"])
        found += [_distance(profile, heads), _ranked("removal", "damage of removing the head", _of(heads, "ablation"))]
    if candidates := data.get("candidates"):
        damage: Values = {
            site: [row[at] for row, at in zip(of["damage"], of["chosen"], strict=True)]
            for site, of in candidates["sites"].items()
        }
        found.append(_ranked("harm", "damage of the choice", damage))
    return [measure for measure in found if measure is not None]


def _of(heads: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> Values:
    return {site: [head[key] for head in row] for site, row in heads.items()}


def _chosen(plan: Mapping[str, Any]) -> Measure:
    """By the window's size, in powers of two: equal letters are of about equal cost."""
    spans = plan["spans"]
    buckets = sorted({bucket(s["window"]) for s in spans if not s["dense"] and not s["far"]})
    shade = {b: str(n * SHADES // len(buckets)) for n, b in enumerate(buckets)}

    def mark(head: Mapping[str, Any]) -> tuple[str, str]:
        if head["far"]:
            return head["far"], far_sign(head)
        if head["dense"]:
            return "dense", ""
        size = bucket(head["window"])
        return shade[size], letter(buckets.index(size))

    legend = [(shade[b], letter(n), f"window ≤ {1 << b}") for n, b in enumerate(buckets)]
    legend += {s["candidate"]: (s["far"], far_sign(s), s["candidate"]) for s in spans if s["far"]}.values()
    legend.append(("dense", "", "dense"))
    marks = {site: [mark(head) for head in row] for site, row in plan["sites"].items()}
    windows: Values = {site: [head["window"] for head in row] for site, row in plan["sites"].items()}
    return Measure("choice", "what the plan chose", "window, tokens", windows, marks, legend)


def _kept(plan: Mapping[str, Any]) -> Measure:
    """Halves, quarters, eighths of the dense head's pairs: costs span orders, so classes are of equal ratio."""

    def mark(head: Mapping[str, Any]) -> tuple[str, str]:
        if head["kept"] is None:
            return "", ""
        halvings = min(int(-math.log2(max(head["kept"], LEAST))), SHADES - 1)
        return str(SHADES - 1 - halvings), letter(SHADES - 1 - halvings)

    legend = []
    for n in range(SHADES):
        high = 100 * 2.0 ** (n - SHADES + 1)
        legend.append((str(n), letter(n), f"≤ {high:.3g} %"))
    values: Values = {
        site: [None if head["kept"] is None else 100 * head["kept"] for head in row]
        for site, row in plan["sites"].items()
    }
    marks = {site: [mark(head) for head in row] for site, row in plan["sites"].items()}
    used = {shade for row in marks.values() for shade, _ in row}
    return Measure("kept", "share of pairs kept", "% of dense", values, marks, [e for e in legend if e[0] in used])


def _distance(profile: Mapping[str, Any], heads: Mapping[str, Sequence[Mapping[str, Any]]]) -> Measure | None:
    if not heads:
        return None
    top = max(row["length"] for row in profile["lengths"]).bit_length()
    ends = {head["distance"][0]: head["distance"][1] for row in heads.values() for head in row}
    starts = sorted(ends)
    shade = {start: str(min(start.bit_length() * SHADES // top, SHADES - 1)) for start in starts}
    marks = {site: [(shade[h["distance"][0]], letter(starts.index(h["distance"][0]))) for h in row]
             for site, row in heads.items()}  # fmt: skip
    legend = [(shade[s], letter(n), f"≤ {ends[s]}") for n, s in enumerate(starts)]
    values: Values = {site: [head["distance"][1] for head in row] for site, row in heads.items()}
    return Measure("distance", "half of the mass lies within", "tokens", values, marks, legend)


def _ranked(key: str, label: str, values: Values) -> Measure | None:
    """By rank, since damages span many orders: eight classes of as many heads each."""
    known = sorted(value for row in values.values() for value in row if value is not None)
    if not known:
        return None
    place = {value: n * SHADES // len(known) for n, value in reversed(list(enumerate(known)))}
    marks = {
        site: [("", "") if value is None else (str(place[value]), letter(place[value])) for value in row]
        for site, row in values.items()
    }
    least: dict[int, float] = {}
    for value in known:
        least.setdefault(place[value], value)
    legend = [(str(n), letter(n), f"from {bound:.2g}") for n, bound in least.items()]
    return Measure(key, label, "nats per token", values, marks, legend)


# The map


def heads(data: Mapping[str, Any]) -> list[Part]:
    shown = measures(data)
    if not shown:
        return []
    sites = list(dict.fromkeys(site for measure in shown for site in measure.values))
    embedded = _embedded(data, shown, sites)
    text = json.dumps(embedded, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return [
        (
            f'<div id="heads">{_controls(data, shown, sites)}'
            f'<div class="split"><div class="mapbox">{_table(data, shown, sites)}{_legends(shown)}</div>'
            f'<div id="head" class="scripted"><h3 aria-live="polite"></h3><div></div></div>{_unscripted()}</div></div>',
            "the map of heads",
        ),
        (f'<script type="application/json" id="head-data">{text}</script>', "the curves of the heads"),
    ]


def styles(data: Mapping[str, Any]) -> str:
    """Which of a cell's classes and letters counts, for each measure: rules of the page's style sheet."""
    rules = []
    for measure in measures(data):
        chosen = f"#heads:has(#by-{measure.key}:checked)"
        shades = sorted({shade for row in measure.marks.values() for shade, _ in row if shade})
        rules += [f"{chosen} .{measure.key}-{s}{{background:var(--r-{s});color:var(--t-{s})}}" for s in shades]
        rules.append(f"{chosen} td[data-{measure.key}]::before{{content:attr(data-{measure.key})}}")
        rules.append(f"{chosen} .legend.{measure.key}{{display:flex}}")
    return "".join(rules)


def _controls(data: Mapping[str, Any], shown: Sequence[Measure], sites: Sequence[str]) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="by" id="by-{m.key}" value="{m.key}"{" checked" if n == 0 else ""}>'
        f" {escape(m.label)}</label>"
        for n, m in enumerate(shown)
    )
    _, labels = short_labels(sites)
    layers = "".join(f'<option value="{n}">{escape(label)}</option>' for n, label in enumerate(labels))
    kinds = _kinds(data)
    kind = (
        '<label>candidate <select id="of-candidate"><option value="">all</option>'
        + "".join(f'<option value="{n}">{escape(name)}</option>' for n, name in enumerate(kinds)) + "</select></label>"
        if kinds else ""
    )  # fmt: skip
    return (
        f'<form autocomplete="off"><fieldset><legend>Colour by</legend><div>{buttons}</div></fieldset>'
        '<fieldset class="scripted"><legend>Show</legend><div>'
        f'<label>layer <select id="of-layer"><option value="">all</option>{layers}</select></label>{kind}'
        '<label>with <select id="side" aria-label="side of the threshold"><option value="1">at least</option>'
        '<option value="-1">at most</option></select> '
        '<input type="number" step="any" id="threshold" aria-label="threshold" aria-describedby="unit"> '
        '<span id="unit" class="soft"></span></label>'
        '<button type="reset">reset</button><output id="count" aria-live="polite"></output></div></fieldset></form>'
    )


def _table(data: Mapping[str, Any], shown: Sequence[Measure], sites: Sequence[str]) -> str:
    title, labels = short_labels(sites)
    widths = {site: max(len(m.values.get(site, ())) for m in shown) for site in sites}
    ruler = "".join(f'<th scope="col">{n}</th>' for n in range(max(widths.values())))
    lines = []
    for n, (site, label) in enumerate(zip(sites, labels, strict=True)):
        cells = (_td(data, shown, site, head, n == head == 0) for head in range(widths[site]))
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>')
    name = f"Heads of {escape(title or 'every site')}: a row for each layer"
    caption = f"<caption>{escape(title)} × heads</caption>" if title else ""
    size = "map few" if max(widths.values()) <= FEW else "map"
    return (
        f'<div class="scroll"><table class="{size}" role="grid" aria-label="{name}">{caption}<thead><tr><td></td>'
        f"{ruler}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _td(data: Mapping[str, Any], shown: Sequence[Measure], site: str, head: int, first: bool) -> str:
    classes, letters = [], []
    for measure in shown:
        shade, sign = _at(measure.marks.get(site), head, ("", ""))
        if shade:
            classes.append(f"{measure.key}-{shade}")
        if sign:
            letters.append(f' data-{measure.key}="{sign}"')
    tip = escape("\n".join(head_facts(data, site, head)))
    return f'<td class="{" ".join(classes)}"{"".join(letters)} tabindex="{0 if first else -1}" title="{tip}"></td>'


def _at(row: Sequence[Any] | None, head: int, missing: Any) -> Any:
    return row[head] if row is not None and head < len(row) else missing


def head_facts(data: Mapping[str, Any], site: str, head: int) -> list[str]:
    """Lines of what is known of one head: its name, then a fact each."""
    lines = [f"{site}, head {head}"]
    plan = data.get("plan") or {}
    if (span := _at(plan.get("sites", {}).get(site), head, None)) is not None:
        said = next(known["label"] for known in plan["spans"] if known["choice"] == span["choice"])
        here = f"window {span['window']}" + (f", sink {span['sink']}" if span["sink"] else "")
        told = span["far"] in ("gone", "selected", "tokens") or span["dense"] or here in said
        lines.append(said if told else f"{said}; {here}")
        lines.append(visited_text(span, plan["lengths"]["planned"]) or f"{kept_text(span)} of the dense pairs kept")
    if profile := data.get("profile"):
        seen = _at(at_longest(profile["sites"])[site] if site in profile["sites"] else None, head, None)
        if seen is not None:
            low, high = seen["distance"]
            within = f"{low} to {high} tokens" if low < high else counted(high, "token")
            lines.append(f"half of its mass within {within}")
            lines.append(f"entropy {seen['entropy']:.3g} nats")
            if seen["ablation"] is not None:
                lines.append(f"removing it costs {seen['ablation']:.3g} nats per token")
    of = ((data.get("candidates") or {}).get("sites") or {}).get(site)
    if of is not None and head < len(of["chosen"]):
        harm = of["damage"][head][of["chosen"][head]]
        if harm is not None:
            lines.append(f"its choice costs {harm:.3g} nats per token")
    return lines


def _legends(shown: Sequence[Measure]) -> str:
    rows = []
    for measure in shown:
        chips = "".join(
            f'<span><i style="background:var(--r-{s});color:var(--t-{s})">{escape(sign)}</i>{escape(text)}</span>'
            for s, sign, text in measure.legend
        )
        unit = "" if measure.key == "choice" else f'<span class="soft">{escape(measure.unit)}</span>'
        rows.append(f'<div class="legend {measure.key}">{chips}{unit}</div>')
    return "".join(rows)


# What the script draws from


def _kinds(data: Mapping[str, Any]) -> list[str]:
    return list((data.get("plan") or {}).get("candidates") or {})


def _embedded(data: Mapping[str, Any], shown: Sequence[Measure], sites: Sequence[str]) -> dict[str, Any]:
    """Rows of everything are in the order of `sites`, which is that of the map; null where nothing is known."""
    found: dict[str, Any] = {
        "sites": list(sites),
        "measures": {
            m.key: {"unit": m.unit, "values": [[rounded(v) for v in m.values.get(s, ())] for s in sites]} for m in shown
        },
    }
    if plan := data.get("plan"):
        kinds = _kinds(data)
        found["kinds"] = [[kinds.index(h["candidate"]) for h in plan["sites"].get(site, ())] for site in sites]
    profile = data.get("profile")
    if profile and "distances" in profile["grid"]:
        rows = at_longest(profile["sites"])
        found["distances"] = profile["grid"]["distances"]
        found["mass"] = [[head.get("mass") for head in rows.get(site, ())] for site in sites]
    if curves := data.get("candidates") or (profile and _grid_curves(profile)):
        # The page says what a person reads first.
        found["choices"] = [{**choice, "choice": choice.get("label", choice["choice"])} for choice in curves["choices"]]
        found["unit"] = curves["unit"]
        for key in ("damage", "chosen"):
            found[key] = [curves["sites"].get(site, {}).get(key) for site in sites]
    return found


def _grid_curves(profile: Mapping[str, Any]) -> dict[str, Any] | None:
    """Without a plan there are no costs: the profile's own windows, in the shape of `candidates_json`."""
    grid = profile["grid"]
    every = at_longest(profile["sites"])
    key = "damage" if all(h["damage"] is not None for row in every.values() for h in row) else "moved"
    if not every or any(head[key] is None for row in every.values() for head in row):
        return None
    choices = [
        {"choice": f"sink {sink}, window {window}", "sink": sink, "window": window, "far": "", "cost": None}
        for sink in grid["sinks"] for window in grid["windows"]
    ]  # fmt: skip
    sites = {site: {"damage": [[rounded(v) for line in h[key] for v in line] for h in row], "chosen": None}
             for site, row in every.items()}  # fmt: skip
    return {"unit": "nats per token" if key == "damage" else "squared change of output", "choices": choices,
            "sites": sites}  # fmt: skip


def _unscripted() -> str:
    return f"<noscript>{soft(WITHOUT_SCRIPTS)}</noscript>"
