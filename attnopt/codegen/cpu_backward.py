"""The CPU target's gradients of a prefill: a module that binds `span_cpu_backward` to the spec and its constants."""

from __future__ import annotations

import torch

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.span_cpu_backward import tuning
from attnopt.codegen.spec import SpanBackward
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

Heads of equal span run together, as in the prefill. Only their windows are read: each chunk of query rows makes its
weights anew from the logsumexp of the rows. attnopt/codegen/span_cpu_backward.py has the functions.
"""

import torch

from attnopt.codegen import span_cpu, span_cpu_backward

SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v})  # query heads, KV heads, dim of q and k, dim of v
DTYPE = torch.{dtype}
TUNING = span_cpu.{tuning}


def backward(dout, q, k, v, out, lse, sinks, windows, scale, pad=None, dlse=None):
    """Arguments and results as those of span_cpu_backward.backward."""
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
{check}    return span_cpu_backward.backward(dout, q, k, v, out, lse, sinks, windows, scale, {pad}, TUNING, dlse)
'''


@TARGETS.register("cpu span_backward")
class Cpu:
    @staticmethod
    def emit(spec: SpanBackward) -> str:
        """Source of a module with ``backward`` (contract: attnopt/codegen/reference_backward.py)."""
        text = filled(TEMPLATE, spec, tuning=tuning(getattr(torch, spec.dtype), spec.head_dim))
        return text + footer(spec, "self_check_backward", "backward")
