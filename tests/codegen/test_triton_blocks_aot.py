"""The emitted Triton prefill over lists of blocks compiled ahead of time, without a GPU.

Compiled by triton 3.9 for bfloat16 (registers / shared KiB; nothing is spilled; on gfx942 vector registers):

    loads        target  block  tile at D <= 128  D=64       D=128      D=256
    descriptors  sm_90   128    128, 8 warps      166 / 80   212 / 160  147 / 168
    descriptors  sm_90    64     64, 4 warps      130 / 56   150 / 112  145 / 168
    descriptors  sm_90    32     32, 2 warps      160 / 18   237 / 34   231 / 34
    descriptors  sm_90    16     16, 1 warp        99 / 8    160 / 16   208 / 17
    pointers     sm_80   128     64, 8 warps      232 / 24   242 / 56   228 / 50
    pointers     sm_80    64     64, 4 warps      230 / 32   255 / 56   228 / 50
    pointers     sm_80    32     32, 2 warps      180 / 22   253 / 42   231 / 50
    pointers     sm_80    16     16, 1 warp       166 / 10   241 / 20   225 / 25
    hip          gfx942  128    128, 4 warps      315 / 32   415 / 32   224 / 16
    hip          gfx942   64     64, 4 warps      162 / 8    258 / 16   234 / 16
    hip          gfx942   32     32, 2 warps      129 / 4    192 / 8    224 / 16
    hip          gfx942   16     16, 1 warp        87 / 2    136 / 4    156 / 8

At D = 256 tiles are at most 64 by descriptors and at most 32 otherwise. FULL_MATRIX=1 compiles them all; what is
compiled always takes 5 s of CPU time where nothing is in Triton's cache.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compiling_ahead import SHARED, TENSOR_CORES, Compiled, Device, Warmup, compiled, needs_compiler, triton_is

from attnopt.codegen import emit
from attnopt.codegen.spec import BlockPrefill
from attnopt.codegen.triton_blocks import launches

pytestmark = needs_compiler

# triton 3.6 allocates worse for sm_80.
SPILLED_BEFORE_3_9 = {"sm_80": 64}


def spec_of(block: int, dim: int = 128, dtype: str = "bfloat16", padded: bool = False) -> BlockPrefill:
    return BlockPrefill("triton", dtype, 32, 8, dim, dim, block, padded)


def made(spec: BlockPrefill, loads: str, target: str, find: bool = False) -> Compiled:
    module = emit.load(spec)
    parts = module.aot_signature(loads, lse=True, **({"find": True} if find else {}))
    return compiled(module.block_prefill, parts, target)


ALWAYS = [
    (spec_of(64), "descriptors", "sm_90"),
    (spec_of(64, padded=True), "pointers", "sm_80"),
    (spec_of(64), "hip", "gfx942"),
]
BLOCKS = (16, 32, 64, 128)
WAYS = (("descriptors", "sm_90"), ("pointers", "sm_80"), ("pointers", "sm_90"), ("hip", "gfx942"))
REST = [
    *((spec_of(block, dim), *way) for block in BLOCKS for dim in (64, 128, 256) for way in WAYS),
    *((spec_of(block, 128, "float16", True), *way) for block in BLOCKS for way in WAYS),
    *((spec_of(block, dim, "float32"), *way) for block in BLOCKS for dim in (64, 128, 256) for way in WAYS[1::2]),
]
GATES = [*ALWAYS, *(pytest.param(*gate, marks=pytest.mark.full) for gate in REST)]


@pytest.mark.parametrize(("spec", "loads", "target"), GATES, ids=str)
def test_compiles_within_its_limits(spec: BlockPrefill, loads: str, target: str) -> None:
    kernel = made(spec, loads, target)
    assert kernel.spilled <= (0 if triton_is(3, 9) else SPILLED_BEFORE_3_9.get(target, 0))
    assert kernel.shared <= SHARED[target]
    tile, _, _ = launches(spec)[loads]
    if spec.dtype != "float32":
        # The large matrix instruction of sm_90 takes 64 rows and four warps.
        assert (TENSOR_CORES[target] if tile >= 64 or target != "sm_90" else "HMMA") in kernel.code
    if loads == "descriptors":
        # Queries, keys and values all come in bulk.
        assert "UTMALDG" in kernel.code and "LDGSTS" not in kernel.code
    elif loads == "pointers" and spec.dtype != "float32":
        # Keys and values come in asynchronously, 16 bytes at a time.
        copies = re.findall(r"LDGSTS\S*", kernel.code)
        assert copies and all(copy.endswith(".128") for copy in copies)
        # GPUs of sm_86 have 99 KiB.
        assert target != "sm_80" or kernel.shared <= 99 * 1024


def test_two_blocks_of_64_share_an_sm() -> None:
    kernel = made(spec_of(64), "descriptors", "sm_90")
    # Each block of threads also takes 1 KiB of its own; an SM has 228 KiB and 65536 registers.
    assert 2 * (kernel.shared + 1024) <= 228 * 1024
    assert 2 * 128 * -(-kernel.registers // 8) * 8 <= 65536


def ttgir(spec: BlockPrefill, loads: str, **more: Any) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = emit.load(spec)
    parts = module.aot_signature(loads, lse=True, **more)
    source = ASTSource(module.block_prefill, parts["signature"], parts["constexprs"], parts["attrs"])
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=parts["options"]).asm["ttgir"]
    assert isinstance(text, str)
    return text


def test_a_skipped_block_loads_no_values() -> None:
    """By how far lines are indented: 6 spaces in a loop, more in a branch of it."""
    free, bounded = re.findall(
        r"^    %.* = scf\.for .*\n((?:      .*\n)*)    \}", ttgir(spec_of(64), "descriptors"), re.M
    )
    steps = {"keys": r"async_tma_copy_global_to_local %k\b", "scores": r"%scores\S* = ttng.warp_group_dot ",
             "exponentials": r"%weights\S* = math.exp2", "values": r"async_tma_copy_global_to_local %v\b",
             "product": r"%acc\S* = ttng.warp_group_dot "}  # fmt: skip
    always, branch = ({n for n, x in steps.items() if re.search(rf"^{at}\S.*{x}|^{at}{x}", bounded, re.M)}
                      for at in (" {6}", " {8}"))  # fmt: skip
    assert always == {"keys", "scores"} and branch == {"exponentials", "values", "product"}
    # Heads without a bound have no such branch, and load values as far ahead as keys.
    assert all(re.search(rf"^ {{6}}(\S.*)?{x}", free, re.M) for x in steps.values())


def test_the_launch_that_finds_what_is_needed_loads_no_values() -> None:
    kernel = made(spec_of(128), "pointers", "sm_80", find=True)
    assert kernel.spilled == 0 and kernel.registers <= 160
    assert "MUFU.EX2" not in kernel.code and "RED" in kernel.code


def test_one_kernel_serves_every_length_list_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JIT itself, for a GPU that is not there: what is not in its spec makes no other kernel."""
    from triton.runtime import driver

    module = emit.load(BlockPrefill("triton", "float16", 4, 2, 32, 32, 16, True))
    warmup = Warmup(module.block_prefill)
    monkeypatch.setattr(driver, "_active", Device("sm_90"))
    monkeypatch.setattr(module, "block_prefill", warmup)
    monkeypatch.setattr(module, "INTERPRETED", True)  # CPU tensors stand for those of the GPU

    def prefill(
        queries: int, keys: int, window: int = 0, batch: int = 1, heads: int = 4, transposed: bool = True
    ) -> None:
        q, k, v = (torch.zeros(batch, n, h, 32, dtype=torch.float16) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
        q, k, v = (t.transpose(1, 2) if transposed else t.transpose(1, 2).contiguous() for t in (q, k, v))
        counts = torch.zeros(batch, 1, -(-queries // 16), dtype=torch.int32).expand(-1, heads, -1)
        blocks = torch.zeros(*counts.shape, -(-keys // 16), dtype=torch.int32)
        pad, served = torch.ones(batch, keys, dtype=torch.bool), torch.arange(heads, dtype=torch.int32)
        bounds = torch.full((heads,), -torch.inf)
        module.prefill(q, k, v, served, counts, blocks, bounds, 0.2, pad, window, torch.empty_like(q))

    prefill(2048, 2048)
    assert warmup.kernels == 1 and "cp.async.bulk.tensor.4d" in warmup.made[0].asm["ptx"]
    prefill(1, 1, window=1, heads=1)
    prefill(17, 256, window=16)
    prefill(1000, 1001, batch=3, heads=3, transposed=False)
    assert len(warmup.made) == 4 and warmup.kernels == 1
