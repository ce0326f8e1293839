"""The pass of blocks.py in Triton: the N x N part on a GPU, in O(N) memory, for runs with a backward pass.

triton_kernels.py has the kernels. Rows are taken some at a time, so that their sums stay small; from a row on these are
float64, and what follows from them is that of rows.py. Compared with its twin in Triton's interpreter and compiled for
sm_80 and sm_90 (tests/test_triton_pass.py, tests/test_triton_pass_aot.py); never run on a GPU, so nothing is known of
its speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnopt.statistics.records import SINK_KEYS, Observation
from attnopt.statistics.rows import Moved, Part, Rows
from attnopt.statistics.triton_kernels import NEVER, attend_keys, attend_rows, weigh_rows

# Rows of heads whose sums are held at a time: 134 MB of them at 64 cells.
ROWS_AT_ONCE = 1 << 18
MAX_DIM = 256
UNBOUNDED = 2**30

# Chosen by TRITON_INTERPRET when this file is imported.
INTERPRETED = not isinstance(attend_rows, triton.JITFunction)


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def tiles_of(dtype: torch.dtype, dim: int) -> tuple[Tiles, Tiles]:
    """Of the kernels over rows, and of that over keys, for features of `dim`, a power of two.

    What neither spills much nor exceeds shared memory, for sm_80 and sm_90: tests/test_triton_pass_aot.py.
    """
    if dtype == torch.float32:
        small = Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)
        return small if dim <= 64 else (Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1))
    if dim > 128:
        return Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 2)
    if dim <= 64:
        return Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)
    return Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2)


def power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def refused(q: Tensor, k: Tensor, v: Tensor, observation: Observation) -> str:
    """Why these kernels cannot serve a pass, or an empty string."""
    if not (q.is_cuda or INTERPRETED):
        return f"Triton needs a GPU, and the model is on {q.device}"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels have no {str(q.dtype).removeprefix('torch.')}"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"heads of {max(q.shape[3], v.shape[3])} features exceed {MAX_DIM}"
    if q.shape[0] * q.shape[1] >= 1 << 16:
        return f"{q.shape[0]} samples of {q.shape[1]} heads are more than one grid holds"
    if "delta" in observation.held:
        return "its kernels do not measure how far outputs move"
    return ""


class Cells:
    """Between which edges of distance, and which sinks, kernels sum; and which of these cells make up what is asked."""

    def __init__(self, found: Rows) -> None:
        grid, device = found.grid, found.device
        cuts = sorted({0, *grid.sinks})
        self.edges, self.cuts = power_of_two(len(found.edges), 2), power_of_two(len(cuts), 2)
        self.count = self.edges * self.cuts
        self.distances, self.columns = (
            torch.tensor(values + [NEVER.value] * (size + 1 - len(values)), dtype=torch.int32, device=device)
            for values, size in ((found.edges, self.edges), (cuts, self.cuts))
        )
        near, up_to = self.distances[:-1], self.columns[1:]
        sinks, windows = (torch.tensor(values, device=device) for values in (grid.sinks, grid.windows))
        in_sink = (up_to[:, None, None, None] <= sinks[:, None]).expand(-1, self.edges, -1, len(windows))
        in_window = (near[:, None, None] < windows).expand(self.cuts, -1, len(sinks), -1)
        self.kept = (in_sink | in_window).reshape(self.count, -1).double()
        starts = torch.tensor([found.edges[n] for n in found.at_bucket], device=device)
        self.beyond = (near[:, None] >= starts).expand(self.cuts, -1, -1).reshape(self.count, -1).double()
        self.shape = (found.folded, found.repeat)
        self.spans = (len(sinks), len(windows))

    def sides(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (B * H, cells, R) over what each candidate keeps, and over what it drops: (X, r, R, S, W) float64."""
        by_row = sums.double().mT
        kept, dropped = ((by_row @ chosen).unflatten(-1, self.spans) for chosen in (self.kept, 1 - self.kept))
        return kept.unflatten(0, self.shape), dropped.unflatten(0, self.shape)

    def mass_beyond(self, sums: Tensor) -> Tensor:
        """(buckets, X, r, R)."""
        return (sums.double().mT @ self.beyond).unflatten(0, self.shape).movedim(-1, 0)


