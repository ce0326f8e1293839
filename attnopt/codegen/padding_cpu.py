"""Padding on the CPU where the real tokens of a sample are one run: its rows and keys are views, nothing is masked.

    rows before the run     keep no key: 0
    rows of the run         unpadded attention, the sinks counted from the run's first key
    rows after the run      keep what their span still holds of the run: nobody should use them, but the mask says so

Time over the same heads without padding, 200 of 4096 tokens padded, 8 over 2 heads, four windows of 256, two of 1024,
one of 2048, one dense head, 64 sinks; in brackets with a feature that hides padded keys (span_cpu.py), which is what
other padding takes. Left: bfloat16 D=64 0.91 (1.14), D=128 0.92 (1.29); float32 0.95 (1.12), 0.91 (1.07). Right:
bfloat16 1.12 (1.20), 1.08 (1.27); float32 1.08 (1.13), 1.03 (1.08).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows after a run that share one masked call; their mask is rows x (sinks + window) numbers.
ROWS = 256


class Run(NamedTuple):
    """Samples `first` to `last` - 1 of a batch, whose real tokens are at `start` to `stop` - 1."""

    first: int
    last: int
    start: int
    stop: int


def real_runs(pad: Tensor) -> list[Run] | None:
    """The runs of pad bool (B, N), true for real tokens; None where those of some sample lie apart."""
    length = pad.shape[1]
    ordered = pad.to(torch.uint8)
    start, stop = ordered.argmax(1), length - ordered.flip(1).argmax(1)
    count = pad.sum(1)
    if not bool(((stop - start == count) | (count == 0)).all()):
        return None
    bounds = torch.stack((start, torch.where(count == 0, start, stop)), 1).tolist()
    runs: list[Run] = []
    for sample, (begin, end) in enumerate(bounds):
        if runs and runs[-1][2:] == (begin, end):
            runs[-1] = runs[-1]._replace(last=sample + 1)
        else:
            runs.append(Run(sample, sample + 1, begin, end))
    return runs


def after_run(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int, scale: float) -> Iterator[tuple[int, Tensor]]:
    """Rows past the last key: q (b, h, R, D), of which row r stands at S + r; k and v (b, g, S, ·) -> (row, result).

    Row r keeps key j where ``j < sink or S + r - j < window``. Rows that keep none are not yielded.
    """
    keys, rows = k.shape[2], q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if window >= keys + rows:
        yield 0, F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        return
    sink = min(sink, keys)
    reached = rows if sink else min(rows, max(window - 1, 0))
    for row in range(0, reached, ROWS):
        end = min(row + ROWS, reached)
        left = min(max(keys + row - window + 1, sink), keys)
        keys_here, values = (torch.cat((x[:, :, :sink], x[:, :, left:]), 2) for x in (k, v))
        place = torch.cat((torch.arange(sink), torch.arange(left, keys)))
        distance = keys + torch.arange(row, end)[:, None] - place
        mask = torch.zeros(distance.shape, dtype=q.dtype).masked_fill_(
            (distance >= window) & (place >= sink), float("-inf")
        )
        rows_here = q[:, :, row:end]
        yield row, F.scaled_dot_product_attention(rows_here, keys_here, values, mask, scale=scale, enable_gqa=grouped)
