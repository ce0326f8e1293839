"""vertical_slash: which blocks it visits, by a loop over queries, keys and distances; lines that no window sees."""

from __future__ import annotations

import pytest
import torch
from candidates.degenerate import HEADS, Degenerate, Inputs
from candidates.lines import blocks_by_hand, lines_by_hand, recalled, sink_window_of, striped
from candidates.selecting import asked_for, kept_by, padded, visits_by
from torch import Tensor

from attnopt.candidates import Number
from attnopt.registry import CANDIDATES

LINES = CANDIDATES["vertical_slash"]
EVERY: dict[str, Number] = {"vertical": 1 << 30, "slash": 1 << 30, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("every key", {**EVERY, "slash": 1}),
    Degenerate("every distance", {**EVERY, "vertical": 0}),
    Degenerate("a window of the model's own", EVERY, own_window=20),
]


def by_hand(params: dict[str, Number], pad: Tensor | None, **of: int) -> Tensor:
    asked = asked_for(LINES, params, pad, **of)
    found = torch.zeros(asked.q.shape[0], len(asked.heads), asked.rows, asked.columns, dtype=torch.bool)
    for b in range(found.shape[0]):
        for h in range(found.shape[1]):
            keys, distances = lines_by_hand(asked, b, h, 64)
            vertical = sorted(keys, key=lambda j: -keys[j])[: int(params["vertical"])]
            slash = sorted(distances, key=lambda d: -distances[d])[: int(params["slash"])]
            found[b, h] = blocks_by_hand(asked, vertical, slash)
    return found & asked.possible


@pytest.mark.parametrize("vertical, slash", [(1, 0), (0, 1), (2, 1), (0, 4), (5, 3)])
@pytest.mark.parametrize("of", [{}, {"queries": 20}, {"queries": 1}, {"window": 20}], ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_it_keeps_the_blocks_on_the_best_lines(vertical: int, slash: int, of: dict[str, int], holes: bool) -> None:
    params, pad = {**EVERY, "vertical": vertical, "slash": slash}, padded() if holes else None
    found = kept_by(LINES, params, pad, **of)
    assert torch.equal(found, by_hand(params, pad, **of))
    assert 0 < int(found.sum()) <= int(kept_by(LINES, EVERY, pad, **of).sum())


def test_padding_on_the_right_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last queries that count, whatever stands at padding, even what is no number."""
    monkeypatch.setattr("attnopt.candidates.vertical_slash.LAST", 8)
    params, pad = {**EVERY, "vertical": 3, "slash": 2}, torch.ones(2, 45, dtype=torch.bool)
    pad[0, 30:], pad[1, 44] = False, False
    q, k, v = striped((), (), 45)
    q, k = q.masked_fill(~pad[:, None, :, None], torch.nan), k.masked_fill(~pad[:, None, :, None], torch.nan)
    padded_right = kept_by(LINES, params, pad, inputs=(q, k, v))
    alone = kept_by(LINES, params, inputs=(q[:1, :, :30], k[:1, :, :30], v[:1, :, :30]))
    assert torch.equal(padded_right[:1, :, :2, :2], alone) and not bool(padded_right[:1, :, :, 2].any())


def far_lines() -> Inputs:
    """Two keys that all look at, and a distance at which all look back, none of them near or first."""
    return striped((60, 100), (130,), 320)


def test_it_finds_what_a_window_of_as_many_blocks_misses() -> None:
    params, inputs = {**EVERY, "vertical": 2, "slash": 1}, far_lines()
    asked = asked_for(LINES, params, None, inputs)
    visited = visits_by(LINES, params, inputs=inputs)
    assert float(visited.float().sum() / asked.possible.expand_as(visited).sum()) < 0.5
    of_lines, of_window = (recalled(keep, asked) for keep in (visited, sink_window_of(visited, asked)))
    late = slice(192, 320)  # rows from which all three lines lie behind
    assert float(of_lines[..., late].min()) > 0.95 and float(of_window[..., late].max()) < 0.6


def test_what_the_last_queries_do_not_look_at_is_missed() -> None:
    """It has no test of itself: rows before have their far key taken away."""
    q, k, v = striped((100,), (), 320)
    q[:, :, 256:] = -q[:, :, 256:]
    params = {**EVERY, "vertical": 1, "slash": 1}
    asked = asked_for(LINES, params, None, (q, k, v))
    visited = visits_by(LINES, params, inputs=(q, k, v))
    # As a key it would be kept in all rows of blocks; the one distance crosses it in two at most.
    crossed = kept_by(LINES, params, inputs=(q, k, v))[0, :, :, 100 // 16].repeat_interleave(16, 1)[:, 200:256]
    assert int(crossed.sum(-1).max()) <= 2 * 16
    assert float(recalled(visited, asked)[0, :, 200:256][~crossed].max()) < 0.3


def test_each_head_follows_its_own_settings() -> None:
    settings = [{**EVERY, "vertical": v, "slash": s} for v, s in ((0, 1), (1, 1), (2, 2), (4, 8))]
    asked = asked_for(LINES, settings[0])
    asked.settings.update({name: torch.tensor([float(p[name]) for p in settings]) for name in ("vertical", "slash")})
    found = (LINES.keep(asked) & asked.possible).expand(2, HEADS, -1, -1)
    for head, params in enumerate(settings):
        assert torch.equal(found[:, head], kept_by(LINES, params)[:, head])


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"vertical": -1}, "vertical must be between"), ({"slash": 0.5}, "slash must be"),
        ({"slash": 0}, "slash must be between"), ({"block": 48}, "block must be one of"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in LINES.problem({**EVERY, **changed})
    assert not LINES.problem(EVERY)
