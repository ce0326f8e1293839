"""Attention that stays inside documents, on the CPU: every document is a call of its own, and no mask is made.

    ids      0 0 0 1 1 2 2 2 2            runs (0, 3) (3, 2) (5, 4)
    ids      7 7 4 4 7 4 4                sorted by id, stable: 4 4 4 4 7 7 7, runs (0, 4) (4, 3), put back in the end

The work is the sum of the squares of the documents' lengths, where a mask makes it the square of their sum. A stable
sort keeps the order of a document's tokens, so that a causal mask is the same in the sorted sequence; a window is not,
and looks at where the tokens were. Short documents of one length are samples of one call.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import span_cpu, span_cpu_backward

# Documents up to this length are gathered, several of one length into one call. CPU milliseconds of 8192 tokens in
# documents of one length, a call each and gathered, 8 heads of 64: float32, 4 tokens 82 and 33, 16 tokens 30 and 22, 32
# tokens 21 and 24; bfloat16 88 and 34, 28 and 19, 18 and 16; 64 tokens 15 and 18.
SHORT = 16
# Tokens of such a call: 256, 512, 1024 and 2048 of them, 16 tokens a document, float32: 30, 22, 28 and 29 ms.
TOGETHER = 512
# From here on a feature that hides padding is cheaper than a mask (attnopt/passes/pays.py).
FEATURE_FROM = 1024

# Sizes of cached masks are multiples of this.
BAND = 1024

# Both read features one after the other, whatever the strides say.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Call:
    """Documents of one length that are attended to in one call: where each begins, as (sample, first token)."""

    length: int
    at: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """Documents of a batch. order: (B, N), the token at each place once documents are together; None if they are."""

    calls: tuple[Call, ...]
    order: Tensor | None

    def whole(self, length: int) -> bool:
        """Whether every sample is one document, so that there is nothing to take apart."""
        return bool(self.calls) and all(call.length == length for call in self.calls)


@dataclass(frozen=True)
class Rule:
    """What is kept inside a document. window: 0 for no bound; a window asks for causal."""

    causal: bool
    window: int
    scale: float


def cut(ids: Tensor) -> Cut:
    """Documents of ids (E, B, N): two tokens of a sample are in one document where all E numbers are equal."""
    _, batch, length = ids.shape
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    orders = []
    for sample in range(batch if length else 0):
        numbers = ids[:, sample]
        begins = (numbers[:, 1:] != numbers[:, :-1]).any(0).nonzero()[:, 0] + 1
        begins = F.pad(begins, (1, 0))
        sizes = torch.diff(begins, append=begins.new_tensor([length]))
        names, which = torch.unique(numbers[:, begins], dim=1, return_inverse=True)
        order = None
        if names.shape[1] < len(begins):
            each = which.repeat_interleave(sizes)
            order, sizes = each.argsort(stable=True), each.bincount()
        orders.append(order)
        first = 0
        for size in sizes.tolist():
            found[size].append((sample, first))
            first += size
    calls = []
    for size, at in sorted(found.items()):
        several = max(1, TOGETHER // size) if size <= SHORT else 1
        calls += [Call(size, tuple(at[n : n + several])) for n in range(0, len(at), several)]
    if all(order is None for order in orders):
        return Cut(tuple(calls), None)
    return Cut(tuple(calls), torch.stack([torch.arange(length) if o is None else o for o in orders]))


def prefill(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, pad: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), ids int (E, B, N), pad bool (B, N) -> out (B, H, N, Dv), sums.

    Key j is kept by query i where ``ids[e, b, i] == ids[e, b, j]`` for all e, ``pad[b, j]``, ``j <= i`` if causal, and
    ``i - j < window`` if there is a window. A row with no kept key is 0. The result is laid out as (B, N, H, Dv).
    sums (B, H, N, 1), what `gradients` is given: the logarithm of the soft-max's sum where a document took no mask.
    """
    heads, length = q.shape[1], q.shape[2]
    rule, parts = Rule(causal, window, scale), cut(ids)
    pad = None if pad is None or bool(pad.all()) else pad
    sums = by_tokens(q, heads, 1, torch.promote_types(q.dtype, torch.float32)).zero_()
    if parts.whole(length):
        out, found = attend(q, k, v, pad, None, rule)
        return out, sums if found is None else found
    out = by_tokens(q, heads, v.shape[3])
    whole = out if parts.order is None else torch.empty_like(out)
    wholes = sums if parts.order is None else torch.zeros_like(sums)
    where = parts.order if window else None
    q, k, v, flags = together(parts.order, q, k, v, pad)
    for call in parts.calls:
        queries, keys, values, one, places = (taken(call, x) for x in (q, k, v, flags, where))
        result, found = attend(queries, keys, values, one, places, rule)
        put(whole, call, result)
        if found is not None:
            put(wholes, call, found)
    if parts.order is None:
        return out, sums
    return put_back(whole, parts.order, out), put_back(wholes, parts.order, sums)


