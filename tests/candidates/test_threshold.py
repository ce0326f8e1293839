"""threshold: whole blocks of a span, of which small ones are skipped; what is skipped stays under its bound."""

from __future__ import annotations

import pytest
import torch
from candidates.degenerate import HEADS, SCALE, Degenerate, any_inputs
from candidates.selecting import asked_for, padded, visits_by

from attnopt.candidates import Number
from attnopt.candidates._selected import bounds_of
from attnopt.codegen.reference_blocks import prefill
from attnopt.registry import CANDIDATES

THRESHOLD = CANDIDATES["threshold"]
EVERY: dict[str, Number] = {"sink": 0, "window": 1 << 30, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("nothing is ever skipped", EVERY),
    Degenerate("sinks that reach everywhere", {**EVERY, "sink": 45, "window": 1}),
    Degenerate("a window of the model's own", EVERY, own_window=20),
]


@pytest.mark.parametrize("sink, window", [(0, 1), (1, 1), (16, 17), (17, 30), (0, 45), (5, 16)])
def test_blocks_of_the_span_are_visited_whole(sink: int, window: int) -> None:
    found = visits_by(THRESHOLD, {**EVERY, "sink": sink, "window": window})
    for r in range(3):
        for c in range(3):
            rows, columns = (range(n * 16, min(n * 16 + 16, 45)) for n in (r, c))
            inside = any(j <= i and (j < sink or i - j < window) for i in rows for j in columns)
            assert bool(found[0, 0, r, c]) == (c <= r and (inside or c == 0)), (r, c)


@pytest.mark.parametrize("skip", [0.03125, 0.5, 45.0, 4096.0])
@pytest.mark.parametrize("holes", [False, True])
def test_a_row_loses_no_more_than_its_bound(skip: float, holes: bool) -> None:
    """Of the mass of a row, relative to what it has met, at most skip: the promise of the module."""
    q, k, v = any_inputs()
    q, k, pad = q * 4, k.clone(), padded() if holes else None
    k[:, :, 16:32] /= 16  # one block that matters little
    asked = asked_for(THRESHOLD, {**EVERY, "skip": skip}, pad, (q, k, v))
    lists, out = THRESHOLD.select(asked), torch.empty_like(q)
    lses, skipped = [], []
    for bounds in (bounds_of(asked), torch.full((HEADS,), -torch.inf)):
        lse = torch.empty(q.shape[:3], dtype=q.dtype)
        given = q, k, v, torch.arange(HEADS, dtype=torch.int32), *lists, bounds, SCALE, pad, 0, 16, out, lse
        skipped.append(prefill(*given))
        lses.append(lse)
    lost = torch.expm1(lses[1] - lses[0])[lses[1].isfinite()]
    assert float(lost.min()) >= 0 and float(lost.max()) <= skip
    assert int(skipped[1].sum()) == 0 and (skip < 1 or int(skipped[0].sum()) > 0)


def test_padding_is_neither_a_sink_nor_among_the_keys_that_a_bound_is_divided_by() -> None:
    inputs, pad = tuple(torch.randn(2, n, 80, 8) for n in (HEADS, 2, 2)), padded(80)
    params = {**EVERY, "sink": 17, "window": 1, "skip": 4.0}
    bounds = bounds_of(asked_for(THRESHOLD, params, pad, inputs))
    torch.testing.assert_close(bounds, (4 / pad.sum(-1, keepdim=True)).log().expand(2, HEADS))
    # One entry begins in the second block.
    found = visits_by(THRESHOLD, params, pad, inputs=inputs)[:, 0, 4].int()
    assert found.tolist() == [[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]


@pytest.mark.parametrize("changed, said", [({"window": 0}, "window must be"), ({"skip": 0.01}, "a multiple of")])
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in THRESHOLD.problem({**EVERY, **changed})
