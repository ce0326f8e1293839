"""Tensor descriptors made on the host, by which emitted kernels for Hopper and Blackwell load their tiles.

A descriptor is four-dimensional, (batch, head, row, dim), with tiles of (1, 1, rows, dims). Its strides have any order,
so that a transposed projection is read where it lies; and what a tile reaches past the last row or the last dim reads
as zero, so that no length needs a kernel of its own.

Triton is imported where a descriptor is made, by the emitted files alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What the hardware asks of a base address and of every stride but the last, in bytes.
ALIGNMENT = 16


def descriptors_serve(*tensors: Tensor) -> bool:
    """Whether descriptors can load these tensors (B, heads, N, dim).

    The device must have tensor memory access and the 227 KiB of shared memory that the launches count on: compute
    capability 9.0 to 10.x. Triton's interpreter, which alone is given CPU tensors, has no such limit.
    """
    return all(_has_descriptors(t.device) and _aligned(t) for t in tensors)


def descriptor(tensor: Tensor, rows: int, dims: int) -> Any:
    """A TensorDescriptor of `tensor` (B, heads, N, dim) with tiles (1, 1, rows, dims); dims may exceed dim."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of an axis of one entry is never used, and may be anything.
    unused = ALIGNMENT
    strides = [step if size > 1 else unused for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, dims])


def _has_descriptors(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return not torch.version.hip and (9, 0) <= torch.cuda.get_device_capability(device) < (11, 0)


def _aligned(tensor: Tensor) -> bool:
    """Contiguous along the last axis, and all else a positive multiple of 16 bytes (an expanded axis has stride 0)."""
    steps = [step for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    whole = all(step > 0 and step * tensor.element_size() % ALIGNMENT == 0 for step in steps)
    return whole and tensor.stride(3) == 1 and tensor.data_ptr() % ALIGNMENT == 0 and tensor.numel() > 0
