"""hierarchical: which blocks it visits, by a loop that halves ranges; what it finds and what it misses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from candidates.degenerate import SCALE, Degenerate
from candidates.lines import recalled, sink_window_of
from candidates.selecting import asked_for, kept_by, padded

from attnopt.candidates import Number, _strided
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, keep_of

HIERARCHICAL = CANDIDATES["hierarchical"]
EVERY: dict[str, Number] = {"count": 3, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("as many ranges as there are blocks", EVERY),
    Degenerate("more ranges than blocks, a window of the model's own", {**EVERY, "count": 4096}, own_window=20),
]
LONG = 13 * 16 + 5


def score(asked: Asked, b: int, h: int, r: int, start: int, end: int) -> float:
    """The best score of the middle key of the blocks start to before end, of those that count."""
    real = [True] * asked.k.shape[2] if asked.pad is None else asked.pad[b].tolist()
    inside = [j for j in range(start * asked.block, min(end * asked.block, len(real))) if real[j]]
    if not inside:
        return -math.inf
    j = inside[len(inside) // 2]
    rows = range(r * asked.block, min((r + 1) * asked.block, asked.q.shape[2]))
    scores = (asked.q[b, h, rows.start : rows.stop] @ asked.k[b, int(asked.kv[h]), j] * SCALE).tolist()
    seen = [real[i] and j <= i and (not asked.window or i - j < asked.window) for i in (i + asked.offset for i in rows)]
    return max((score for score, may in zip(scores, seen, strict=True) if may), default=-1e300)


def by_hand(asked: Asked, count: int) -> torch.Tensor:
    """bool (B, h, R, C)."""
    found = torch.zeros(asked.q.shape[0], len(asked.heads), asked.rows, asked.columns, dtype=torch.bool)
    first, last = (x.tolist() for x in asked.reach)
    for b, h, r in [(b, h, r) for b in range(found.shape[0]) for h in range(found.shape[1]) for r in range(asked.rows)]:
        real = [True] if asked.pad is None else asked.pad[b].tolist()
        begin = max(first[r], real.index(True) // asked.block)
        seen = max(last[r] + 1 - begin, 0)
        cuts = [begin + n * seen // count for n in range(count + 1)]
        ranges = list(pairwise(cuts))
        while any(end - start > 1 for start, end in ranges):
            halves = [(start, (start + end + 1) // 2) for start, end in ranges]
            halves += [((start + end + 1) // 2, end) for start, end in ranges]
            ranges = sorted(halves, key=lambda at: -score(asked, b, h, r, *at))[:count]
        for start, end in ranges:
            found[b, h, r, start:end] = True
    return found


def long_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of LONG tokens: keys that turn slowly, as neighbours are alike."""
    drawn = torch.Generator().manual_seed(2)
    q, steps = (torch.randn(2, n, LONG, 8, generator=drawn, dtype=torch.float64) for n in (4, 2))
    return 2 * q, steps.cumsum(2) / 8, steps


def long_padding() -> torch.Tensor:
    pad = torch.ones(2, LONG, dtype=torch.bool)
    pad[0, :85], pad[1, 40:90], pad[1, 150:] = False, False, False
    return pad


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "holes, queries, window", [(False, None, 0), (True, None, 0), (True, 50, 0), (False, 7, 0), (True, None, 100)]
)
def test_it_keeps_the_best_ranges_at_every_halving(
    count: int, holes: bool, queries: int | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_strided, "HELD", 1)
    params, pad = {**EVERY, "count": count}, long_padding() if holes else None
    asked = asked_for(HIERARCHICAL, params, pad, long_inputs(), window, queries)
    found = kept_by(HIERARCHICAL, params, pad, inputs=long_inputs(), queries=queries, window=window)
    assert torch.equal(found, by_hand(asked, count) & asked.possible)
    assert int(found.sum(-1).max()) <= count and bool(found.any())


@pytest.mark.parametrize("holes", [False, True])
def test_rows_that_see_no_more_than_count_blocks_visit_them_all(holes: bool) -> None:
    pad = padded() if holes else None
    asked = asked_for(HIERARCHICAL, {**EVERY, "count": 2}, pad)
    found = kept_by(HIERARCHICAL, {**EVERY, "count": 2}, pad)
    assert torch.equal(found[:, :, :2], asked.possible.expand(2, 4, -1, -1)[:, :, :2])


def topic(place: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that look for `width` keys around a place, which are alike and unlike all others."""
    drawn = torch.Generator().manual_seed(4)
    q, k = (0.1 * torch.randn(1, n, 512, 8, generator=drawn, dtype=torch.float64) for n in (4, 2))
    q[..., 0] = 1.0
    k[:, :, place - width // 2 : place + width // 2, 0] = 12 / SCALE
    return q, k, k


@pytest.mark.parametrize("place", [100, 167, 240])
def test_a_topic_is_found_wherever_it_stands_and_a_single_key_by_chance_alone(place: int) -> None:
    """Neighbours of a topic lead there: 64 keys of 512, 4 or 5 of the 8 blocks a row keeps. A needle of two keys has
    no neighbours, and is looked at only where it is a middle."""
    shares = []
    for width in (64, 2):
        asked = asked_for(HIERARCHICAL, {**EVERY, "count": 8}, inputs=topic(place, width))
        keep = keep_of(HIERARCHICAL.select(asked), asked.columns)
        shares.append([recalled(x, asked)[..., 384:].mean().item() for x in (keep, sink_window_of(keep, asked))])
    assert shares[0][0] > 0.75 and shares[0][1] < 0.05 and shares[1][0] < 0.5, shares


@pytest.mark.parametrize("changed, said", [
    ({"count": 0}, "count must be between"), ({"count": 5000}, "count must be between"), ({"count": 1.5}, "a whole"),
])  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in HIERARCHICAL.problem({**EVERY, **changed})
    assert not HIERARCHICAL.problem(EVERY)
