"""`attnopt::selected_attention`: heads whose blocks of keys are selected from the input, beside others' outputs.

The selection is the candidate's own (attnopt/candidates), the walk over its lists an emitted kernel of `BlockPrefill`.
Both run within this one opaque call, so that no list is a value of the graph, and nothing waits for the device. It has
no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import settings as switches
from attnopt.codegen.emit import load
from attnopt.codegen.spec import BlockPrefill
from attnopt.ops.span import empty_tokens_first, launches, prefill, tokens_first
from attnopt.registry import CANDIDATES


@dataclass(frozen=True, eq=False)
class Visits:
    """What a call did, by head: int32 (B, h, R) each. counts: blocks listed; skipped: of these by their bound;
    possible: those that hold a key which causality, padding and the model's own window leave."""

    counts: Tensor
    skipped: Tensor
    possible: Tensor

    @property
    def sums(self) -> Tensor:
        """Blocks possible, listed and skipped of every head, int64 (h, 3)."""
        return torch.stack([x.sum((0, 2)) for x in (self.possible, self.counts, self.skipped)], -1)


# Tables are sent to the device, and counts begun there, by the first call that needs them: no CUDA graph may hold them.
APART = (torch.Tag.cudagraph_unsafe,)

# Site -> int64 (H, 4): blocks possible, listed, skipped, and calls, since `forget`; on the device of the
# site, added to without waiting for it.
tally: dict[str, Tensor] = {}


def forget() -> None:
    tally.clear()


@lru_cache(maxsize=4096)
def _beside(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """A table on its device, sent there once."""
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64, device=device)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, method: str, settings: Tensor, pad: Tensor | None, scale: float,
    window: int, out: Tensor, lse: Tensor | None = None, every: bool = False,
) -> Visits:  # fmt: skip
    """Write the heads `heads`, int32 (h,), of out (B, H, N, Dv), and lse (B, h, N) where it is wanted.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, Dv), M >= N; method: the candidate, its fixed parameters and the size of
    its blocks, "pooled/64" or "hierarchical/16/64"; settings float64 (h, P): all its parameters in their order; heads
    and settings on the CPU. pad bool (B, M) true where a key counts; window: the model's own, 0 for none. every: visit
    all that there is.
    """
    from attnopt.candidates._selected import asked_of, bounds_of

    name, *fixed = method.split("/")
    candidate = CANDIDATES[name]
    table = _beside(tuple(map(tuple, settings.tolist())), q.device)
    served = _beside(tuple((float(head),) for head in heads.tolist()), q.device)[:, 0].long()
    asked = asked_of(candidate, q, k, served, table, scale, pad, window, tuple(map(int, fixed)))
    lists, bounds = candidate.select(asked) if not every else asked.every, bounds_of(asked)
    bounds = torch.full_like(bounds, -torch.inf) if every else bounds
    spec = BlockPrefill(
        switches.target(q.device.type), str(q.dtype).removeprefix("torch."), q.shape[1], k.shape[1], q.shape[3],
        v.shape[3], asked.block, pad is not None,
    )  # fmt: skip
    launches[spec.key()] += 1
    skipped = load(spec).prefill(q, k, v, served.int(), *lists, bounds, scale, pad, window, out, lse)
    possible = asked.possible.sum(-1, dtype=torch.int32).expand_as(lists.counts)
    return Visits(lists.counts, skipped, possible)


@torch.library.custom_op("attnopt::selected_attention", mutates_args=(), tags=APART)
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near: Tensor | None,
    heads: Tensor,
    method: str,
    settings: Tensor,
    pad: Tensor | None,
    scale: float,
    model_window: int,
    min_length: int,
    site: str,
) -> Tensor:
    """Causal attention whose query heads `heads` visit selected blocks; the other heads are those of `near`.

    Arguments as in `attend_selected`; near (B, H, N, Dv): None where `heads` are all there are. Below `min_length` keys
    nothing is selected, and `near` holds these heads too. site: what the blocks visited are counted under in `tally`,
    "" for not at all. Returns (B, H, N, Dv), physically (B, N, H, Dv).
    """
    short = k.shape[2] < min_length or not q.numel()
    if short and near is not None:
        return tokens_first(near.clone())
    if short:
        whole = torch.full((q.shape[1],), max(k.shape[2], 1), dtype=torch.int32)
        if model_window:
            whole.clamp_(max=model_window)
        return tokens_first(prefill(q, k, v, torch.zeros_like(whole), whole, scale, pad))
    out = empty_tokens_first(q, v.shape[3])
    if near is not None:
        out.copy_(near)
    visits = attend_selected(q, k, v, heads, method, settings, pad, scale, model_window, out)
    if site:
        count(site, q, heads, visits.sums)
    return out


