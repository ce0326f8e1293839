"""The emitted Triton step of heads that select tokens compiled ahead of time, without a GPU.

Compiled by triton 3.9, 32 over 8 heads, with features of 16 (registers / shared KiB; nothing is spilled; on gfx942
vector registers):

              decide   scan      pick       gather    merge
    bfloat16 D=128
      sm_90   27 / 0   72 / 40   124 / 16    96 / 1   48 / 2
      sm_80   30 / 0   64 / 40   122 / 16    96 / 1   48 / 2
      gfx942  14 / 0   90 / 16   144 / 32    68 / 1   40 / 2
    bfloat16 D=256
      sm_90   42 / 0   63 / 42   124 / 16   104 / 4   48 / 4
    float32 D=128
      sm_90   28 / 0   38 / 16   124 / 16   136 / 2   48 / 2

FULL_MATRIX=1 compiles them all.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from compiling_ahead import SHARED, TENSOR_CORES, Compiled, compiled, needs_compiler

from attnopt.codegen import emit
from attnopt.codegen.spec import TokenStep

pytestmark = needs_compiler

FEATURES = 16
KERNELS = "decide", "scan", "pick", "gather", "gather in parts", "merge"
TARGETS = "sm_90", "sm_80", "gfx942"


def spec_of(dtype: str = "bfloat16", dim: int = 128) -> TokenStep:
    return TokenStep("triton", dtype, 32, 8, dim, dim)


SPEC = spec_of()
ALWAYS = [(SPEC, "scan", "sm_90"), (SPEC, "pick", "sm_90"), (SPEC, "gather", "sm_90"), (SPEC, "scan", "gfx942")]
EVERY = [
    (spec_of(dtype, dim), kernel, target)
    for dtype, dim in (("bfloat16", 128), ("bfloat16", 64), ("bfloat16", 256), ("float32", 128), ("float32", 256))
    for kernel in KERNELS
    for target in TARGETS
]
GATES = [*ALWAYS, *(pytest.param(*gate, marks=pytest.mark.full) for gate in EVERY if gate not in ALWAYS)]


def parts_of(spec: TokenStep, kernel: str, target: str) -> dict[str, Any]:
    parts = list(emit.load(spec).aot_signatures(FEATURES))[KERNELS.index(kernel)]
    if target.startswith("gfx") and kernel == "scan":
        # What the file itself does on an AMD GPU.
        return {**parts, "options": {**parts["options"], "num_stages": 2}}
    return parts


@cache
def made(spec: TokenStep, kernel: str, target: str) -> Compiled:
    parts = parts_of(spec, kernel, target)
    return compiled(parts["kernel"], parts, target)


@pytest.mark.parametrize(("spec", "kernel", "target"), GATES, ids=str)
def test_compiles_within_its_limits(spec: TokenStep, kernel: str, target: str) -> None:
    found = made(spec, kernel, target)
    assert found.spilled == 0 and found.shared <= SHARED[target]
    half = spec.dtype != "float32"
    if kernel == "scan" and half:
        # A tile of 16 rows is less than the 64 that wgmma wants.
        assert re.search(rf"\b{TENSOR_CORES[target].replace('HG', 'H')}", found.code)
    if target.startswith("gfx"):
        return
    if kernel == "scan":
        # Four programs share an SM: a block takes 1 KiB of its own beside its shared memory.
        assert 4 * (found.shared + 1024) <= SHARED["sm_90"] + 1024
        # Keys come in asynchronously, 16 bytes at a time.
        copies = re.findall(r"LDGSTS\S*", found.code)
        assert copies and (not half or all(copy.endswith(".128") for copy in copies))
    if kernel.startswith("gather"):
        # Of a warp's 32 keys and 32 values each lane has 16 bytes at a time.
        assert found.code.count("LDG.E.128") >= (8 if half else 16) * spec.head_dim // 128 // (
            1 + (spec.head_dim > 128)
        )
    if kernel == "pick":
        # Digits are counted in shared memory, and the hardware adds up those of a warp that are equal.
        assert "ATOMS.POPC.INC" in found.code


def ttgir(kernel: str) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parts = parts_of(SPEC, kernel, "sm_90")
    source = ASTSource(parts["kernel"], parts["signature"], parts["constexprs"], parts["attrs"])
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=parts["options"]).asm["ttgir"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(("kernel", "large"), [("scan", ("k", "labels", "q")), ("pick", ("scores",))])
def test_who_does_not_select_reads_nothing_large(kernel: str, large: tuple[str, ...]) -> None:
    """The first branch leaves the kernel, and what decides on it is `due`."""
    ahead, behind = re.split(r"^    cf\.cond_br .*\n", ttgir(kernel), maxsplit=1, flags=re.M)
    ahead = ahead[ahead.index("tt.func public") :].partition("\n")[2]
    assert re.match(r"  \^bb1:.*\n    tt\.return", behind)
    assert "%due" in ahead
    for name in large:
        assert not re.search(rf"%{name}\b", ahead) and re.search(rf"%{name}\b", behind)
