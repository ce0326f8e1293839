"""Heads whose blocks of keys are selected while a prompt runs: in a cache, whole or in chunks, and without a cache.

Steps of decoding attend to every key: the cache keeps them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt import ops  # noqa: F401  registers attnopt::selected_attention and attnopt::selected_chunk
from attnopt.cache import Layout
from attnopt.codegen.cache_prefill import taken, together
from attnopt.ir import Choice, Site
from attnopt.mixed import far_parts, hold

select = torch.ops.attnopt.selected_attention.default
select_chunk = torch.ops.attnopt.selected_chunk.default


class PromptSelection:
    """The heads of a layer that select, by method; `min_length`: the least tokens of a prompt that they select from."""

    def __init__(self, choices: Sequence[Choice], site: Site, min_length: int) -> None:
        parts = [part for part in far_parts(choices) if part.far == "selected"]
        # What two of them are compared by.
        self.asked = tuple(parts)
        every, here = range(len(choices)), torch.device("cpu")
        with torch.inference_mode(False):
            self.parts = [hold(part, len(choices), None, site.name, every, here) for part in parts]
        self.heads = tuple(head for part in parts for head in part.heads)
        self.window, self.min_length, self.site = site.mask.window or 0, min_length, site.name
        self.groups = {head // (site.heads // site.kv_heads) for head in self.heads}

    def serves(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens is selected from."""
        return tokens > 1 and tokens >= self.min_length

    def goes_on(self, layout: Layout) -> bool:
        """Whether all keys that these heads may select from stay in the cache, as the chunks behind the first need."""
        return all(layout.whole[group] for group in self.groups)

    def narrowed(self, spans: Tensor) -> Tensor:
        """The spans, int32 (H, 2), that are computed beside: the heads that select keep nothing there."""
        with torch.inference_mode(False):
            made = spans.clone()
            for head in self.heads:
                made[head] = 0
        return made

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """`out` (B, H, T, Dv), with these heads' attention of q (B, H, T, D) to the keys of the prompt k (B, G, T, D)
        in their place. valid bool (B, T): tokens that count, which alone are selected from."""
        if valid is None:
            return self.attend_packed(q, k, v, out, None, scale)
        back, order = together(valid)
        q, k, v, near = (taken(x.masked_fill(~valid[:, None, :, None], 0.0), order) for x in (q, k, v, out))
        real = valid.gather(1, order)
        return taken(self.attend_packed(q, k, v, near, real, scale), back).masked_fill(~valid[:, None, :, None], 0.0)

    def attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, n: Tensor, layout: Layout, out: Tensor, valid: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """The same of tokens that follow others, all of which the cache holds by now: keys (B, S, D), values
        (B, S, Dv), n int32 (B,)."""
        starts = [start if whole else -1 for start, whole in zip(layout.starts, layout.whole, strict=True)]
        for part in self.parts:
            given = part.heads, part.kind, part.settings, valid, scale, self.window, self.min_length, self.site
            out = select_chunk(q, keys, values, n, starts, out, *given)
        return out

    def attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pad: Tensor | None, scale: float
    ) -> Tensor:  # fmt: skip
        """The same where the tokens that count are the first of their row; pad bool (B, T)."""
        for part in self.parts:
            out = select(q, k, v, out, part.heads, part.kind, part.settings, pad, scale, self.window, 0, self.site)
        return out


def selection_of(choices: Sequence[Choice] | None, site: Site, min_length: int) -> PromptSelection | None:
    """What a plan selects in the prompts of a layer; None where no head does."""
    found = None if choices is None else PromptSelection(choices, site, min_length)
    return found if found is not None and found.heads else None
