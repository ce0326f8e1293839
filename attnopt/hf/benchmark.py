"""Decoding side by side: what a token of `model.generate` takes with each cache, rounds interleaved in one process.

    DynamicCache      transformers' default: grows by torch.cat
    StaticCache       transformers' buffer, exactly as long as needed
    attnopt exact     attnopt.enable(model): the same results, each slot read once for all query heads of a KV head
    attnopt planned   attnopt.enable(model, plan): a KV cache that holds only what the plan keeps

The baseline decides the headline, so all are always shown.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnopt import hf
from attnopt.errors import ModelError
from attnopt.hf.cache import SpanCache
from attnopt.hf.generation import MARK, disable, enable
from attnopt.plan import Plan
from attnopt.units import MIB

DYNAMIC, STATIC, EXACT, PLANNED = "DynamicCache", "StaticCache", "attnopt exact", "attnopt planned"


@dataclass(frozen=True)
class Decoded:
    """One variant at one prompt length: median milliseconds and tokens per second of a decode step of the whole batch,
    MiB of KV cache, and the relative error of the first new token's logits against DynamicCache."""

    variant: str
    length: int
    new_tokens: int
    batch: int
    dtype: str
    milliseconds: float
    tokens_per_second: float
    cache_mib: float
    error: float


@dataclass(eq=False)
class Prefix:
    """A cache filled with all of a prompt but its last token, and how to run the model on it."""

    variant: str
    plan: Plan | None
    cache: Any = None
    error: float = 0.0

    @property
    def ours(self) -> bool:
        return self.variant in (EXACT, PLANNED)


class Clock:
    """A logits processor that notes when it is called, once for each new token. now: in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seen: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.seen.append(self.now())
        return scores

    @property
    def steps(self) -> list[float]:
        """Seconds from each token to the next."""
        return [after - before for before, after in zip(self.seen, self.seen[1:], strict=False)]


@contextmanager
def running(model: nn.Module, prefix: Prefix) -> Iterator[None]:
    """The model as the variant runs it."""
    if not prefix.ours:
        yield
        return
    enable(model, prefix.plan)
    try:
        yield
    finally:
        disable(model)


def empty_cache(model: Any, prefix: Prefix, length: int) -> Any:
    """A cache of the variant for `length` tokens."""
    transformers = hf.transformers()
    if prefix.ours:
        return SpanCache.for_model(model, prefix.plan, max_length=length)
    config = model.config.get_text_config(decoder=True)
    if prefix.variant == STATIC:
        return transformers.StaticCache(config=config, max_cache_len=length)
    return transformers.DynamicCache(config=config)


def mib_of(cache: Any) -> float:
    """What the keys and values of a cache take, in MiB."""
    if isinstance(cache, SpanCache):
        return float(cache.nbytes) / MIB
    return float(sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))) / MIB


@torch.no_grad()
def timed_decoding(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None, plan: Plan | None = None, new_tokens: int = 32,
    rounds: int = 3, now: Callable[[], float] = time.perf_counter, progress: Callable[[str], None] | None = None,
) -> tuple[list[Prefix], dict[str, list[float]]]:  # fmt: skip
    """The variants with their filled caches, and for each the seconds of every decode step, in the same order.

    Greedy decoding of `new_tokens` after the prompt ids (B, N), from a copy of its cache in every round; mask int64
    (B, N), 0 where a token is padding. Each variant reads the prompt once.
    """
    if MARK in vars(model):
        raise ModelError("The model is enabled, and is timed with other caches too.", "Call attnopt.disable(model).")
    prefixes = [Prefix(DYNAMIC, None), Prefix(STATIC, None), Prefix(EXACT, None)]
    if plan is not None:
        prefixes.append(Prefix(PLANNED, plan))
    tell = progress or (lambda _: None)
    fill(model, prefixes, ids, mask, new_tokens, tell)
    seconds: dict[str, list[float]] = {p.variant: [] for p in prefixes}
    # The first round warms up: kernels are compiled, memory is touched.
    for n in range(rounds + 1):
        for prefix in prefixes:
            clock = Clock(now)
            with running(model, prefix):
                decode(model, ids, mask, copy.deepcopy(prefix.cache), new_tokens, clock)
            seconds[prefix.variant] += clock.steps if n else []
            tell(f"round {n}: {prefix.variant}")
    return prefixes, seconds


def compare_decoding(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None, plan: Plan | None = None, new_tokens: int = 32,
    rounds: int = 3, dtype: str = "", progress: Callable[[str], None] | None = None,
) -> list[Decoded]:  # fmt: skip
    """A row for each variant of `timed_decoding`, whose arguments these are."""
    prefixes, seconds = timed_decoding(model, ids, mask, plan, new_tokens, rounds, progress=progress)
    batch, rows = ids.shape[0], []
    for prefix in prefixes:
        median = statistics.median(seconds[prefix.variant])
        facts = prefix.variant, ids.shape[1], new_tokens, batch, dtype
        rows.append(Decoded(*facts, median * 1e3, batch / median, mib_of(prefix.cache), prefix.error))
    return rows


def fill(
    model: Any, prefixes: list[Prefix], ids: Tensor, mask: Tensor | None, new_tokens: int, tell: Callable[[str], None]
) -> None:
    """Read the prompt with each variant, and note how far the logits after it are from the first variant's."""
    wanted = None
    given = {} if mask is None else {"attention_mask": mask}
    head = {} if mask is None else {"attention_mask": mask[:, :-1]}
    for prefix in prefixes:
        with running(model, prefix):
            prefix.cache = empty_cache(model, prefix, ids.shape[1] + new_tokens)
            model(ids[:, :-1], past_key_values=prefix.cache, logits_to_keep=1, **head)
            last = copy.deepcopy(prefix.cache)
            places = None if mask is None else mask.cumsum(1)[:, -1:] - 1
            found = model(ids[:, -1:], past_key_values=last, position_ids=places, **given).logits[:, -1].double()
        wanted = found if wanted is None else wanted
        prefix.error = float((found - wanted).norm() / wanted.norm())
        tell(f"prompt: {prefix.variant}")


def decode(model: Any, ids: Tensor, mask: Tensor | None, cache: Any, new_tokens: int, clock: Clock) -> Tensor:
    """Token ids (B, N + new_tokens) by `generate`, greedy, on a cache that holds all but the last of the prompt's."""
    transformers = hf.transformers()
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList([clock]),
    )  # fmt: skip
    return found
