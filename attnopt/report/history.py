"""What each pass did to a graph, with the text before and after: a compiler's log.

print(attnopt.explain(model).history)          every pass, its time and node counts, and where kept a unified diff
attnopt.explain(model).history[4].diff()       one pass
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.ir import GraphReport
from attnopt.passes.graph_text import changes as differences

HOW_TO_KEEP = 'Texts were not kept. To see what changed, compile with options={"history": True} or set ATTNOPT_DEBUG=3.'


@dataclass(frozen=True)
class Change:
    """One pass over one graph. graph: its number in the explanation; milliseconds; nodes: counts before and after;
    before, after: the graph's text, equal where nothing changed and empty where texts were not kept."""

    graph: int
    name: str
    milliseconds: float
    nodes: tuple[int, int]
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)

    @property
    def changed(self) -> bool:
        """Whether the text is another; without texts, whether the number of nodes is."""
        return self.before != self.after if self.before or self.after else self.nodes[0] != self.nodes[1]

    def diff(self) -> str:
        """A unified diff of the text; empty where nothing changed."""
        return differences(self.before, self.after, self.name)

    def __str__(self) -> str:
        before, after = self.nodes
        counts = f"{before:5d} -> {after:5d} nodes" if before != after else f"{after:5d} nodes"
        return f"{self.name:20} {self.milliseconds:9.1f} ms  {counts}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with the diff in the place of the texts."""
        return {
            "graph": self.graph, "name": self.name, "milliseconds": self.milliseconds, "before": self.nodes[0],
            "after": self.nodes[1], "diff": self.diff(),
        }  # fmt: skip


class History(Sequence[Change]):
    """The passes over all graphs of an explanation, in order."""

    def __init__(self, reports: Sequence[GraphReport]) -> None:
        self.kept = any(report.source for report in reports)
        self._changes = tuple(change for n, report in enumerate(reports) for change in changes(n, report))

    def __len__(self) -> int:
        return len(self._changes)

    def __getitem__(self, index: Any) -> Any:
        return self._changes[index]

    def __str__(self) -> str:
        if not self._changes:
            return "No pass has run."
        lines: list[str] = []
        for n, change in enumerate(self._changes):
            if n == 0 or self._changes[n - 1].graph != change.graph:
                lines.append(f"graph {change.graph}")
            lines.append(f"  {change}")
            lines += [f"    {line}" for line in change.diff().splitlines()]
        return "\n".join(lines if self.kept else [*lines, HOW_TO_KEEP])

    __repr__ = __str__


def changes(index: int, report: GraphReport) -> Iterator[Change]:
    text = report.source
    for step in report.history:
        before, text = text, step.text or text
        yield Change(index, step.name, step.milliseconds, (step.before, step.after), before, text)
