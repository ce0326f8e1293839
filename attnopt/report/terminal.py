"""What attnopt says on a terminal. Reports go to standard output, progress and errors to standard error.

Everything printed comes from the data of report.data, so that a table, --json and the page never differ. Text of the
user's own (module names, reasons) is never read as markup.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnopt.errors import AttnoptError
from attnopt.ir import GraphReport
from attnopt.plan import Plan
from attnopt.planner.verify import Record
from attnopt.profile_file import Profile
from attnopt.report import data
from attnopt.report.cells import bucket, cell_text, far_sign, is_number, letter, short_labels
from attnopt.report.profile_map import FIRST_KEYS, MOSTLY, NEAR

WIDTH = 140  # of tables that go to a file or a pipe, where no terminal says how wide it is
WIDE = 40  # from so many heads on, a cell of a map is one column and not two
# From narrow to wide, readable on dark and light alike; dense stands apart.
RAMP = ("#1a9850", "#53ae5d", "#8cc665", "#c3d968", "#f0d95f", "#fdb44f", "#f4793c", "#d7402b")
DENSE_COLOUR = "#707a8a"
FAR_COLOURS = {"linear": "#a98be0", "mean": "#63b0e8", "gone": "#f2f2f2"}
STATES = {"rewritten": "green", "left alone": "yellow", "not recognised": "red"}


def console(stderr: bool = False) -> Console:
    """A console that reads no markup; NO_COLOR and COLUMNS are honoured."""
    stream = sys.stderr if stderr else sys.stdout
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and not encoding.startswith("utf"):
        reconfigure(errors="replace")  # a module's name must not end the program
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDTH
    return made


Advance = Callable[..., None]


@contextmanager
def progress(description: str, total: float | None = None, force: bool = False) -> Iterator[Advance]:
    """A transient bar on standard error, on a terminal or with `force`; yields ``advance(n=1, text=None)``.

    total: None for a bar without an end. text: replaces the description.
    """
    target = console(stderr=True)
    if not target.is_terminal:
        if not force:
            yield lambda n=1, text=None: None
            return
        target = Console(stderr=True, markup=False, emoji=False, highlight=False, force_terminal=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=target, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(n: float = 1, text: str | None = None) -> None:
            bar.update(task, advance=n, description=description if text is None else text)

        yield advance


def print_error(error: AttnoptError, to: Console | None = None) -> None:
    """The problem in red, what to do about it below."""
    to = to or console(stderr=True)
    to.print(Text(error.problem, style="bold red"), soft_wrap=True)
    if error.remedy:
        to.print(Text("  " + error.remedy), soft_wrap=True)


def _table(columns: Iterable[str], right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numeric = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", overflow="fold")
    return table


def _titled(to: Console, title: str, table: Table) -> None:
    """A table under its title; rich would wrap a title of its own to the table's width."""
    to.print(Text(title, style="bold"))
    to.print(table)


# Graphs


def print_graphs(reports: Sequence[GraphReport], to: Console | None = None) -> None:
    """Every site, what was done to it or why not; equal layers together."""
    to = to or console()
    found = data.graphs_json(reports)
    counts = found["counts"]
    rows = found["rows"]
    title = (
        f"{_count(counts['sites'], 'attention')} in {_count(counts['graphs'], 'graph')}: {counts['rewritten']} "
        f"rewritten, {counts['left_alone']} left alone, {counts['not_recognised']} not recognised"
    )
    if not rows:
        to.print(Text(title, style="bold"))
        to.print("No attention was found in what was compiled." if reports else "Nothing was compiled.")
    else:
        several = any(row["graphs"] > 1 for row in rows)
        table = _table(["site", "pattern", "heads", "dim", "keeps", "done", "why"] + ["graphs"] * several)
        for row in rows:
            name = row["site"] + (f" ×{row['layers']}" if row["layers"] > 1 else "")
            done = Text(row["done"] or row["state"], style=STATES[row["state"]])
            why = row["why"]
            at = " at ".join(filter(None, (row["op"], row["source"])))
            place = "; ".join(filter(None, (at, row["page"])))
            if place and (row["state"] != "rewritten" or row["page"]):
                why += f" ({place})"
            cells = [name, row["pattern"], row["heads"], row["dim"], row["mask"], done, why]
            table.add_row(*cells, *([str(row["graphs"])] if several else []))
        _titled(to, title, table)
    for note in dict.fromkeys(note for graph in found["graphs"] for note in graph["notes"]):
        to.print(Text("note: " + note, style="yellow"))
    times = found["pass_milliseconds"]
    if times:
        each = ", ".join(f"{name} {ms:.1f}" for name, ms in times.items())
        to.print(Text(f"passes {sum(times.values()):.1f} ms: {each}", style="dim"))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")


# Maps of heads: a letter and a colour per head, so that a map without colour still reads


