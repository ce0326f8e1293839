"""Selection of tokens, against a loop that does one row of one head after the other in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.codegen import reference_tokens
from attnopt.codegen.reference_tokens import Selection, TokenRule, best, channels_of, rows

SCALE = 0.4
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 37, 8


def inputs(length: int = LENGTH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float64; queries drift, so that some are similar to those before them."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(BATCH, n, length, DIM, generator=made, dtype=torch.float64) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q.cumsum(2), k, v


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, rule: TokenRule, pad: Tensor | None = None,
    of: tuple[Tensor, Tensor] | None = None, chosen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`rows`, written as the sentences of its module. of: q and k that another layer selects by."""
    batch, heads, length, _ = q.shape
    share, out = heads // k.shape[1], torch.zeros(batch, heads, length, v.shape[3], dtype=q.dtype)
    asking, asked_of = (q, k) if of is None else of
    for b in range(batch):
        real = list(range(length)) if pad is None else pad[b].nonzero()[:, 0].tolist()
        for h in range(heads):
            held: list[int] = []
            then = -1
            for i, t in enumerate(real):
                now = asking[b, h, t]
                before = asking[b, h, real[then]]
                apart = bool(now @ before < rule.similar * now.norm() * before.norm())
                if then < 0 or i - then >= rule.every or (rule.similar > 0 and apart):
                    features = slice(None) if chosen is None else chosen[b, h // share]
                    scores = [float(now[features] @ asked_of[b, h // share, real[j]][features]) for j in range(i + 1)]
                    held = sorted(range(i + 1), key=lambda j, of=scores: (-of[j], j))[: rule.count]
                    then = i
                keep = [j for j in range(i + 1) if j < rule.sink or i - j < rule.recent or j in held]
                at = [real[j] for j in keep]
                weights = torch.softmax(k[b, h // share, at] @ q[b, h, t] * SCALE, 0)
                out[b, h, t] = weights @ v[b, h // share, at]
    return out


def padded() -> Tensor:
    """A row that begins with pads and has one within, and one that ends with them."""
    pad = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    pad[0, :5] = pad[0, 20] = pad[1, 30:] = False
    return pad


RULES = [
    TokenRule(4),
    TokenRule(1, recent=1),
    TokenRule(3, sink=2, recent=4, every=5),
    TokenRule(4, sink=1, recent=2, every=1000, similar=0.97),
    TokenRule(4, recent=1, every=6, similar=0.9),
    TokenRule(LENGTH + 9, every=3),
    TokenRule(5, sink=1, channels=3, every=2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_rows_are_the_steps_of_decoding(rule: TokenRule, padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pad, (q, k, v) = padded() if padding else None, inputs()
    chosen = channels_of(q, k, rule.channels, pad) if rule.channels else None
    monkeypatch.setattr(reference_tokens, "SCORES", 7 * BATCH * HEADS * LENGTH)
    found = rows(q, k, v, rule, SCALE, pad)
    torch.testing.assert_close(found, by_hand(q, k, v, rule, pad, chosen=chosen))


def test_the_guard_is_neither_always_nor_never_met() -> None:
    """Or the rules above would test it less than they say."""
    q, k, _ = inputs()
    last = Selection.of(q, k, TokenRule(4, every=1000, similar=0.97)).last
    selecting = (last == torch.arange(LENGTH)).float().mean()
    assert 0.1 < selecting < 0.9


@pytest.mark.parametrize("padding", [False, True])
def test_a_later_layer_holds_what_the_source_does(padding: bool) -> None:
    pad, (q, k, v), (before_q, before_k, _) = padded() if padding else None, inputs(), inputs(seed=5)
    rule = TokenRule(4, sink=1, recent=2, every=3)
    source = Selection.of(before_q, before_k, rule, pad)
    found = rows(q, k, v, TokenRule(4, sink=1, recent=2), SCALE, pad, source)
    torch.testing.assert_close(found, by_hand(q, k, v, rule, pad, (before_q, before_k)))


def test_of_equal_scores_the_first_are_taken() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0, 2.0, -torch.inf]])
    assert best(scores, 2).nonzero()[:, 1].tolist() == [1, 4]
    assert best(scores, 3).nonzero()[:, 1].tolist() == [1, 2, 4]
    assert best(scores, 4).nonzero()[:, 1].tolist() == [1, 2, 3, 4]
    assert best(scores, 6).sum() == best(scores, 9).sum() == 6
    assert best(torch.zeros(1, 9), 4).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_features_are_weighed_by_the_last_queries_and_all_keys() -> None:
    length = reference_tokens.LAST + 9
    q, k, _ = inputs(length)
    q[:, :, :9] *= 1e6
    chosen = channels_of(q, k, 3)
    for g in range(KV_HEADS):
        weight = q[0, 2 * g : 2 * g + 2, 9:].abs().mean((0, 1)) * k[0, g].abs().mean(0)
        assert chosen[0, g].tolist() == sorted(range(DIM), key=lambda d, of=weight: -float(of[d]))[:3]


def test_rows_of_pads_and_one_token_are_exact_or_zero() -> None:
    q, k, v = inputs(1)
    torch.testing.assert_close(rows(q, k, v, TokenRule(9), SCALE), v.repeat_interleave(2, 1))
    q, k, v = inputs(6)
    pad = torch.zeros(BATCH, 6, dtype=torch.bool)
    pad[1, 3] = True
    v[0] = torch.nan
    found = rows(q, k, v, TokenRule(2, similar=0.5, every=9, channels=2), SCALE, pad)
    assert not found[0].any() and not found[1, :, [0, 1, 2, 4, 5]].any()
    torch.testing.assert_close(found[1, :, 3], v[1, :, 3].repeat_interleave(2, 0))
    empty = tuple(x[:, :, :0] for x in (q, k, v))
    assert rows(*empty, TokenRule(2, similar=0.5), SCALE).shape == (BATCH, HEADS, 0, DIM)
