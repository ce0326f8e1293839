"""SpanCache: transformers' KV cache, holding of every KV head what the plan keeps.

    from attnopt import SpanCache                                # makes "attnopt" known to transformers

    model.set_attn_implementation("attnopt")                     # attnopt.enable(model, plan) does all of this
    cache = SpanCache.for_model(model, "plan.json", max_length=4096)
    model.generate(**inputs, past_key_values=cache)

transformers hands `update` the new keys and values and passes what it returns on to the attention function. A layer of
this cache returns a Handle, which is no tensor: the attention function "attnopt" knows what to do with it, any other
fails with a remedy. Attending and writing are then one operator, `attnopt::attend_update`.

A token's position is the number of tokens of its row that count before it, so that padding is neither attended to nor
stored. Windows are those at max_length tokens, for the whole life of the cache.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from attnopt.cache import TokenTable, layouts_of, tokens_of
from attnopt.errors import CacheFull, ModelError, PlanError
from attnopt.fingerprint import fingerprint_of
from attnopt.hf import sites
from attnopt.hf.prompts import selection_of
from attnopt.hf.span_layer import ANOTHER, SpanLayer, autocast
from attnopt.hf.token_state import TokenState
from attnopt.plan import Plan

# transformers, by way of span_layer.py, is there.
from transformers.cache_utils import Cache  # isort: skip

NAME = "attnopt"


class SpanCache(Cache):
    """A layer of slots for every layer of a model. Make it with `for_model`."""

    def __init__(self, layers: list[SpanLayer], length: int) -> None:
        super().__init__(layers=list(layers))
        self.max_length = length
        # Whether it was made for whatever length is needed, and may go on with a larger one.
        self.grows = False

    @classmethod
    def for_model(
        cls,
        model: Any,
        plan: Plan | str | Path | None = None,
        *,
        max_length: int,
        slack: int = 0,
        batch_size: int | None = None,
    ) -> SpanCache:
        """A cache for at most `max_length` tokens a row (prompt and what is generated), windows being the plan's at
        that length. No plan: every head keeps all its model keeps. slack: tokens that can be taken back at any time.
        batch_size: rows, to allocate at once instead of with the first token.

        ModelError for a model that cannot be served, or whose attention is not "attnopt"; PlanError for a plan of
        another model, or of more than spans.
        """
        inner = sites.generator(model)
        found = sites.attentions(inner)
        if inner.config._attn_implementation != NAME:
            raise ModelError(
                f"The attention of this model is {inner.config._attn_implementation!r}, which cannot read a SpanCache.",
                ANOTHER,
            )
        plan = plan_for(plan, inner, found)
        cache = cls.of(found, plan, max_length, slack)
        if batch_size is not None:
            cache.allocate(inner, found, batch_size)
        return cache

    def __copy__(self) -> SpanCache:
        """A cache of its own: two that share their slots would write into each other's."""
        return copy.deepcopy(self)

    @classmethod
    def of(cls, found: list[sites.Attention], plan: Plan | None, length: int, slack: int = 0) -> SpanCache:
        here = [a.site for a in found]
        layouts, states = layouts_of(plan, here, length, slack), cls.states_of(tokens_of(plan, here, length))
        whole = plan is None or length < plan.min_length
        layers = []
        for at, (site, state) in enumerate(zip(here, states, strict=True)):
            choices = None if whole or plan is None else plan.choices.get(site.name)
            prompt = selection_of(choices, site, plan.min_length if plan is not None else 0)
            layers.append(SpanLayer(layouts[site.name], site.mask.window, at == 0, state, prompt))
        return cls(layers, length)

    @staticmethod
    def states_of(tables: list[TokenTable | None]) -> list[TokenState | None]:
        """A state for each layer whose heads select tokens, which knows those it reads from."""
        states: list[TokenState | None] = []
        for at, table in enumerate(tables):
            sources = [] if table is None else [states[at - back] for back in table.sources]
            states.append(None if table is None else TokenState(table, [s for s in sources if s is not None]))
        return states

    def allocate(self, model: Any, found: list[sites.Attention], rows: int) -> None:
        """Allocate all layers for so many rows, in the model's dtype, each on the device of its module."""
        for layer, attention in zip(self.layers, found, strict=True):
            site, device = attention.site, next(attention.module.parameters()).device
            empty = autocast(torch.empty(rows, site.kv_heads, 0, site.head_dim, dtype=model.dtype, device=device))
            layer.lazy_initialization(empty, empty)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values and of what heads select by, of all rows and layers; 0 before they are allocated."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ideal_nbytes(self) -> int:
        """Bytes if there were a slot for every token that can be asked for, and no other."""
        return sum(layer.ideal_nbytes for layer in self.layers)

    def activate_past_recording(self) -> None:
        for layer in self.layers:
            layer.activate_past_recording()

    def crop(self, tokens_to_remove: Any) -> None:
        """Take back the last |tokens_to_remove| columns of all layers, or raise and leave all as they were."""
        first = self.layers[0]
        columns = first.asked(tokens_to_remove)
        if columns:
            padding = first.padding(columns)
            furthest = first.furthest(columns, padding)
            for layer in self.layers:
                layer.check_crop(*furthest)
            for layer in self.layers:
                layer.crop(-columns, padding)

    def grow(self, larger: SpanCache) -> None:
        """Go on with the layouts of a cache of more tokens, whose windows are the same."""
        for layer, other in zip(self.layers, larger.layers, strict=True):
            layer.grow(other.layout)
        self.max_length = larger.max_length

    def check(self) -> None:
        """Raise CacheFull where a row has more tokens than the cache was made for. On a GPU, where no one waits for
        the answer while generating, this is the way to know."""
        first = self.layers[0]
        if first.is_initialized and int(first.n.max()) > self.max_length:
            raise CacheFull(
                f"The cache was made for {self.max_length} tokens of a row, and has {int(first.n.max())}.",
                "Make it with a larger max_length.",
            )


def plan_for(plan: Plan | str | Path | None, model: Any, found: list[sites.Attention]) -> Plan | None:
    """The plan itself, read if it is a path, after checking that it was made for this model."""
    if plan is None:
        return None
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"The plan is a {type(plan).__name__}.", "Give a Plan or the path of a plan file.")
    here = [a.site for a in found]
    plan.check([site for site in here if site.name in plan.choices], fingerprint_of(model, here))
    return plan
