"""Tables of spans, of far parts, of selected blocks and of steps that select tokens, as one."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.cost.blocks import BlockTable
from attnopt.cost.far import FarTable
from attnopt.cost.steps import StepTable
from attnopt.cost.table import Costs


@dataclass(frozen=True)
class Joined:
    """A table of spans with those of other parts, where there are any. Times of blocks are told in the time of the
    table of spans: as many times dense as they were where they were timed."""

    spans: Costs
    far: FarTable | None = None
    blocks: BlockTable | None = None
    steps: StepTable | None = None

    @property
    def kind(self) -> str:
        return self.spans.kind

    @property
    def id(self) -> str:
        return "+".join(table.id for table in (self.spans, self.far, self.blocks, self.steps) if table is not None)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.spans.lengths

    @property
    def key_time(self) -> float | None:
        return self.spans.key_time if self.steps is None else self.steps.key_time(self.steps.lengths[-1])

    def cost(self, length: int, sink: int, window: int) -> float:
        return self.spans.cost(length, sink, window)

    def group_cost(self, length: int) -> float:
        return self.spans.group_cost(length)

    def far_cost(self, length: int, kind: str, rank: int) -> float:
        return self.spans.far_cost(length, kind, rank) if self.far is None else self.far.cost(length, kind, rank)

    def block_cost(self, length: int, block: int, visited: float, skipped: float) -> float:
        if self.blocks is None:
            return self.spans.block_cost(length, block, visited, skipped)
        return self._told(length) * self.blocks.cost(length, block, visited, skipped)

    def selection_cost(self, length: int, name: str, timed: tuple[float, ...], pairs: int) -> float:
        if self.blocks is None:
            return self.spans.selection_cost(length, name, timed, pairs)
        return self._told(length) * self.blocks.selection(length, name, timed)

    def scanned(self, length: int, features: int, dim: int) -> float:
        if self.steps is None:
            return self.spans.scanned(length, features, dim)
        return self.steps.scanned(length, features)

    def gathered(self, length: int, count: int) -> float:
        return self.spans.gathered(length, count) if self.steps is None else self.steps.gathered(length, count)

    def overhead(self, length: int) -> float:
        return self.spans.overhead(length) if self.steps is None else self.steps.overhead(length)

    def _told(self, length: int) -> float:
        assert self.blocks is not None
        return self.spans.cost(length, 0, length) / self.blocks.of_dense(length)
