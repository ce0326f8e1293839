"""The CPU target for a step of heads that select tokens: a module that binds `tokens_cpu.step` to the spec."""

from __future__ import annotations

from attnopt.codegen.cpu_text import filled
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import TokenStep
from attnopt.registry import TARGETS

TEMPLATE = '''"""{spec}.

Scores of all keys where a head selects, and attention to the rows that are kept: one call of the compiled kernel
attnopt/codegen/tokens.cpp where it can be had, else torch's operators (attnopt/codegen/reference_token_step.py).
"""

import torch

from attnopt.codegen import tokens_cpu

# Query heads, KV heads, dim of q and k, dim of v.
SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v})
DTYPE = torch.{dtype}


def step(q, keys, values, n, valid, table, *state):
    """Arguments as those of tokens_cpu.step."""
    shape = (q.shape[1], table.shape[0], q.shape[3], values.shape[2])
    if shape != SHAPE or q.dtype != DTYPE:
        raise ValueError(f"emitted for {{SHAPE}} {{DTYPE}}, called with {{shape}} {{q.dtype}}")
    tokens_cpu.step(q, keys, values, n, valid, table, *state)
'''


@TARGETS.register("cpu token_step")
class Cpu:
    @staticmethod
    def emit(spec: TokenStep) -> str:
        """Source of a module with ``step`` (attnopt/codegen/reference_token_step.py has its contract)."""
        text = filled(TEMPLATE, spec)
        return text + footer(spec, "self_check_tokens", "step")
