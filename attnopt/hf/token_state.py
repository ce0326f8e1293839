"""What a layer of a SpanCache holds beside keys and values where heads select tokens: what they selected, and when."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt import ops  # noqa: F401  registers attnopt::attend_tokens
from attnopt.cache import Layout, TokenTable

attend = torch.ops.attnopt.attend_tokens.default
# The tensors that have a row for each row of the batch.
STATE = ("picked", "asked", "age", "chosen", "labels")


class TokenState:
    """picked int32 (B, H, K), asked (B, H, D), age int32 (B, H): what each head selected, the query that did and steps
    since, -1 for nothing. chosen int64 (B, G, R), labels (B, R, S): the features that weigh most, and these of every
    key. sources: the states that heads of this layer read."""

    def __init__(self, table: TokenTable, sources: list[TokenState]) -> None:
        self.table, self.sources = table, sources

    def allocate(self, layout: Layout, keys: Tensor) -> None:
        """Beside keys (B, S, D), on their device and in their dtype."""
        rows, slots, dim = keys.shape
        heads, groups = len(self.table.rules), len(layout.starts)
        whole, own = dict(dtype=torch.int32, device=keys.device), dict(dtype=keys.dtype, device=keys.device)
        self.picked = torch.full((rows, heads, min(self.table.most, layout.length)), -1, **whole)
        self.asked = torch.zeros(rows, heads, dim, **own)
        self.age = torch.full((rows, heads), -1, **whole)
        features = min(self.table.features, dim)
        self.chosen = torch.arange(features, device=keys.device).repeat(rows, groups, 1)
        self.labels = torch.zeros(rows, features, slots, **own)
        self._tables(layout, keys.device)

    def _tables(self, layout: Layout, device: torch.device) -> None:
        self.rules, self.similar = self.table.tensors(layout.length, device)
        self.quick = self.table.quick(layout, device)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in (*STATE, "rules", "similar", "quick")]

    @property
    def nbytes(self) -> int:
        """Bytes of what has a row for each row of the batch."""
        return sum(x.numel() * x.element_size() for x in (getattr(self, name) for name in STATE))

    def forget(self) -> None:
        """Nothing is selected any more: the next step selects anew."""
        self.age.fill_(-1)

    def reorder(self, rows: Tensor) -> None:
        for name in STATE:
            x = getattr(self, name)
            x.copy_(x.index_select(0, rows.to(x.device)))

    def rebatch(self, rows: Any) -> None:
        for name in STATE:
            setattr(self, name, rows(getattr(self, name)))

    def move(self, before: Layout, layout: Layout) -> None:
        """Go on with a layout for more tokens; a position stays what it is."""
        rows, heads, held = self.picked.shape
        picked = self.picked.new_full((rows, heads, min(self.table.most, layout.length)), -1)
        picked[..., :held] = self.picked
        labels = self.labels.new_zeros(rows, self.labels.shape[1], layout.slots)
        for old, new, capacity in zip(before.starts, layout.starts, before.capacities, strict=True):
            labels[..., new : new + capacity] = self.labels[..., old : old + capacity]
        self.picked, self.labels = picked, labels
        self.forget()
        self._tables(layout, labels.device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None,
        table: Tensor, spans: Tensor, scale: float, fresh: bool,
    ) -> Tensor:  # fmt: skip
        """attnopt::attend_update of the layer, with what is selected."""
        sources = [source.picked for source in self.sources]
        state = self.rules, self.similar, self.picked, self.asked, self.age, sources, self.chosen, self.labels
        out: Tensor = attend(q, k, v, keys, values, n, valid, table, self.quick, spans, *state, scale, fresh)
        return out
