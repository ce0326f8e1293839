"""docs/performance.md, between its markers, from benchmarks/results; ``python -m benchmarks document`` writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.planners.page import fill, markdown
from benchmarks.readers import read
from benchmarks.record import RESULTS, Aim, Run

PAGE = Path(__file__).parents[1] / "docs/performance.md"
FIGURES = PAGE.parent / "figures"
# Benchmark -> what its section is called and says. The order is that of the page.
TITLES = {
    "cpu_prefill": "CPU: prefill of per-head spans",
    "cpu_blocks": "CPU: prefill over lists of blocks",
    "cpu_backward": "CPU: gradients of per-head spans",
    "cpu_decode": "CPU: decoding with spans by KV head",
    "generate": "CPU: generation under a plan, end to end",
    "cpu_cache": "CPU: one step of a cache",
    "cpu_linear": "CPU: heads with a linear far part",
    "linear_decode": "CPU: decoding at equal loss, with and without far parts",
    "token_decode": "CPU: decoding that reads the tokens it selects",
    "exact_windows": "CPU: exact mode on windows and packed documents",
    "exact_decode": "CPU: exact mode, decoding from a static cache",
    "exact_append": "CPU: exact mode, decoding from a dynamic cache",
    "exact_prefill": "CPU: exact mode, class by class",
    "end_to_end": "CPU: the demo model end to end",
    "compile_cost": "The cost of compiling",
    "gpu": "GPU",
}
# Sections that have a page of their own: the class-by-class table is not repeated.
ELSEWHERE = {"exact_prefill": "[Exact mode](exact.md) has every class."}
# Times that a section shows beside its ratios.
TIMES = {"compile_cost": ("capture", "passes")}
# More rows than this are a table that nobody reads: the figure shows them, and the file has them.
MOST_ROWS = 60


def runs(folder: Path = RESULTS) -> dict[str, Run]:
    """Every recorded run that holds ratios, by the stem of its file, in the page's order."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read(path)
        except SystemExit:
            continue
    order = list(TITLES)
    return dict(sorted(found.items(), key=lambda kv: (order.index(kv[1].name) if kv[1].name in order else 99, kv[0])))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(run: Run) -> str:
    """A line for each case: its facts, ratios with their lower bounds, the error. WRONG instead of ratios of one."""
    rows = [row for row in run.rows if row.wrong or row.ratios]
    facts = list(dict.fromkeys(name for row in rows for name in row.case))
    names = list(dict.fromkeys(name for row in rows if not row.wrong for name in row.ratios))
    times = TIMES.get(run.name, ())
    lines = []
    for row in rows:
        cells = [shown(row.case.get(name, "")) for name in facts]
        for name in names:
            if row.wrong:
                cells.append("WRONG")
            elif name in row.ratios:
                low = row.lower.get(name)
                cells.append(shown(row.ratios[name]) + (f" (≥ {shown(low)})" if low is not None else ""))
            else:
                cells.append("")
        cells += ["WRONG" if row.wrong else f"{row.times_ms[name]:.0f}" for name in times]
        lines.append([*cells, f"{row.error:.0e}"])
    return markdown([*facts, *names, *(f"{name}, ms" for name in times), "error"], lines)


def machine(run: Run) -> str:
    """One sentence on where a run was made."""
    held = run.environment
    where = held.get("device") or (held.get("gpu") or [held.get("cpu")])[0]
    threads = held.get("threads")
    parts = [str(where), f"{threads} thread{'s' * (threads != 1)}" if threads else "", f"torch {held.get('torch')}"]
    parts += [f"triton {held['triton']}" if held.get("triton") else "", str(held.get("date") or "")]
    return ", ".join(filter(None, parts))


def geometric(run: Run) -> str:
    """Mean and worst of every ratio, where there are many rows."""
    by_name: dict[str, list[float]] = {}
    for row in run.rows:
        if not row.wrong:
            for name, value in row.ratios.items():
                by_name.setdefault(name, []).append(value)
    lines = [
        [name, str(len(v)), shown(math.exp(sum(map(math.log, v)) / len(v))), shown(min(v)), shown(max(v))]
        for name, v in by_name.items()
    ]
    return markdown(["times as fast as", "cases", "geometric mean", "least", "most"], lines)


def section(stem: str, run: Run, figures: Path) -> str:
    """A run's heading, machine, table, figure and notes."""
    timed = [row for row in run.rows if row.wrong or row.ratios]
    lines = [f"### {TITLES.get(run.name, run.name)}: `{stem}.json`", "", f"{machine(run)}.", ""]
    if run.name in ELSEWHERE:
        return "\n".join([*lines, geometric(run), "", ELSEWHERE[run.name], ""])
    lines += [table(run) if len(timed) <= MOST_ROWS else geometric(run), ""]
    if any(row.ratios for row in timed if not row.wrong):
        run.figure(figures / f"{stem}.svg")
        lines += [f"![ratios of every case](figures/{stem}.svg)", ""]
    lines += [f"- {note}" for note in run.notes]
    return "\n".join(lines).rstrip() + "\n"


def gpu_aims() -> list[Aim]:
    """What is aimed at on a GPU, as long as no run there is recorded."""
    from benchmarks.cuda import blocks, cache, decode, generation, prefill, tokens
    from benchmarks.spans import Sizes

    aims = [aim for dim in Sizes().dims for aim in prefill.aims([], dim, 16384)] + decode.aims([])
    return aims + blocks.aims([]) + cache.aims([]) + tokens.aims([]) + generation.aims([])


def aims_table(found: Sequence[tuple[str, Aim]]) -> str:
    lines = []
    for where, aim in found:
        sign = "≤" if aim.at_most else "≥"
        value = "" if aim.found is None else f"{aim.found:.3g}"
        verdict = f"**{aim.verdict}**" if aim.met is False else aim.verdict
        lines.append([f"{where}: {aim.what}", f"{sign} {aim.wanted:g}", value, verdict])
    return markdown(["what", "aim", "found", ""], lines)


def write(page: Path = PAGE, results: Path = RESULTS, figures: Path = FIGURES) -> None:
    """Fill both places of the page: the aims with what was found, and every recorded run."""
    held = runs(results)
    aims = [(TITLES.get(run.name, run.name).removeprefix("CPU: "), aim) for run in held.values() for aim in run.aims]
    if not any(run.name == "gpu" for run in held.values()):
        aims += [("GPU", aim) for aim in gpu_aims()]
    missed = sum(aim.met is False for _, aim in aims)
    counts = f"{sum(aim.met is True for _, aim in aims)} met, {missed} missed, " \
             f"{sum(aim.met is None for _, aim in aims)} unmeasured."  # fmt: skip
    fill(page, "aims", f"{counts}\n\n{aims_table(aims)}")
    fill(page, "results", "\n".join(section(stem, run, figures) for stem, run in held.items()))
    print(f"wrote {page.name} and the figures of {len(held)} runs: {counts}")
