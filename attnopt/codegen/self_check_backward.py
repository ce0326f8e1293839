"""How an emitted backward of span prefills checks and times itself: ``check(spec, backward)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import reference_backward, self_check
from attnopt.codegen.reference_prefill import prefill_lse
from attnopt.codegen.self_check import TOLERANCE, Check, Race, Results
from attnopt.codegen.self_check_prefill import SCALE, TIMED, inputs_of, mixture_of, padding_of, tables_of
from attnopt.codegen.spec import SpanBackward

reference: Callable[..., Results] = reference_backward.backward


def check(spec: SpanBackward, backward: Callable[..., Results]) -> NoReturn:
    """Compare the gradients of an emitted file with the reference, time them against those of dense SDPA, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, backward, device), _races(spec, backward, device))


def _checks(spec: SpanBackward, backward: Callable[..., Results], device: torch.device) -> Iterator[Check]:
    sinks, windows = tables_of(spec, device)
    # Gradients are sums of products that were themselves rounded: twice what a prefill may err.
    tolerance = 2 * TOLERANCE[spec.dtype]
    for length in (1, 65, 200):
        pad = padding_of(spec, length, device)
        given = _given(spec, 2, length, sinks, windows, pad, device)
        wide = [t.double() for t in given]
        # Of the logsumexp too, at one of the lengths.
        dlse = given[0][..., 0].float() if length == 65 else None
        found = partial(backward, *given, sinks, windows, SCALE, pad, dlse)
        expected, wrong = (partial(reference, *wide, sinks, windows + more, SCALE, pad, dlse) for more in (0, 1))
        if length == 1:
            # Only v has a gradient, and what rounding leaves of the others is nothing beside it.
            yield Check("dq, dk and dv, N = 1", partial(_joined, found), partial(_joined, expected), tolerance)
        else:
            yield Check(f"dq, dk, dv, N = {length}", found, expected, tolerance, wrong)


def _given(
    spec: SpanBackward,
    batch: int,
    length: int,
    sinks: Tensor,
    windows: Tensor,
    pad: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """dout, q, k, v, out and lse, as a forward pass leaves them."""
    q, k, v = inputs_of(spec, batch, length, device)
    out, lse = prefill_lse(q.double(), k.double(), v.double(), sinks, windows, SCALE, pad)
    dout = torch.randn(batch, length, spec.heads, spec.head_dim_v, device=device).transpose(1, 2)
    return dout.to(q.dtype), q, k, v, out.to(q.dtype), lse.float()


def _joined(gradients: Callable[[], Results]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients()])


def _races(spec: SpanBackward, backward: Callable[..., Results], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference" or spec.padded:
        return
    length = TIMED[device.type]
    sinks, windows, ideal = mixture_of(spec, length, device)
    q, k, v = inputs_of(spec, 1, length, device)
    dout = torch.randn_like(q[..., :1]).expand(*q.shape[:3], spec.head_dim_v).contiguous()
    # Any will do for a time, as long as no weight overflows.
    lse = torch.full(q.shape[:3], math.log(length), device=device)
    own = partial(backward, dout, q, k, v, torch.zeros_like(dout), lse, sinks, windows, SCALE)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    share = spec.heads // spec.kv_heads
    keys, values = (t.repeat_interleave(share, 1) for t in (k, v))
    dense = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=SCALE)
    sdpa = partial(torch.autograd.grad, dense, (q, k, v), dout, retain_graph=True)
    yield Race(f"N = {length}, {ideal:.1f}× fewer pairs", {"these gradients": own, "those of dense SDPA": sdpa})
