"""threshold: sinks and a window in whole blocks, of which those with small weights are skipped while walking.

    skip a block if max_j s_ij < m_i + ln(skip / M) for all its rows i,    m_i the largest score of row i so far

(Yuan et al., "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv:2512.12087; the second stage
of SpargeAttn, Zhang et al., arXiv:2502.18137.) Nothing is estimated beforehand: scores are computed, what is saved is
the exponentials, the values and their product. Each skipped block holds at most skip * block / M of what its row has
met, so a row loses `skip` of it at most, over its own denominator, which is at least 1. With `skip` in the hundreds,
where published settings lie, that promises nothing: `attnopt distill` measures per head what is lost.
"""

from __future__ import annotations

import torch

from attnopt.candidates import Param
from attnopt.candidates._selected import Selected
from attnopt.candidates._tried import MOST_TOKENS
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked


class Threshold(Selected):
    name = "threshold"
    family = "threshold"
    params = (Param("sink", int, 0, MOST_TOKENS), Param("window", int, 1, MOST_TOKENS))

    def menu(self, length: int) -> list[Choice]:
        whole = {"sink": 0, "window": MOST_TOKENS}
        return [c for skip in (1 / 4, 1.0, 4.0, 16.0, 64.0) for c in self.offered({**whole, "skip": skip}, length)]

    def keep(self, asked: Asked) -> torch.Tensor:
        """Every block that holds a key of the span of some of its rows."""
        c = torch.arange(asked.columns, device=asked.q.device)
        start = torch.arange(asked.rows, device=asked.q.device) * asked.block + asked.offset
        first = (start - asked.setting("window")[..., 0] + 1).clamp(min=0)  # (h, R)
        in_window = (c + 1) * asked.block > first[..., None]
        # Sinks are the first keys of a prompt, not padding before it.
        in_sink = (c - asked.begins)[:, None, None] * asked.block < asked.setting("sink")  # (B | 1, h, 1, C)
        return in_window | in_sink


CANDIDATES.register("threshold")(Threshold())
