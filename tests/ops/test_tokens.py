"""`attnopt::attend_tokens`: the cache, heads with spans and heads that select, in one call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt import ops
from attnopt.cache import Layout, TokenTable
from attnopt.codegen.reference_tokens import TokenRule, rows
from attnopt.errors import CacheFull

SCALE, LENGTH, DIM = 0.4, 48, 32
FULL = (0, 1 << 20)
# KV head 0 is spans alone, 1 is both, 2 selects alone.
RULES = (None, None, TokenRule(5, 1, 2), None, TokenRule(3, recent=1, every=4), TokenRule(4, channels=7))
SPANS = ((2, 5), (0, 9), FULL, FULL, FULL, FULL)


class Cache:
    """A layer's cache and what its heads selected; empty slots are NaN."""

    def __init__(
        self, rules: tuple[TokenRule | None, ...] = RULES, spans: tuple[tuple[int, int], ...] = SPANS,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        layout = Layout.of_spans([s for s, _ in spans], [w for _, w in spans], 3, LENGTH)
        table = TokenTable(rules, (0,) * 6)
        self.keys, self.values = (torch.full((2, layout.slots, DIM), torch.nan, dtype=dtype) for _ in range(2))
        self.n = torch.zeros(2, dtype=torch.int32)
        self.table, self.spans = layout.tables()
        self.quick, (self.rules, self.similar) = table.quick(layout, "cpu"), table.tensors(LENGTH, "cpu")
        self.picked = torch.full((2, 6, table.most), -1, dtype=torch.int32)
        self.asked, self.age = torch.zeros(2, 6, DIM, dtype=dtype), torch.full((2, 6), -1, dtype=torch.int32)
        self.chosen = torch.arange(table.features).repeat(2, 3, 1)
        self.labels = torch.zeros(2, table.features, layout.slots, dtype=dtype)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, fresh: bool) -> tuple[Any, ...]:
        held = self.keys, self.values, self.n, valid, self.table, self.quick, self.spans, self.rules, self.similar
        state = self.picked, self.asked, self.age, [], self.chosen, self.labels
        return q, k, v, *held, *state, SCALE, fresh

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, fresh: bool = False) -> Tensor:
        return ops.attend_tokens(*self.arguments(q, k, v, valid, fresh))

    def run(self, qkv: list[Tensor], cuts: list[int], valid: Tensor | None = None) -> Tensor:
        parts = []
        for a, b in pairwise([0, *cuts, qkv[0].shape[2]]):
            parts.append(self.step(*(x[:, :, a:b] for x in qkv), None if valid is None else valid[:, a:b], a == 0))
        return torch.cat(parts, 2)


def inputs(length: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, length, DIM, generator=made).to(dtype) for n in (6, 3, 3)]


def by_spans(qkv: list[Tensor], valid: Tensor | None, cuts: list[int]) -> Tensor:
    """What `attend_update` gives, which is what prompts and heads with spans are."""
    cache = Cache()
    parts = []
    for a, b in pairwise([0, *cuts, qkv[0].shape[2]]):
        counts = None if valid is None else valid[:, a:b]
        held = cache.keys, cache.values, cache.n, counts, cache.table, cache.spans
        parts.append(ops.attend_update(*(x[:, :, a:b] for x in qkv), *held, SCALE, a == 0))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("padded", [False, True])
def test_spans_and_prompts_are_those_of_attend_update(
    native: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    qkv, cuts = inputs(30), [17, 20, *range(21, 30)]
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) < 0.8 if padded else None
    cache = Cache()
    found, expected = cache.run(qkv, cuts, valid), by_spans(qkv, valid, cuts)
    torch.testing.assert_close(found[:, :, :20], expected[:, :, :20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, [0, 1, 3]], expected[:, [0, 1, 3]], rtol=1e-5, atol=1e-5)
    assert (found - expected)[:, [2, 4, 5], 20:].abs().amax((0, 2, 3)).min() > 1e-2
    if valid is not None:
        assert not found.transpose(1, 2)[~valid].any()


