"""The emitted Triton decoding compiled ahead of time, without a GPU: spills, shared memory, tensor-core instructions.

Compiled by triton 3.9, 32 over 8 heads (registers / spilled bytes / shared KiB):

                              sm_90            sm_80            gfx942 (vector registers / spilled / KiB)
    bfloat16 D=128            128 / 0 / 70     128 / 0 / 70     214 / 0 / 32
    bfloat16 D=64             114 / 0 / 36     120 / 0 / 36     128 / 0 / 16
    bfloat16 D=128, spans     135 / 0 / 71     128 / 0 / 71     203 / 0 / 32
    float32 D=128             67 / 0 / 25      64 / 0 / 25
    merge of D=128            40 / 0 / 2       40 / 0 / 2       38 / 0 / 2
"""

from __future__ import annotations

import re

import pytest
from compiling_ahead import SHARED, Compiled, compiled, needs_compiler

from attnopt.codegen import emit
from attnopt.codegen.spec import SpanDecode
from attnopt.codegen.triton_decode_host import launch

pytestmark = needs_compiler

# Bytes, on AMD registers.
SPILLED = {"sm_80": 16, "sm_90": 16, "gfx942": 0}
SPEC = SpanDecode("triton", "bfloat16", 32, 8, 128, 128)
SPANS = SpanDecode("triton", "bfloat16", 32, 8, 128, 128, 1, True)
FLOAT = SpanDecode("triton", "float32", 32, 8, 128, 128)
# What multiplies a tile of 16 rows: wgmma wants 64.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HMMA", "gfx942": "v_mfma"}
# (spec, which of its kernels, target)
GATES = [
    (SPEC, 0, "sm_90"),
    (SPEC, 1, "sm_90"),
    (SPEC, 0, "sm_80"),
    (SpanDecode("triton", "bfloat16", 32, 8, 64, 64), 0, "sm_90"),
    (SPANS, 0, "sm_90"),
    (FLOAT, 0, "sm_90"),
    (SPEC, 0, "gfx942"),
]


def made(spec: SpanDecode, kernel: int, target: str) -> Compiled:
    parts = list(emit.load(spec).aot_signatures())[kernel]
    if target.startswith("gfx"):
        # What the file itself does on an AMD GPU.
        parts = {**parts, "options": {**parts["options"], "num_stages": 2}}
    return compiled(parts["kernel"], parts, target)


@pytest.mark.parametrize(
    ("spec", "kernel", "target"),
    GATES,
    ids=[f"{s.dtype} D{s.head_dim} {s.flags} {('decode', 'merge')[kernel]} {t}" for s, kernel, t in GATES],
)
def test_compiles_within_its_limits(spec: SpanDecode, kernel: int, target: str) -> None:
    found, warps = made(spec, kernel, target), launch(spec)[1]
    assert found.spilled <= SPILLED[target] and found.shared <= SHARED[target]
    if kernel == 1:
        return
    # On the tensor cores float32 would be rounded to tf32.
    assert (TENSOR_CORES[target] in found.code) == (spec.dtype != "float32")
    # Two programs share an SM, as the model of decode_list.py has it.
    if target == "gfx942":
        assert 2 * found.shared <= SHARED[target]
        return
    # A block takes 1 KiB of its own beside its shared memory.
    assert 2 * (found.shared + 1024) <= SHARED[target] + 1024 and 2 * 32 * warps * found.registers <= 65536
    # Keys and values come in asynchronously, 16 bytes at a time; positions, 4 bytes a slot, may not.
    copies = re.findall(r"LDGSTS\S*", found.code)
    assert len([copy for copy in copies if copy.endswith(".128")]) > 0.75 * len(copies) > 0
