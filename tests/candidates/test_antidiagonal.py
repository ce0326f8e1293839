"""antidiagonal: which blocks it visits, by a loop over antidiagonals; lines it finds; parameters out of range."""

from __future__ import annotations

import math

import pytest
import torch
from candidates.degenerate import DIM, SCALE, Degenerate
from candidates.lines import recalled, sink_window_of, striped
from candidates.selecting import asked_for, in_topics, kept_by, padded

from attnopt.candidates import Number, _strided
from attnopt.ir import Choice, Mask, Site
from attnopt.mixed import attend
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, keep_of

ANTIDIAGONAL = CANDIDATES["antidiagonal"]
EVERY: dict[str, Number] = {"mass": 1.0, "stride": 4, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("the whole mass of every row", EVERY),
    Degenerate("a window of the model's own", {**EVERY, "stride": 16}, own_window=20),
]


def score(asked: Asked, b: int, h: int, a: int, c: int) -> float | None:
    """Mean product along the antidiagonal of cell a of queries and cell c of keys; None if no pair of it may be."""
    stride, lag = asked.fixed["stride"], asked.offset
    pairs = [(a * stride + stride - 1 - t, c * stride + t) for t in range(stride)]
    apart = [i + lag - j for i, j in pairs]
    if max(apart) < 0 or (asked.window and min(apart) >= asked.window):
        return None
    real = torch.ones(asked.k.shape[2], dtype=torch.bool) if asked.pad is None else asked.pad[b]
    there = [(i, j) for i, j in pairs if i < asked.q.shape[2] and j < asked.k.shape[2] and real[i + lag] and real[j]]
    q, k = asked.q[b, h], asked.k[b, int(asked.kv[h])]
    return sum(float(q[i] @ k[j]) for i, j in there) * SCALE / len(there) if there else None


def by_hand(asked: Asked, mass: float) -> torch.Tensor:
    """bool (B, h, R, C): the fewest best blocks of each row, one by one."""
    per = asked.block // asked.fixed["stride"]
    found = torch.zeros(asked.q.shape[0], len(asked.heads), asked.rows, asked.columns, dtype=torch.bool)
    for b, h, r in [(b, h, r) for b in range(found.shape[0]) for h in range(found.shape[1]) for r in range(asked.rows)]:
        weights = [0.0] * asked.columns
        for a in range(r * per, (r + 1) * per):
            scores = {c: score(asked, b, h, a, c) for c in range(asked.columns * per)}
            total = sum(math.exp(s) for s in scores.values() if s is not None)
            for c, s in scores.items():
                weights[c // per] += math.exp(s) / total if s is not None else 0.0
        gathered = 0.0
        for c in sorted(range(asked.columns), key=lambda c: -weights[c]):
            if gathered < mass * sum(weights) and weights[c] > 0:
                found[b, h, r, c] = True
            gathered += weights[c]
    return found


@pytest.mark.parametrize("mass, stride", [(0.5, 4), (0.75, 8), (0.9375, 16)])
@pytest.mark.parametrize(
    "holes, queries, window", [(False, None, 0), (True, None, 0), (True, 30, 0), (False, 7, 0), (True, 40, 20)]
)
def test_it_keeps_the_fewest_blocks_of_most_mass(
    mass: float, stride: int, holes: bool, queries: int | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_strided, "HELD", 1)  # a row of blocks at a time
    params, pad = {**EVERY, "mass": mass, "stride": stride}, padded() if holes else None
    asked = asked_for(ANTIDIAGONAL, params, pad, queries=queries, window=window)
    found = kept_by(ANTIDIAGONAL, params, pad, queries=queries, window=window)
    assert torch.equal(found, by_hand(asked, mass) & asked.possible)
    assert 0 < int(found.sum()) < int(asked.possible.expand_as(found).sum())


def shares(keys: tuple[int, ...], distances: tuple[int, ...]) -> tuple[float, float]:
    """Of the attention of late queries to these lines: what is visited, and what a sink and a window of as many blocks
    would."""
    asked = asked_for(ANTIDIAGONAL, {**EVERY, "mass": 0.5}, inputs=striped(keys, distances, 256))
    keep = keep_of(ANTIDIAGONAL.select(asked), asked.columns)
    visited, window = (recalled(kept, asked)[..., 112:].mean() for kept in (keep, sink_window_of(keep, asked)))
    return float(visited), float(window)


@pytest.mark.parametrize("keys, distances", [((37,), ()), ((), (71,))])
def test_lines_are_found_that_a_sink_and_a_window_miss(keys: tuple[int, ...], distances: tuple[int, ...]) -> None:
    visited, window = shares(keys, distances)
    assert visited > 0.99 and window < 0.05


def test_a_slash_at_an_even_distance_is_not_seen() -> None:
    """No antidiagonal of a cell holds a pair at an even distance: blocks are then as good as drawn."""
    assert shares((), (70,))[0] < 0.6


def test_heads_of_different_strides_are_served_by_calls_of_their_own() -> None:
    """Shapes depend on the stride, so it is part of the method; each head still gets what it would get alone."""
    q, k, v = (x.float() for x in in_topics())
    params = [{**EVERY, "mass": 0.5, "stride": stride} for stride in (4, 16, 4, 8)]
    site = Site("a", 0, "sdpa", 4, 2, DIM, DIM, SCALE, "float32", Mask(causal=True))
    found = attend(q, k, v, [Choice.of("antidiagonal", each) for each in params], site)
    for head, each in enumerate(params):
        alone = ANTIDIAGONAL.reference(q, k, v, each, SCALE)[:, head]
        torch.testing.assert_close(found[:, head], alone, rtol=1e-5, atol=1e-5)
    assert [ANTIDIAGONAL.method(each) for each in params[:2]] == ["antidiagonal/4/16", "antidiagonal/16/16"]


@pytest.mark.parametrize("changed, said", [
    ({"mass": 0.0}, "mass must be between"), ({"mass": 1.25}, "mass must be between"), ({"mass": 0.3}, "a multiple"),
    ({"stride": 6}, "stride must be one of 4, 8, 16"), ({"stride": 32}, "stride must be between"),
])  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in ANTIDIAGONAL.problem({**EVERY, **changed})
    assert not ANTIDIAGONAL.problem(EVERY)
