"""The CPU target for a prefill over lists of blocks: a module that binds the function of `blocks_cpu` to the spec."""

from __future__ import annotations

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import BlockPrefill
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

Each block of rows visits the blocks of keys that its list names: the compiled kernel attnopt/codegen/blocks.cpp where
it can be had, else torch's operators (attnopt/codegen/blocks_cpu.py).
"""

import torch

from attnopt.codegen import blocks_cpu

# Query heads, KV heads, dim of q and k, dim of v.
SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v})
DTYPE = torch.{dtype}
# Rows of a block of queries, and keys of one of keys.
BLOCK = {block}


def prefill(q, k, v, heads, counts, blocks, bounds, scale, pad, window, out, lse=None):
    """Arguments and result as those of blocks_cpu.prefill."""
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
{check}    return blocks_cpu.prefill(q, k, v, heads, counts, blocks, bounds, scale, {pad}, window, BLOCK, out, lse)
'''


@TARGETS.register("cpu block_prefill")
class Cpu:
    @staticmethod
    def emit(spec: BlockPrefill) -> str:
        """Source of a module with ``prefill`` (attnopt/codegen/reference_blocks.py has its contract)."""
        text = filled(TEMPLATE, spec)
        return text + footer(spec, "self_check_blocks", "prefill")
