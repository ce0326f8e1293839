"""What generation under a plan must equal: everything is kept, and each head's mask is written out, dense.

The model runs transformers' own code with an attention of its own here, over all tokens at once and without a cache,
or step by step with a DynamicCache that drops nothing. Nothing of attnopt is imported: the meaning of a span is stated
a second time, in `keep`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

Spans = Sequence[Sequence[tuple[int, int]]]  # of each layer, of each query head: (sink, window)
NAME = "oracle"


def span(sink: int, alpha: int, beta: float, length: int, own_window: int | None = None) -> tuple[int, int]:
    """(sink, window) of the rule alpha + beta N at the total length N of a cache."""
    window = min(max(math.floor(alpha + beta * length), 1), length)
    return (sink, window) if own_window is None else (0, min(window, own_window))


def keep(valid: Tensor, spans: Sequence[tuple[int, int]], queries: int) -> Tensor:
    """bool (B, H, queries, N): what the last `queries` of N tokens see. valid: bool (B, N)."""
    positions = valid.cumsum(-1) - 1
    columns = torch.arange(valid.shape[1])
    last = columns[len(columns) - queries :]
    causal = columns[None, :] <= last[:, None]
    both = valid[:, last][:, :, None] & valid[:, None, :] & causal
    heads = []
    for sink, window in spans:
        distance = positions[:, last][:, :, None] - positions[:, None, :]
        heads.append(both & ((positions < sink)[:, None, :] | (distance < window)))
    return torch.stack(heads, 1)


def attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """q (B, H, T, D), k and v (B, G, N, D) of all tokens so far: (B, T, H, D), 0 in rows that see nothing."""
    batch, heads, queries, _dim = q.shape
    everything = torch.ones(batch, k.shape[2], dtype=torch.bool) if valid is None else valid[:, 0, 0]
    assert everything.shape == (batch, k.shape[2]), "the mask must say of every token held whether it is one"
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    kept = keep(everything, module.config.oracle_spans[module.layer_idx], queries)
    scores = (q @ k.mT * scaling).masked_fill(~kept, -math.inf)
    weights = scores.softmax(-1).masked_fill(~kept, 0.0)
    return (weights @ v).transpose(1, 2).contiguous(), None


def whole_padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """The padding mask of all tokens so far, bool (B, 1, 1, N), or None where all are real."""
    return None if attention_mask is None else attention_mask[:, None, None, :kv_length].bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, whole_padding_mask)


def of(model: Any, spans: Spans, dtype: torch.dtype = torch.float64) -> Any:
    """A second model of equal weights that attends as the spans say; generate with `past_key_values=DynamicCache()`,
    which, made without a configuration, keeps every token whatever window the model has."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = NAME
    config.oracle_spans = [list(layer) for layer in spans]
    with torch.random.fork_rng():
        twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.to(dtype).eval()


def logits(
    model: Any, ids: Tensor, mask: Tensor | None, spans: Spans, dtype: torch.dtype = torch.float64,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits (B, N, V) of tokens ids (B, N), of which mask (B, N) says which are real.

    positions: what the model rotates by; None: those `generate` gives, the number of real tokens before each.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    twin = of(model, spans, dtype)
    with torch.no_grad():
        return twin(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def following(model: Any, ids: Tensor, mask: Tensor, produced: Any, spans: Spans, **options: Any) -> Tensor:
    """Logits (rows, new tokens, V) that `generate` should have found, along the sequences it produced.

    ids, mask (B, L): the prompt it was given. `produced` has R B rows, R next to each other of each prompt.
    """
    sequences = produced.sequences
    new = sequences.shape[1] - ids.shape[1]
    mask = mask.repeat_interleave(len(sequences) // len(mask), 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    return logits(model, sequences, mask, spans, **options)[:, ids.shape[1] - 1 : -1]
