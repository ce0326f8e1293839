"""attnopt.enable(model, plan): from then on model.generate(...) attends by the plan, with a cache that holds no more.

What is changed is the model's attention implementation, its `_prepare_cache_for_generation` (of this instance), a table
of spans on each attention module and, on request, how it is compiled. attnopt.disable(model) takes it all back.
"""

from __future__ import annotations

import copy
import importlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from attnopt import settings
from attnopt.errors import AttnoptError, CacheFull, ModelError, OptionError
from attnopt.hf import sites
from attnopt.hf.attention import SPANS, register, spans_of
from attnopt.hf.cache import NAME, SpanCache, plan_for
from attnopt.hf.span_layer import AGAIN, ROLLBACK, SpanLayer
from attnopt.plan import Plan

MARK = "_attnopt"
HOOK = "_prepare_cache_for_generation"
# Attributes of a model that are set here, or by generate() for what is set here.
REPLACED = (HOOK, "generation_config", "_compiled_call_impl", "_compiled_call", "_last_compile_config")
# Kinds of cache of generate() that a SpanCache stands in for; it is dynamic in what it holds and static in shape.
ABSORBED = frozenset({None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "hybrid_chunked"})
# Lengths of caches: a step is an eighth of the power of two below, so that at most an eighth is allocated for nothing
# and prompts of similar lengths share a compiled graph.
SHORTEST, STEPS = 128, 8


class Key(NamedTuple):
    """What a cache was made for: rows, tokens of a row, and how many can be taken back."""

    rows: int
    length: int
    slack: int


