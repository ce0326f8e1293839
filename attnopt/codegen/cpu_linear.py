"""The CPU target of linear far parts: modules that bind library functions to the spec."""

from __future__ import annotations

from attnopt.codegen.cpu_text import UNPADDED
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import Linear, LinearBackward, LinearDecode, LinearPrefill
from attnopt.registry import TARGETS

PREFILL = '''"""{spec}.

Chunk by chunk, with a running state in float32; heads of one span run together (attnopt/codegen/linear_cpu.py).
"""

import torch

from attnopt.codegen import linear_cpu
from attnopt.codegen.linear_cpu import state

__all__ = ["prefill", "state"]

{constants}

def prefill(q, k, v, heads, sinks, windows, maps, pad=None):
    """Arguments and results as those of attnopt.codegen.reference_linear.prefill."""
{check}    return linear_cpu.prefill(q, k, v, heads, sinks, windows, maps, {pad})
'''
BACKWARD = '''"""{spec}.

Two sweeps over the chunks, forward for the gradient at q, backward for those at k and v
(attnopt/codegen/linear_cpu_backward.py).
"""

import torch

from attnopt.codegen import linear_cpu_backward

{constants}

def backward(dout, dlse, q, k, v, out, lse, heads, sinks, windows, maps, pad=None):
    """Arguments and results as those of attnopt.codegen.reference_linear.backward."""
{check}    return linear_cpu_backward.backward(dout, dlse, q, k, v, out, lse, heads, sinks, windows, maps, {pad})
'''
DECODE = '''"""{spec}.

What leaves the windows is added to the states, which are then read (attnopt/codegen/linear_decode_cpu.py).
"""

from attnopt.codegen.linear_cpu import state
from attnopt.codegen.linear_decode_cpu import decode

__all__ = ["decode", "state"]
'''
CONSTANTS = """# Query heads, KV heads, dim of q and k, dim of v; heads served, rank of their maps.
SHAPE = ({heads}, {kv_heads}, {head_dim}, {head_dim_v}, {served}, {rank})
KIND, DTYPE = "{kind}", torch.{dtype}
"""
CHECK = """    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3], maps.heads, maps.rank)
    if (shape, maps.kind, q.dtype) != (SHAPE, KIND, DTYPE):
        raise ValueError(f"emitted for {SHAPE} {KIND} {DTYPE}, called with {shape} {maps.kind} {q.dtype}")
"""


@TARGETS.register("cpu linear_prefill")
class Prefill:
    @staticmethod
    def emit(spec: LinearPrefill) -> str:
        """Source of a module with ``prefill`` and ``state`` (contract: attnopt/codegen/reference_linear.py)."""
        return _text(PREFILL, spec, spec.padded, "prefill, state")


@TARGETS.register("cpu linear_backward")
class Backward:
    @staticmethod
    def emit(spec: LinearBackward) -> str:
        """Source of a module with ``backward`` (contract: attnopt/codegen/reference_linear.py)."""
        return _text(BACKWARD, spec, spec.padded, "backward")


@TARGETS.register("cpu linear_decode")
class Decode:
    @staticmethod
    def emit(spec: LinearDecode) -> str:
        """Source of a module with ``decode`` and ``state`` (contract: attnopt/codegen/reference_linear.py)."""
        return DECODE.format(spec=spec) + footer(spec, "self_check_linear", "decode, state")


def _text(template: str, spec: Linear, padded: bool, functions: str) -> str:
    constants = CONSTANTS.format(
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        served=spec.served,
        rank=spec.rank,
        kind=spec.kind,
        dtype=spec.dtype,
    )
    check = CHECK + ("" if padded else UNPADDED)
    text = template.format(spec=spec, constants=constants, check=check, pad="pad" if padded else "None")
    return text + footer(spec, "self_check_linear", functions)
