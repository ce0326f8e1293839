"""One layer of a SpanCache, and what it hands to the attention function in place of keys and values."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from attnopt import ops, settings  # noqa: F401  ops registers attnopt::attend_update
from attnopt.cache import Layout
from attnopt.errors import AttnoptError, CacheFull, OptionError
from attnopt.hf import loading
from attnopt.hf.prompts import PromptSelection
from attnopt.hf.token_state import TokenState

loading.transformers()
from transformers.cache_utils import CacheLayerMixin  # noqa: E402

attend = torch.ops.attnopt.attend_update.default
# Tokens that assisted decoding may take back at once. It drafts 20 by default and up to the cache's slack.
ROLLBACK = 64
# Columns of which it is remembered whether they are padding, so that they can be taken back.
REMEMBERED = 128
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

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """PyTorch calls this where a function of its own is given a Handle."""
        raise AttnoptError(
            f"A SpanCache was handed to a model that computes with its keys or values (torch.{function.__name__}).",
            "Call attnopt.disable(model), and run it with a cache of transformers.",
        )


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that attention has under torch.autocast, where it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class SpanLayer(CacheLayerMixin):
    """One layer: a flat buffer of slots for all KV heads, and how many tokens each row has seen.

    n int32 (B,): tokens of each row that count; pads int32 (B,): columns that do not; highest int32 (B,): the largest n
    before anything was taken back; marks int32 (B, REMEMBERED), of the first layer: c + 1 at c mod REMEMBERED where
    column c is one of the pads.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(
        self, layout: Layout, window: int | None = None, leads: bool = False, tokens: TokenState | None = None,
        prompt: PromptSelection | None = None,
    ) -> None:  # fmt: skip
        """window: the model's own at this layer. leads: it is the first, which checks a call for all of them. tokens:
        of heads that select what steps of decoding read, prompt: of those that select in a prompt; None for none."""
        self.layout, self.window, self.leads, self.tokens, self.prompt = layout, window, leads, tokens, prompt
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
        self.n, self.pads, self.highest = (torch.zeros(rows, dtype=torch.int32, **own) for _ in range(3))
        self.marks = torch.zeros(rows, REMEMBERED if self.leads else 0, dtype=torch.int32, **own)
        self._tables()
        if self.tokens is not None:
            self.tokens.allocate(self.layout, self.slots_k)

    def _tables(self) -> None:
        self.table, self.spans = self.layout.tables(self.device)
        if self.prompt is not None:
            self.narrowed = self.prompt.narrowed(self.spans)

    def tensors(self) -> list[Tensor]:
        """Everything that is held, the tables too."""
        beside = [] if self.tokens is None else self.tokens.tensors()
        beside += [] if self.prompt is None else [self.narrowed]
        return [self.slots_k, self.slots_v, *self.counts(), self.table, self.spans, *beside]

    def counts(self) -> list[Tensor]:
        return [self.n, self.pads, self.highest, self.marks]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What the attention function attends with; nothing is written before it does, as the mask is not known."""
        key_states, value_states = autocast(key_states), autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.batch_size and not torch.compiler.is_compiling():
            raise OptionError(
                f"The cache holds {self.batch_size} rows, and tokens of {key_states.shape[0]} come.",
                "Give it as many with batch_repeat_interleave() or batch_select_indices(), or make another cache.",
            )
        elif self.fresh and not torch.compiler.is_compiling() and self._elsewhere(key_states):
            self.lazy_initialization(key_states, value_states)
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def _elsewhere(self, x: Tensor) -> bool:
        """Whether the model was moved, or runs in another dtype, since this was allocated."""
        return x.dtype != self.dtype or x.device != self.device

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """query (B, H, T, D), key and value (B, G, T, ·) -> (B, H, T, Dv), and write what is kept of the new tokens.
        valid bool (B, T) is true for those that count, None for all of them."""
        before = self.n + self.pads if valid is not None and self.leads else None
        q = autocast(query)
        step: Any = attend if self.tokens is None else self.tokens.attend
        selects = self.selects(q.shape[2])
        spans = self.narrowed if selects else self.spans
        out: Tensor = step(
            q, key, value, self.slots_k, self.slots_v, self.n, valid, self.table, spans, scale, self.fresh
        )
        if selects and self.prompt is not None and self.fresh:
            out = self.prompt.attend(q, key, value, out, valid, scale)
        elif selects and self.prompt is not None:
            out = self.prompt.attend_chunk(q, self.slots_k, self.slots_v, self.n, self.layout, out, valid, scale)
        if valid is not None:
            self.pads.add_((~valid).sum(1, dtype=torch.int32))
        if before is not None and valid is not None:
            last = valid[:, -REMEMBERED:]
            columns = torch.arange(valid.shape[1] - last.shape[1], valid.shape[1], device=last.device)
            columns = before[:, None] + columns
            self.marks.scatter_(1, columns % REMEMBERED, torch.where(last, 0, columns + 1).to(torch.int32))
        self.fresh = False
        return out

    def selects(self, tokens: int) -> bool:
        """Whether so many new tokens are a prompt, or a chunk of one, that is selected from."""
        if self.prompt is None:
            return False
        if self.fresh:
            return self.prompt.serves(tokens)
        # So few may be drafts, of which as much must come as of tokens one by one: dense.
        return tokens > 1 + max(ROLLBACK, self.layout.slack) and self.prompt.goes_on(self.layout)

    def grow(self, layout: Layout) -> None:
        """Go on with a layout for more tokens. What is held moves to its slots there; windows must be the same."""
        if self.is_initialized:
            # As when first allocated: inference tensors could not be written to outside of inference mode.
            with torch.inference_mode(False):
                self._move(layout)
        self.layout = layout

    def _move(self, layout: Layout) -> None:
        before, k, v = self.layout, self.slots_k, self.slots_v
        rows = self.batch_size
        self.slots_k, self.slots_v = (x.new_zeros(rows, layout.slots, x.shape[2]) for x in (k, v))
        for head, start in enumerate(before.starts):
            positions = before.positions_of(self.n, head)
            row, slot = (positions >= 0).nonzero(as_tuple=True)
            to = layout.slot_of(positions[row, slot], head)
            self.slots_k[row, to], self.slots_v[row, to] = k[row, start + slot], v[row, start + slot]
        self.layout = layout
        self._tables()
        if self.tokens is not None:
            self.tokens.move(before, layout)

    def check(self, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise, with nothing written, where `tokens` new ones cannot follow what the cache holds.

        mask: what the mask function made, bool (B, 1, 1, tokens), with the attribute `history`, int (B,), where it was
        told what counts of the older tokens. positions: position_ids. Called for the first layer, outside of graphs.
        """
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if captured or (self.device.type != "cpu" and tokens == 1):
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
        history = getattr(mask, "history", None)
        if history is None and mask is None and (tokens > 1 or settings.verify()):
            history = self.n + self.pads
        if history is not None and not torch.equal(history.to(self.n), self.n):
            raise AttnoptError(
                f"The attention_mask says that {history.tolist()} of the older tokens count, and the cache was told "
                f"{self.n.tolist()} when they were new; what is cached cannot be masked afterwards.",
                "Pass the attention_mask of all tokens so far, unchanged, or reset() the cache and feed it again.",
            )
        if positions is not None and positions.dim() == 2 and self._goes_back(mask, positions):
            raise AttnoptError(
                f"The new tokens begin at position {int(positions.min())}, and the cache holds "
                f"{int(self.n.max())} tokens already: they are no continuation.",
                AGAIN,
            )

    def _goes_back(self, mask: Tensor | None, positions: Tensor) -> bool:
        """Whether a new token of some row comes before one that is cached."""
        if mask is not None:
            positions = positions.masked_fill(~mask[:, 0, 0], torch.iinfo(positions.dtype).max)
        return bool((positions.amin(1) < self.n).any())

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
            if self.tokens is not None:
                self.tokens.forget()
        self.fresh = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row b what row beam_idx[b] holds, in place."""
        if self.is_initialized:
            for x in (self.slots_k, self.slots_v, *self.counts()):
                x.copy_(x.index_select(0, beam_idx.to(x.device)))
            if self.tokens is not None:
                self.tokens.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rebatch(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        self._rebatch(lambda x: x.repeat_interleave(repeats, 0))

    def _rebatch(self, rows: Any) -> None:
        if self.is_initialized:
            for name in ("slots_k", "slots_v", "n", "pads", "highest", "marks"):
                setattr(self, name, rows(getattr(self, name)))
            if self.tokens is not None:
                self.tokens.rebatch(rows)
            self.batch_size = self.n.shape[0]

    def activate_past_recording(self) -> None:
        """Keep what taking tokens back needs. AttnoptError where what is held already cannot."""
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

    def padding(self, columns: int) -> Tensor:
        """How many of the last `columns` columns are padding, int32 (B,). AttnoptError where that is not known."""
        seen = self.n + self.pads
        if columns > int(seen.min()):
            raise AttnoptError(f"{columns} columns are to be taken back of {int(seen.min())}.", "Take back fewer.")
        if not bool(self.pads.any()):
            return torch.zeros_like(self.pads)
        if columns > REMEMBERED or not self.leads:
            raise AttnoptError(
                f"{columns} columns are to be taken back, and which of them are padding is not known.",
                f"Take back {REMEMBERED} at most, of the whole cache; or reset() it and feed it again.",
            )
        at = seen[:, None] - 1 - torch.arange(columns, device=seen.device)
        return (self.marks.gather(1, at % REMEMBERED) == at + 1).sum(1, dtype=torch.int32)

    def furthest(self, columns: int, padding: Tensor) -> tuple[int, int]:
        """Of all rows: how far behind the most tokens there ever were the last `columns` begin, and that most."""
        highest = torch.maximum(self.highest, self.n)
        back, top = torch.stack(((highest - self.n + columns - padding).amax(), highest.amax())).tolist()
        return back, top

    def check_crop(self, back: int, top: int) -> None:
        """Raise unless tokens can be taken back exactly, from `top` to `back` before."""
        wrapped = any(top > c and not w for c, w in zip(self.layout.capacities, self.layout.whole, strict=True))
        if back > self.layout.slack and wrapped:
            raise AttnoptError(
                f"{back} tokens are to be taken back, and this cache can give back {self.layout.slack}.",
                f"Make it with SpanCache.for_model(..., slack={back}), or reset() it and feed it again.",
            )

    def crop(self, tokens_to_remove: Any, padding: Tensor | None = None) -> None:
        """Take back the last |tokens_to_remove| columns, exactly; raise where they cannot be. padding: how many of them
        are, where that was looked up and all was checked for the whole cache."""
        columns = self.asked(tokens_to_remove)
        if not columns:
            return
        if padding is None:
            padding = self.padding(columns)
            self.check_crop(*self.furthest(columns, padding))
        # Counted on the first layer's device, which need not be this one's.
        padding = padding.to(self.n.device)
        self.highest.copy_(torch.maximum(self.highest, self.n))
        self.n.sub_(columns - padding)
        self.pads.sub_(padding)
        self.marks.masked_fill_(self.marks > (self.n + self.pads)[:, None], 0)
        if self.tokens is not None:
            self.tokens.forget()

    def asked(self, tokens_to_remove: Any) -> int:
        """Columns to take back, of transformers' argument: a negative number of them, an int or a tensor ().

        A positive one is the length to keep, which transformers took until 5.17.
        """
        given = int(tokens_to_remove) if self.is_initialized else 0
        return -given if given <= 0 else max(0, int(self.get_seq_length()) - given)

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
        """Bytes of the slots and of what heads select by, 0 before the first token."""
        if not self.is_initialized:
            return 0
        slots = sum(x.numel() * x.element_size() for x in (self.slots_k, self.slots_v))
        return slots + (0 if self.tokens is None else self.tokens.nbytes)

    @property
    def ideal_nbytes(self) -> int:
        """Bytes if there were a slot for every token that can be asked for, and no other."""
        if not self.is_initialized:
            return 0
        widths = self.slots_k.shape[-1], self.slots_v.shape[-1]
        return self.layout.ideal_bytes(*widths, self.dtype, self.batch_size)
