"""The CPU target: a module that binds the library functions of `span_cpu` to the spec and its measured constants."""

from __future__ import annotations

import torch

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.span_cpu import tuning
from attnopt.codegen.spec import SpanPrefill
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

Dense heads are causal SDPA. Windowed ones run in the compiled kernel attnopt/codegen/spans.cpp where it can be
had; else those of equal span run together, as chunks of query rows against strided views of K and V, the query heads of
a KV head packed into rows (attnopt/codegen/span_cpu.py).
"""

import torch

from attnopt.codegen import span_cpu

SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v})  # query heads, KV heads, dim of q and k, dim of v
DTYPE = torch.{dtype}
# Of the chunks.
TUNING = span_cpu.{tuning}


def prefill(q, k, v, sinks, windows, scale, pad=None):
    """Arguments and result as those of span_cpu.prefill."""
    _check(q, k, v, pad)
    return span_cpu.prefill(q, k, v, sinks, windows, scale, {pad}, TUNING)


def prefill_lse(q, k, v, sinks, windows, scale, pad=None):
    """Arguments and results as those of span_cpu.prefill_lse."""
    _check(q, k, v, pad)
    return span_cpu.prefill_lse(q, k, v, sinks, windows, scale, {pad}, TUNING)


def _check(q, k, v, pad):
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
{check}'''


@TARGETS.register("cpu span_prefill")
class Cpu:
    @staticmethod
    def emit(spec: SpanPrefill) -> str:
        """Source of a module with ``prefill`` and ``prefill_lse`` (contract: attnopt/codegen/reference_prefill.py)."""
        text = filled(TEMPLATE, spec, tuning=tuning(getattr(torch, spec.dtype), spec.head_dim))
        return text + footer(spec, "self_check_prefill", "prefill, prefill_lse")
