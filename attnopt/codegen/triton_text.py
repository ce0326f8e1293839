"""Pieces of text that emitted Triton kernels share. Triton itself is imported by the emitted files alone."""

from __future__ import annotations

import importlib.util

from attnopt.codegen.spec import KernelSpec
from attnopt.errors import DependencyError

TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
MAX_DIM = 256


def check(spec: KernelSpec) -> None:
    """ValueError where no kernel can be emitted for `spec`."""
    if spec.dtype not in TRITON_DTYPES:
        raise ValueError(f"the triton target has no {spec.dtype}; it has {', '.join(TRITON_DTYPES)}")
    if max(spec.head_dim, spec.head_dim_v) > MAX_DIM:
        raise ValueError(f"head dimensions {spec.head_dim}/{spec.head_dim_v} exceed {MAX_DIM}, the most one tile holds")


def need_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise DependencyError("The triton target needs the package triton.", "Run: pip install triton")


def padded_dim(dim: int) -> int:
    """Triton's tiles have power-of-two sides and tl.dot wants at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def dim_mask(dim: int, index: str) -> str:
    return "" if dim == padded_dim(dim) else f"{index} < {dim}"


def mask_argument(*conditions: str) -> str:
    """A mask of those conditions that are needed, or nothing: as an argument of tl.load or tl.store."""
    needed = [c for c in conditions if c]
    if len(needed) > 1:
        needed = [f"({c})" for c in needed]
    return f", mask={' & '.join(needed)}" if needed else ""


def load_text(pointer: str, *conditions: str) -> str:
    mask = mask_argument(*conditions)
    return f"tl.load({pointer}{mask}{', other=0.0' if mask else ''})"


def fetch_text(name: str, descriptor: str, block: str, pointer: str) -> str:
    """Lines inside a kernel's loop that set `name` to a tile: by a tensor descriptor or, without, from `block` on."""
    return f"""        if DESCRIPTORS:
            {name} = {descriptor}
        else:
            {block}
            {name} = {pointer}"""
