"""A step out of torch's operators, against the rows of a text that are steps each."""

from __future__ import annotations

import pytest
import torch
from selecting_tokens import RULES as SELECTING
from selecting_tokens import decode
from selecting_tokens import inputs as selecting_inputs
from torch import Tensor

from attnopt.codegen import reference_token_step
from attnopt.codegen.reference_token_step import parts_of, step
from attnopt.codegen.reference_tokens import Selection, TokenRule, channels_of, rows
from attnopt.codegen.self_check_tokens import SCALE

RULES = [
    TokenRule(4, 1, 2),
    TokenRule(4, 1, 2),
    TokenRule(3, recent=1, every=4),
    None,
    TokenRule(5, sink=2, every=1000, similar=0.9),
    TokenRule(5, sink=2, every=1000, similar=0.9),
    TokenRule(500, every=3),
    TokenRule(2, sink=100, recent=3),
]


def inputs(length: int = 41, heads: int = 8, groups: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, length, 8, generator=made, dtype=torch.float64) for n in (heads, groups, groups))
    return q.cumsum(2), k, v


def alone(
    q: Tensor, k: Tensor, v: Tensor, head: int, rule: TokenRule, source: Selection | None = None,
    channels: Tensor | None = None, pad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`rows` of one head."""
    group = head // (q.shape[1] // k.shape[1])
    mine = q[:, [head]], k[:, [group]], v[:, [group]]
    return rows(*mine, rule, SCALE, pad, source, None if channels is None else channels[:, [group]])


def test_steps_are_the_rows_of_a_text() -> None:
    """From the first token on, heads of many rules side by side; a head that does not select is left as it is."""
    q, k, v = inputs()
    found, held = decode(step, q, k, v, RULES)
    for head, rule in enumerate(RULES):
        if rule is None:
            assert found[:, head].isnan().all()
        else:
            torch.testing.assert_close(found[:, [head]], alone(q, k, v, head, rule))
    assert held["age"][:, 2].tolist() == [0, 0] and held["age"][:, 3].tolist() == [-1, -1]
    assert held["picked"][0, 7].tolist()[2:] == [-1] * 498


def test_tokens_that_do_not_count_change_nothing() -> None:
    q, k, v = inputs()
    valid = torch.rand(2, 41, generator=torch.Generator().manual_seed(3)) < 0.7
    valid[0, :3] = False
    found, held = decode(step, q, k, v, RULES, valid=valid)
    for head, rule in enumerate(RULES):
        if rule is not None:
            torch.testing.assert_close(found[:, [head]], alone(q, k, v, head, rule, pad=valid))
    assert held["n"].tolist() == valid.sum(1).tolist()


def test_features_are_those_of_the_prompt() -> None:
    q, k, v = inputs()
    rules = [TokenRule(4, 1, 2, channels=n, every=1 + n % 2) for n in (2, 5, 3, 3)]
    found, held = decode(step, q[:, :4], k[:, :2], v[:, :2], rules, 30)
    chosen = channels_of(q[:, :4, :30], k[:, :2, :30], 5)
    assert torch.equal(held["chosen"], chosen)
    for head, rule in enumerate(rules):
        own = chosen[:, :, : rule.channels]
        # A text whose selections are of every row or of every second: the first behind the prompt is one.
        expected = alone(q[:, :4], k[:, :2], v[:, :2], head, rule, channels=own)
        torch.testing.assert_close(found[:, [head]], expected[:, :, 30:])


def test_a_source_is_read_and_not_written() -> None:
    q, k, v = inputs()
    before_q, before_k, before_v = inputs(seed=9)
    rule, steps = TokenRule(4, 1, 2, every=3), []

    def recording(*given: Tensor) -> None:
        step(*given)
        steps.append(given[8].clone())

    decode(recording, before_q, before_k, before_v, [rule] * 8)
    later = [TokenRule(4, 0, 1)] * 4 + [TokenRule(3)] * 4
    found, held = decode(step, q, k, v, later, sources=lambda at: [steps[at]], of=[0] * 4 + [-1] * 4)
    source = Selection.of(before_q[:, [2]], before_k[:, [1]], rule)
    torch.testing.assert_close(found[:, [2]], alone(q, k, v, 2, later[2], source))
    torch.testing.assert_close(found[:, [5]], alone(q, k, v, 5, later[5]))
    assert (held["picked"][:, :4] == -1).all() and (held["age"][:, :4] == -1).all()


def test_heads_that_are_alike_are_one_product() -> None:
    rules = torch.tensor([[4, 1, 2, 1, 0, -1]] * 6 + [[3, 0, 0, 1, 0, -1], [0, 0, 0, 0, 0, -1]], dtype=torch.int32)
    table = torch.tensor([[48 * g, 48, 0, 1 << 30] for g in range(4)], dtype=torch.int32)
    first, last = parts_of(rules, table)
    assert (first.heads, first.groups, first.start, first.share) == ((0, 1, 2, 3, 4, 5), 3, 0, 2)
    assert (last.heads, last.group, last.groups, last.start) == ((6,), 3, 1, 144)
    table = table.clone()
    table[1, 1] = 64
    assert [part.groups for part in parts_of(rules, table)] == [1, 1, 1, 1]


def test_a_step_that_does_not_ask_whether_to_select(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where asking would wait: selected in every step, and put back where it is not due."""
    rules = SELECTING["of all kinds"]
    q, k, v = selecting_inputs(8, 2, 28, (64, 32), torch.float64)
    expected, wanted = decode(step, q, k, v, rules, 20)
    monkeypatch.setattr(reference_token_step, "may_ask", lambda device: False)
    found, held = decode(step, q, k, v, rules, 20)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert all(torch.equal(held[name], wanted[name]) for name in ("picked", "asked", "age"))