def _map(to: Console, rows: Mapping[str, Sequence[tuple[str, str]]], columns: str = "heads") -> None:
    """One line per site, one cell (letter, colour) per head, or of what `columns` are."""
    title, labels = short_labels(list(rows))
    wide = 1 if max(map(len, rows.values()), default=0) > WIDE else 2
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right")
    grid.add_column(overflow="fold")
    if title:
        to.print(Text(f"{title} × {columns}", style="dim"))
    for label, cells in zip(labels, rows.values(), strict=True):
        line = Text()
        for sign, colour in cells:
            line.append(sign.ljust(wide), style=f"black on {colour}")
        grid.add_row(Text(label), line)
    to.print(grid)


def _legend(to: Console, entries: Iterable[tuple[str, str, str]]) -> None:
    line = Text()
    for sign, colour, meaning in entries:
        line.append(f" {sign} ", style=f"black on {colour}")
        line.append(f" {meaning}   ")
    to.print(line)


def _ramp(share: float) -> str:
    return RAMP[min(int(max(share, 0.0) * len(RAMP)), len(RAMP) - 1)]


# Plan


def print_plan(plan: Plan, to: Console | None = None) -> None:
    """Figures, a map of layers × heads, and the distinct spans with their counts."""
    to = to or console()
    found = data.plan_json(plan)
    grid = Table.grid(padding=(0, 2))
    for label, value in data.plan_facts(found):
        grid.add_row(Text(label, style="dim"), Text(value))
    to.print(Text(f"plan {found['id']}", style="bold"))
    to.print(grid)
    to.print()
    length = found["lengths"]["planned"]
    buckets = sorted({bucket(span["window"]) for span in found["spans"] if not span["dense"] and not span["far"]})
    top = max(bucket(length), 1)

    def cell(head: Mapping[str, Any]) -> tuple[str, str]:
        if head["far"]:
            return far_sign(head), FAR_COLOURS[head["far"]]
        if head["dense"]:
            return "#", DENSE_COLOUR
        size = bucket(head["window"])
        return letter(buckets.index(size)), _ramp(size / top)

    _map(to, {name: [cell(head) for head in heads] for name, heads in found["sites"].items()})
    entries = [(letter(n), _ramp(b / top), f"window <= {1 << b}") for n, b in enumerate(buckets)]
    fars = {s["candidate"]: (far_sign(s), FAR_COLOURS[s["far"]], s["candidate"]) for s in found["spans"] if s["far"]}
    _legend(to, [*entries, *fars.values(), ("#", DENSE_COLOUR, "dense")])
    right = ("heads", "sink", "window", "kept")
    table = _table(["choice", "heads", "sink", "window", "kept"], right)
    for span in found["spans"]:
        window = "none" if span["far"] == "gone" else "all" if span["dense"] else str(span["window"])
        table.add_row(span["choice"], str(span["heads"]), str(span["sink"]), window, f"{100 * span['kept']:.1f} %")
    _titled(to, f"Spans at {length} tokens", table)


# Profile


def print_profile(profile: Profile, to: Console | None = None) -> None:
    """Text seen, where each head's mass lies, what removing a head costs, and who needs distance most."""
    to = to or console()
    found = data.profile_json(profile)
    grid = found["grid"]
    to.print(Text(f"profile of model {found['fingerprint']}", style="bold"))
    to.print(f"windows {_numbers(grid['windows'])}; sinks {_numbers(grid['sinks'])}; {', '.join(found['dtypes'])}")
    to.print(f"loss of {'; '.join(found['supervision'])}")
    columns = ("length", "samples", "rows", "tokens")
    table = _table(columns, columns)
    for row in found["lengths"]:
        table.add_row(*(f"{row[name]:g}" if name == "tokens" else str(row[name]) for name in columns))
    to.print(table)
    if not found["sites"]:
        to.print("The profile holds no site.")
        return
    heads = {site: by_length[max(by_length, key=int)] for site, by_length in found["sites"].items()}
    totals = found["totals"]
    to.print(
        f"{totals['heads']} heads: {totals['local_heads']} with {MOSTLY:.0%} of their mass within {NEAR} tokens, "
        f"{totals['sink_heads']} with half of it on the first {FIRST_KEYS} keys; "
        f"mean {totals['local']:.0%} and {totals['sink']:.0%}, entropy {totals['entropy']:.2f} nats"
    )
    _distance_map(to, heads, max(row["length"] for row in found["lengths"]))
    _share_map(to, f"Share of mass on the first {FIRST_KEYS} keys",
               {site: [head["sink"] for head in row] for site, row in heads.items()})  # fmt: skip
    nats = all(head["ablation"] is not None for row in heads.values() for head in row)
    if nats:
        _ablation_map(to, heads)
    _most_damaged(to, found["worst"], "the text", "nats per token" if nats else "squared change of the output per row")
    _most_damaged(to, found["recalling"], "answers about lines far above", "nats per token of them, softened")
    alike = found["similarity"]
    if len(alike["sites"]) > 1:
        rows = dict(zip(alike["sites"], alike["layers"], strict=True))
        _share_map(to, "How alike layers attend: mean cosine of their heads", rows, "layers")
        for pair in alike["alike"][:3]:
            to.print(Text(f"{pair['one']} and {pair['other']}: {pair['cosine']:.3f}", style="dim"))


