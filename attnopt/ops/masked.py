"""`attnopt::masked_attention`: attention under any recovered mask, bias, soft-cap and sink, by an emitted kernel.

It has no gradient: passes never insert it into a graph that needs one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen import equal_runs as runs
from attnopt.codegen.emit import load
from attnopt.codegen.spec import MaskedPrefill
from attnopt.ops.span import empty_tokens_first, launches, tokens_first


@torch.library.custom_op("attnopt::masked_attention", mutates_args=())
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    sink: Tensor | None,
    form: str,
    scale: float,
) -> Tensor:
    """The attention that `form` is the text of (attnopt/masks/kernel_form.py), on the device's target.

    q (B, H, Sq, D), k (B, G, Sk, D), v (B, G, Sk, Dv); tensors: t0, t1, ... of the form, of any strides, and behind
    them `equal_runs` of those that number documents and `kept_runs` of those that are padding; sizes: s0, s1, ...;
    sink: (H,) or (B, H, Sq) as the form says. Returns (B, H, Sq, Dv), physically (B, Sq, H, Dv). ValueError where the
    target has no such kernel, AttnoptError where `form` is no form.
    """
    spec = MaskedPrefill(
        target=settings.target(q.device.type),
        dtype=str(q.dtype).removeprefix("torch."),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        form=form,
    )
    module = load(spec)
    launches[spec.key()] += 1
    out = module.attend(q, k, v, tensors, sizes, sink, scale)
    return tokens_first(out)


@masked_attention.register_fake
def _(q, k, v, tensors, sizes, sink, form, scale):  # type: ignore[no-untyped-def]
    return empty_tokens_first(q, v.shape[3])


@torch.library.custom_op("attnopt::equal_runs", mutates_args=())
def equal_runs(ids: Tensor) -> Tensor:
    """ids int (..., N) -> int32 (3, ..., N), see attnopt/codegen/equal_runs.py. Any device."""
    return runs.equal_runs(ids)


@equal_runs.register_fake
def _(ids):  # type: ignore[no-untyped-def]
    return ids.new_empty(3, *ids.shape, dtype=torch.int32)


@torch.library.custom_op("attnopt::kept_runs", mutates_args=())
def kept_runs(flags: Tensor) -> Tensor:
    """flags bool (..., N) -> int32 (4, ...), see attnopt/codegen/equal_runs.py. Any device."""
    return runs.kept_runs(flags)


@kept_runs.register_fake
def _(flags):  # type: ignore[no-untyped-def]
    return flags.new_empty(4, *flags.shape[:-1], dtype=torch.int32)
