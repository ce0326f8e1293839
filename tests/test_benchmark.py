"""The comparison of variants: each once per round, errors against the first, ratios to the baseline."""

from __future__ import annotations

import pytest
import torch
from models import tokens

from attnopt.benchmark import compare


def test_each_variant_is_called_in_turn_and_compared_with_the_first() -> None:
    called: list[str] = []

    def variant(name: str, factor: float):  # type: ignore[no-untyped-def]
        def call(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            called.append(name)
            return factor * torch.ones(*ids.shape, 3)

        return call

    calls = {"eager": variant("eager", 1.0), "attnopt exact": variant("attnopt exact", 1.5)}
    rows = compare(calls, tokens(1, 8), rounds=2, dtype="fp32")
    assert called == ["eager", "attnopt exact"] * 3
    assert [r.error for r in rows] == [0.0, pytest.approx(0.5)]
    assert rows[1].ratio == 1.0 and all(r.milliseconds > 0 and r.length == 8 for r in rows)


def test_padded_rows_do_not_count_as_errors() -> None:
    ids, mask = tokens(1, 8), torch.ones(1, 8, dtype=torch.long)
    mask[:, :2] = 0
    wrong_where_padded = torch.ones(1, 8, 3)
    wrong_where_padded[:, :2] = 7.0
    calls = {"eager": lambda i, m: torch.ones(1, 8, 3), "attnopt exact": lambda i, m: wrong_where_padded}
    assert [r.error for r in compare(calls, ids, mask, rounds=1)] == [0.0, 0.0]
