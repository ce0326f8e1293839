"""What a bisection found, on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import short_source
from attnopt.report.terminal.console import console, table

MEANING = {
    "nothing": "Nothing is broken: the output is right with every rewrite.",
    "without": "The output is wrong without any rewrite too: not attnopt's rewrites break it.",
}
LEADS = "the first rewrite of its graph, with which the graph's normalised form comes in too"


def print_bisection(data: dict[str, Any], to: Console | None = None) -> None:
    """The verdict, the rewrite that breaks the output, and every trial."""
    to = to or console()
    measured = "tolerance" in data
    listed = table(["rewrites", *(["difference"] if measured else []), "output"], right=("rewrites", "difference"))
    for trial in sorted(data["trials"], key=lambda t: (t["fuel"] is None, t["fuel"] or 0)):
        allowed = f"all {trial['made'] or ''}".strip() if trial["fuel"] is None else str(trial["fuel"])
        state = Text("right", style="green") if trial["good"] else Text("wrong", style="red")
        listed.add_row(allowed, *([_figure(trial["difference"])] if measured else []), state)
    culprit = data["culprit"]
    to.print(Text(MEANING.get(data["verdict"]) or f"Rewrite {culprit['number']} breaks the output.", style="bold"))
    for rewrite in culprit["rewrites"] if culprit else ():
        became = rewrite["lowering"] + (f" ({rewrite['note']})" if rewrite["note"] else "")
        facts = {"site": rewrite["site"], "became": became, "source": short_source(rewrite["source"])}
        facts |= {"which is": LEADS} if rewrite["leads"] else {}
        for name, value in facts.items():
            to.print(Text(f"  {name:<10}{value}"))
    to.print(listed)
    if measured:
        said = f"difference: the worst token's logits, relative to {data['reference']}; eager's own is "
        to.print(Text(f"{said}{_figure(data['eager_difference'])}, the tolerance {data['tolerance']:.2g}", style="dim"))
    wrong = next((t["said"] for t in data["trials"] if not t["good"] and t["said"]), "")
    if wrong:
        to.print(Text("The end of what a wrong run said:", style="dim"))
        to.print(Text(wrong.rstrip()))


def _figure(difference: float | None) -> str:
    return "not finite" if difference is None else f"{difference:.2g}"
