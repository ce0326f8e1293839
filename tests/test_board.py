"""Heads that select tokens while decoding, evaluated with every row at once: as a mixture, in a model, in a prefill."""

from __future__ import annotations

import pytest
import torch
from generation import models, token_oracle
from generation.test_tokens import BEHIND, MIXED, NOW_AND_THEN, choice, top
from mixtures import attend as attention
from models import make_plan
from torch import Tensor
from tracing import operators, qkv, trace

from attnopt.board import Board, as_prompt, reach_of
from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.measure import Spans
from attnopt.mixed import attend
from attnopt.registry import CANDIDATES

SITE = Site("b", 0, "sdpa", 8, 2, 8, 8, 8**-0.5, "float64", Mask(causal=True))
TOP, OTHER = choice(top(5, 1, 2)), choice(top(3, every=4))
NARROW = choice(dict(k=4, r=3, sink=1, recent=2, every=2))
WINDOW = Choice.of("sink_window", {"sink": 2, "alpha": 5, "beta": 0.0})
CHOICES = (TOP, DENSE, WINDOW, NARROW, OTHER, NARROW, TOP, TOP)


def expected(q: Tensor, k: Tensor, v: Tensor, choices: tuple[Choice, ...]) -> Tensor:
    """Each head out of its candidate's reference, computed for all heads alike."""
    every = [
        CANDIDATES[c.candidate].reference(q, k, v, dict(c.params), SITE.scale)[:, [h]] for h, c in enumerate(choices)
    ]
    return torch.cat(every, 1)


def test_a_mixture_of_heads_that_select_and_others() -> None:
    q, k, v = qkv(2, 8, 2, 45, dtype=torch.float64)
    found = attend(q, k, v, CHOICES, SITE)
    torch.testing.assert_close(found, expected(q, k, v, CHOICES))
    torch.testing.assert_close(attend(q, k, v, CHOICES, SITE, min_length=46), attend(q, k, v, [DENSE] * 8, SITE))
    assert as_prompt(CHOICES) == (DENSE, DENSE, WINDOW, *[DENSE] * 5)


def test_padded_rows_and_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 8, 2, 20, dtype=torch.float64))
    pad = torch.ones(2, 20, dtype=torch.bool)
    pad[1, :7] = False
    # A span counts columns where padding lies between.
    choices = tuple(DENSE if c == WINDOW else c for c in CHOICES)
    found = attend(q, k, v, choices, SITE, pad=pad)
    torch.testing.assert_close(found[:1], expected(q, k, v, choices)[:1])
    torch.testing.assert_close(found[1:, :, 7:], expected(*(x[1:, :, 7:] for x in (q, k, v)), choices))
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), (q, k, v)))


def test_a_whole_model_is_measured_as_it_would_decode(eagerly: object) -> None:
    """Under one plan after the other, each twice: what earlier attentions leave is of the run that asks."""
    model, ids = models.shared("llama"), models.prompts(1, 23)
    names, spans = [site.name for site in models.sites_of(model)], Spans(model)
    for heads in (NOW_AND_THEN, BEHIND, MIXED):
        choices = {name: [choice(head) for head in layer] for name, layer in zip(names, heads, strict=True)}
        with torch.no_grad():
            found = spans.logits(ids, choices)
            assert torch.equal(spans.logits(ids, choices), found)
        wanted = token_oracle.logits(model, ids, torch.ones_like(ids), heads)
        assert models.difference(found, wanted) < models.TOLERANCE
    assert min(spans.losses(ids, choices, divergence=True).kl) > 1e-3


def test_what_is_not_settled_is_taken_to_select_in_every_step() -> None:
    """As where choices are tried one by one, in the backward pass, from the last attention to the first."""
    q, k, v = qkv(2, 8, 2, 30, dtype=torch.float64)
    before_q, before_k, _ = qkv(2, 8, 2, 30, seed=4, dtype=torch.float64)
    behind = choice(top(5, 1, 2, behind=1))
    settled, tried = Board(1), Board()
    for board, choices in (settled, (TOP,) * 8), (tried, None):
        board.post("a", before_q, before_k, None, choices)
        board.post("b", q, k, None, choices)
        board.post("c", q, k, None, choices)
    found = attend(q, k, v, [behind] * 8, SITE, board=tried)
    assert settled.posted["a"].q is None and settled.posted["b"].q is q
    settled.post("a", before_q, before_k, None, (TOP,) * 8)
    settled.post("b", q, k, None, (behind,) * 8)
    assert list(settled.posted) == ["a", "b"]
    torch.testing.assert_close(found, attend(q, k, v, [behind] * 8, SITE, board=settled))
    assert (found - attend(q, k, v, [TOP] * 8, SITE)).abs().max() > 1e-3


def test_a_selection_that_is_not_there_is_refused() -> None:
    q, k, v = qkv(2, 8, 2, 30)
    behind, board = choice(top(5, behind=1)), Board()
    with pytest.raises(PlanError, match="there are 0 before it"):
        attend(q, k, v, [behind] * 8, SITE)
    board.post("b", q, k, None, None)
    with pytest.raises(PlanError, match="there are 0 before it"):
        attend(q, k, v, [behind] * 8, SITE, board=board)
    board = Board(0)
    board.post("a", q, k, None, [TOP] * 8)
    board.post("b", q, k, None, [behind] * 8)
    with pytest.raises(PlanError, match="left none for it"):
        attend(q, k, v, [behind] * 8, SITE, board=board)
    assert (reach_of(iter([TOP, DENSE])), reach_of(iter([TOP, behind]))) == (0, 1)


def test_a_compiled_prefill_is_dense_and_says_so() -> None:
    q, k, v = qkv(2, 8, 2, 40)
    traced = trace(attention, q, k, v, plan=make_plan({"attention": CHOICES}), verify=False)
    assert operators(traced) == ["span_attention"] and traced.rewrites == ["span kernel, 2 spans"]
    assert [no.code for no in traced.program.notes] == ["selects-while-decoding"]
    assert "6 of its 8 heads" in traced.program.notes[0].reason
    traced = trace(attention, q, k, v, plan=make_plan({"attention": (TOP,) * 8}), verify=False)
    assert "span_attention" not in operators(traced)