@dataclass
class Installed:
    """What `enable` did to a model, and what undoes it. pool: caches that nobody holds any more, to be used again."""

    plan: Plan | None
    max_length: int | None
    compiled: bool
    attentions: list[sites.Attention]
    configs: list[tuple[Any, dict[str, Any]]]
    attributes: dict[str, Any]
    pool: list[tuple[Key, list[SpanLayer]]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Installed:
        copied = {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "pool"}
        return Installed(**copied)


def enable(
    model: Any, plan: Plan | str | Path | None = None, *, max_length: int | None = None, compile: bool = False
) -> Any:
    """Make `model.generate` attend by a plan and cache what the plan keeps; returns the model, which is changed.

    plan: None for exact, where every head keeps what the model keeps. max_length: the tokens of every cache, prompt and
    continuation, and the N that windows are made for; None rounds up what each call needs. compile: run the model
    compiled by attnopt. The last cache that nobody holds any more is kept for the next call, until `disable`. Enabling
    again replaces what was enabled. ModelError for a model that cannot be served,
    PlanError for a plan of another model, or with heads that are more than spans.
    """
    inner = sites.generator(model)
    if max_length is not None and max_length < 1:
        raise OptionError(f"A cache of {max_length} tokens cannot be made.", "Give a max_length of 1 or more.")
    found = sites.attentions(inner)
    plan = plan_for(plan, inner, found)
    # Whatever is wrong with the plan is said before anything is changed.
    SpanCache.of(found, plan, max_length or SHORTEST)
    if MARK in vars(inner):
        disable(inner)
    register()
    if settings.debug() >= 4 or settings.dump() is not None:
        # Kernels are told and dumped by the backend, which nothing else here needs.
        importlib.import_module("attnopt.backend")
    kept = {name: vars(inner)[name] for name in REPLACED if name in vars(inner)}
    installed = Installed(plan, max_length, compile, found, list(implementations(inner)), kept)
    setattr(inner, MARK, installed)
    try:
        install(inner, installed)
    except BaseException:
        disable(inner)
        raise
    return model


def install(model: Any, installed: Installed) -> None:
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise sites.unserved(model, "its attention does not go through transformers' attention functions")
    # No bound method: those are pickled by their name, which the class does not have.
    setattr(model, HOOK, partial(prepare_cache, model))
    for attention in installed.attentions:
        choices = installed.plan.choices.get(attention.site.name) if installed.plan is not None else None
        least = installed.plan.min_length if installed.plan is not None else 0
        setattr(attention.module, SPANS, spans_of(choices, attention.site, least))
    if installed.compiled:
        compile_model(model)


def compile_model(model: Any) -> None:
    """On an accelerator generate() compiles its decoding steps itself, as told here. Elsewhere it does not, and the
    module is compiled, prefill and decoding steps alike."""
    from transformers import CompileConfig

    if model.device.type == "cpu":
        model.compile(backend="attnopt", fullgraph=True)
        return
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.compile_config = CompileConfig(backend="attnopt", fullgraph=True, mode=None)


def disable(model: Any) -> Any:
    """Undo `enable`: the model is as it was. Returns it. ModelError where it is not enabled."""
    inner = sites.generator(model)
    installed = installed_on(inner)
    for config, values in installed.configs:
        for name in [name for name in vars(config) if name.startswith("_attn") and name not in values]:
            delattr(config, name)
        for name, value in values.items():
            setattr(config, name, value)
    for name in REPLACED:
        vars(inner).pop(name, None)
    vars(inner).update(installed.attributes)
    for attention in installed.attentions:
        vars(attention.module).pop(SPANS, None)
    delattr(inner, MARK)
    return model


def installed_on(model: Any) -> Installed:
    installed = vars(model).get(MARK)
    if not isinstance(installed, Installed):
        raise ModelError(f"attnopt is not enabled on this {type(model).__name__}.", "Call attnopt.enable(model, plan).")
    return installed


def implementations(model: nn.Module) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every configuration of a model, and what it says of its attention."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config, {name: value for name, value in vars(config).items() if name.startswith("_attn")}


def bucket(length: int) -> int:
    """The length of the cache for so many tokens: the next of eight steps between powers of two, 128 at least."""
    if length <= SHORTEST:
        return SHORTEST
    step = (1 << math.floor(math.log2(length - 1))) // STEPS
    return -(-length // step) * step


def prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
    max_cache_length: int,
) -> None:  # fmt: skip
    """transformers' hook of the same name: a SpanCache where there is no cache yet."""
    installed = installed_on(self)
    refuse_options(generation_config)
    if not installed.compiled and generation_config.compile_config is None:
        # transformers compiles the steps of any cache of a fixed shape on an accelerator; nobody asked for it here.
        generation_config.disable_compile = True
    given = model_kwargs.get("past_key_values")
    if given is not None:
        accept(installed, given, generation_config, model_kwargs, max_cache_length)
        before = installed.attributes.get(HOOK) or MethodType(getattr(type(self), HOOK), self)
        before(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        return
    if generation_config.use_cache is False:
        return
    rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    asked = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
    slack = rollback(generation_config, generation_mode)
    model_kwargs["past_key_values"] = take(self, installed, rows, asked, slack)


def refuse_options(generation_config: Any) -> None:
    """Raise OptionError, by name, for what generate() was asked for and cannot have with a SpanCache."""
    kind = generation_config.cache_implementation
    if kind not in ABSORBED:
        raise OptionError(
            f"cache_implementation={kind!r} cannot hold what a plan keeps.",
            'Leave it out, or give "static" or "dynamic"; or call attnopt.disable(model) first.',
        )
    if generation_config.output_attentions:
        raise OptionError(
            "output_attentions asks for weights that are never formed.", "Call attnopt.disable(model) to look at them."
        )


def rollback(generation_config: Any, generation_mode: Any) -> int:
    """Tokens that this way to generate may take back at once."""
    assisted = getattr(generation_mode, "value", generation_mode) == "assisted_generation"
    if not assisted and not getattr(generation_config, "is_assistant", False):
        return 0
    drafts = [generation_config.prompt_lookup_num_tokens, generation_config.num_assistant_tokens]
    return max([ROLLBACK, *(n for n in drafts if n)])


def accept(installed: Installed, given: Any, generation_config: Any, model_kwargs: dict[str, Any], length: int) -> None:
    """Raise where generate() cannot go on from the cache it was given."""
    if not isinstance(given, SpanCache):
        raise ModelError(
            f"generate() was given a {type(given).__name__}, and this model's attention reads a SpanCache.",
            "Leave past_key_values out, pass SpanCache.for_model(model, plan, max_length=...), or call "
            "attnopt.disable(model).",
        )
    if length > given.max_length and given.grows:
        slack = max(layer.layout.slack for layer in given.layers)
        larger = SpanCache.of(installed.attentions, installed.plan, bucket(length), slack)
        if same_windows(given, SpanCache.of(installed.attentions, installed.plan, given.max_length, slack)):
            given.grow(larger)
    if length > given.max_length:
        raise CacheFull(
            f"{length} tokens are asked for, and the cache was made for {given.max_length}.",
            f"Ask for fewer, or start again without it: make one, or enable the model, with max_length={length}.",
        )
    mask = model_kwargs.get("attention_mask")
    columns = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", None)
    seen = int(given.get_seq_length())
    if columns is not None and columns <= seen:
        raise AttnoptError(
            f"The prompt has {columns} tokens and the cache holds {seen} already: it is no continuation.",
            AGAIN,
        )


def same_windows(a: SpanCache, b: SpanCache) -> bool:
    """Whether two caches keep the same of every head; a model may have been enabled with another plan since."""

    def of(layer: SpanLayer) -> tuple[Any, ...]:
        tokens = None if layer.tokens is None else layer.tokens.table
        prompt = None if layer.prompt is None else layer.prompt.asked
        return layer.layout.head_sinks, layer.layout.head_windows, tokens, prompt

    return all(of(x) == of(y) for x, y in zip(a.layers, b.layers, strict=True))


def take(model: Any, installed: Installed, rows: int, length: int, slack: int) -> SpanCache:
    """A cache of so many rows for `length` tokens: one that nobody holds any more, or a new one."""
    if installed.max_length is not None:
        if length > installed.max_length:
            raise CacheFull(
                f"{length} tokens are asked for, and attnopt was enabled with max_length={installed.max_length}.",
                f"Enable it with max_length={length} or more, or ask for fewer.",
            )
        length = installed.max_length
    else:
        length = bucket(length)
    # One cache is kept at most: the memory of the others is wanted for this one.
    try:
        # In one step, as two threads may ask.
        key, layers = installed.pool.pop()
    except IndexError:
        key, layers = Key(0, 0, 0), []
    if layers and serves(key, Key(rows, length, slack), installed.plan):
        cache = SpanCache(layers, key.length)
        cache.reset()
    else:
        key = Key(rows, length, slack)
        cache = SpanCache.of(installed.attentions, installed.plan, length, slack)
        if model._compiled_call_impl is not None:
            # A compiled forward that allocates is another graph than one that finds everything there.
            cache.allocate(model, installed.attentions, rows)
    # A chat goes on past the length that its first turn asked for, and a model that drafts past its first tokens.
    cache.grows = installed.max_length is None and not elastic(installed.plan)
    weakref.finalize(cache, give_back, weakref.ref(installed), key, list(cache.layers)).atexit = False
    return cache


def serves(held: Key, asked: Key, plan: Plan | None) -> bool:
    """Whether a cache that is there can stand in for the one asked for, giving the same results: one up to twice as
    long as well, unless the plan's windows depend on the length."""
    if held == asked or elastic(plan):
        return held == asked
    return held.rows == asked.rows and held.slack >= asked.slack and asked.length <= held.length <= 2 * asked.length


def elastic(plan: Plan | None) -> bool:
    """Whether what a plan keeps depends on the length of the cache."""
    if plan is None:
        return False
    every = {choice for choices in plan.choices.values() for choice in choices}
    return bool(plan.min_length) or any(dict(choice.params).get("beta") for choice in every)


def give_back(installed: weakref.ref[Installed], key: Key, layers: list[SpanLayer]) -> None:
    """Called when a cache is gone: its layers can serve the next call. One that grew or has other rows cannot."""
    alive, first = installed(), layers[0]
    same = first.is_initialized and first.batch_size == key.rows and first.layout.length == key.length
    if alive is not None and same:
        alive.pool[:] = [(key, layers)]