def test_heads_that_select_in_each_step_are_the_rows_of_a_text() -> None:
    rules = (None, None, TokenRule(5, 1, 2), TokenRule(3), TokenRule(4, 2), TokenRule(6, 0, 3))
    qkv, cache = inputs(), Cache(rules)
    found = cache.run(qkv, [1, 30, *range(31, 40)])
    for head in (2, 3, 4, 5):
        q, k, v = qkv[0][:, [head]], *(x[:, [head // 2]] for x in qkv[1:])
        expected = rows(q, k, v, rules[head] or TokenRule(1), SCALE)[:, :, 30:]
        torch.testing.assert_close(found[:, [head], 30:], expected, rtol=1e-5, atol=1e-5)


def test_several_tokens_at_once_make_what_was_selected_stale() -> None:
    qkv, cache = inputs(), Cache()
    cache.run([x[:, :, :12] for x in qkv], [10, 11])
    assert cache.age[:, 4].tolist() == [1, 1] and cache.age[:, 2].tolist() == [0, 0]
    cache.step(*(x[:, :, 12:15] for x in qkv))
    assert (cache.age == -1).all()
    chosen = cache.chosen.clone()
    cache.step(*(x[:, :, 15:16] for x in qkv))
    assert cache.age[:, [2, 4, 5]].tolist() == [[0] * 3] * 2 and torch.equal(cache.chosen, chosen)


@pytest.mark.parametrize("every", [False, True], ids=["mixed", "all select"])
@pytest.mark.parametrize("native", ["1", "0"])
def test_a_token_too_many_is_refused_with_nothing_written(
    every: bool, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    qkv = inputs(LENGTH + 1)
    cache = Cache((TokenRule(5, 1, 2),) * 6, (FULL,) * 6) if every else Cache()
    cache.run([x[:, :, :LENGTH] for x in qkv], [LENGTH - 1])
    before = [x.clone() for x in (cache.keys, cache.n, cache.picked, cache.age)]
    last = [x[:, :, LENGTH:] for x in qkv]
    with pytest.raises(CacheFull):
        cache.step(*last)
    after = cache.keys, cache.n, cache.picked, cache.age
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    # Padding takes no slot.
    assert not cache.step(*last, torch.zeros(2, 1, dtype=torch.bool)).any()


def test_a_compiled_step_writes_its_state_in_place(eagerly: Any) -> None:
    qkv, cache, twin = inputs(20), Cache(), Cache()
    expected = twin.run(qkv, [15, *range(16, 20)])

    def step(*given: Any) -> Tensor:
        return torch.ops.attnopt.attend_tokens(*given) * 1.0

    compiled = torch.compile(step, fullgraph=True)
    found = [cache.run([x[:, :, :15] for x in qkv], [])]
    at = cache.picked.data_ptr()
    for t in range(15, 20):
        found.append(compiled(*cache.arguments(*(x[:, :, t : t + 1] for x in qkv), None, False)))
    torch.testing.assert_close(torch.cat(found, 2), expected)
    assert cache.picked.data_ptr() == at and torch.equal(cache.picked, twin.picked) and torch.equal(cache.n, twin.n)


def test_the_operator_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, qkv = Cache(), inputs(5)
    cache.step(*(x[:, :, :4] for x in qkv), None, True)
    cache.keys.nan_to_num_(), cache.values.nan_to_num_()
    given = cache.arguments(*(x[:, :, 4:] for x in qkv), None, False)
    torch.library.opcheck(torch.ops.attnopt.attend_tokens.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("picked", lambda x: x[:, :5], "picked is"),
        ("age", lambda x: x.long(), "age is torch.int64"),
        ("labels", lambda x: x[..., 1:], "labels is"),
        ("asked", lambda x: x.double(), "asked is torch.float64"),
        ("rules", lambda x: x[:, :4], "rules is"),
    ],
)
def test_a_state_of_another_layer_is_refused(name: str, made: Any, said: str) -> None:
    cache, qkv = Cache(), inputs(3)
    setattr(cache, name, made(getattr(cache, name)))
    with pytest.raises(ValueError, match=said):
        cache.step(*qkv, None, True)


@pytest.mark.parametrize("native", ["1", "0"])
def test_a_head_that_selects_in_a_ring_is_refused(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_NATIVE", native)
    with pytest.raises((ValueError, RuntimeError), match=r"slots|out of bounds"):
        Cache((TokenRule(5, 1, 2),) * 6).run(inputs(30), [28, 29])


def test_there_is_no_gradient() -> None:
    q, k, v = inputs(1)
    with pytest.raises(RuntimeError, match="no gradient"):
        Cache().step(q.requires_grad_(), k, v)
