"""The operators rewritten graphs call: opaque to inductor, with a kernel chosen by device and a fake for tracing."""

from attnopt.ops.cache import attend_update
from attnopt.ops.decode import span_decode
from attnopt.ops.documents import document_attention
from attnopt.ops.linear import linear_decode, linear_far, linear_far_backward, linear_state
from attnopt.ops.live import live_attention
from attnopt.ops.masked import masked_attention
from attnopt.ops.mean_far import mean_far
from attnopt.ops.merge import compute, merge
from attnopt.ops.selected import selected_attention, selected_chunk
from attnopt.ops.span import (
    launches,
    prefill,
    span_attention,
    span_attention_backward,
    span_attention_lse,
    windows_at,
)
from attnopt.ops.tokens import attend_tokens

__all__ = [
    "attend_tokens",
    "attend_update",
    "compute",
    "document_attention",
    "launches",
    "linear_decode",
    "linear_far",
    "linear_far_backward",
    "linear_state",
    "live_attention",
    "masked_attention",
    "mean_far",
    "merge",
    "prefill",
    "selected_attention",
    "selected_chunk",
    "span_attention",
    "span_attention_backward",
    "span_attention_lse",
    "span_decode",
    "windows_at",
]
