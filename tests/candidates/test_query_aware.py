"""query_aware: which way each head goes, and which blocks it visits, by loops over queries, keys and blocks."""

from __future__ import annotations

import math

import pytest
import torch
from candidates.degenerate import HEADS, SCALE, Degenerate, Inputs
from candidates.lines import blocks_by_hand, lines_by_hand, recalled, sink_window_of, striped
from candidates.selecting import asked_for, in_topics, kept_by, padded, visits_by
from torch import Tensor

from attnopt.candidates import Number
from attnopt.candidates.query_aware import estimate_error
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked

AWARE = CANDIDATES["query_aware"]
EVERY: dict[str, Number] = {"mass": 1.0, "trust": 1.0, "least": 0, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("the whole mass of pooled scores", EVERY),
    Degenerate("the whole mass of lines", {**EVERY, "trust": 0.0}),
    Degenerate("as many blocks as there are", {**EVERY, "mass": 1 / 64, "least": 3}),
    Degenerate("as many lines as there are", {**EVERY, "mass": 1 / 64, "trust": 0.0, "least": 3}),
    Degenerate("a window of the model's own", EVERY, own_window=20),
]


def reached(line: dict[int, float], mass: float, least: int) -> list[int]:
    """The fewest largest that reach `mass` of all, and `least` at least."""
    found, gathered, total = list[int](), 0.0, sum(line.values())
    for x in sorted(line, key=lambda x: -line[x]):
        if gathered < mass * total or len(found) < least or mass >= 1:
            found.append(x)
        gathered += line[x]
    return found


def mean_key(asked: Asked, b: int, h: int, c: int) -> Tensor | None:
    """Of a block, over the keys that count; None where none does."""
    at = range(c * asked.block, min((c + 1) * asked.block, asked.k.shape[2]))
    counted = [j for j in at if asked.pad is None or bool(asked.pad[b, j])]
    return asked.of_heads(asked.k)[b, h, counted].mean(0) if counted else None


def softmax_of(asked: Asked, b: int, h: int, queries: list[int], columns: list[int]) -> dict[int, float]:
    """Of the mean of some queries over the mean keys of columns."""
    mean = asked.queries[b, h, [i - asked.offset for i in queries]].mean(0)
    means = {c: mean_key(asked, b, h, c) for c in columns}
    scores = {c: math.exp(float(mean @ key) * asked.scale) for c, key in means.items() if key is not None}
    return {c: s / sum(scores.values()) for c, s in scores.items()}


