"""`attnopt::document_attention`: attention of packed documents, none of which sees another. It has a gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen import documents_cpu, reference_documents
from attnopt.ops.span import empty_tokens_first, tokens_first


def implementation(q: Tensor) -> ModuleType:
    cpu = q.device.type == "cpu" and settings.target("cpu") != "reference"
    return documents_cpu if cpu else reference_documents


@torch.library.custom_op("attnopt::document_attention", mutates_args=())
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, pad: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Attention of each token to those of its own document.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv); ids int (E, B, N): tokens whose E numbers are equal are a document,
    in any order; pad bool (B, N), true where a key counts; window: 0, or how many keys back (causal only). Returns
    (B, H, N, Dv), physically (B, N, H, Dv), where rows with no kept key are 0, and what its backward needs beside it.
    """
    out, sums = implementation(q).prefill(q, k, v, ids, pad, scale, causal, window)
    return tokens_first(out), tokens_first(sums)


@document_attention.register_fake
def _(q, k, v, ids, pad, scale, causal, window):  # type: ignore[no-untyped-def]
    sums = empty_tokens_first(q.to(torch.promote_types(q.dtype, torch.float32)), 1)
    return empty_tokens_first(q, v.shape[3]), sums


@torch.library.custom_op("attnopt::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    pad: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the result."""
    made = implementation(q).gradients(grad, out, sums, q, k, v, ids, pad, scale, causal, window)
    dq, dk, dv = (tokens_first(x) for x in made)
    return dq, dk, dv


@document_attention_backward.register_fake
def _(grad, out, sums, q, k, v, ids, pad, scale, causal, window):  # type: ignore[no-untyped-def]
    return tuple(empty_tokens_first(x, x.shape[3]) for x in (q, k, v))


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ids, pad, *rule = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, ids, pad)
    ctx.rule = rule


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    made = torch.ops.attnopt.document_attention_backward(grad, *ctx.saved_tensors, *ctx.rule)
    return *made, None, None, None, None, None


document_attention.register_autograd(backward, setup_context=remember)
