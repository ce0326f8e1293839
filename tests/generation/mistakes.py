"""Steps of a cache that make one mistake, and what is asked of every test of a mistake: that the code passes it, and
that the code with the mistake in it does not.

A mistake is a function that breaks the code through a MonkeyPatch. The two steps here take the emitted kernel's place.
`slotted` holds what the cache holds; `remembered` holds every token there ever was, so that what a head sees can be
said anew. Both are right until they are told to be wrong, which the tests check as well.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation import models, oracle
from torch import Tensor

from attnopt.codegen.slots import held, slots, survives
from attnopt.errors import AttnoptError
from attnopt.hf.cache import SpanLayer
from attnopt.ops import cache as operator

Mistake = Callable[[pytest.MonkeyPatch], object]
# A mistake moves a logit by at least this much; their spread is about one, and rounding moves them by 1e-6.
NOTICED = 1e-3


def told_apart(error: Callable[[], float], *mistakes: Mistake) -> None:
    """The largest error of a logit is within the tolerance, and with any of the mistakes it is noticed: it is more than
    NOTICED, or the code says by itself that something is wrong."""
    found = error()
    assert found <= models.TOLERANCE, found
    for mistake in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            try:
                found = error()
            except AttnoptError:
                continue
        assert found > NOTICED, f"{mistake.__name__} moves logits by {found} only"


def only_right(check: Callable[[], object], *mistakes: Mistake) -> None:
    """The check passes, and with any of the mistakes it fails, or the code says by itself that something is wrong."""
    check()
    for mistake in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            mistake(patch)
            try:
                check()
            # The second is pytest's, of an error that was not raised.
            except (AssertionError, AttnoptError, pytest.fail.Exception):
                continue
        raise AssertionError(f"{mistake.__name__} is not noticed")


def wrong(out: Any, ids: Tensor, mask: Tensor, length: int, model: Any = None, rules: Any = None) -> float:
    """The largest error of the logits of what was generated, in a cache of so many tokens."""
    model = model or models.shared("llama")
    spans = models.spans_of(model, rules or models.rules_for(model), length)
    found = models.produced_logits(out)
    if not found.isfinite().all():
        return float("inf")
    return models.difference(found, oracle.following(model, ids, mask, out, spans))


def not_done(owner: Any, *names: str) -> Mistake:
    """The mistake of leaving these functions out."""

    def mistake(patch: pytest.MonkeyPatch) -> None:
        for name in names:
            patch.setattr(owner, name, lambda *_, **__: None)

    mistake.__name__ = "no " + ", ".join(names)
    return mistake


def all_of(*parts: Mistake) -> Mistake:
    def mistake(patch: pytest.MonkeyPatch) -> None:
        for part in parts:
            part(patch)

    mistake.__name__ = " and ".join(part.__name__ for part in parts)
    return mistake


def unchecked(patch: pytest.MonkeyPatch) -> None:
    not_done(SpanLayer, "check")(patch)


def instead(step: Callable[..., Tensor]) -> Mistake:
    """`step` in place of the kernels of attnopt::attend_update, whatever the target."""

    def mistake(patch: pytest.MonkeyPatch) -> None:
        # On the CPU a compiled kernel may serve the operator without asking for one.
        patch.setenv("ATTNOPT_NATIVE", "0")
        patch.setattr(operator, "_kernel", lambda *_: (SimpleNamespace(step=step), "mistaken"))

    mistake.__name__ = getattr(step, "__name__", "step")
    return mistake


def forgetting(name: str) -> Mistake:
    """Rows that change places leave one of the tensors of a layer behind."""

    def mistake(patch: pytest.MonkeyPatch) -> None:
        reorder = SpanLayer.reorder_cache

        def reordered(self: SpanLayer, rows: Tensor) -> None:
            kept = getattr(self, name).clone()
            reorder(self, rows)
            getattr(self, name).copy_(kept)

        patch.setattr(SpanLayer, "reorder_cache", reordered)

    mistake.__name__ = f"forgets {name}"
    return mistake


def attended(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """q (H, T, D), k and v (G, N, ·), keep bool (H, T, N) -> (H, T, Dv); rows that keep nothing are 0."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).masked_fill(~keep, 0.0) @ v


