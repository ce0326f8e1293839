"""The plain-PyTorch target of `BlockPrefill`: block after block of rows, and for each the blocks of keys it lists."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import BlockPrefill
from attnopt.registry import TARGETS


def prefill(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, counts: Tensor, blocks: Tensor, bounds: Tensor, scale: float,
    pad: Tensor | None, window: int, block: int, out: Tensor, lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of the query heads `heads`, int32 (h,), to the blocks listed; written to these heads of `out`.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, Dv), M >= N: the queries are the last N. counts int32 (B, h, R) and
    blocks int32 (B, h, R, L): row block r visits the column blocks ``blocks[b, h, r, :counts[b, h, r]]``, ascending and
    different; what stands behind them is not read. bounds float32 (h,) or (B, h): natural logarithms of the thresholds
    lambda, -inf for none. pad bool (B, M) true where a key counts, what stands elsewhere may be no number; window: the
    model's own, 0 for none. out (B, H, N, Dv), of any strides, and lse (B, h, N) in float32 (float64 for float64),
    where it is wanted, are written: 0 and -inf in a row that keeps no key. Returns int32 (B, h, R), the blocks skipped
    by their bound.

    Blocks are visited in this order: the first of the list, where sinks are, then from the last, the diagonal,
    downward. With m_i the largest score of row i so far, a block is skipped where ``max_j s_ij < m_i + bound`` for
    every row i of the block that keeps any of its keys (Yuan et al., "BLASST", arXiv:2512.12087); it leaves m as it is.
    A block of which nothing is kept counts neither as visited nor as skipped. Each skipped block holds at most lambda *
    block of the mass of what its row has visited.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    share, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    skipped, bounds = torch.zeros_like(counts), bounds.expand(q.shape[0], -1)
    if pad is not None:
        # A weight of 0 does not hide what is no number.
        v = v.masked_fill(~pad[:, None, :, None], 0.0)
    for b in range(q.shape[0]):
        for n, head in enumerate(heads.tolist()):
            keys, values = (x[b, head // share].to(wide) for x in (k, v))
            for r in range(counts.shape[2]):
                rows = torch.arange(r * block, min((r + 1) * block, q.shape[2]), device=q.device)
                queries = q[b, head, rows].to(wide)
                listed = blocks[b, n, r, : int(counts[b, n, r])].tolist()
                most = queries.new_full((len(rows),), -torch.inf)
                total, mixed = queries.new_zeros(len(rows)), queries.new_zeros(len(rows), values.shape[1])
                for c in [*listed[:1], *reversed(listed[1:])]:
                    columns = torch.arange(c * block, min((c + 1) * block, k.shape[2]), device=q.device)
                    apart = (rows + offset)[:, None] - columns
                    keep = (apart >= 0) & (apart < window) if window else apart >= 0
                    if pad is not None:
                        keep = keep & pad[b, columns]
                    scores = (queries @ keys[columns].T * scale).masked_fill(~keep, -torch.inf)
                    here = scores.amax(-1)
                    if not bool(keep.any()):
                        continue
                    if bool(((here < most + bounds[b, n]) | (here == -torch.inf)).all()):
                        skipped[b, n, r] += 1
                        continue
                    new = torch.maximum(most, here)
                    at = new.masked_fill(new == -torch.inf, 0.0)
                    weights, shrunk = torch.exp(scores - at[:, None]), torch.exp(most - at)
                    total, most = total * shrunk + weights.sum(-1), new
                    mixed = mixed * shrunk[:, None] + weights @ values[columns]
                out[b, head, rows] = (mixed / total.clamp(min=torch.finfo(wide).tiny)[:, None]).to(out.dtype)
                if lse is not None:
                    lse[b, n, rows] = total.log() + most.masked_fill(most == -torch.inf, 0.0)
    return skipped


@TARGETS.register("reference block_prefill")
class Reference:
    @staticmethod
    def emit(spec: BlockPrefill) -> str:
        text = TEMPLATE.format(spec=spec, block=spec.block)
        return text + footer(spec, "self_check_blocks", "prefill")


TEMPLATE = '''"""{spec}."""

from attnopt.codegen import reference_blocks


def prefill(q, k, v, heads, counts, blocks, bounds, scale, pad, window, out, lse=None):
    """Arguments and result as those of reference_blocks.prefill."""
    return reference_blocks.prefill(q, k, v, heads, counts, blocks, bounds, scale, pad, window, {block}, out, lse)
'''
