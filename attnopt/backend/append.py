"""The buffers behind caches that grow by a token a call, around what inductor made of a graph with appends.

    keys = compiled(past)         cat: n tokens read and written      append: the past's own memory, one token longer

The compiled function writes new tokens into its longer inputs (passes/append.py), which are made here out of the pasts
that the caller holds. Nobody but the caller owns a buffer: it lives as long as a tensor in it does.

A past is continued in place only if it is a tensor that was returned here and has not been continued yet: then nothing
lies behind it. Everything else is copied to a buffer of its own: the second continuation of a prefix, a slice, rows in
another order, a deepcopy. What somebody still holds of an older state keeps its contents, as only the memory behind it
is written to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnopt.passes.append import Append, capacity, strides_of


@dataclass
class Counts:
    """How often a past was continued in place, and how often it was copied, in this process."""

    appended: int = 0
    copied: int = 0


counts = Counts()
# Tensors that were returned and not yet continued, for as long as the caller holds them, and what they looked like.
_open: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Two threads may continue one prefix at once.
_claiming = threading.Lock()


def looks(tensor: Tensor) -> tuple[Any, ...]:
    """What changes where somebody gives a tensor other memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.is_inference()


def claimed(past: Tensor) -> bool:
    """Whether the memory behind `past` is free. It is then the caller's, and nobody is told so again."""
    with _claiming:
        seen = _open.pop(past, None)
    return seen == looks(past) and past.is_inference() == torch.is_inference_mode_enabled()


def added_by(append: Append, args: Sequence[Any]) -> int:
    """How many positions a call adds."""
    return append.added if append.added_at is None else int(args[append.added_at])


def within(past: Tensor, length: int) -> Tensor:
    """The tensor of `length` positions in the memory of `past`; no view of it, so that nothing is kept alive by it."""
    batch, heads, _, dim = past.shape
    return past.new_empty(0).set_(
        past.untyped_storage(), past.storage_offset(), (batch, heads, length, dim), past.stride()
    )


def moved(past: Tensor, length: int, slots: int, strides: Sequence[int] | None = None) -> Tensor:
    """The tensor of `length` positions in a new buffer of `slots`, the first of them those of `past`. strides: those of
    the buffer, packed if None."""
    batch, heads, held, dim = past.shape
    sizes = (batch, heads, slots, dim)
    memory = past.new_empty_strided(sizes, strides_of(sizes, slots) if strides is None else strides)
    memory[:, :, :held].copy_(past)
    counts.copied += 1
    return within(memory, length)


def continued(append: Append, past: Tensor, added: int) -> Tensor | None:
    """The longer tensor for `past`; None where its strides, which were compiled, leave no room."""
    length = past.shape[2] + added
    if not append.roomy:
        return moved(past, length, capacity(length))
    slots = past.stride(1) // past.shape[3]
    if slots <= length:
        return None
    if claimed(past):
        counts.appended += 1
        return within(past, length)
    # Heads may lie further apart than their slots take.
    return moved(past, length, slots, past.stride())


def kept(full: Tensor, added: int) -> Tensor:
    """What the caller gets: in a larger buffer where the next call would find no room, so that the strides which that
    call is compiled for, or checked against, are those it finds."""
    length = full.shape[2]
    # One slot more: compiled code may rely on there being room behind the positions.
    if full.stride(1) // full.shape[3] <= length + added:
        full = moved(full, length, capacity(length + added))
    _open[full] = looks(full)
    return full


def with_longer(inputs: Sequence[Any], appends: Sequence[Append]) -> list[Any]:
    """A graph's example inputs, the longer tensors without data in the places of the pasts."""
    longer = {a.past: a.like for a in appends}
    return [longer.get(at, given) for at, given in enumerate(inputs)]


def appending(
    run: Callable[..., Any], appends: Sequence[Append], untouched: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """`run` with the pasts among its arguments made longer, and these put among its results; what `untouched` compiles,
    at the first such call, where a past has no room for what is added."""
    other: list[Callable[..., Any]] = []
    # By position, lowest first: the order in which the results they are missing from is filled up.
    places = sorted((at, n) for n, append in enumerate(appends) for at in append.outputs)

    def with_room(*args: Any) -> Any:
        added = [added_by(a, args) for a in appends]
        longer = [continued(a, args[a.past], count) for a, count in zip(appends, added, strict=True)]
        if any(full is None for full in longer):
            if not other:
                other.append(untouched())
            return other[0](*args)
        given = list(args)
        for append, full in zip(appends, longer, strict=True):
            given[append.past] = full
        results = list(run(*given))
        ends = [kept(full, count) for full, count in zip(longer, added, strict=True)]
        for at, n in places:
            results.insert(at, ends[n])
        return results

    return with_room