def gradients(
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
    """Gradients of q, k and v for `grad` (B, H, N, Dv), that of `prefill`'s result; laid out as (B, N, heads, ·)."""
    rule, parts = Rule(causal, window, scale), cut(ids)
    pad = None if pad is None or bool(pad.all()) else pad
    if parts.whole(q.shape[2]):
        # As the forward pass, which decides for the batch as a whole what needs a mask and has no sums.
        dq, dk, dv = attend_backward([grad, out, sums, q, k, v, pad, None], rule)
        return dq, dk, dv
    results = [by_tokens(x, x.shape[1], x.shape[3]) for x in (q, k, v)]
    wholes = results if parts.order is None else [torch.empty_like(x) for x in results]
    where = parts.order if window else None
    tensors = together(parts.order, grad, out, sums, q, k, v, pad)
    for call in parts.calls:
        made = attend_backward([taken(call, x) for x in (*tensors, where)], rule)
        for target, part in zip(wholes, made, strict=True):
            put(target, call, part)
    if parts.order is not None:
        results = [put_back(w, parts.order, r) for w, r in zip(wholes, results, strict=True)]
    return results[0], results[1], results[2]


def by_tokens(x: Tensor, heads: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for (B, heads, N, width), laid out as (B, N, heads, width)."""
    return x.new_empty(x.shape[0], x.shape[2], heads, width, dtype=dtype or x.dtype).transpose(1, 2)


def together(order: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Every (B, heads, N, D) and (B, N) with its tokens in `order`."""
    if order is None:
        return list(tensors)

    def sorted_by(x: Tensor) -> Tensor:
        dim = 1 if x.ndim == 4 else 0
        return torch.stack([sample.index_select(dim, places) for sample, places in zip(x, order, strict=True)])

    return [x if x is None else sorted_by(x) for x in tensors]


def put_back(whole: Tensor, order: Tensor, out: Tensor) -> Tensor:
    for sample, places, target in zip(whole, order, out, strict=True):
        target.index_copy_(1, places, sample)
    return out


def taken(call: Call, x: Tensor | None) -> Any:
    """The documents of a call as samples, of x (B, heads, N, D) or (B, N): a view for one document."""
    if x is None:
        return None
    dim = x.ndim // 2
    if len(call.at) == 1:
        ((sample, first),) = call.at
        return x[sample : sample + 1].narrow(dim, first, call.length)
    rows = x.transpose(1, dim).flatten(0, 1).index_select(0, tokens(call, x.shape[dim]))
    return rows.unflatten(0, (-1, call.length)).transpose(1, dim)


def put(whole: Tensor, call: Call, result: Tensor) -> None:
    """Write what `taken` would read; whole (B, heads, N, D) is laid out as (B, N, heads, D)."""
    if len(call.at) == 1:
        taken(call, whole).copy_(result)
    else:
        rows = whole.transpose(1, 2).flatten(0, 1)
        rows.index_copy_(0, tokens(call, whole.shape[2]), result.transpose(1, 2).flatten(0, 1))


def tokens(call: Call, length: int) -> Tensor:
    """Where the tokens of a call's documents are in all samples, one after the other."""
    begins = torch.tensor([sample * length + first for sample, first in call.at])
    return (begins[:, None] + torch.arange(call.length)).flatten()


def attend(
    q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, where: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor | None]:
    """A document for each sample: q (n, H, L, D), k (n, G, L, D), v (n, G, L, Dv), pad bool (n, L) -> (n, H, L, Dv).

    where: (n, L), the places that a window looks at; None where they are neighbours. With the result comes the
    logarithm of the soft-max's sum, (n, H, L, 1), where no mask was needed.
    """
    length, width = q.shape[2], v.shape[3]
    pad = None if pad is None or bool(pad.all()) else pad
    if pad is not None and not bool(pad.any()):
        return q.new_zeros(*q.shape[:3], width), None
    windowed = rule.window > 0 and (where is not None or rule.window < length)
    if windowed and where is None and span_pays(q, k, rule.window):
        spans = spans_of(q, rule)
        if pad is not None:
            return span_cpu.prefill(q, k, v, *spans, rule.scale, pad), None
        out, sums = span_cpu.prefill_lse(q, k, v, *spans, rule.scale)
        return out, sums.unsqueeze(-1)
    if pad is not None and rule.causal and not windowed and length >= FEATURE_FROM:
        return span_cpu.causal_padded(q, k, v, pad, rule.scale), None
    mask, dead = additive(q, pad, where, rule) if windowed or pad is not None else (None, None)
    q, k, v, scale = span_cpu._widen(in_a_row(q), in_a_row(k), in_a_row(v), rule.scale, None, 0)
    out, sums = flash(q, k, v, 0.0, rule.causal and mask is None, attn_mask=mask, scale=scale)
    out = out[..., :width]
    if mask is None:
        return out, sums.unsqueeze(-1)
    return out if dead is None else out.masked_fill(dead, 0.0), None


def attend_backward(tensors: list[Any], rule: Rule) -> tuple[Tensor, ...]:
    """Gradients of what `attend` reads, of the shapes of q, k and v.

    tensors: the gradient of its first result, both results, and q, k, v, pad and where. What took no mask has the sum
    that its weights are made of; all else is made anew, under a mask.
    """
    grad, out, sums, q, k, v, pad, where = tensors
    heads, groups, dims = q.shape[1], k.shape[1], (q.shape[3], k.shape[3], v.shape[3])
    pad = None if pad is None or bool(pad.all()) else pad
    windowed = rule.window > 0 and (where is not None or rule.window < q.shape[2])
    grad, q, k, v = in_a_row(grad), in_a_row(q), in_a_row(k), in_a_row(v)
    if windowed and where is None and pad is None and span_pays(q, k, rule.window):
        spans = spans_of(q, rule)
        return span_cpu_backward.backward(grad, q, k, v, out, sums.squeeze(-1), *spans, rule.scale)
    q, k, v, scale = span_cpu._widen(q, k, v, rule.scale, None, 0)
    grad, out = (F.pad(x, (0, v.shape[3] - dims[2])) if x.shape[3] < v.shape[3] else x for x in (grad, out))
    k, v = (x if heads == groups else x.repeat_interleave(heads // groups, 1) for x in (k, v))
    mask = None
    sums = sums.squeeze(-1)
    if windowed or pad is not None:
        mask, dead = additive(q, pad, where, rule)
        if dead is not None:
            # A row without a key has no gradient; its soft-max is kept a number.
            mask, grad = mask.masked_fill(dead, 0.0), grad.masked_fill(dead, 0.0)
        out, sums = flash(q, k, v, attn_mask=mask, scale=scale)
    made = flash_backward(grad, q, k, v, out, sums, 0.0, rule.causal and mask is None, attn_mask=mask, scale=scale)
    dq, dk, dv = (x[..., :dim] for x, dim in zip(made, dims, strict=True))
    return (dq, *(x if heads == groups else x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv)))


def in_a_row(x: Tensor) -> Tensor:
    """The tensor with features that are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def spans_of(q: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The sinks and windows of the span kernel's heads."""
    windows = torch.full((q.shape[1],), rule.window, dtype=torch.int32)
    return torch.zeros_like(windows), windows


def additive(q: Tensor, pad: Tensor | None, where: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """What is dropped inside documents of q's length as a mask to add, (n | 1, 1, L, L) in q's dtype, and with padding
    the rows that keep no key, bool (n, 1, L, 1)."""
    length = q.shape[2]
    if pad is None and where is None and rule.causal:
        # Shorter documents take its corner; a size of its own for each would make it anew in every call.
        size = -(-length // BAND) * BAND
        return band(size, rule.window, q.dtype)[:, :, :length, :length], None
    row = torch.arange(length, device=q.device)[None] if where is None else where
    distance = (row[:, :, None] - row[:, None, :])[:, None]
    keep = torch.ones_like(distance, dtype=torch.bool) if not rule.causal else distance >= 0
    keep = keep & (distance < rule.window) if rule.window else keep
    keep = keep if pad is None else keep & pad[:, None, None, :]
    mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, float("-inf"))
    return mask, None if pad is None else ~keep.any(-1, keepdim=True)


@lru_cache(maxsize=4)
def band(size: int, window: int, dtype: torch.dtype) -> Tensor:
    """Causal keys of a window as a mask to add, (1, 1, size, size)."""
    with torch.inference_mode(False):
        keep = torch.ones(size, size, dtype=torch.bool).tril_().triu_(1 - window)
        return torch.zeros(size, size, dtype=dtype).masked_fill_(~keep, float("-inf"))[None, None]


def span_pays(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether chunks are cheaper than a mask inside one document: time of the mask over that of chunks, in brackets.

    float32, 8 heads of 64 over 2, windows of 64, 128, 256: 300 tokens (1.35, 1.13, 0.92), 512 (1.93, 1.64, 1.18), 768
    (2.75, 2.27, 1.78); over 8: 512 (1.18, 1.36, 0.86), 768 (1.77, 1.47, 1.29), 768 and a window of 512 (0.93), 1000
    (2.43, 2.09, 1.73). bfloat16 over 2: 512 (1.22, 1.40, 1.00), 768 (1.74, 1.67, 1.26); over 8: 512 (0.60, 0.88, 0.91),
    768 (1.10, 0.94, 0.74), 1000 (1.38, 1.23, 1.36).
    """
    length, grouped = q.shape[2], q.shape[1] > k.shape[1]
    if q.dtype in (torch.bfloat16, torch.float16):
        return length >= (768 if grouped else 1024)
    return length >= 1024 or (length >= 512 and (grouped or 3 * window <= length))
