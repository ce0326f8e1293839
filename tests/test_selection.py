"""What selections are made of, against loops over queries and keys: geometry, pooling, last queries, mass, lists."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.selection import (
    Asked,
    Lists,
    alikeness,
    any_of,
    blocks_of,
    keep_of,
    lists_of,
    masked_softmax,
    most,
    pooled,
    reaching,
)

HEADS, KV, DIM, SCALE = 4, 2, 5, 0.7
# (queries, keys, block, the model's own window)
SHAPES = [
    (1, 1, 16, 0),
    (7, 7, 16, 0),
    (16, 16, 16, 0),
    (33, 33, 16, 0),
    (40, 40, 8, 11),
    (13, 40, 8, 0),
    (1, 40, 8, 9),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def asked_of(shape: tuple[int, int, int, int], holes: bool = False, heads: tuple[int, ...] = (3, 0, 1)) -> Asked:
    """Three of four heads, in an order of their own; two prompts, one padded on the left and one on the right."""
    n, m, block, window = shape
    served = torch.tensor(heads)
    pad = None
    if holes:
        pad = drawn(2, m, seed=9) > -0.8
        pad[0, : m // 3], pad[1, m - m // 4 :] = False, False
    settings = {"share": torch.arange(len(heads)) / 4}
    return Asked(
        drawn(2, HEADS, n, DIM), drawn(2, KV, m, DIM, seed=1), served, served // 2, settings, SCALE, block, pad, window
    )


def sees(asked: Asked, b: int, i: int, j: int) -> bool:
    """Whether the query at position i may see the key at j, whatever stands at i itself."""
    near = not asked.window or i - j < asked.window
    return j <= i and near and (asked.pad is None or bool(asked.pad[b, j]))


def positions(asked: Asked) -> list[tuple[int, int]]:
    """(number, position) of every query."""
    return [(n, n + asked.k.shape[2] - asked.q.shape[2]) for n in range(asked.q.shape[2])]


def counts(asked: Asked, b: int, at: int) -> bool:
    return asked.pad is None or bool(asked.pad[b, at])


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}-of-{}-by-{}-window-{}".format(*s))
every_padding = pytest.mark.parametrize("holes", [False, True], ids=["whole", "padded"])


@every_shape
@every_padding
def test_which_blocks_are_possible_and_which_always_live(shape: tuple[int, int, int, int], holes: bool) -> None:
    asked = asked_of(shape, holes)
    n, m, block, _ = shape
    rows, columns = math.ceil(n / block), math.ceil(m / block)
    assert (asked.rows, asked.columns, asked.offset) == (rows, columns, m - n)
    possible, always = torch.zeros(2, 2, 1, rows, columns, dtype=torch.bool)
    for b in range(2):
        real = [j for j in range(m) if counts(asked, b, j)]
        for number, i in positions(asked):
            row = number // block
            always[b, 0, row, i // block] = True
            if real:
                always[b, 0, row, real[0] // block] = True
            for j in range(m):
                possible[b, 0, row, j // block] |= sees(asked, b, i, j)
    found = asked.possible.expand_as(possible)
    real_blocks = torch.tensor(
        [[any(counts(asked, b, j) for j in range(m) if j // block == c) for c in range(columns)] for b in range(2)]
    )
    assert torch.equal(asked.real.expand(2, -1), real_blocks)
    # Padding takes whole blocks away; whether a window reaches what counts of the others is the kernel's matter.
    assert torch.equal(found, asked_of(shape).possible & real_blocks[:, None, None])
    assert not bool((possible & ~found).any()) and (holes or torch.equal(found, possible))
    assert torch.equal(asked.always & found, always & found)


@every_shape
def test_first_and_last_block_in_reach(shape: tuple[int, int, int, int]) -> None:
    asked = asked_of(shape)
    first, last = (x.tolist() for x in asked.reach)
    for row in range(asked.rows):
        of_row = [i for number, i in positions(asked) if number // asked.block == row]
        seen = [j for i in of_row for j in range(asked.k.shape[2]) if sees(asked, 0, i, j)]
        assert (first[row], last[row]) == (min(seen) // asked.block, max(seen) // asked.block)


@every_shape
@every_padding
def test_pooled_queries_keys_and_weights(shape: tuple[int, int, int, int], holes: bool) -> None:
    asked = asked_of(shape, holes)
    assert asked.pooled_queries.dtype == torch.float64
    for b in range(2):
        for n, head in enumerate(asked.heads.tolist()):
            for r in range(asked.rows):
                of = [number for number, i in positions(asked) if number // asked.block == r and counts(asked, b, i)]
                query = asked.q[b, head, of].mean(0) if of else torch.zeros(DIM, dtype=torch.float64)
                torch.testing.assert_close(asked.pooled_queries[b, n, r], query)
                scores = {}
                for c in asked.possible.expand(2, 1, -1, -1)[b, 0, r].nonzero()[:, 0].tolist():
                    keys = [j for j in range(asked.k.shape[2]) if j // asked.block == c and counts(asked, b, j)]
                    key = asked.k[b, head // 2, keys].mean(0)
                    torch.testing.assert_close(asked.pooled_keys[b, n, c], key)
                    scores[c] = math.exp(float(query @ key) * SCALE)
                expected = torch.zeros(asked.columns, dtype=torch.float64)
                for c, score in scores.items():
                    expected[c] = score / sum(scores.values()) if of else 0.0
                torch.testing.assert_close(asked.pooled_weights[b, n, r], expected)


@every_shape
@every_padding
@pytest.mark.parametrize("count", [1, 6, 64])
def test_weights_of_the_last_queries_that_count(shape: tuple[int, int, int, int], holes: bool, count: int) -> None:
    asked = asked_of(shape, holes)
    last = asked.last(count)
    n = min(count, asked.q.shape[2])
    assert last.weights.shape == (2, 3, n, asked.k.shape[2]) and last.queries.shape == (2, 3, n, DIM)
    for b in range(2):
        real = [(number, i) for number, i in positions(asked) if counts(asked, b, i)][-count:]
        missing = n - len(real)
        assert not last.weights[b, :, :missing].any() and not last.queries[b, :, :missing].any()
        may = last.may.expand(2, -1, -1)[b]
        assert not may[:missing].any()
        for place, (number, i) in enumerate(real, missing):
            assert int(last.at.expand(2, -1)[b, place]) == i
            seen = [j for j in range(asked.k.shape[2]) if sees(asked, b, i, j)]
            assert may[place].nonzero()[:, 0].tolist() == seen
            for h, head in enumerate(asked.heads.tolist()):
                assert torch.equal(last.queries[b, h, place], asked.q[b, head, number])
                scores = [math.exp(float(asked.q[b, head, number] @ asked.k[b, head // 2, j]) * SCALE) for j in seen]
                expected = torch.zeros(asked.k.shape[2], dtype=torch.float64)
                expected[seen] = torch.tensor([s / sum(scores) for s in scores], dtype=torch.float64)
                torch.testing.assert_close(last.weights[b, h, place], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_wide_and_settings_one_for_each_head(dtype: torch.dtype) -> None:
    asked = asked_of((33, 33, 16, 0))
    asked = replace(asked, q=asked.q.to(dtype), k=asked.k.to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {asked.wide, asked.queries.dtype, asked.pooled_weights.dtype, asked.last(3).weights.dtype} == {wide}
    assert torch.equal(asked.queries[:, 0], asked.q[:, 3].to(wide))
    assert torch.equal(asked.of_heads(asked.k), asked.k[:, [1, 0, 0]])
    assert asked.setting("share").tolist() == [[[0.0]], [[0.25]], [[0.5]]]


def test_a_prompt_of_padding_alone_is_never_no_number() -> None:
    asked = asked_of((33, 33, 16, 0))
    pad = torch.zeros(2, 33, dtype=torch.bool)
    pad[1, 5:] = True
    q, k = (x.masked_fill(~pad[:, None, :, None], torch.nan) for x in (asked.q, asked.k))
    asked = replace(asked, q=q, k=k, pad=pad)
    found = asked.pooled_keys, asked.pooled_queries, asked.pooled_weights, *asked.last(40)[2:]
    assert all(bool(x.isfinite().all()) for x in found)
    assert not asked.possible[0].any() and asked.possible[1, 0, 2].all()
    assert not asked.last(40).weights[0].any() and not asked.pooled_weights[0].any()


@pytest.mark.parametrize("length", [1, 5, 8, 19])
def test_blocks_and_what_any_of_them_holds(length: int) -> None:
    x = drawn(2, 3, length, 4)
    cut, missing = blocks_of(x, 8, 7.0)
    assert cut.shape == (2, 3, math.ceil(length / 8), 8, 4) and missing == cut.shape[2] * 8 - length
    assert torch.equal(cut.flatten(2, 3)[:, :, :length], x) and bool((cut.flatten(2, 3)[:, :, length:] == 7).all())
    held = x[..., 0] > 1
    expected = [[[any(held[b, h, c * 8 : c * 8 + 8].tolist()) for c in range(cut.shape[2])] for h in range(3)]
                for b in range(2)]  # fmt: skip
    assert any_of(held, 8).tolist() == expected


@every_padding
def test_means_and_alikeness_of_blocks(holes: bool) -> None:
    x, pad = drawn(2, 3, 19, 4), asked_of((19, 19, 8, 0), holes).pad
    means, alike = pooled(x, 8, pad), alikeness(x, 8, pad)
    for b in range(2):
        for h in range(3):
            for c in range(3):
                at = [j for j in range(19) if j // 8 == c and (pad is None or bool(pad[b, j]))]
                mean = x[b, h, at].mean(0) if at else torch.zeros(4, dtype=torch.float64)
                torch.testing.assert_close(means[b, h, c], mean)
                cosines = [torch.cosine_similarity(x[b, h, i], x[b, h, j], dim=0) for i in at for j in at]
                expected = float(sum(cosines)) / len(cosines) if at else 0.0
                assert float(alike[b, h, c]) == pytest.approx(expected, abs=1e-9)


def test_a_row_that_keeps_nothing_weighs_nothing() -> None:
    scores, keep = drawn(3, 4) * 50, torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    found = masked_softmax(scores.clone(), keep)
    torch.testing.assert_close(found[0], scores[0].softmax(0))
    torch.testing.assert_close(found[1, [1, 3]], scores[1, [1, 3]].softmax(0))
    assert not found[1, [0, 2]].any() and not found[2].any()


WEIGHTS = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.25] * 4, [1e-30, 2.0, 1.0, 1.0]])


@pytest.mark.parametrize("mass", [1 / 64, 0.25, 0.5, 0.51, 0.875, 63 / 64, 1.0])
def test_the_fewest_that_reach_a_mass(mass: float) -> None:
    found = reaching(WEIGHTS, torch.tensor([[mass]]))
    for weights, kept in zip(WEIGHTS.tolist(), found.tolist(), strict=True):
        expected, gathered = [False] * 4, 0.0
        for n in sorted(range(4), key=lambda n, w=weights: -w[n]):  # type: ignore[misc]
            expected[n] = weights[n] > 0 and (gathered < mass * sum(weights) or mass == 1)
            gathered += weights[n]
        assert kept == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 9])
def test_the_largest_of_those_above_nothing(count: int) -> None:
    found = most(WEIGHTS, torch.tensor([[count]]))
    for weights, kept in zip(WEIGHTS.tolist(), found.tolist(), strict=True):
        best = sorted(range(4), key=lambda n, w=weights: -w[n])[:count]  # type: ignore[misc]
        assert kept == [n in best and weights[n] > 0 for n in range(4)]


def test_each_head_has_a_mass_and_a_count_of_its_own() -> None:
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(2, 3, 5, 4)
    each = torch.tensor([0.5, 0.75, 1.0])[:, None, None]
    assert reaching(weights, each).sum(-1).tolist() == [[[1] * 5, [2] * 5, [4] * 5]] * 2
    assert most(weights, each * 4).sum(-1).tolist() == [[[2] * 5, [3] * 5, [4] * 5]] * 2


@pytest.mark.parametrize("columns", [1, 6])
def test_lists_hold_what_is_kept_in_order_and_nothing_else(columns: int) -> None:
    keep = drawn(2, 3, 4, columns) > 0
    keep[0, 0, 0], keep[0, 0, 1] = False, True
    lists = lists_of(keep)
    assert lists.counts.dtype == lists.blocks.dtype == torch.int32 and lists.blocks.shape == keep.shape
    for at in [(b, h, r) for b in range(2) for h in range(3) for r in range(4)]:
        listed = lists.blocks[at][: int(lists.counts[at])].tolist()
        assert listed == keep[at].nonzero()[:, 0].tolist()
    assert torch.equal(keep_of(lists, columns), keep)
    behind = torch.arange(columns) >= lists.counts[..., None]
    assert torch.equal(keep_of(Lists(lists.counts, lists.blocks.masked_fill(behind, columns - 1)), columns), keep)
