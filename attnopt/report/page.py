"""One self-contained HTML page: no script, nothing loaded from anywhere, readable on a phone, light and dark.

    write_page(path, {"title": ..., "summary": [...], "graphs": graphs_json(...), "plan": plan_json(...), ...})

Every key is optional; a section appears when its data does. The figures on the page are those of the JSON data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from zlib import crc32

from attnopt.codegen.emit import write_atomically
from attnopt.report import figures
from attnopt.report.cells import bucket, cell_text, far_sign, is_number, letter
from attnopt.report.data import plan_facts

LIMIT = 1_900_000  # bytes; a larger page leaves its largest optional parts out and says so
NO_MATPLOTLIB = "Charts are left out: matplotlib is not installed."
STEPS = 8  # shades of a map

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2128;--soft:#59636e;--line:#d1d9e0;--fill:#f6f8fa;--dense:#aab4c0}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--fill:#151b23;
--dense:#59636e}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}td.n,th.n{text-align:right;
font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--soft)}dd{margin:0;
overflow-wrap:anywhere}
@media(max-width:35rem){dl{display:block}dd{margin-bottom:.5rem}}
code,pre{font:13px/1.45 ui-monospace,monospace}pre{overflow-x:auto;background:var(--fill);padding:.8rem;
border:1px solid var(--line)}
details{margin:.4rem 0}summary{cursor:pointer}figure{display:inline-block;margin:.5rem .8rem .5rem 0;max-width:100%}
figcaption,.soft{color:var(--soft);font-size:.9rem}svg{max-width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.map td{border:1px solid var(--bg);padding:0;width:1.15rem;min-width:1.15rem;height:1.15rem;text-align:center;
font-size:.7rem;color:#111}.map th{border:0;padding:0 .5rem 0 0;font-weight:400;font-size:.85rem;white-space:nowrap}
.key{display:inline-block;min-width:1.2rem;text-align:center;color:#111;font-size:.75rem;margin:0 .3rem 0 .8rem}
.s0{background:#1a9850}.s1{background:#53ae5d}.s2{background:#8cc665}.s3{background:#c3d968}.s4{background:#f0d95f}
.s5{background:#fdb44f}.s6{background:#f4793c}.s7{background:#e0604c}.dense{background:var(--dense)}
.far-linear{background:#a98be0}.far-mean{background:#63b0e8}.far-gone{background:#f2f2f2}
"""

# A part of a section: its HTML, and what to call it if it must be left out (empty: it stays).
Part = tuple[str, str]


def write_page(path: Path | str, data: Mapping[str, Any]) -> Path:
    """Write the page of `data`, whose keys are those of `SECTIONS` and "title"; a reader never sees half of it."""
    path = Path(path)
    write_atomically(path, render(data))
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page's text, under `LIMIT` bytes as long as its tables are."""
    sections = [(heading, make(data)) for key, heading, make in SECTIONS if data.get(key)]
    parts = [part for _, own in sections for part in own]
    left_out: list[str] = []
    size = sum(len(text.encode("utf-8", "replace")) for text, _ in parts) + len(STYLE)
    for text, name in sorted((p for p in parts if p[1]), key=lambda p: -len(p[0])):
        if size <= LIMIT:
            break
        size -= len(text.encode("utf-8", "replace"))
        left_out.append(name)
    body = []
    for heading, own in sections:
        body.append(f"<section><h2>{escape(heading)}</h2>")
        body += [text if name not in left_out else _soft(f"Left out for its size: {name}.") for text, name in own]
        body.append("</section>")
    title = escape(str(data.get("title") or "attnopt"))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    # A name may hold what UTF-8 cannot.
    return page.encode("utf-8", "replace").decode("utf-8")


