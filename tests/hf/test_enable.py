"""attnopt.enable, disable and explain: what changes on a model, how long caches are, and that all of it goes away."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import models
from generation.models import FULL, LAYERS, MAX_LENGTH, RULES, Rule, enabled, generate
from torch import nn
from transformers import CompileConfig

import attnopt
from attnopt.errors import AttnoptError, CacheFull, ModelError, OptionError, PlanError
from attnopt.hf import generation
from attnopt.hf.generation import Key, bucket, elastic, serves

FIXED: tuple[tuple[Rule, ...], ...] = (((2, 6, 0.0), FULL, (0, 9, 0.0), (1, 3, 0.0)),) * LAYERS


def state(model: nn.Module) -> dict[str, Any]:
    """All that anyone could have hung on a model, its modules and their configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {key: value if callable(value) else id(value) for key, value in vars(module).items()}
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{name} config"] = copy.deepcopy(vars(config))
    return found | {"generation_config": model.generation_config.to_dict()}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixed"])
def test_disabling_leaves_nothing(family: str, compile: bool) -> None:
    model = models.build(family)
    before, ids = state(model), models.prompts()
    stock = models.produced_logits(generate(model, ids, None, 4))
    attnopt.enable(model, models.plan_of(model, models.rules_for(model)), compile=compile)
    assert state(model) != before and ("_compiled_call_impl" in vars(model)) == compile
    if not compile:
        generate(model, ids, None, 4)
    assert attnopt.disable(model) is model
    assert state(model) == before
    assert torch.equal(models.produced_logits(generate(model, ids, None, 4)), stock)


def test_what_was_there_comes_back() -> None:
    """A hook of the user's own, another attention and a compiled forward."""
    model = models.build("llama", layers=1)
    model.set_attn_implementation("eager")
    made = []
    theirs = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = lambda *given: made.append(1) or theirs(*given)
    model.compile(backend="eager")
    before = state(model)
    attnopt.enable(model, compile=True)
    attnopt.enable(model)
    attnopt.disable(model)
    assert state(model) == before and model.config._attn_implementation == "eager"
    model._compiled_call_impl = None
    generate(model, models.prompts(), None, 2)
    assert made


def test_the_files_of_a_model_do_not_change(tmp_path: Path) -> None:
    model = models.shared("llama")
    model.save_pretrained(tmp_path / "before")
    with enabled(model, RULES):
        model.save_pretrained(tmp_path / "enabled")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "before" / file).read_text() == (tmp_path / "enabled" / file).read_text()


def test_enabling_again_is_what_was_asked_for_last() -> None:
    model, ids = models.shared("llama"), models.prompts()
    stock = models.produced_logits(generate(model, ids, None, 6))
    with enabled(model, RULES, max_length=64):
        planned = models.produced_logits(generate(model, ids, None, 6))
        attnopt.enable(model)
        again = models.produced_logits(generate(model, ids, None, 6))
    assert models.difference(again, stock) < models.TOLERANCE < 0.5 < models.difference(planned, stock)


def test_what_cannot_be_enabled_changes_nothing() -> None:
    model = models.shared("llama")
    before = state(model)
    plan = models.plan_of(model, RULES)
    for wrong in (models.foreign(plan), "there/is/no.json", 3):
        with pytest.raises(PlanError):
            attnopt.enable(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="0 tokens"):
        attnopt.enable(model, plan, max_length=0)
    with pytest.raises(ModelError, match="Linear is no transformers model"):
        attnopt.enable(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="not enabled"):
        attnopt.disable(model)
    assert state(model) == before
    with enabled(model, RULES):
        held = state(model)
        with pytest.raises(PlanError):
            attnopt.enable(model, models.foreign(plan))
        assert state(model) == held


def test_a_plan_is_read_from_its_file(tmp_path: Path) -> None:
    model, ids = models.shared("llama"), models.prompts()
    plan = models.plan_of(model, RULES)
    plan.save(tmp_path / "plan.json")
    with enabled(model, RULES, max_length=64):
        expected = models.produced_logits(generate(model, ids, None, 6))
        attnopt.enable(model, tmp_path / "plan.json", max_length=64)
        assert torch.equal(models.produced_logits(generate(model, ids, None, 6)), expected)


def test_a_wrapped_model_is_the_model_inside() -> None:
    model, ids = models.build("llama", layers=1), models.prompts()
    wrapped = torch.compile(model, backend="eager")
    assert attnopt.enable(wrapped, models.plan_of(model, RULES[:1]), max_length=64) is wrapped
    out = wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, attnopt.SpanCache)
    attnopt.disable(wrapped)
    assert generation.MARK not in vars(model)


