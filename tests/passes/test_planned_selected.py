"""Heads whose keys are selected while running, in a graph: beside spans and far parts, compiled, and where refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling import compiled
from mixtures import attend as attention
from mixtures import fits, linear, naive, site, window
from models import build, make_plan, padding, tokens
from tracing import operators, qkv, trace

from attnopt import backend
from attnopt.ir import DENSE, Choice
from attnopt.mixed import attend
from attnopt.registry import CANDIDATES

OWN = {"mass": 0.5, "count": 4, "alike": -1.0, "block": 16, "skip": 0.0}
FEW, FEWER = Choice.of("pooled", OWN), Choice.of("pooled", {**OWN, "mass": 0.25})
LARGER = Choice.of("pooled", {**OWN, "block": 32})
MIXED = (FEW, DENSE, window(2, 5), linear(2, 5), FEWER, LARGER, FEW, DENSE)
FITTED = fits({"attention": MIXED})


def test_beside_spans_and_far_parts() -> None:
    """One call for the heads of one method and size of blocks; each head by its own settings."""
    q, k, v = (0.5 * x for x in qkv(2, 8, 2, 70, dtype=torch.float64))
    plan = replace(make_plan({"attention": MIXED}), fitted=FITTED)
    traced = trace(attention, q, k, v, plan=plan, verify=False)
    assert operators(traced) == ["span_attention_lse", "linear_far", "selected_attention", "selected_attention"]
    assert traced.rewrites == [
        "span kernel, 2 spans; pooled selection on 3 heads; linear tail on 1 head; pooled selection on 1 head"
    ]
    others = tuple(DENSE if c.candidate == "pooled" else c for c in MIXED)
    expected = naive(q, k, v, others, site(), FITTED)
    for head, choice in enumerate(MIXED):
        if choice.candidate == "pooled":
            expected[:, head] = CANDIDATES["pooled"].reference(q, k, v, dict(choice.params), 8**-0.5)[:, head]
    torch.testing.assert_close(traced.output, expected, atol=1e-10, rtol=1e-10)
    # What verification runs is the same.
    torch.testing.assert_close(attend(q, k, v, MIXED, site(), FITTED), expected, atol=1e-10, rtol=1e-10)


def test_alone_they_need_no_span_kernel() -> None:
    q, k, v = qkv(2, 8, 2, 70)
    traced = trace(attention, q, k, v, plan=make_plan({"attention": (FEW,) * 8}), verify=False)
    assert operators(traced) == ["selected_attention"] and traced.rewrites == ["pooled selection on 8 heads"]


def test_where_a_gradient_is_asked_for_the_site_stays_exact() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 8, 2, 40))
    traced = trace(attention, q, k, v, plan=make_plan({"attention": (FEW,) * 8}), verify=False, grad=True)
    assert "selected_attention" not in operators(traced)
    assert [no.code for no in traced.program.notes] == ["selection-has-no-gradient"]
    traced.output.sum().backward()


def test_a_model_of_padded_batches_compiles_once(eagerly: Any) -> None:
    """At several lengths, the second of which is a symbol; below the plan's least length nothing is selected."""
    backend.clear_reports()
    model = build("llama", num_hidden_layers=1)
    path = "model.layers.0.self_attn"
    call = compiled(model, plan=make_plan({path: (FEW, FEWER, DENSE, window(2, 5))}, 30))
    with torch.no_grad():
        for length in (60, 75, 29):
            mask = padding(2, length, "left")
            given = {"input_ids": tokens(2, length), "attention_mask": mask, "use_cache": False}
            found, stock = call(**given).logits, model(**given).logits
            near = float((found - stock)[mask.bool()].abs().max())
            assert near < 1e-5 if length < 30 else near > 1e-3, length
    assert len(eagerly) <= 2
    (rewrite,) = backend.reports()[-1].rewrites
    assert rewrite.lowering == "span kernel, 2 spans; pooled selection on 2 heads"


def test_a_candidate_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "pooled")
    traced = trace(attention, *qkv(2, 8, 2, 40), plan=make_plan({"attention": (FEW,) * 8}), verify=False)
    assert [no.code for no in traced.program.notes] == ["switched-off"]