# Pieces


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _facts(rows: Iterable[tuple[Any, Any]]) -> str:
    cells = (f"<dt>{escape(str(label))}</dt><dd>{escape(_plain(value))}</dd>" for label, value in rows)
    return f"<dl>{''.join(cells)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else cell_text(value)


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """columns: (key, heading). Numbers are aligned right; a key that no row holds a value for has no column."""
    columns = [(key, text) for key, text in columns if any(row.get(key) not in (None, "") for row in rows)]
    numeric = {key for key, _ in columns if all(is_number(row.get(key)) or row.get(key) in (None, "") for row in rows)}

    right = ' class="n"'

    def cell(tag: str, key: str, text: str) -> str:
        return f"<{tag}{right if key in numeric else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", key, text) for key, text in columns)
    body = "".join(f"<tr>{''.join(cell('td', k, _plain_cell(row.get(k))) for k, _ in columns)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain_cell(value: Any) -> str:
    return _plain(value) if isinstance(value, (Mapping, list, tuple)) else cell_text(value)


def _map(rows: Mapping[str, Sequence[tuple[str, str, str]]], legend: Iterable[tuple[str, str, str]]) -> str:
    """rows: site -> one (class, letter, tooltip) per head. legend: (class, letter, meaning)."""
    lines = []
    for site, cells in rows.items():
        tds = (f'<td class="{c}" title="{escape(tip)}">{escape(sign)}</td>' for c, sign, tip in cells)
        lines.append(f"<tr><th>{escape(site)}</th>{''.join(tds)}</tr>")
    keys = (f'<span class="key {c}">{escape(sign)}</span>{escape(text)}' for c, sign, text in legend)
    return (
        f'<div class="scroll"><table class="map"><tbody>{"".join(lines)}</tbody></table></div>'
        f'<p class="soft">{"".join(keys)}</p>'
    )


def _shade(share: float) -> str:
    return f"s{min(int(max(share, 0.0) * STEPS), STEPS - 1)}"


def _figure(caption: str, svg: str) -> str:
    prefix = f"f{crc32(caption.encode('utf-8', 'replace'))}"
    return f"<figure>{figures.inline(svg, prefix)}<figcaption>{escape(caption)}</figcaption></figure>"


# Sections: data of the whole page -> parts


def _summary(data: Mapping[str, Any]) -> list[Part]:
    return [(_facts(data["summary"]), "")]


def _notes(data: Mapping[str, Any]) -> list[Part]:
    return [("<ul>" + "".join(f"<li>{escape(str(note))}</li>" for note in data["notes"]) + "</ul>", "")]


SITE_COLUMNS = [
    ("site", "site"), ("layers", "layers"), ("pattern", "pattern"), ("heads", "heads"), ("dim", "dim"),
    ("dtype", "dtype"), ("mask", "keeps"), ("state", "state"), ("done", "by"), ("why", "note or reason"),
    ("op", "operation"), ("source", "source"), ("page", "explained in"),
]  # fmt: skip


def _graphs(data: Mapping[str, Any]) -> list[Part]:
    graphs = data["graphs"]
    rows, counts = graphs["rows"], graphs["counts"]
    parts = [(_facts((name.replace("_", " "), value) for name, value in counts.items()), "")]
    done = [row for row in rows if row["state"] == "rewritten"]
    if done:
        parts.append(("<h3>Rewritten</h3>" + _table(SITE_COLUMNS, done), ""))
    rest = [row for row in rows if row["state"] != "rewritten"]
    if rest:
        parts.append(("<h3>Left alone, and why</h3>" + _table(SITE_COLUMNS, rest), ""))
    notes = dict.fromkeys(note for graph in graphs["graphs"] for note in graph["notes"])
    parts += [(_soft(note), "") for note in notes]
    times = [{"pass": name, "ms": ms} for name, ms in graphs["pass_milliseconds"].items()]
    if times:
        parts.append(("<h3>Passes</h3>" + _table([("pass", "pass"), ("ms", "milliseconds, all graphs")], times), ""))
    return parts


def _plan(data: Mapping[str, Any]) -> list[Part]:
    plan = data["plan"]
    length = plan["lengths"]["planned"]
    top = max(length.bit_length(), 1)
    buckets = sorted({bucket(span["window"]) for span in plan["spans"] if not span["dense"] and not span["far"]})

    def cell(site: str, head: int, span: Mapping[str, Any]) -> tuple[str, str, str]:
        tip = f"{site} head {head}: {span['choice']}, {100 * span['kept']:.1f} % kept"
        if span["far"]:
            return f"far-{span['far']}", far_sign(span), tip
        if span["dense"]:
            return "dense", "", tip
        size = bucket(span["window"])
        tip += f", sink {span['sink']}, window {span['window']}"
        return _shade(size / top), letter(buckets.index(size)), tip

    rows = {site: [cell(site, n, head) for n, head in enumerate(heads)] for site, heads in plan["sites"].items()}
    legend = [(_shade(b / top), letter(n), f"window <= {1 << b}") for n, b in enumerate(buckets)]
    fars = {s["candidate"]: (f"far-{s['far']}", far_sign(s), s["candidate"]) for s in plan["spans"] if s["far"]}
    legend += fars.values()
    spans = [
        {"choice": s["choice"], "heads": s["heads"], "sink": s["sink"],
         "window": "none" if s["far"] == "gone" else "all" if s["dense"] else s["window"],
         "kept": f"{100 * s['kept']:.1f} %"}
        for s in plan["spans"]
    ]  # fmt: skip
    columns = [(key, key) for key in ("choice", "heads", "sink", "window", "kept")]
    return [
        (_facts([("plan", plan["id"]), *plan_facts(plan)]), ""),
        (f"<h3>Heads at {length} tokens</h3>" + _map(rows, [*legend, ("dense", "", "dense")]), "the map of the plan"),
        ("<h3>Spans</h3>" + _table(columns, spans), ""),
    ]


def _profile(data: Mapping[str, Any]) -> list[Part]:
    profile = data["profile"]
    grid = profile["grid"]
    columns = [(key, key) for key in ("length", "samples", "rows")]
    facts = [("model", profile["fingerprint"]), ("windows", grid["windows"]), ("sinks", grid["sinks"]),
             ("dtypes", profile["dtypes"])]  # fmt: skip
    parts = [(_facts(facts) + _table(columns, profile["lengths"]), "")]
    heads = {site: by_length[max(by_length, key=int)] for site, by_length in profile["sites"].items()}
    if heads:
        top = max(row["length"] for row in profile["lengths"]).bit_length()
        starts = sorted({head["distance"][0] for row in heads.values() for head in row})
        rows = {site: [_distance_cell(site, h, starts, top) for h in row] for site, row in heads.items()}
        ends = {head["distance"][0]: head["distance"][1] for row in heads.values() for head in row}
        legend = [(_shade(s.bit_length() / top), letter(n), f"<= {ends[s]}") for n, s in enumerate(starts)]
        parts.append(("<h3>Half of the mass lies within</h3>" + _map(rows, legend), "the map of distances"))
        parts.append(("<h3>Damage of removing the head</h3>" + _ablation(heads), "the map of removed heads"))
    if profile["worst"]:
        first = profile["worst"][0]
        heading = f"Most damaged beyond a window of {first['window']} (sink {first['sink']} kept)"
        worst = [("site", "site"), ("head", "head"), ("length", "length"), ("nats_per_token", "nats per token")]
        parts.append((f"<h3>{heading}</h3>" + _table(worst, profile["worst"]), ""))
    if figures.available():
        charts = figures.damage_figures(profile)
        parts += [(_figure(caption, svg), f"the chart {caption}") for caption, svg in charts.items()]
    else:
        parts.append((_soft(NO_MATPLOTLIB), ""))
    return parts


def _distance_cell(site: str, head: Mapping[str, Any], starts: list[int], top: int) -> tuple[str, str, str]:
    low, high = head["distance"]
    tip = f"{site} head {head['head']}: {low} to {high} tokens, entropy {head['entropy']:.3g} nats"
    return _shade(low.bit_length() / top), letter(starts.index(low)), tip


def _ablation(heads: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Ranked, since the sizes span many orders: eight classes of as many heads each."""
    if any(head["ablation"] is None for row in heads.values() for head in row):
        return _soft("Removing heads was not weighed: the profile was made without a backward pass.")
    values = sorted(head["ablation"] for row in heads.values() for head in row)
    place = {value: n / len(values) for n, value in enumerate(values)}
    rows = {
        site: [
            (_shade(place[h["ablation"]]), "", f"{site} head {h['head']}: {h['ablation']:.3g} nats per token")
            for h in row
        ]
        for site, row in heads.items()
    }
    bounds = [values[min(n * len(values) // STEPS, len(values) - 1)] for n in range(STEPS)]
    return _map(rows, [(f"s{n}", "", f"from {bound:.2g}") for n, bound in enumerate(bounds)])


RECORD_COLUMNS = [
    ("step", "step"), ("predicted", "predicted, nats per token"), ("cost", "cost"), ("increase", "measured increase"),
    ("upper_95", "at most (95 %)"), ("length", "length"), ("verdict", "budget"),
]  # fmt: skip


def _records(data: Mapping[str, Any]) -> list[Part]:
    records = [
        {**r, "upper_95": "no bound" if r.get("upper_95") is None else r["upper_95"],
         "verdict": "holds" if r.get("holds") else "misses"}
        for r in data["records"]
    ]  # fmt: skip
    parts = [(_table(RECORD_COLUMNS, records), "")]
    budget = (data.get("plan") or {}).get("budget", {})
    if not figures.available():
        return [*parts, (_soft(NO_MATPLOTLIB), "")]
    chart = figures.search_figure(data["records"], budget.get("limit"), budget.get("unit", ""))
    return [*parts, (_figure("Predicted against measured", chart), "the chart of the search")] if chart else parts


def _bench(data: Mapping[str, Any]) -> list[Part]:
    columns = dict.fromkeys(name for row in data["bench"] for name in row)
    return [(_table([(name, name.replace("_", " ")) for name in columns], data["bench"]), "")]


def _kernels(data: Mapping[str, Any]) -> list[Part]:
    return [
        (f"<details><summary><code>{escape(name)}</code></summary><pre>{escape(source)}</pre></details>",
         f"kernel {name}")
        for name, source in data["kernels"].items()
    ]  # fmt: skip


def _figures(data: Mapping[str, Any]) -> list[Part]:
    return [(_figure(caption, svg), f"the figure {caption}") for caption, svg in data["figures"].items()]


def _environment(data: Mapping[str, Any]) -> list[Part]:
    return [(_facts(data["environment"].items()), "")]


SECTIONS: list[tuple[str, str, Callable[[Mapping[str, Any]], list[Part]]]] = [
    ("summary", "Summary", _summary),
    ("notes", "Notes", _notes),
    ("graphs", "What was compiled", _graphs),
    ("plan", "Plan", _plan),
    ("profile", "Profile", _profile),
    ("records", "Search on the verify split", _records),
    ("bench", "Benchmark", _bench),
    ("figures", "Figures", _figures),
    ("kernels", "Emitted kernels", _kernels),
    ("environment", "Environment", _environment),
]
