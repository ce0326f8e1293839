"""Generation through torch.compile: the same logits and few graphs. What Inductor would be given runs as it is."""

from __future__ import annotations

from typing import Any

from generation import models
from generation.models import MAX_LENGTH, RULES, assert_follows, enabled, generate
from transformers import CompileConfig

NEW = 24


def test_a_compiled_model(eagerly: list[Any]) -> None:
    """Prefill and decode, padded, far past the windows; a second call and a second prompt length compile little."""
    model, rules = models.build("llama", layers=1), RULES[:1]
    with enabled(model, rules, max_length=MAX_LENGTH):
        model.compile(backend="attnopt", fullgraph=True)
        ids, mask = models.left_padded()
        assert_follows(model, rules, ids, mask, generate(model, ids, mask, NEW))
        graphs = len(eagerly)
        assert 1 <= graphs <= 3
        assert_follows(model, rules, ids, mask, generate(model, ids, mask, NEW))
        assert len(eagerly) == graphs
        ids, mask = models.left_padded(length=17)
        assert_follows(model, rules, ids, mask, generate(model, ids, mask, NEW))
        assert len(eagerly) <= graphs + 1


def test_compile_config(eagerly: list[Any]) -> None:
    """The way of `generate` itself: prefill runs as it is, the steps are one graph, of a second call too."""
    model = models.build("mixed")
    rules = models.rules_for(model)
    config = CompileConfig(backend="attnopt", fullgraph=True, mode="reduce-overhead")
    config._compile_all_devices = True
    ids, mask = models.left_padded()
    with enabled(model, rules, max_length=MAX_LENGTH):
        for _ in range(2):
            out = generate(model, ids, mask, NEW, compile_config=config)
            assert_follows(model, rules, ids, mask, out)
            assert len(eagerly) == 1
