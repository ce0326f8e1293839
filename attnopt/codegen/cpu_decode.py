"""The CPU target for decoding: a module that binds the library functions of `decode_cpu` to the spec."""

from __future__ import annotations

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import SpanDecode
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

The query heads of a KV head are rows that read its slots once: in the compiled kernel attnopt/codegen/decode.cpp where
it can be had, else in one SDPA call on views of the cache for the KV heads of one length
(attnopt/codegen/decode_cpu.py).
"""

import torch

from attnopt.codegen import decode_cpu

# Query heads, KV heads, queries of a head, dim of q and k, dim of v.
SHAPE = ({heads}, {kv_heads}, {tokens}, {head_dim}, {head_dim_v})
DTYPE = torch.{dtype}


def decode({arguments}):
    """Arguments and result as those of decode_cpu.decode."""
    shape = (q.shape[1], filled.shape[1], q.shape[2], k.shape[2], v.shape[2])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
    return decode_cpu.decode({arguments})
'''


@TARGETS.register("cpu span_decode")
class Cpu:
    @staticmethod
    def emit(spec: SpanDecode) -> str:
        """Source of a module with ``decode`` (attnopt/codegen/reference_decode.py has its contract)."""
        more = ", sinks, windows, positions, at" if spec.positioned else ""
        text = filled(TEMPLATE, spec, arguments=f"q, k, v, starts, filled, scale{more}")
        return text + footer(spec, "self_check_decode", "decode")