def test_a_copy_of_an_enabled_model_is_enabled() -> None:
    model, ids = models.build("llama", layers=1), models.prompts()
    with enabled(model, RULES[:1], max_length=64):
        expected = models.produced_logits(generate(model, ids, None, 4))
        twin = copy.deepcopy(model)
    assert twin._prepare_cache_for_generation.args[0] is twin
    assert torch.equal(models.produced_logits(generate(twin, ids, None, 4)), expected)
    attnopt.disable(twin)
    assert not any("attnopt" in name for module in twin.modules() for name in vars(module))


def test_what_is_explained() -> None:
    model = models.shared("mixed")
    assert "not enabled" in str(attnopt.explain(model))
    with enabled(model, models.rules_for(model), max_length=256):
        explained = attnopt.explain(model)
        found, text = explained.generation, str(explained)
        assert found is not None and explained.plan is found.plan and f"plan {found.plan.id}" in text
        assert found.enabled and found.length == 256 and len(found.layers) == LAYERS
        assert "model.layers.1.self_attn" in text and f"own window {models.OWN_WINDOW}" in text and "was sdpa" in text
        cache = generate(model, models.prompts(1), None, 4).past_key_values
        assert found.nbytes == cache.nbytes < found.dense and "is kept for" not in text
        del cache
        assert "is kept for the next call: 1 rows of 256 tokens" in str(attnopt.explain(model))
    assert found.to_json()["nbytes"] == found.nbytes and len(found.to_json()["layers"]) == LAYERS
    assert found.dense == LAYERS * 256 * models.KV_HEADS * 2 * models.HEAD_DIM * 4
    with enabled(model, None):
        assert "no plan: exact" in str(attnopt.explain(model))


def test_what_is_refused_is_explained() -> None:
    model = models.build("llama", layers=1)
    model.config.kv_lora_rank = 8
    found = attnopt.explain(model)
    assert found.generation is not None and not found.generation.enabled
    assert "MLA" in str(found) and "cannot be enabled" in str(found)
    with pytest.raises(ModelError, match="MLA"):
        attnopt.enable(model)


def test_lengths_are_rounded_up_to_few() -> None:
    lengths = [bucket(n) for n in range(1, 20000)]
    assert all(n <= found for n, found in enumerate(lengths, 1)) and lengths == sorted(lengths)
    assert all(found <= max(128, 1.125 * n) for n, found in enumerate(lengths, 1))
    assert len({found for found in lengths if 1024 < found <= 2048}) == 8
    assert [bucket(n) for n in (1, 128, 129, 1024, 1025, 16384)] == [128, 128, 144, 1024, 1152, 16384]


def test_which_caches_serve_again() -> None:
    model = models.shared("llama")
    fixed, stretched = models.plan_of(model, FIXED), models.plan_of(model, RULES)
    assert elastic(stretched) and not elastic(fixed) and not elastic(None)
    held = Key(2, 256, 64)
    serving = [held, Key(2, 128, 0), Key(2, 200, 64)]
    for asked in [*serving, Key(2, 112, 0), Key(1, 256, 0), Key(2, 288, 0), Key(2, 256, 80)]:
        same = asked in serving
        assert serves(held, asked, fixed) == same
        assert serves(held, asked, stretched) == (asked == held)


def test_a_cache_that_nobody_holds_is_used_again_and_one_that_is_held_is_not() -> None:
    model, ids = models.shared("llama"), models.prompts()

    def slots(cache: Any) -> int:
        return cache.layers[0].slots_k.data_ptr()

    with enabled(model, RULES):
        kept = generate(model, ids, None, 4)
        content = [layer.slots_k.clone() for layer in kept.past_key_values.layers]
        first = slots(generate(model, models.prompts(seed=7), None, 4).past_key_values)
        second = generate(model, ids, None, 4)
        assert slots(second.past_key_values) == first != slots(kept.past_key_values)
        assert torch.equal(models.produced_logits(second), models.produced_logits(kept))
        assert all(torch.equal(a, b.slots_k) for a, b in zip(content, kept.past_key_values.layers, strict=True))
        longer = generate(model, ids, None, 150)
        assert longer.past_key_values.max_length == bucket(len(ids[0]) + 149)
    assert not hasattr(model, generation.MARK)


def test_one_length_for_all_where_it_was_given() -> None:
    model, ids = models.shared("llama"), models.prompts()
    with enabled(model, RULES, max_length=40):
        assert generate(model, ids, None, 3).past_key_values.max_length == 40
        # The last token is never fed: 21 + 20 of them fit.
        generate(model, ids, None, 20)
        with pytest.raises(CacheFull, match="max_length=41"):
            generate(model, ids, None, 21)


