"""Triton kernels compiled ahead of time, without a GPU: what the tests read from the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

needs_compiler = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"),
]

# Shared memory that one block may take, in bytes.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# The instruction of the tensor cores, by target.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


class Compiled(NamedTuple):
    """registers: of a thread, on AMD the vector ones; spilled: bytes, on AMD registers; shared: bytes."""

    registers: int
    spilled: int
    shared: int
    code: str


def triton_is(*at_least: int) -> bool:
    return tuple(int(n) for n in version("triton").split(".")[:2]) >= at_least


def compiled(kernel: Any, parts: dict[str, Any], target: str) -> Compiled:
    """`kernel` for "sm_80", "sm_90" or "gfx942"; parts: signature, constexprs, attrs and options of triton.compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(kernel, parts["signature"], parts["constexprs"], parts["attrs"])
    made = triton.compile(source, target=gpu, options=parts["options"])
    if amd:
        code = made.asm["amdgcn"]
        registers, kept = (
            int(re.findall(rf"\.{name}:\s*(\d+)", code)[0]) for name in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        code = made.asm["sass"]
        registers, kept = _registers(made.asm["cubin"]), spilled(code)
    return Compiled(registers, kept, made.metadata.shared, code)


def spilled(sass: str) -> int:
    """Bytes that the code stores to local memory, or loads from it, whichever are more (no kernel keeps arrays)."""
    widths = [re.findall(rf"\b{word}(?:\.\w+)*?(?:\.(64|128))?\s", sass) for word in ("STL", "LDL")]
    return max(sum(int(width or 32) // 8 for width in found) for found in widths)


def _registers(cubin: bytes) -> int:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", told))


class Device:
    """What Triton's JIT asks of a driver, for a GPU that is not there: kernels are compiled for it, never launched."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Warmup:
    """In the place of a kernel: its launches are compiled as the JIT would compile them, and the results are kept."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.made.append(self.kernel.warmup(*arguments, grid=grid, **options))

        return launch

    @property
    def kernels(self) -> int:
        """How many different ones there are."""
        return len({made.hash for made in self.made})
