"""Generation through torch.compile: the same logits, few graphs; but once, the rewritten graph itself runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import models
from generation.models import MAX_LENGTH, RULES, assert_follows, enabled, generate
from transformers import CompileConfig

NEW = 24


@pytest.mark.parametrize("route", ["compile=True", "model.compile"])
def test_a_compiled_model(route: str, eagerly: list[Any]) -> None:
    """Prefill and decode, padded, far past the windows; a second call and a second prompt length compile little."""
    model = models.build("llama")
    options = {"compile": True} if route == "compile=True" else {}
    with enabled(model, RULES, max_length=MAX_LENGTH, **options):
        if route == "model.compile":
            model.compile(backend="attnopt", fullgraph=True)
        ids, mask = models.left_padded()
        assert_follows(model, RULES, ids, mask, generate(model, ids, mask, NEW))
        graphs = len(eagerly)
        assert 1 <= graphs <= 3
        assert_follows(model, RULES, ids, mask, generate(model, ids, mask, NEW))
        assert len(eagerly) == graphs
        ids, mask = models.left_padded(length=17)
        assert_follows(model, RULES, ids, mask, generate(model, ids, mask, NEW))
        assert len(eagerly) <= graphs + 1


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_compile_config(family: str, eagerly: list[Any]) -> None:
    """The way of `generate` itself: prefill runs as it is, the steps are one graph."""
    model = models.build(family)
    rules = models.rules_for(model)
    config = CompileConfig(backend="attnopt", fullgraph=True, mode="reduce-overhead")
    config._compile_all_devices = True
    ids, mask = models.left_padded()
    with enabled(model, rules, max_length=MAX_LENGTH):
        out = generate(model, ids, mask, NEW, compile_config=config)
        assert_follows(model, rules, ids, mask, out)
        assert len(eagerly) == 1
        assert_follows(model, rules, ids, mask, generate(model, ids, mask, NEW, compile_config=config))
        assert len(eagerly) == 1


def test_through_inductor() -> None:
    """Once with everything: generated code, a plan, padding."""
    model = models.build("llama", layers=1)
    ids, mask = models.left_padded()
    with enabled(model, RULES[:1], max_length=MAX_LENGTH, compile=True), torch.no_grad():
        assert_follows(model, RULES[:1], ids, mask, generate(model, ids, mask, 12))
