"""proxy: which blocks it visits, by a loop over tokens of pooled heads; each head's number; parameters out of range."""

from __future__ import annotations

import math

import pytest
import torch
from candidates.degenerate import SCALE, Degenerate, any_inputs
from candidates.lines import recalled, sink_window_of, striped
from candidates.selecting import asked_for, kept_by, padded

from attnopt.candidates import Number, _strided
from attnopt.candidates._selected import asked_of
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, keep_of

PROXY = CANDIDATES["proxy"]
EVERY: dict[str, Number] = {"mass": 1.0, "group": 2, "stride": 4, "block": 16, "skip": 0.0}
DEGENERATE = [
    Degenerate("the whole mass of the last queries", EVERY),
    Degenerate("all heads in one group, a window of the model's own", {**EVERY, "group": 4096}, own_window=20),
]


def weights(asked: Asked, b: int, i: int, query: torch.Tensor, keys: torch.Tensor, stride: int) -> dict[int, float]:
    """Soft-max of one query at position i over every stride-th key that it may see."""
    real = torch.ones(asked.k.shape[2], dtype=torch.bool) if asked.pad is None else asked.pad[b]
    seen = [j for j in range(0, i + 1, stride) if real[j] and (not asked.window or i - j < asked.window)]
    scores = {j: math.exp(float(query @ keys[j]) * SCALE) for j in seen}
    return {j: score / sum(scores.values()) for j, score in scores.items()}


def number_of(asked: Asked, b: int, h: int, mass: float) -> int:
    """Blocks that hold `mass` of what the last queries that count attend to."""
    real = torch.ones(asked.k.shape[2], dtype=torch.bool) if asked.pad is None else asked.pad[b]
    last = [i for i in range(asked.q.shape[2]) if real[i + asked.offset]][-asked.block :]
    held = [0.0] * asked.columns
    for i in last:
        keys = asked.k[b, int(asked.kv[h])]
        for j, weight in weights(asked, b, i + asked.offset, asked.q[b, h, i], keys, 1).items():
            held[j // asked.block] += weight
    held.sort(reverse=True)
    return next((n for n in range(len(held) + 1) if sum(held[:n]) >= mass * sum(held)), len(held))


def by_hand(asked: Asked, mass: float) -> torch.Tensor:
    """bool (B, h, R, C): of every row the blocks that the group's pooled head weighs most, as many as the head's."""
    group, stride, share = asked.fixed["group"], asked.fixed["stride"], asked.q.shape[1] // asked.k.shape[1]
    found = torch.zeros(asked.q.shape[0], len(asked.heads), asked.rows, asked.columns, dtype=torch.bool)
    for b, (n, head) in ((b, h) for b in range(found.shape[0]) for h in enumerate(asked.heads.tolist())):
        members = [h for h in range(asked.q.shape[1]) if h // group == head // group]
        query = sum(asked.q[b, h] for h in members) / len(members)
        keys = sum(asked.k[b, h // share] for h in members) / len(members)
        number = number_of(asked, b, n, mass)
        for r in range(asked.rows):
            most = [0.0] * asked.columns
            for i in range(r * asked.block, min((r + 1) * asked.block, asked.q.shape[2]), stride):
                if asked.pad is None or asked.pad[b, i + asked.offset]:
                    for j, weight in weights(asked, b, i + asked.offset, query[i], keys, stride).items():
                        most[j // asked.block] = max(most[j // asked.block], weight)
            for c in sorted(range(asked.columns), key=lambda c: -most[c])[:number]:
                found[b, n, r, c] = most[c] > 0
    return found


@pytest.mark.parametrize("mass, group, stride", [(0.5, 2, 4), (0.75, 3, 8), (0.875, 1, 1), (0.9375, 4096, 16)])
@pytest.mark.parametrize(
    "holes, queries, window", [(False, None, 0), (True, None, 0), (True, 30, 0), (False, 7, 0), (True, 40, 20)]
)
def test_every_head_keeps_its_number_of_the_blocks_its_group_weighs_most(
    mass: float, group: int, stride: int, holes: bool, queries: int | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_strided, "HELD", 1)
    params, pad = {**EVERY, "mass": mass, "group": group, "stride": stride}, padded() if holes else None
    asked = asked_for(PROXY, params, pad, queries=queries, window=window)
    found = kept_by(PROXY, params, pad, queries=queries, window=window)
    assert torch.equal(found, by_hand(asked, mass) & asked.possible) and bool(found.any())


@pytest.mark.parametrize("heads", [[1], [3, 0], [0, 1, 3]])
def test_a_head_selects_the_same_whatever_else_is_served(heads: list[int]) -> None:
    q, k, _ = any_inputs()
    params = {**EVERY, "mass": 0.75}
    every = keep_of(PROXY.select(asked_for(PROXY, params, inputs=(q, k, k))), 3)
    table = torch.tensor([PROXY.settings(params)] * len(heads), dtype=torch.float64)
    some = keep_of(PROXY.select(asked_of(PROXY, q, k, torch.tensor(heads), table, SCALE, None, 0)), 3)
    assert torch.equal(some, every[:, heads])


def test_a_stripe_of_one_head_is_found_for_its_group_and_heads_keep_numbers_of_their_own() -> None:
    """Head 0 attends to two keys far back, the other head of its group to every key alike: both rank blocks by the same
    scores, and the first keeps fewer of them."""
    q, k, v = striped((36, 100), (), 256)
    q[:, 1::2] *= 0.05
    asked = asked_for(PROXY, {**EVERY, "mass": 0.75}, inputs=(q, k, v))
    keep = keep_of(PROXY.select(asked), asked.columns)
    held, window = (recalled(kept, asked)[:, 0, 128:].mean() for kept in (keep, sink_window_of(keep, asked)))
    assert float(held) > 0.99 and float(window) < 0.1
    assert bool((keep[:, 1] | ~keep[:, 0]).all()) and int(keep[:, 1].sum()) > 2 * int(keep[:, 0].sum())


def test_keys_between_strides_are_not_seen_and_each_is_at_a_stride_of_one() -> None:
    """What a head needs is then kept only by the number of blocks it asks for, of others."""
    inputs = striped((37,), (), 256)
    kept = []
    for stride in (4, 1):
        asked = asked_for(PROXY, {**EVERY, "mass": 0.75, "stride": stride}, inputs=inputs)
        kept.append(float(recalled(keep_of(PROXY.select(asked), asked.columns), asked)[:, :, 128:].mean()))
    assert kept[0] < 0.3 and kept[1] > 0.99


@pytest.mark.parametrize("changed, said", [
    ({"mass": 0.0}, "mass must be between"), ({"group": 0}, "group must be between"), ({"mass": 0.3}, "a multiple"),
    ({"stride": 3}, "stride must be one of 1, 2, 4, 8, 16"), ({"stride": 0}, "stride must be between"),
])  # fmt: skip
def test_wrong_parameters_are_named(changed: dict[str, Number], said: str) -> None:
    assert said in PROXY.problem({**EVERY, **changed})
    assert not PROXY.problem(EVERY)
