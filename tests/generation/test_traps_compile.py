"""Mistakes between `generate`, torch.compile and the cache: compiled code that is never called, made anew on every
step, or copies the cache, and caches that compiled code cannot change from the inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import models
from torch import Tensor
from transformers import AttentionMaskInterface, CompileConfig

import attnopt
from attnopt.cache import Layout
from attnopt.hf import attention, generation
from attnopt.hf.cache import SpanLayer

RULES = models.RULES[:1]
NEW = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("llama", layers=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In inductor's place the rewritten graph itself; every call of one is recorded."""
    made: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, **_: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            made.append(gm)
            return gm(*args)

        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return made


def test_generate_runs_compiled_code_and_says_so(model: Any, calls: list[Any]) -> None:
    """The wrapper of torch.compile hands out the generate of the module within, which knows of no compiled code; and
    CompileConfig copies what it is given, so that a backend that remembers is not the one that was asked."""

    class Remembering:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, gm: Any, inputs: Any, **kwargs: Any) -> Any:
            self.seen.append(gm)
            return gm.forward

    def check(run: Any, seen: Callable[[], list[Any]], **options: Any) -> None:
        calls.clear()
        attnopt.clear_reports()
        torch._dynamo.reset()
        models.generate(run, models.prompts(), None, NEW, **options)
        assert len(seen()) == 1

    with models.enabled(model, RULES, max_length=models.MAX_LENGTH):
        check(model, attnopt.reports, compile_config=configured("attnopt"))
        assert len(calls) >= NEW - 1 and len(set(map(id, calls))) == 1
        with pytest.raises(AssertionError):
            check(torch.compile(model, backend="attnopt"), attnopt.reports)
        assert not calls
        own = Remembering()
        with pytest.raises(AssertionError):
            check(model, lambda: own.seen, compile_config=configured(own))


def configured(chosen: Any) -> CompileConfig:
    """Decoding steps compiled by `generate`, on this device too."""
    config = CompileConfig(backend=chosen, fullgraph=True, mode="reduce-overhead")
    config._compile_all_devices = True
    return config


def graphs(model: Any, tokens: int, padded: bool = False) -> int:
    """Graphs that so many steps of decoding take."""
    made = []

    def counted(gm: Any, _: Any, **__: Any) -> Any:
        made.append(gm)
        return gm.forward

    torch._dynamo.reset()
    ids, mask = models.left_padded() if padded else (models.prompts(), None)
    with models.enabled(model, RULES):
        models.generate(model, ids, mask, tokens + 1, compile_config=configured(counted))
    return len(made)


def test_one_graph_serves_every_step(model: Any) -> None:
    """64 tokens; lengths that are numbers, and masks that grow, take a graph for every step or one that is slower."""

    def counting(patch: pytest.MonkeyPatch) -> None:
        attend = SpanLayer.attend

        def counted(self: SpanLayer, q: Tensor, *rest: Any) -> Tensor:
            self.columns = getattr(self, "columns", 0) + q.shape[2]
            return attend(self, q, *rest)

        patch.setattr(SpanLayer, "attend", counted)
        patch.setattr(SpanLayer, "get_seq_length", lambda self: getattr(self, "columns", 0))

    def growing(patch: pytest.MonkeyPatch) -> None:
        def whole(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
            return None if attention_mask is None else attention_mask[:, None, None].bool()

        for module in (attention, generation):
            patch.setattr(module, "register", lambda: None)
        patch.setitem(AttentionMaskInterface._global_mapping, "attnopt", whole)
        patch.setattr(attention, "counted", lambda q, mask: None if mask is None else mask[:, 0, 0, -q.shape[2] :])
        patch.setattr(SpanLayer, "check", lambda *_: None)

    assert graphs(model, 64, padded=True) == 1
    for mistake, padded in ((counting, False), (growing, True)):
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            assert graphs(model, 2, padded) > 1


def test_a_compiled_step_does_not_copy_the_cache() -> None:
    """What a bare AOT graph does with anything that is written to: half a second of every step at 512 MB."""
    layout = Layout.of_spans([0, 2, 4, 4], [2**14, 9, 12, 3], 2, 2**14)
    table, spans = layout.tables()
    new = [torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)]
    held = [torch.zeros(1, layout.slots, 16), torch.zeros(1, layout.slots, 16), torch.zeros(1, dtype=torch.int32)]

    def step(*args: Tensor) -> Tensor:
        return torch.ops.attnopt.attend_update(*args, None, table, spans, 0.25, False)

    def check(backend: str) -> None:
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        with torch.no_grad():
            compiled(*new, *held)
            with torch.profiler.profile(profile_memory=True) as profile:
                compiled(*new, *held)
        assert held[2].tolist() == [2]
        assert max(event.cpu_memory_usage for event in profile.events()) < held[0].nbytes / 2
        held[2].zero_()

    check("attnopt")
    with pytest.raises(AssertionError):
        check("aot_eager")


def test_what_a_graph_returns_of_a_growing_cache_keeps_its_length(calls: list[Any]) -> None:
    """transformers' DynamicCache counts what it has seen by what it was given back: evicting there would move every
    later position."""

    def step(past_k: Tensor, past_v: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True), keys, values

    def evicting(gm: Any, _: Any) -> Any:
        return lambda *args: tuple(x[:, :, -12:] for x in gm(*args))

    def check(chosen: Any) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=chosen, fullgraph=True)
        held = expected = (torch.randn(2, 2, 21, 8), torch.randn(2, 2, 21, 8))
        with torch.no_grad():
            for _ in range(3):
                new = [torch.randn(2, heads, 1, 8) for heads in (4, 2, 2)]
                (out, *held), (wanted, *expected) = compiled(*held, *new), step(*expected, *new)
                torch.testing.assert_close(out, wanted)
        assert held[0].shape[2] == 24 and all(map(torch.equal, held, expected))

    attnopt.clear_reports()
    check("attnopt")
    assert any(report.rewrites for report in attnopt.reports())
    with pytest.raises(AssertionError):
        check(evicting)