def test_a_draft_model_goes_on_past_its_first_bucket() -> None:
    """Every draft is a call of its own, for a few tokens more."""
    model, draft = models.shared("llama"), models.build("llama", layers=1, seed=3)
    ids = models.prompts(1)
    expected = generate(model, ids, None, 120)
    with enabled(draft, FIXED[:1]):
        found = generate(model, ids, None, 120, assistant_model=draft)
    assert models.difference(models.produced_logits(found), models.produced_logits(expected)) < models.TOLERANCE


def test_a_longer_cache_holds_what_a_short_one_held() -> None:
    model = models.shared("llama")
    ids, (_, mask) = models.prompts(3, 90), models.left_padded(3, 90)
    with models.attending(model), torch.no_grad():
        plan = models.plan_of(model, FIXED)
        short, long = (attnopt.SpanCache.for_model(model, plan, max_length=n) for n in (48, 128))
        for cache in (short, long):
            model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        short.grow(attnopt.SpanCache.for_model(model, plan, max_length=128))
        found = [model(ids[:, 40:], attention_mask=mask, past_key_values=cache).logits for cache in (short, long)]
    assert short.max_length == 128 and torch.equal(*found)


def test_nothing_is_compiled_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator transformers compiles steps with any cache of a fixed shape."""
    model, ids = models.shared("llama"), models.prompts()
    asked = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: asked.append(config) or self.__call__)
    monkeypatch.setattr(
        type(model), "_valid_auto_compile_criteria", lambda self, kwargs, config: not config.disable_compile
    )
    config = CompileConfig(backend="eager")
    with enabled(model, RULES):
        generate(model, ids, None, 3)
        assert not asked
        generate(model, ids, None, 3, compile_config=config)
        assert asked == [config]


def test_steps_are_one_graph_for_plans_of_equal_size(eagerly: list[Any]) -> None:
    """256 steps, and another plan whose heads keep as many slots in all."""
    from torch._dynamo.utils import counters

    model, ids = models.build("llama", layers=1), models.prompts(2, 9)
    rules = ((2, 6, 0.0), (0, 4, 0.0), (0, 9, 0.0), (1, 3, 0.0))
    counters.clear()
    for plan, steps in ((rules, 256), (rules[2:] + rules[:2], 4)):
        with enabled(model, (plan,), max_length=280, compile=True):
            generate(model, ids, None, steps)
        assert counters["stats"]["unique_graphs"] == 2, "prefill and steps"


def test_a_prompt_that_is_no_continuation() -> None:
    model = models.shared("llama")
    with enabled(model, RULES):
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, RULES), max_length=64)
        generate(model, models.prompts(1, 20), None, 4, past_key_values=cache)
        for length in (12, 23):
            with pytest.raises(AttnoptError, match="no continuation") as refused:
                generate(model, models.prompts(1, length, seed=5), None, 4, past_key_values=cache)
            assert "reset()" in refused.value.remedy
        cache.reset()
        again = generate(model, models.prompts(1, 20), None, 4, past_key_values=cache)
        cache = attnopt.SpanCache.for_model(model, models.plan_of(model, models.RULES), max_length=64)
        fresh = generate(model, models.prompts(1, 20), None, 4, past_key_values=cache)
    assert torch.equal(models.produced_logits(again), models.produced_logits(fresh))


def test_a_model_in_another_dtype_after_its_first_cache() -> None:
    """The memory of that cache is not taken up again; and under autocast a cache allocated beforehand is made anew."""
    model = models.build("llama")
    ids = models.prompts(1, 12)
    attnopt.enable(model, models.plan_of(model, RULES), max_length=MAX_LENGTH)
    first = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.to(torch.bfloat16)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == first.shape
    model.to(torch.float32)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), first)
    cache = attnopt.SpanCache.for_model(model, max_length=MAX_LENGTH, batch_size=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        model(ids, past_key_values=cache)
        # Without a cache, under the plan's spans, as with one.
        found = model(ids, use_cache=False).logits
    assert cache.layers[0].slots_k.dtype == torch.bfloat16 and found.isfinite().all()


def test_an_enabled_model_is_saved_whole(tmp_path: Path) -> None:
    model = models.build("llama")
    attnopt.enable(model, max_length=MAX_LENGTH)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    ids = models.prompts(1, 9)
    found, wanted = (m.generate(ids, max_new_tokens=3, do_sample=False) for m in (again, model))
    assert torch.equal(found, wanted) and again._prepare_cache_for_generation.args[0] is again