def _most_damaged(to: Console, worst: Sequence[Mapping[str, Any]], what: str, unit: str) -> None:
    if not worst:
        return
    table = _table(["site", "head", "length", "damage"], ("head", "length", "damage"))
    for row in worst:
        table.add_row(row["site"], str(row["head"]), str(row["length"]), f"{row['nats_per_token']:.3g}")
    beyond = f"beyond a window of {worst[0]['window']} (sink {worst[0]['sink']} kept)"
    _titled(to, f"Most damaged {beyond}, of {what}, {unit}", table)


def _share_map(to: Console, title: str, rows: Mapping[str, Sequence[float]], columns: str = "heads") -> None:
    """Shares of 1 by tenths: a under 0.1, j from 0.9 on."""

    def tenth(share: float) -> int:
        return min(int(max(share, 0.0) * 10), 9)

    to.print(Text(title, style="bold"))
    _map(
        to, {name: [(letter(tenth(x)), _ramp(tenth(x) / 10)) for x in values] for name, values in rows.items()}, columns
    )
    seen = sorted({tenth(x) for values in rows.values() for x in values})
    _legend(to, [(letter(n), _ramp(n / 10), f"from {n / 10:g}" if n else "under 0.1") for n in seen])
    to.print()


def _distance_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]], length: int) -> None:
    starts = sorted({head["distance"][0] for row in heads.values() for head in row})
    top = max(length.bit_length(), 1)
    colour = {start: _ramp(start.bit_length() / top) for start in starts}
    to.print(Text("Half of the mass lies within this distance", style="bold"))
    _map(to, {site: [(letter(starts.index(h["distance"][0])), colour[h["distance"][0]]) for h in row]
              for site, row in heads.items()})  # fmt: skip
    ends = {head["distance"][0]: head["distance"][1] for row in heads.values() for head in row}
    _legend(to, [(letter(n), colour[s], f"<= {ends[s]}") for n, s in enumerate(starts)])
    to.print()


def _ablation_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Letters by powers of ten: what matters between heads is the order of size."""
    powers = sorted({_power(head["ablation"]) for row in heads.values() for head in row})
    least = powers[0]
    colour = {p: _ramp((p - least) / max(powers[-1] - least, 1) * 0.999) for p in powers}
    to.print(Text("Damage of removing the head, nats per token", style="bold"))
    _map(to, {site: [(letter(powers.index(_power(h["ablation"]))), colour[_power(h["ablation"])]) for h in row]
              for site, row in heads.items()})  # fmt: skip
    _legend(to, [(letter(n), colour[p], f"< 1e{p + 1}") for n, p in enumerate(powers)])
    to.print()


def _power(value: float) -> int:
    """Floor of the decimal logarithm; everything under 1e-12 counts as nothing."""
    return math.floor(math.log10(max(value, 1e-12)))


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


# Search, benchmark, candidates


def print_records(records: Sequence[Record], to: Console | None = None) -> None:
    """The verify search, one line per evaluation."""
    to = to or console()
    numeric = ("predicted", "cost", "increase", "at most", "length")
    table = _table(["step", *numeric, "budget"], numeric)
    for record in records:
        worst = record.worst
        verdict = Text("holds", style="green") if record.holds else Text("misses", style="red")
        figures = (f"{record.predicted:.3g}", f"{record.cost:.4g}", f"{worst.increase:.4g}", f"{worst.upper_95:.4g}")
        table.add_row(record.step, *figures, str(worst.length), verdict)
    _titled(to, "Search on the verify split", table)


def print_bench(rows: Sequence[Mapping[str, Any]], title: str = "Benchmark", to: Console | None = None) -> None:
    """Rows of whatever columns they hold, in the order of first appearance; numbers to four digits."""
    to = to or console()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numeric = [c for c in columns if any(is_number(row.get(c)) for row in rows)]
    table = _table([c.replace("_", " ") for c in columns], [c.replace("_", " ") for c in numeric])
    for row in rows:
        table.add_row(*(cell_text(row.get(c)) for c in columns))
    _titled(to, title, table)


def print_candidates(rows: Sequence[Mapping[str, Any]], title: str = "Candidates", to: Console | None = None) -> None:
    """Rows {choice, damage, cost, chosen, why} of one head, nats per token and what `title` says of costs; the chosen
    one marked."""
    to = to or console()
    table = _table(["", "choice", "damage (nats per token)", "cost", "why"], ("damage (nats per token)", "cost"))
    for row in rows:
        style = "bold green" if row.get("chosen") else ""
        cells = [cell_text(row.get(name)) for name in ("choice", "damage", "cost", "why")]
        table.add_row(">" if row.get("chosen") else "", *cells, style=style)
    _titled(to, title, table)
