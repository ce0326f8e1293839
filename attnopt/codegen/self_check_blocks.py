"""How an emitted prefill over lists of blocks checks and times itself: ``check(spec, prefill)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.reference_blocks import prefill as reference
from attnopt.codegen.self_check import TOLERANCE, Check, Race, Results
from attnopt.codegen.self_check_prefill import SCALE, TIMED, TOLERANCE_LSE
from attnopt.codegen.spec import BlockPrefill

BATCH = 2
# Every which block of keys is loud, and the logarithm of the threshold that hides the others (`inputs_of`).
LOUD, BOUND = 3, -1.0
# Of what `Call.run` returns: how many blocks are skipped is compared with the output.
OUT, LSE = slice(0, None, 2), slice(1, 2)
# One block in so many is listed where the kernel is timed.
SPARSE = 4


class Case(NamedTuple):
    """Queries, keys, the model's own window (0 for none), the logarithm of the threshold (-inf for none)."""

    length: int
    keys: int
    window: int = 0
    bound: float = -torch.inf

    def __str__(self) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"{self.length} of {self.keys} tokens{window}{', threshold' if self.bound > -torch.inf else ''}"


class Call(NamedTuple):
    """What the kernel is called with, but for its outputs: as reference_blocks.py names it."""

    inputs: tuple[Tensor, Tensor, Tensor]
    heads: Tensor
    counts: Tensor
    blocks: Tensor
    bounds: Tensor
    pad: Tensor | None
    window: int

    def run(self, prefill: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """out (B, h, N, Dv) of the served heads, lse and the blocks skipped."""
        q, _, v = self.inputs
        shape = q.shape[0], q.shape[2], q.shape[1], v.shape[3]
        out = torch.full(shape, torch.nan, dtype=q.dtype, device=q.device).transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((q.shape[0], len(self.heads), q.shape[2]), torch.nan, dtype=wide, device=q.device)
        rest = self.heads, self.counts, self.blocks, self.bounds, SCALE, self.pad, self.window
        skipped = prefill(*self.inputs, *rest, out, lse)
        return out[:, self.heads.long()], lse, skipped

    def double(self) -> Call:
        q, k, v = (x.double() for x in self.inputs)
        return self._replace(inputs=(q, k, v), bounds=self.bounds.double())


def check(spec: BlockPrefill, prefill: Callable[..., Tensor]) -> NoReturn:
    """Compare the function of an emitted file with the reference, time it against dense SDPA, and exit."""
    device = self_check.device_of(spec.target)
    self_check.run(spec, device, _checks(spec, prefill, device), _races(spec, prefill, device))


def inputs_of(
    spec: BlockPrefill, batch: int, length: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model's projections lay them out: (B, heads, N, dim), physically (B, N, heads, dim).

    Scores are about 0.2 times normal numbers, and 3.5 more at the first key of every LOUD-th block: far enough from
    BOUND below each other for rounding not to decide what it skips.
    """
    torch.manual_seed(0)
    sizes = (length, spec.heads, spec.head_dim), (keys, spec.kv_heads, spec.head_dim)
    q, k, v = (torch.randn(batch, *size, device=device) for size in (*sizes, (keys, spec.kv_heads, spec.head_dim_v)))
    q, k = (x * spec.head_dim**-0.25 for x in (q, k))
    q[..., 0], k[..., 0] = 4.2, 0
    k[:, :: LOUD * spec.block, :, 0] = 4.2
    q, k, v = (x.to(getattr(torch, spec.dtype)).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def lists_of(
    block: int, sizes: tuple[int, int], length: int, keys: int, device: torch.device, sparse: int = 2
) -> tuple[Tensor, Tensor]:
    """counts int32 (*sizes, R) and blocks int32 (*sizes, R, C): one in `sparse` of the blocks that causality leaves, at
    random, and with them the first and those on the diagonal."""
    torch.manual_seed(1)
    first, columns = (torch.arange(0, size, block, device=device) for size in (length, keys))
    p = (first + keys - length)[:, None]
    drawn = torch.rand(*sizes, len(first), len(columns), device=device) * sparse < 1
    keep = (drawn | (columns == 0) | (columns + block > p)) & (columns <= (p + block).clamp(max=keys) - 1)
    index = torch.arange(len(columns), device=device)
    # What stands behind a list is not there.
    blocks = torch.where(keep, index, 2**30).sort(-1).values
    return keep.sum(-1, dtype=torch.int32), blocks.to(torch.int32)


def _call(spec: BlockPrefill, case: Case, device: torch.device) -> Call:
    # Not the second: other kernels write what a call does not serve.
    heads = torch.tensor([h for h in range(spec.heads) if h != 1], dtype=torch.int32, device=device)
    bounds = torch.full((len(heads),), -torch.inf, device=device)
    bounds[::2] = case.bound
    pad = None
    if spec.padded:
        # One entry has pads on the left and a hole.
        pad = torch.ones(BATCH, case.keys, dtype=torch.bool, device=device)
        pad[0, : case.keys // 3] = pad[0, case.keys // 2] = False
    inputs = inputs_of(spec, BATCH, case.length, case.keys, device)
    lists = lists_of(spec.block, (BATCH, len(heads)), case.length, case.keys, device)
    return Call(inputs, heads, *lists, bounds, pad, case.window)


def _checks(spec: BlockPrefill, prefill: Callable[..., Tensor], device: torch.device) -> Iterator[Check]:
    block = spec.block
    cases = (
        Case(1, 1),
        Case(block - 3, block - 3),
        Case(2 * block + 5, 5 * block + 1),
        Case(3 * block + 8, 3 * block + 8, window=block + 9),
        Case(4 * block + 1, 4 * block + 1, bound=BOUND),
    )

    def by_reference(*arguments: Tensor) -> Tensor:
        *rest, out, lse = arguments
        return reference(*rest, block, out, lse)  # type: ignore[call-arg, arg-type]

    for case in cases:
        call = _call(spec, case, device)
        found, right = partial(call.run, prefill), partial(call.double().run, by_reference)
        near = partial(_near(call).double().run, by_reference)
        for name, part, tolerance in (("out", OUT, TOLERANCE[spec.dtype]), ("LSE", LSE, TOLERANCE_LSE)):
            parts = [partial(_part, run, part) for run in (found, right, near)]
            yield Check(f"{name}, {case}", parts[0], parts[1], tolerance, parts[2])


def _part(run: Callable[[], tuple[Tensor, ...]], part: slice) -> Results:
    return run()[part]


def _near(call: Call) -> Call:
    """The lists of one head lack their last block, or, where there are thresholds, the other heads have them."""
    bounded = call.bounds > -torch.inf
    if bounded.any():
        return call._replace(bounds=torch.where(bounded, -torch.inf, BOUND))
    counts = call.counts.clone()
    counts[-1, -1] -= 1
    return call._replace(counts=counts)


def _races(spec: BlockPrefill, prefill: Callable[..., Tensor], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference":
        return
    length = TIMED[device.type]
    q, k, v = inputs_of(spec, 1, length, length, device)
    counts, blocks = lists_of(spec.block, (1, spec.heads), length, length, device, SPARSE)
    heads = torch.arange(spec.heads, dtype=torch.int32, device=device)
    bounds = torch.full((spec.heads,), -torch.inf, device=device)
    out = torch.empty(1, length, spec.heads, spec.head_dim_v, dtype=q.dtype, device=device).transpose(1, 2)
    pad = mask = None
    if spec.padded:
        # What a padded model is run with: the mask, written out.
        pad = torch.arange(length, device=device)[None] >= length // 100
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_() & pad[:, None, None, :]
    dense = partial(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE, enable_gqa=True
    )
    own = partial(prefill, q, k, v, heads, counts, blocks, bounds, SCALE, pad, 0, out)
    rows = len(counts[0, 0])
    ideal = spec.heads * rows * (rows + 1) / 2 / int(counts.sum())
    yield Race(f"N = {length}, {ideal:.1f}× fewer blocks", {"this kernel": own, "dense SDPA": dense})
