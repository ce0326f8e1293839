"""The kernels of the profiler's pass compiled ahead of time, without a GPU: spills, shared memory, tensor cores.

Compiled by triton 3.9 for bfloat16, no padding, no soft-cap (registers / spilled bytes / shared KiB):

    features  kernel       tile    warps  sm_90          sm_80
    128       weigh_rows   128x32  8       99 / 0 / 96   174 / 0 / 64
    128       attend_rows  128x32  8      244 / 0 / 96   255 / 0 / 84
    128       attend_keys  64x64   8      238 / 0 / 104  171 / 0 / 72
    64        attend_rows  64x32   4      182 / 0 / 32   238 / 0 / 26
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"),
]
KERNELS = ("weigh_rows", "attend_rows", "attend_keys")
# Shared memory that one block may take, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Bytes a thread may spill where padding and a soft-cap are both there; without them none.
SPILLED = 80


def compiled(dtype: str, dim: int, odd: bool, kernel: str, capability: int, folder: Path) -> tuple[int, int, str]:
    """Bytes spilled, of shared memory, and the machine code; `odd`: padded and soft-capped."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from attnopt.statistics.triton_pass import aot_signatures

    made, parts = list(aot_signatures(dtype, dim, dim, 16, 4, odd, odd))[KERNELS.index(kernel)]
    assert made.__name__ == kernel
    source = ASTSource(made, parts["signature"], parts["constexprs"], parts["attrs"])
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=parts["options"])
    # Triton keeps no record of spills, so its PTX goes through the assembler once more.
    ptx = folder / "kernel.ptx"
    ptx.write_text(done.asm["ptx"], encoding="utf-8")
    name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    command = [get_ptxas(capability).path, "-v", "--gpu-name", name, str(ptx), "-o", str(folder / "kernel.cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.stdout + log.stderr)
    return max(int(n) for pair in spills for n in pair), done.metadata.shared, done.asm["sass"]


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dim", "odd"), [(128, False), (128, True), (64, False), (64, True)])
def test_compiles_within_its_limits(kernel: str, dim: int, odd: bool, capability: int, tmp_path: Path) -> None:
    spilled, shared, sass = compiled("bfloat16", dim, odd, kernel, capability, tmp_path)
    assert shared <= SHARED[capability]
    assert ("HGMMA" if capability == 90 else "HMMA") in sass
    # Keys and values come in asynchronously, 16 bytes at a time.
    assert re.search(r"LDGSTS\S*\.128", sass)
    if tuple(int(n) for n in version("triton").split(".")[:2]) >= (3, 9):
        assert spilled <= (SPILLED if odd else 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_stays_off_the_tensor_cores(kernel: str, tmp_path: Path) -> None:
    """They would round its products to tf32."""
    spilled, _, sass = compiled("float32", 64, False, kernel, 90, tmp_path)
    assert spilled == 0
    assert "HGMMA" not in sass and "HMMA" not in sass


def test_the_widest_heads_compile(tmp_path: Path) -> None:
    assert compiled("float16", 256, True, "attend_rows", 80, tmp_path)[1] <= SHARED[80]
