"""The gradients of the reference prefill, written out: what the other targets' backward kernels are tested against."""

from __future__ import annotations

import torch

from attnopt.codegen.reference_prefill import finite, masked_scores
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanBackward
from attnopt.registry import TARGETS


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
    windows: torch.Tensor,
    scale: float,
    pad: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients at q (B, H, N, D), k (B, G, N, D) and v (B, G, N, Dv) of a prefill whose output `out` has the gradient
    dout (B, H, N, Dv) and whose rows have the logsumexp lse (B, H, N), natural and -inf in a row without a kept key.

    dlse (B, H, N): the gradient of lse itself, None for none; it counts for nothing in a row without a kept key.
    With the weights P = exp(scores - lse) and D_i = dout_i . out_i - dlse_i: dscores = P (dout vᵀ - D).
    """
    scores, values = masked_scores(q, k, v, sinks, windows, scale, pad)
    wide, share = values.dtype, q.shape[1] // k.shape[1]
    dout, out = dout.to(wide), out.to(wide)
    weights = torch.exp(scores - finite(lse.to(wide))[..., None])
    delta = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse.to(wide)
    dscores = weights * (dout @ values.transpose(-1, -2) - delta[..., None]) * scale
    dq = dscores @ k.to(wide).repeat_interleave(share, 1)
    dk, dv = dscores.transpose(-1, -2) @ q.to(wide), weights.transpose(-1, -2) @ dout
    # A KV head gathers from every query head that reads it.
    dk, dv = (x.unflatten(1, (-1, share)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@TARGETS.register("reference span_backward")
class Reference:
    @staticmethod
    def emit(spec: SpanBackward) -> str:
        text = f'"""{spec}."""\n\nfrom attnopt.codegen.reference_backward import backward\n\n__all__ = ["backward"]\n'
        return text + footer(spec, "self_check_backward", "backward")
