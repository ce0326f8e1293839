"""The emitted Triton decoding compiled ahead of time, without a GPU: spills, shared memory, tensor-core instructions.

Compiled by triton 3.9, 32 over 8 heads (registers / spilled bytes / shared KiB):

                              sm_90            sm_80            gfx942 (vector registers / spilled / KiB)
    bfloat16 D=128            128 / 0 / 70     128 / 0 / 70     214 / 0 / 32
    bfloat16 D=64             114 / 0 / 36     120 / 0 / 36     128 / 0 / 16
    bfloat16 D=128, spans     135 / 0 / 71     128 / 0 / 71     203 / 0 / 32
    float32 D=128             72 / 0 / 25      72 / 0 / 25
    merge of D=128            40 / 0 / 2       40 / 0 / 2       38 / 0 / 2

float32 at D=128 with blocks of 32 slots instead of 16 spills 508 bytes on sm_90.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from attnopt.codegen import emit
from attnopt.codegen.spec import SpanDecode

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"),
]

# Shared memory that one block may take, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
SPILLED = 16
SPEC = SpanDecode("triton", "bfloat16", 32, 8, 128, 128)
SPANS = SpanDecode("triton", "bfloat16", 32, 8, 128, 128, 1, True)
FLOAT = SpanDecode("triton", "float32", 32, 8, 128, 128)
# (spec, which of its kernels, capability)
GATES = [
    (SPEC, 0, 90),
    (SPEC, 1, 90),
    (SPEC, 0, 80),
    (SpanDecode("triton", "bfloat16", 32, 8, 64, 64), 0, 90),
    (SPANS, 0, 90),
    (FLOAT, 0, 90),
]


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of spill stores or of spill loads, whichever are more
    shared: int
    sass: str


def built(spec: SpanDecode, kernel: int, target: tuple[str, Any, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parts: dict[str, Any] = list(emit.load(spec).aot_signatures())[kernel]
    ast = ASTSource(parts["kernel"], parts["signature"], parts["constexprs"], parts["attrs"])
    # What the file itself does on an AMD GPU.
    options = {**parts["options"], "num_stages": 2} if target[0] == "hip" else parts["options"]
    return triton.compile(ast, target=GPUTarget(*target), options=options)


@cache
def compiled(spec: SpanDecode, kernel: int, capability: int) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas

    made = built(spec, kernel, ("cuda", capability, 32))
    with TemporaryDirectory() as folder:
        # Triton keeps no record of spills, so its PTX goes through the assembler once more.
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"], encoding="utf-8")
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [get_ptxas(capability).path, "-v", "--gpu-name", name, str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    spills = [int(n) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) for n in pair]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    return Compiled(max(registers), max(spills), made.metadata.shared, made.asm["sass"])


@pytest.mark.parametrize(
    ("spec", "kernel", "capability"),
    GATES,
    ids=[f"{s.dtype} D{s.head_dim} {s.flags} {('decode', 'merge')[kernel]} sm_{c}" for s, kernel, c in GATES],
)
def test_compiles_within_its_limits(spec: SpanDecode, kernel: int, capability: int) -> None:
    made = compiled(spec, kernel, capability)
    assert made.spilled <= SPILLED and made.shared <= SHARED[capability]
    if kernel == 0:
        # Two programs share an SM, as the model of decode_list.py has it. A block takes 1 KiB of its own.
        assert 2 * (made.shared + 1024) <= 228 * 1024 and 2 * 128 * made.registers <= 65536
        # Keys and values come in asynchronously, 16 bytes at a time; positions, 4 bytes a slot, may not.
        copies = re.findall(r"LDGSTS\S*", made.sass)
        assert len([copy for copy in copies if copy.endswith(".128")]) > 0.9 * len(copies) > 0
        # On the tensor cores float32 would be rounded to tf32.
        assert ("HMMA" in made.sass) == (spec.dtype != "float32")


def test_compiles_for_amd_without_spills() -> None:
    made = built(SPEC, 0, ("hip", "gfx942", 64))
    text = made.asm["amdgcn"]
    (spilled,) = {int(n) for n in re.findall(r"vgpr_spill_count:?\s+(\d+)", text)}
    assert spilled == 0 and "v_mfma" in text
    assert 2 * made.metadata.shared <= 64 * 1024
