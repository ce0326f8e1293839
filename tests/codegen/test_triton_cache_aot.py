"""The emitted Triton step of a cache compiled ahead of time, without a GPU: spills, shared memory, tensor-core
instructions.

Compiled by triton 3.9, 32 over 8 heads (registers / spilled bytes / shared KiB):

                              sm_90            sm_80            gfx942 (vector registers / spilled / KiB)
    bfloat16 D=128            180 / 0 / 70     168 / 0 / 70     231 / 0 / 32
    bfloat16 D=64             119 / 0 / 36
    bfloat16 D=128, 16 tokens 255 / 4 / 112    255 / 60 / 88    328 / 0 / 40
    bfloat16 D=256, 16 tokens 244 / 0 / 128    255 / 0 / 100
    float32 D=128             70 / 0 / 25
    merge of D=128            54 / 0 / 2       40 / 0 / 2       37 / 0 / 2
    write of D=128            30 / 0 / 0       28 / 0 / 0       12 / 0 / 0
"""

from __future__ import annotations

import re

import pytest
from compiling_ahead import SHARED, TENSOR_CORES, Compiled, compiled, needs_compiler

from attnopt.codegen import emit
from attnopt.codegen.spec import CacheStep
from attnopt.codegen.triton_cache_host import launch

pytestmark = needs_compiler

# Bytes, on AMD registers.
SPILLED = {"sm_80": 16, "sm_90": 16, "gfx942": 0}
SPEC = CacheStep("triton", "bfloat16", 32, 8, 128, 128)
KERNELS = "attend", "merge", "write"
# (new tokens, which kernel, target)
GATES = [
    (1, "attend", "sm_90"),
    (1, "write", "sm_90"),
    (16, "attend", "sm_90"),
    (1, "attend", "sm_80"),
    (1, "attend", "gfx942"),
]


def made(tokens: int, kernel: str, target: str) -> Compiled:
    parts = list(emit.load(SPEC).aot_signatures(tokens))[KERNELS.index(kernel)]
    if target.startswith("gfx"):
        # What the file itself does on an AMD GPU.
        parts = {**parts, "options": {**parts["options"], "num_stages": 2}}
    return compiled(parts["kernel"], parts, target)


@pytest.mark.parametrize(("tokens", "kernel", "target"), GATES)
def test_compiles_within_its_limits(tokens: int, kernel: str, target: str) -> None:
    found, warps = made(tokens, kernel, target), launch(SPEC)[1][64 if tokens > 1 else 16]
    assert found.spilled <= SPILLED[target] and found.shared <= SHARED[target]
    if kernel == "write":
        # A slot of 128 bfloat16 is read and written 16 bytes at a time.
        assert "LDG.E.128" in found.code and "STG.E.128" in found.code
    if kernel != "attend":
        return
    # A tile of 16 rows is less than the 64 that wgmma wants.
    cores = TENSOR_CORES[target] if tokens > 1 else TENSOR_CORES[target].replace("HG", "H")
    assert re.search(rf"\b{cores}", found.code)
    # Two programs share an SM, as the model of decode_list.py has it.
    if target == "gfx942":
        assert 2 * found.shared <= SHARED[target]
        return
    # A block takes 1 KiB of its own beside its shared memory.
    assert 2 * 32 * warps * found.registers <= 65536
    assert tokens > 1 or 2 * (found.shared + 1024) <= SHARED[target] + 1024
    # Keys and values, old and new, come in asynchronously, 16 bytes at a time.
    copies = re.findall(r"LDGSTS\S*", found.code)
    assert len(copies) > 0 and all(copy.endswith(".128") for copy in copies)