def stream(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, pad: Tensor | None, observation: Observation,
    window: int | None = None, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and the sums into `observation`; arguments as of `blocks.stream`."""
    found = Rows(q, k.shape[1], pad, observation)
    dtypes = q.dtype, k.dtype, v.dtype
    if INTERPRETED and q.dtype == torch.bfloat16:
        # The interpreter would multiply the bit patterns of bfloat16.
        q, k, v, grad = (x.float() for x in (q, k, v, grad))
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad.to(q.dtype)))
    (batch, heads, length, dim), (kv_heads, dim_v) = q.shape, (v.shape[1], v.shape[3])
    cells, items = Cells(found), batch * heads
    padding = cells.distances if pad is None else pad.to(torch.uint8).contiguous()
    common: dict[str, Any] = {
        "REPEAT": found.repeat, "DIM": dim, "DIM_V": dim_v, "WIDTH": power_of_two(dim, 16),
        "WIDTH_V": power_of_two(dim_v, 16), "CAPPED": bool(softcap), "PADDED": pad is not None,
    }  # fmt: skip
    over_rows, over_keys = tiles_of(q.dtype, max(common["WIDTH"], common["WIDTH_V"]))
    rowwise, keywise = (
        {**common, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys, **tiles.options} for tiles in (over_rows, over_keys)
    )
    numbers = (scale, softcap or 1.0, UNBOUNDED if window is None else window)
    strides = [step for x in (q, k, v, grad) for step in x.stride()[:3]]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lse, dots, entropy = (torch.empty(items, length, dtype=torch.float32, device=q.device) for _ in range(3))
    held = min(length, max(over_rows.rows, ROWS_AT_ONCE // items // over_rows.rows * over_rows.rows))
    x = slice(0, found.folded)
    with torch.cuda.device_of(q):
        for first in range(0, length, held):
            stop = min(first + held, length)
            mass, moved = torch.zeros(2, items, cells.count, held, dtype=torch.float32, device=q.device)
            lead = torch.empty(items, triton.cdiv(stop - first, over_rows.rows), SINK_KEYS, device=q.device)
            grid = lead.shape[1], items
            weigh_rows[grid](
                q, k, v, grad, padding, lse, dots, entropy, lead, length, first, stop, *numbers, *strides,
                HEADS=heads, **rowwise,
            )  # fmt: skip
            attend_rows[grid](
                q, k, v, grad, padding, lse, dots, cells.distances, cells.columns, dq, mass, moved,
                length, first, stop, held, *numbers, *strides,
                HEADS=heads, EDGES=cells.edges, CUTS=cells.cuts, **rowwise,
            )  # fmt: skip
            rows = slice(first, stop)
            mass, moved = mass[..., : stop - first], moved[..., : stop - first]
            of_rows = [y[:, rows].double().unflatten(0, cells.shape) for y in (entropy, dots)]
            at_key = lead.double().sum(1)[:, : min(SINK_KEYS, length)].unflatten(0, cells.shape)
            changes = Moved(*cells.sides(moved), of_rows[1])
            part = Part(*cells.sides(mass), cells.mass_beyond(mass), of_rows[0], at_key, changes)
            found.add(x, first, found.valid(x, first, stop), part)
        attend_keys[(triton.cdiv(length, over_keys.keys), batch * kv_heads)](
            q, k, v, grad, padding, lse, dots, dk, dv, length, *numbers, *strides, KV_HEADS=kv_heads, **keywise
        )
    found.finish()
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


def aot_signatures(
    dtype: str, dim: int, dim_v: int, edges: int, cuts: int, capped: bool, padded: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel and what triton.compile needs for it, as the JIT would have it for aligned tensors."""
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    widths = power_of_two(dim, 16), power_of_two(dim_v, 16)
    over_rows, over_keys = tiles_of(getattr(torch, dtype), max(widths))
    fixed = {
        "HEADS": 32, "KV_HEADS": 8, "REPEAT": 4, "DIM": dim, "DIM_V": dim_v, "WIDTH": widths[0], "WIDTH_V": widths[1],
        "EDGES": edges, "CUTS": cuts, "CAPPED": capped, "PADDED": padded,
    }  # fmt: skip
    types = {
        **dict.fromkeys(("q", "k", "v", "grad", "dq", "dk", "dv"), f"*{short}"), **dict.fromkeys(fixed, "constexpr"),
        **dict.fromkeys(("edges", "cuts"), "*i32"), "pad": "*u8" if padded else "*i32",
        **dict.fromkeys(("lse", "dots", "entropy", "mass", "moved", "lead"), "*fp32"),
        **dict.fromkeys(("scale", "cap"), "fp32"), **dict.fromkeys(("BLOCK_M", "BLOCK_N"), "constexpr"),
    }  # fmt: skip
    unaligned = {"length", "first", "stop", "held", "scale", "cap", "BLOCK_M", "BLOCK_N", *fixed}
    for kernel, tiles in ((weigh_rows, over_rows), (attend_rows, over_rows), (attend_keys, over_keys)):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        known = {**fixed, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
        yield (
            kernel,
            {
                "signature": signature,
                "constexprs": {name: value for name, value in known.items() if name in signature},
                "attrs": {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name not in unaligned},
                "options": tiles.options,
            },
        )
