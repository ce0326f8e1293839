"""What transformers calls by the name "attnopt": an attention function and the mask function that belongs to it.

    attention   Handle of a SpanCache          attnopt::attend_update
                keys as long as the queries    no cache: scoring, training, a first call; the plan's spans, or exact
                anything else                  a cache that attnopt does not know: an error
    mask        causal, with a sliding window or not, and padding: bool (B, 1, 1, T), which new tokens count
                anything else                  an error

Both are registered with the first SpanCache or the first `attnopt.enable`; without its mask function transformers would
hand the attention no mask at all, padding or not, and say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnopt import ops, settings
from attnopt.codegen.cache_prefill import taken, together
from attnopt.errors import AttnoptError, ModelError
from attnopt.hf.cache import NAME
from attnopt.hf.prompts import PromptSelection, selection_of
from attnopt.hf.span_layer import Handle, autocast
from attnopt.ir import DENSE, Choice, Site
from attnopt.mixed import tables

# transformers, by way of cache.py, is there.
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # isort: skip

# What models pass on to the attention function and what has no say in what it computes.
IGNORED = frozenset(
    {"position_ids", "cache_position", "use_cache", "position_embeddings", "num_items_in_batch", "return_dict"}
    | {"output_hidden_states", "output_router_logits", "logits_to_keep", "deterministic"}
)
MORE = (
    "The model masks its keys by more than their order, a sliding window and padding (packed sequences, images or a "
    "mask function of its own)."
)
# The attribute of an attention module that holds the plan's spans.
SPANS = "_attnopt_spans"
DISABLE = "Call attnopt.disable(model), or choose another attention for this call."


def register() -> None:
    """Make "attnopt" known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def unregister() -> None:
    """Forget "attnopt", as if it had never been registered."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D) -> (B, T, H, Dv), and no attention weights. key, value: a Handle each, or (B, G, T, ·)."""
    for name, given in kwargs.items():
        if name not in IGNORED and given is not None and given is not False:
            raise ModelError(f"{type(module).__name__} asks its attention for {name}, which attnopt has not.", DISABLE)
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} attends to later tokens, which a cache of spans cannot.", DISABLE)
    valid = counted(query, attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        layer = key.layer
        if (sliding_window or None) != layer.window:
            raise ModelError(
                f"{type(module).__name__} has a sliding window of {sliding_window or 'none'}, the cache was made for "
                f"{layer.window or 'none'}.",
                "Make the cache of this very model, and do not change its configuration afterwards.",
            )
        if layer.leads and not torch.compiler.is_compiling():
            layer.check(query.shape[2], attention_mask, kwargs.get("position_ids"))
        out = layer.attend(query, key.key, key.value, valid, scale)
    elif key.shape[2] == query.shape[2]:
        out = uncached(module, query, key, value, valid, scale, sliding_window or 0, dropout)
    else:
        raise AttnoptError(
            f"{query.shape[2]} new tokens came with {key.shape[2]} keys: a cache that attnopt does not know holds some "
            "of them, and which tokens those are it does not say.",
            "Leave past_key_values out, or pass attnopt.SpanCache.for_model(model, plan, max_length=...). Without "
            'attnopt: model.set_attn_implementation("sdpa").',
        )
    return out.transpose(1, 2), None


def counted(query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which new tokens count, bool (B, T), from what `mask` made; None for all."""
    if attention_mask is None:
        return None
    batch, tokens = query.shape[0], query.shape[2]
    if attention_mask.dtype != torch.bool or attention_mask.shape != (batch, 1, 1, tokens):
        raise AttnoptError(
            f"A mask of the shape {tuple(attention_mask.shape)} was passed, which may keep anything.",
            "Pass attention_mask as (batch, tokens), or none.",
        )
    return attention_mask[:, 0, 0]


@dataclass(frozen=True)
class Spans:
    """The spans of a layer's heads as `attnopt::span_attention` reads them, int32 (H,) twice and float64 (H,), and the
    heads that select in a prompt."""

    sinks: Tensor
    alphas: Tensor
    betas: Tensor
    min_length: int
    prompt: PromptSelection | None = None


def spans_of(choices: Sequence[Choice] | None, site: Site, min_length: int) -> Spans | None:
    """The spans that a plan gives the heads of a site; None where all are dense."""
    if choices is None or all(choice == DENSE for choice in choices):
        return None
    return Spans(**tables(choices, site.heads), min_length=min_length, prompt=selection_of(choices, site, min_length))


def uncached(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, window: int,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Attention among the tokens of this call alone, (B, H, T, Dv), by the plan's spans at T tokens. It has gradients
    at query, key and value. Rows that do not count are 0."""
    query, key, value = (autocast(x) for x in (query, key, value))
    spans = getattr(module, SPANS, None)
    if dropout and (spans is not None or window):
        raise ModelError(f"{type(module).__name__} drops attention weights, which spans cannot.", "Call model.eval().")
    back = None
    if valid is not None:
        # Tokens that count come first, in their order: then columns are positions, and no later one is seen.
        back, order = together(valid)
        query, key, value = (taken(x, order) for x in (query, key, value))
    if spans is None and not window:
        causal = query.shape[2] > 1
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        rules = Spans(**tables(None, query.shape[1]), min_length=0) if spans is None else spans
        numbers = None, scale, window, rules.min_length
        selects = rules.prompt is not None and query.shape[2] >= rules.min_length
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            if selects:
                said = f"{type(module).__name__} selects blocks of keys under this plan, which has no gradient."
                raise ModelError(said, "Run it under torch.no_grad(), or train under a plan of spans.")
            out = ops.span_attention_lse(query, key, value, rules.sinks, rules.alphas, rules.betas, *numbers)[0]
        else:
            out = ops.span_attention(query, key, value, rules.sinks, rules.alphas, rules.betas, *numbers)
        if selects and rules.prompt is not None:
            real = None if valid is None else valid.gather(1, order)
            out = rules.prompt.attend_packed(query, key, value, out, real, scale)
    if valid is None or back is None:
        return out
    return taken(out, back).masked_fill(~valid[:, None, :, None], 0)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Which of the q_length new tokens count, bool (B, 1, 1, q_length); None for all of them.

    What older tokens count was said when they were new. attention_mask bool (B, columns so far with the new ones).
    """
    if not (causal(mask_function, local_size) or windowed_in_graph(local_size, q_length, **kwargs)):
        if torch.compiler.is_compiling():
            # Dynamo can show this one. While tracing transformers takes any call without a mask and a cache for packed.
            raise ValueError(f"{MORE} Pass an attention_mask, of ones where all tokens count.")
        raise ModelError(MORE, DISABLE)
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise AttnoptError(
            f"A mask of the shape {tuple(attention_mask.shape)} was passed, which may keep anything.",
            "Pass attention_mask as (batch, tokens), or none.",
        )
    eager = not torch.compiler.is_compiling()
    # A step of decoding does not wait for the device to be told.
    known = isinstance(q_offset, int) or (eager and (q_offset.device.type == "cpu" or q_length > 1))
    if known and attention_mask.shape[1] != int(q_offset) + q_length:
        raise AttnoptError(
            f"The attention_mask has {attention_mask.shape[1]} columns, and the cache with the new tokens "
            f"{int(q_offset) + q_length}: they are no continuation.",
            "Pass one for all tokens so far; reset() a cache before another prompt.",
        )
    made = attention_mask[:, None, None, -q_length:].to(torch.bool).contiguous()
    if known and eager and (q_length > 1 or settings.verify()):
        # The layer compares it with what it was told when these tokens were new; a step of decoding can do without.
        made.history = attention_mask[:, :-q_length].sum(1)  # type: ignore[attr-defined]
    return made


def causal(mask_function: Any, local_size: int | None) -> bool:
    """Whether transformers' mask function is the causal one, alone or within a sliding window of `local_size`."""
    if mask_function is masking_utils.causal_mask_function:
        return local_size is None
    if local_size is None or torch.compiler.is_compiling():
        return False
    return alike(mask_function, masking_utils.sliding_window_causal_mask_function(local_size))


def windowed_in_graph(local_size: int | None, q_length: int, **kwargs: Any) -> bool:
    """Whether, while tracing, where no function can be looked into, transformers asks for its sliding window alone.

    It asks with use_vmap for mask functions of the caller's own, and forbids to skip masks, but for steps of decoding,
    for packed sequences and blocks; in a step neither says more than the order of tokens does.
    """
    if local_size is None or not torch.compiler.is_compiling():
        return False
    config, plain = kwargs.get("config"), not kwargs.get("use_vmap", False)
    plain = plain and kwargs.get("allow_is_causal_skip") in ((True, False) if q_length == 1 else (True,))
    own = getattr(config, "sliding_window", None) == local_size and not getattr(config, "attention_chunk_size", None)
    return plain and own


def alike(a: Any, b: Any) -> bool:
    """Whether two functions run the same code over the same values, down to the functions these are."""
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    code = getattr(a, "__code__", None)
    if code is None or code is not getattr(b, "__code__", None):
        return bool(type(a) is type(b) and isinstance(a, int) and a == b)
    return alike(*(tuple(cell.cell_contents for cell in f.__closure__ or ()) for f in (a, b)))


register()