def error_by_hand(asked: Asked, b: int, h: int, real: list[int]) -> float:
    last, (keys, _) = real[-asked.block :], lines_by_hand(asked, b, h, asked.block)
    true = dict[int, float]()
    for j, weight in keys.items():
        true[j // asked.block] = true.get(j // asked.block, 0.0) + weight / len(last)
    pooled = softmax_of(asked, b, h, last, sorted(true))
    found = 0.0
    for c, p in pooled.items():
        middle = (p + true[c]) / 2
        found += (p * math.log(p / middle) + true[c] * math.log(true[c] / middle)) / 2
    return math.sqrt(max(found, 0.0))


def by_hand(params: dict[str, Number], pad: Tensor | None, **of: int) -> tuple[Tensor, Tensor]:
    """bool (B, h, R, C), and the error of every head (B, h)."""
    asked = asked_for(AWARE, params, pad, **of)
    errors, found = torch.zeros(2, HEADS), torch.zeros(2, HEADS, asked.rows, asked.columns, dtype=torch.bool)
    mass, least = float(params["mass"]), int(params["least"])
    for b, h in [(b, h) for b in range(2) for h in range(HEADS)]:
        span = range(asked.offset, asked.k.shape[2])
        real = [i for i in span if pad is None or bool(pad[b, i])]
        errors[b, h] = error_by_hand(asked, b, h, real)
        if errors[b, h] >= params["trust"]:
            lines = lines_by_hand(asked, b, h, asked.block)
            found[b, h] = blocks_by_hand(asked, *(reached(line, mass, least * asked.block) for line in lines))
            continue
        weights = dict[int, float]()
        for r in range(asked.rows):
            rows = [i for i in real if (i - asked.offset) // asked.block == r]
            columns = asked.possible.expand(2, 1, -1, -1)[b, 0, r].nonzero()[:, 0].tolist()
            of_row = softmax_of(asked, b, h, rows, columns) if rows else {}
            weights |= {r * asked.columns + c: w for c, w in of_row.items()}
            for c in reached(of_row, 1 / 64, least)[:least]:
                found[b, h, r, c] = True
        for at in reached(weights, mass, 0):
            found[b, h, at // asked.columns, at % asked.columns] = True
    return found & asked.possible, errors


@pytest.mark.parametrize("mass, trust, least", [(0.75, 1.0, 0), (0.5, 1.0, 1), (0.25, 0.0, 1), (0.5, 0.125, 0)])
@pytest.mark.parametrize("of", [{}, {"queries": 20}, {"queries": 1}, {"window": 20}], ids=str)
@pytest.mark.parametrize("holes", [False, True])
def test_each_head_goes_its_way(mass: float, trust: float, least: int, of: dict[str, int], holes: bool) -> None:
    params, pad = {**EVERY, "mass": mass, "trust": trust, "least": least}, padded() if holes else None
    expected, errors = by_hand(params, pad, **of)
    asked = asked_for(AWARE, params, pad, **of)
    torch.testing.assert_close(estimate_error(asked, asked.last(16)), errors.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(kept_by(AWARE, params, pad, **of), expected)


def test_heads_of_a_prompt_differ() -> None:
    """At the setting of the loop above that is in between, some are trusted and some are not."""
    asked = asked_for(AWARE, EVERY)
    trusted = estimate_error(asked, asked.last(16)) < 0.125
    assert bool(trusted.any()) and not bool(trusted.all())


def topics() -> Inputs:
    """20 blocks of 16 keys of six subjects that alternate, and queries that ask for the subject of their own block: the
    mean of a block says everything, and no line does."""
    drawn = torch.Generator().manual_seed(5)
    subjects = torch.nn.functional.one_hot(torch.arange(320) // 16 % 6, 6).double()
    q, k, v = (torch.randn(2, n, 320, 6, generator=drawn, dtype=torch.float64) for n in (HEADS, 2, 2))
    return 0.05 * q + 6 * subjects, 0.05 * k + 6 * subjects, v


def test_pooled_scores_are_trusted_where_blocks_are_alike() -> None:
    inputs, params = topics(), {**EVERY, "mass": 63 / 64, "trust": 1 / 8}
    asked = asked_for(AWARE, params, None, inputs)
    # All of it is what the last queries may not see of their own block, one of four that matter.
    assert 1 / 16 < float(estimate_error(asked, asked.last(16)).max()) < 1 / 8
    visited = visits_by(AWARE, params, inputs=inputs)
    of_topics, of_window = (recalled(keep, asked) for keep in (visited, sink_window_of(visited, asked)))
    late = slice(240, 320)
    assert float(visited.float().sum() / asked.possible.expand_as(visited).sum()) < 0.5
    assert float(of_topics[..., late].mean()) > 0.95 and float(of_window[..., late].mean()) < 0.6


def test_it_falls_back_to_lines_where_a_mean_hides_a_key() -> None:
    """One loud key among fifteen that point the other way: the pooled score of its block is nothing."""
    q, k, v = striped((100,), (), 320)
    k[:, :, 96:112, 0] -= 2.0 / SCALE
    k[:, :, 100, 0] = 12.0 / SCALE
    params = {**EVERY, "mass": 15 / 16, "trust": 3 / 32}
    asked = asked_for(AWARE, params, None, (q, k, v))
    assert float(estimate_error(asked, asked.last(16)).min()) > 0.25
    visited = visits_by(AWARE, params, inputs=(q, k, v))
    blind = visits_by(AWARE, {**params, "trust": 1.0, "mass": 0.25}, inputs=(q, k, v))
    assert float(recalled(visited, asked)[..., 240:].min()) > 0.95
    assert float(recalled(blind, asked)[..., 240:].max()) < 0.3


def test_one_head_that_is_trusted_leaves_another_alone() -> None:
    """Two heads of one call, of which one has its settings say never."""
    params = {**EVERY, "mass": 0.5}
    asked = asked_for(AWARE, params, inputs=in_topics())
    asked.settings["trust"] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    found = AWARE.keep(asked) & asked.possible
    lines, pooled = (kept_by(AWARE, {**params, "trust": trust}) for trust in (0.0, 1.0))
    assert torch.equal(found[:, 0::2], lines[:, 0::2]) and torch.equal(found[:, 1::2], pooled[:, 1::2])
    assert not torch.equal(lines, pooled)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"mass": 0.0}, "mass must be between"), ({"mass": 1.25}, "mass must be between"),
        ({"trust": 0.1}, "a multiple"), ({"trust": 2.0}, "trust must be between"), ({"least": -1}, "least must be"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in AWARE.problem({**EVERY, **changed})
    assert not AWARE.problem(EVERY)
