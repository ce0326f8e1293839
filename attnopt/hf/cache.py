"""SpanCache: transformers' KV cache, holding of every KV head what the plan keeps.

    model.set_attn_implementation("attnopt")                             # attnopt.enable(model, plan) does both
    cache = attnopt.SpanCache.for_model(model, "plan.json", max_length=4096)
    model.generate(**inputs, past_key_values=cache)

transformers hands `update` the new keys and values and passes what it returns on to the attention function. A layer of
this cache returns a Handle, which is no tensor: the attention function "attnopt" knows what to do with it, any other
fails with a remedy. Attending and writing are then one operator, `attnopt::attend_update`.

A token's position is the number of tokens of its row that count before it, so that padding is neither attended to nor
stored. Windows are those at max_length tokens, for the whole life of the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnopt import ops, settings  # noqa: F401  ops registers attnopt::attend_update
from attnopt.cache import Layout, layouts_of
from attnopt.errors import AttnoptError, CacheFull, ModelError, OptionError, PlanError
from attnopt.hf import loading, sites
from attnopt.plan import Plan

loading.transformers()
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402

NAME = "attnopt"
attend = torch.ops.attnopt.attend_update.default
# Tokens that assisted decoding may take back at once. It drafts 20 by default and up to the cache's slack.
ROLLBACK = 64
AGAIN = "Call cache.reset() before another prompt, or pass all tokens of the conversation so far."
ANOTHER = 'Call attnopt.enable(model), or model.set_attn_implementation("attnopt").'


class Handle:
    """A layer of a SpanCache and the new keys and values it was handed, on their way to the attention function.

    key (B, G, T, D), value (B, G, T, Dv).
    """

    def __init__(self, layer: SpanLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value

    def __getattr__(self, name: str) -> NoReturn:
        # Python and Dynamo ask for these of any object, and take this answer for no.
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttnoptError(
            f"A SpanCache was handed to an attention that does not know it (it asks for .{name} of the keys).", ANOTHER
        )


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that attention has under torch.autocast, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class SpanLayer(CacheLayerMixin):
    """One layer: a flat buffer of slots for all KV heads, and how many tokens each row has seen.

    n int32 (B,): tokens of each row that count; pads int32 (B,): columns that do not; solid int32 (B,): what n was
    after the last of those. highest int32 (B,): the largest n before anything was taken back.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, layout: Layout, window: int | None = None, leads: bool = False) -> None:
        """window: the model's own at this layer. leads: it is the first, which checks a call for all of them."""
        self.layout, self.window, self.leads = layout, window, leads
        self.is_initialized = False
        self.fresh = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, dtype and device of key_states (B, G, ·, D) and value_states (B, G, ·, Dv)."""
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        groups = len(self.layout.starts)
        if key_states.shape[1] != groups:
            raise OptionError(
                f"The cache was made for {groups} KV heads, the model hands it {key_states.shape[1]}.",
                "Make it of this very model: SpanCache.for_model(model, plan, max_length=...).",
            )
        if torch.compiler.is_compiling():
            self._allocate(key_states.shape[-1], value_states.shape[-1])
        else:
            # Inference tensors could not be written to outside of inference mode, where the next call may be.
            with torch.inference_mode(False):
                self._allocate(key_states.shape[-1], value_states.shape[-1])
            for x in self.tensors():
                torch._dynamo.mark_static_address(x)
        self.is_initialized = True

    def _allocate(self, width: int, width_v: int) -> None:
        rows, slots, own = self.batch_size, self.layout.slots, dict(device=self.device)
        self.slots_k = torch.zeros(rows, slots, width, dtype=self.dtype, **own)
        self.slots_v = torch.zeros(rows, slots, width_v, dtype=self.dtype, **own)
        for name in ("n", "pads", "solid", "highest"):
            setattr(self, name, torch.zeros(rows, dtype=torch.int32, **own))
        self.table, self.spans = self.layout.tables(self.device)

    def tensors(self) -> list[Tensor]:
        """Everything that is held, the tables too."""
        return [self.slots_k, self.slots_v, *self.counts(), self.table, self.spans]

    def counts(self) -> list[Tensor]:
        return [self.n, self.pads, self.solid, self.highest]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the attention function attends with; nothing is written before it does, as the mask is not known."""
        key_states, value_states = autocast(key_states), autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """query (B, H, T, D), key and value (B, G, T, ·) -> (B, H, T, Dv), and write what is kept of the new tokens.
        valid bool (B, T) is true for those that count, None for all of them."""
        if valid is not None:
            # A column that does not count ends what can be taken back: n after the last of them.
            counted = valid.sum(1, dtype=torch.int32)
            tail = valid.flip(1).cumprod(1).sum(1, dtype=torch.int32)
            self.solid.copy_(torch.where(tail < valid.shape[1], self.n + counted - tail, self.solid))
            self.pads.add_(valid.shape[1] - counted)
        out: Tensor = attend(
            autocast(query),
            key,
            value,
            self.slots_k,
            self.slots_v,
            self.n,
            valid,
            self.table,
            self.spans,
            scale,
            self.fresh,
        )
        self.fresh = False
        return out

    def check(self, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise, with nothing written, where `tokens` new ones cannot follow what the cache holds.

        mask: what the mask function made, bool (B, 1, 1, tokens), with the attribute `history`, int (B,), where it was
        told what counts of the older tokens. positions: position_ids. Called for the first layer, outside of graphs.
        """
        if self.device.type != "cpu" and (tokens == 1 or torch.cuda.is_current_stream_capturing()):
            # A step of decoding does not wait for the device; `SpanCache.check` does.
            return
        if not tokens:
            raise AttnoptError("There are no new tokens: the cache holds the whole prompt and more.", AGAIN)
        counted = tokens if mask is None else mask[:, 0, 0].sum(1)
        most = int((self.n + counted).max()) if self.batch_size else 0
        if most > self.layout.length:
            raise CacheFull(
                f"The cache was made for {self.layout.length} tokens of a row, and this would be {most}.",
                f"Make it with max_length={most} or more.",
            )
        if positions is not None and positions.dim() == 2 and self._goes_back(mask, positions):
            raise AttnoptError(
                f"The new tokens end at position {int(positions.max())}, and the cache holds "
                f"{int(self.n.max())} tokens already: they are no continuation.",
                AGAIN,
            )
        history = getattr(mask, "history", None)
        if history is None and mask is None and (tokens > 1 or settings.verify()):
            history = self.n + self.pads
        if history is not None and not torch.equal(history.to(self.n), self.n):
            raise AttnoptError(
                f"The attention_mask says that {history.tolist()} of the older tokens count, and the cache was told "
                f"{self.n.tolist()} when they were new; what is cached cannot be masked afterwards.",
                "Pass the attention_mask of all tokens so far, unchanged, or reset() the cache and feed it again.",
            )

    def _goes_back(self, mask: Tensor | None, positions: Tensor) -> bool:
        """Whether all new tokens of some row come before one that is cached."""
        if mask is None:
            return bool((positions.amax(1) < self.n).any())
        valid = mask[:, 0, 0]
        last = positions.masked_fill(~valid, -1).amax(1)
        return bool(((last < self.n) & valid.any(1)).any())

    def get_seq_length(self) -> Any:
        """Columns seen so far, padding included: an int32 tensor (), or 0 where there is nothing yet."""
        return self.n[0] + self.pads[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.layout.length

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` up to transformers 5.17."""
        return self.layout.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layout.length, 0

    def reset(self) -> None:
        """Forget every token; what is allocated stays where it is."""
        if self.is_initialized:
            for count in self.counts():
                count.zero_()
        self.fresh = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row b what row beam_idx[b] holds, in place."""
        if self.is_initialized:
            for x in (self.slots_k, self.slots_v, *self.counts()):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rebatch(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        self._rebatch(lambda x: x.repeat_interleave(repeats, 0))

    def _rebatch(self, rows: Any) -> None:
        if self.is_initialized:
            for name in ("slots_k", "slots_v", "n", "pads", "solid", "highest"):
                setattr(self, name, rows(getattr(self, name)))
            self.batch_size = self.n.shape[0]

    def activate_past_recording(self) -> None:
        """Keep what taking tokens back needs. RuntimeError where what is held already cannot."""
        layout = self.layout
        if layout.slack >= ROLLBACK or all(layout.whole):
            return
        if self.is_initialized:
            raise AttnoptError(
                f"Tokens are to be taken back, and this cache was made to give back {layout.slack}.",
                f"Make it with SpanCache.for_model(..., slack={ROLLBACK}).",
            )
        spans = layout.head_sinks, layout.head_windows
        self.layout = Layout.of_spans(*spans, len(layout.starts), layout.length, ROLLBACK)

    def check_crop(self, tokens: int) -> None:
        """Raise unless the last `tokens` columns can be taken back exactly."""
        after = self.n - tokens
        if bool((after < self.solid).any()):
            raise AttnoptError(
                f"{tokens} columns are to be taken back, and some of them are padding or were never there.",
                "Take back fewer, or reset() the cache and feed it again.",
            )
        back = int((torch.maximum(self.highest, self.n) - after).max())
        highest = int(torch.maximum(self.highest, self.n).max())
        wrapped = any(highest > c and not w for c, w in zip(self.layout.capacities, self.layout.whole, strict=True))
        if back > self.layout.slack and wrapped:
            raise AttnoptError(
                f"{back} tokens are to be taken back, and this cache can give back {self.layout.slack}.",
                f"Make it with SpanCache.for_model(..., slack={back}), or reset() it and feed it again.",
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last |tokens_to_remove| columns, exactly; raise where they cannot be."""
        if tokens_to_remove and self.is_initialized:
            tokens = self._asked(tokens_to_remove)
            self.check_crop(tokens)
            self.highest.copy_(torch.maximum(self.highest, self.n))
            self.n.sub_(tokens)

    def _asked(self, tokens_to_remove: int) -> int:
        # A positive number is the length to keep, which transformers took until 5.17.
        return -tokens_to_remove if tokens_to_remove < 0 else max(0, int(self.get_seq_length()) - tokens_to_remove)

    @property
    def keys(self) -> NoReturn:  # type: ignore[override]
        raise AttnoptError(
            "A SpanCache has no keys to be read: each KV head holds other tokens.",
            "Use transformers' DynamicCache where the keys themselves are wanted, with attnopt.disable(model).",
        )

    values = keys

    def offload(self) -> None:
        raise AttnoptError("A SpanCache cannot be offloaded.", 'Leave cache_implementation out, or use "static".')

    prefetch = offload

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, 0 before the first token."""
        return sum(x.numel() * x.element_size() for x in (self.slots_k, self.slots_v)) if self.is_initialized else 0

    @property
    def ideal_nbytes(self) -> int:
        """Bytes if there were a slot for every token that can be asked for, and no other."""
        if not self.is_initialized:
            return 0
        widths = self.slots_k.shape[-1], self.slots_v.shape[-1]
        return self.layout.ideal_bytes(*widths, self.dtype, self.batch_size)


class SpanCache(Cache):
    """A layer of slots for every layer of a model. Make it with `for_model`."""

    def __init__(self, layers: list[SpanLayer], length: int) -> None:
        super().__init__(layers=list(layers))
        self.max_length = length

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

    @classmethod
    def of(cls, found: list[sites.Attention], plan: Plan | None, length: int, slack: int = 0) -> SpanCache:
        layouts = layouts_of(plan, [a.site for a in found], length, slack)
        rows = enumerate(a.site for a in found)
        return cls([SpanLayer(layouts[site.name], site.mask.window, at == 0) for at, site in rows], length)

    def allocate(self, model: Any, found: list[sites.Attention], rows: int) -> None:
        """Allocate all layers for so many rows, in the model's dtype, each on the device of its module."""
        for layer, attention in zip(self.layers, found, strict=True):
            site, device = attention.site, next(attention.module.parameters()).device
            empty = autocast(torch.empty(rows, site.kv_heads, 0, site.head_dim, dtype=model.dtype, device=device))
            layer.lazy_initialization(empty, empty)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, of all rows and layers; 0 before they are allocated."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ideal_nbytes(self) -> int:
        """Bytes if there were a slot for every token that can be asked for, and no other."""
        return sum(layer.ideal_nbytes for layer in self.layers)

    def activate_past_recording(self) -> None:
        for layer in self.layers:
            layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last |tokens_to_remove| columns of all layers, or raise and leave all as they were."""
        if tokens_to_remove and self.layers[0].is_initialized:
            tokens = self.layers[0]._asked(tokens_to_remove)
            for layer in self.layers:
                layer.check_crop(tokens)
            for layer in self.layers:
                layer.crop(-tokens)

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
    from attnopt.fingerprint import fingerprint_of

    here = [a.site for a in found]
    plan.check([site for site in here if site.name in plan.choices], fingerprint_of(model, here))
    return plan
