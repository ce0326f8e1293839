"""The CPU target for a step of the ragged cache: a module that binds the function of `cache_cpu` to the spec."""

from __future__ import annotations

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import CacheStep
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

New queries attend to the slots of their KV head and to the new keys, then those of the new that stay are written: one
call of the compiled kernel attnopt/codegen/cache.cpp where it can be had, else torch's operators
(attnopt/codegen/cache_cpu.py).
"""

import torch

from attnopt.codegen import cache_cpu

# Query heads, KV heads, dim of q and k, dim of v.
SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v})
DTYPE = torch.{dtype}


def step(q, k, v, keys, values, n, valid, table, spans, scale, fresh):
    """Arguments and result as those of cache_cpu.step."""
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
    return cache_cpu.step(q, k, v, keys, values, n, valid, table, spans, scale, fresh)
'''


@TARGETS.register("cpu cache_step")
class Cpu:
    @staticmethod
    def emit(spec: CacheStep) -> str:
        """Source of a module with ``step`` (attnopt/codegen/reference_cache.py has its contract)."""
        text = filled(TEMPLATE, spec)
        return text + footer(spec, "self_check_cache", "step")