@torch.library.custom_op("attnopt::selected_chunk", mutates_args=(), tags=APART)
def selected_chunk(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    n: Tensor,
    starts: Sequence[int],
    near: Tensor,
    heads: Tensor,
    method: str,
    settings: Tensor,
    valid: Tensor | None,
    scale: float,
    model_window: int,
    min_length: int,
    site: str,
) -> Tensor:
    """`selected_attention` of a chunk of a prompt, whose keys and those before it a cache holds (`attend_update`).

    q (B, H, T, D), near (B, H, T, Dv), valid bool (B, T) true for tokens that count, None for all; keys (B, S, D),
    values (B, S, Dv): slots, n int32 (B,): tokens of each row, this chunk's among them. starts: of each KV head, where
    its tokens stand in their order, -1 where not all are there, which the KV heads of `heads` must have: to a method
    that looks at other heads these keys are 0. A row of less than `min_length` tokens visits every block. Waits for the
    device, as shapes depend on n. Returns (B, H, T, Dv), physically (B, T, H, Dv).
    """
    out, seen, every = tokens_first(near.clone()), n.tolist(), slice(None)
    sums = torch.zeros(len(heads), 3, dtype=torch.int64, device=q.device)
    rows: list[tuple[slice, Tensor | slice]] = [(every, every)]
    if len(set(seen)) > 1 or (valid is not None and not bool(valid.all())):
        counted = [every] * len(seen) if valid is None else [row.nonzero()[:, 0] for row in valid]
        rows = [(slice(b, b + 1), found) for b, found in enumerate(counted)]
    for row, real in rows:
        here = out[row, :, real]
        if not here.numel():
            continue
        length = seen[row][0]
        k, v = (in_order(x[row], starts, length) for x in (keys, values))
        given = heads, method, settings, None, scale, model_window, here
        visits = attend_selected(q[row, :, real], k, v, *given, every=length < min_length)
        out[row, :, real] = here
        sums += visits.sums
    if site:
        count(site, q, heads, sums)
    return out


def in_order(slots: Tensor, starts: Sequence[int], length: int) -> Tensor:
    """The first `length` tokens of each KV head of slots (B, S, D): (B, G, length, D), 0 where `starts` has -1."""
    found = slots.new_zeros(slots.shape[0], len(starts), length, slots.shape[2])
    for head, start in enumerate(starts):
        if start >= 0:
            found[:, head] = slots[:, start : start + length]
    return found


def count(site: str, q: Tensor, heads: Tensor, sums: Tensor) -> None:
    """Add a call, whose `Visits.sums` these are, to `tally`."""
    held = tally.get(site)
    if held is None or held.device != q.device or held.shape[0] != q.shape[1]:
        held = tally[site] = torch.zeros(q.shape[1], 4, dtype=torch.int64, device=q.device)
    served = _beside(tuple((float(head),) for head in heads.tolist()), q.device)[:, 0].long()
    held.index_add_(0, served, F.pad(sums, (0, 1), value=1))


@selected_attention.register_fake
def _(q, k, v, near, heads, method, settings, pad, scale, model_window, min_length, site):  # type: ignore[no-untyped-def]
    return empty_tokens_first(q, v.shape[3])


@selected_chunk.register_fake
def _(q, keys, values, n, starts, near, *rest):  # type: ignore[no-untyped-def]
    return empty_tokens_first(q, values.shape[2])


def _no_gradient(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "attnopt::selected_attention has no gradient. Train with a plan of spans, or with the model as it was."
    )


selected_attention.register_autograd(_no_gradient)
