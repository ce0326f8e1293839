"""Emitted Triton kernels of linear far parts compiled ahead of time, without a GPU: spills, memory, tensor cores.

Compiled by triton 3.9 for bfloat16, kind exp, 64 features (registers / spilled bytes / shared KiB; on gfx942 vector
registers):

    D=128            sm_90                         sm_80                         gfx942
    linear_prefill   32, 4 warps: 240 / 0 / 108    32, 8 warps: 236 / 0 / 96     32, 4 warps: 506 / 0 / 32
    key_states       32, 4 warps: 218 / 0 / 60     32, 8 warps: 161 / 0 / 52     32, 4 warps: 422 / 0 / 32
    linear_dq        32, 8 warps: 255 / 16 / 96    32, 8 warps: 255 / 0 / 92     16, 4 warps: 486 / 0 / 32
    linear_dkv       32, 8 warps: 251 / 0 / 104    32, 8 warps: 255 / 8 / 100    16, 4 warps: 484 / 0 / 32
    query_states     32, 8 warps: 167 / 0 / 44     32, 8 warps: 168 / 0 / 40
    linear_decode    4 warps: 191 / 0 / 2          4 warps: 194 / 0 / 2          2 warps: 208 / 0 / 8

    linear_prefill of others on sm_90: D=64 216 / 0 / 56, D=256 251 / 0 / 192, float16 216 / 0 / 108, exp/128
    254 / 0 / 192, taylor/8 251 / 0 / 80. On sm_80 128 features do not fit: exp/128 spills kilobytes, taylor/8 248 B.
    float32, off the tensor cores, spills 1.7 kB at D=128.

Blocks of 64 rows take wgmma, and with it keep an address of every product in registers: 4 warps spill 100 bytes and
more, 8 warps none at 252 registers, which leaves an SM one program that waits for its own loads.
"""

from __future__ import annotations

import pytest
from compiling_ahead import SHARED, compiled, needs_compiler, triton_is

from attnopt.codegen import emit
from attnopt.codegen.spec import LinearBackward, LinearPrefill

pytestmark = needs_compiler

# Bytes, on AMD registers.
SPILLED = {"sm_80": 16, "sm_90": 16, "gfx942": 0}
# What multiplies a tile of 32 rows: wgmma wants 64.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HMMA", "gfx942": "v_mfma"}
SIZES = "triton", "bfloat16", 32, 8, 128, 128, 32, "exp", 64, False
# Compiling all of the table takes minutes; these are the kernels with the most registers.
GATES = [("linear_prefill", "sm_90"), ("linear_dkv", "sm_90"), ("linear_prefill", "gfx942")]


@pytest.mark.parametrize(("name", "target"), GATES, ids=[f"{n} {t}" for n, t in GATES])
def test_compiles_within_its_limits(name: str, target: str) -> None:
    if not triton_is(3, 9):
        pytest.skip("limits are those of triton 3.9")
    family = LinearPrefill if name == "linear_prefill" else LinearBackward
    made = emit.load(family(*SIZES)).aot_signatures("hip" if target == "gfx942" else target)
    parts = next(x for x in made if x["kernel"].__name__ == name)
    found = compiled(parts["kernel"], parts, target)
    assert found.spilled <= SPILLED[target] and found.shared <= SHARED[target]
    assert TENSOR_CORES[target] in found.code
    if (name, target) == ("linear_prefill", "sm_90"):
        # Two programs share an SM, each with 1 KiB of its own, and load their tiles 16 bytes at a time, asynchronously.
        assert 2 * (found.shared + 1024) <= 228 * 1024 and 2 * 128 * found.registers <= 65536
        assert "LDGSTS.E.BYPASS.LTC128B.128" in found.code or "LDGSTS.E.BYPASS.128" in found.code