def slotted(writes_first: bool = False, attends_empty: bool = False) -> Callable[..., Tensor]:
    """A step that reads and writes slots. writes_first: the new tokens are written before anything is read.
    attends_empty: slots that hold nothing yet are taken for old tokens."""

    def step(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
        spans: Tensor, scale: float, fresh: bool,
    ) -> Tensor:  # fmt: skip
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        share = q.shape[1] // k.shape[1]
        for row, seen in enumerate(n.tolist()):
            new = torch.arange(q.shape[2]) if valid is None else valid[row].nonzero()[:, 0]
            at, after = seen + torch.arange(len(new)), seen + len(new)
            for group, (start, capacity, sink, _) in enumerate(table.tolist()):
                own = slice(group * share, (group + 1) * share)
                keep_on = survives(at, after, capacity, sink)
                place = start + slots(at[keep_on], capacity, sink)

                def write(place=place, chosen=new[keep_on], row=row, group=group):
                    keys[row, place], values[row, place] = k[row, group, chosen], v[row, group, chosen]

                if writes_first:
                    write()
                positions = held(after if writes_first else seen, capacity, sink)
                there = positions >= (-capacity if attends_empty else 0)
                read_k, read_v = (x[row, start : start + capacity][there] for x in (keys, values))
                positions = positions[there]
                if not writes_first:
                    positions = torch.cat((positions, at))
                    read_k, read_v = (torch.cat((old, x[row, group, new])) for old, x in ((read_k, k), (read_v, v)))
                sinks, windows = spans[own, 0, None, None], spans[own, 1, None, None]
                keep = (positions <= at[:, None]) & ((positions < sinks) | (at[:, None] - positions < windows))
                out[row, own, new] = attended(q[row, own, new], read_k[None], read_v[None], keep, scale)
                if not writes_first:
                    write()
        n += q.shape[2] if valid is None else valid.sum(1, dtype=n.dtype)
        return out

    step.__name__ = "slotted" + " writes first" * writes_first + " attends empty" * attends_empty
    return step


def remembered(columns: bool = False, sees: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A step that forgets nothing, for caches whose rows stay where they are. columns: a token's position is its
    column, and pads have one too. sees(i, j, sinks, windows) says what is kept among the keys before a query."""
    history: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def step(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
        spans: Tensor, scale: float, fresh: bool,
    ) -> Tensor:  # fmt: skip
        new = q.new_ones(len(q), q.shape[2], dtype=torch.bool) if valid is None else valid
        if fresh:
            history.pop(n.data_ptr(), None)
        old = history.get(n.data_ptr(), (k[:, :, :0], v[:, :, :0], new[:, :0]))
        all_k, all_v, counts = (
            torch.cat(pair, dim) for pair, dim in zip(zip(old, (k, v, new), strict=True), (2, 2, 1), strict=True)
        )
        history[n.data_ptr()] = all_k, all_v, counts
        position = (torch.ones_like(counts) if columns else counts).cumsum(1) - 1
        column = torch.arange(counts.shape[1])
        last = column[counts.shape[1] - q.shape[2] :]
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for row in range(len(q)):
            i, j = position[row, last][:, None], position[row]
            sinks, windows = spans[:, 0, None, None], spans[:, 1, None, None]
            span = (j < sinks) | (i - j < windows) if sees is None else sees(i, j, sinks, windows)
            keep = span & (column <= last[:, None]) & counts[row] & counts[row, last][:, None]
            out[row] = attended(q[row], all_k[row], all_v[row], keep, scale)
        n += new.sum(1, dtype=n.dtype)
        return out

    step.__name__ = "remembered" + " by columns" * columns
    return step
