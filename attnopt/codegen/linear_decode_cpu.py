"""One token of linear far parts on the CPU: in the kernel linear_decode.cpp where it can be had, else the reference.

In the kernel a state is walked once, each row taking what leaves the window and being read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen import linear_native, reference_linear
from attnopt.feature_maps import FeatureMap


def decode(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, heads: Tensor, state: Tensor, maps: FeatureMap
) -> tuple[Tensor, Tensor]:
    """Arguments and results as those of attnopt.codegen.reference_linear.decode."""
    if state.dtype != torch.float32 or not state.is_contiguous() or linear_native.unusable(q.dtype):
        return reference_linear.decode(q, k, v, slots, heads, state, maps)
    return linear_native.decode(q, k, v, slots, heads, state, maps.tensors, maps.kind)
