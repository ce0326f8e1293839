"""Closed forms of constant buffers: the whole value is compared once with the formula that its borders suggest.

    tril(ones(1024, 1024)) -> j <= i        arange(1024) -> j        triu(full(-inf), 1) -> -inf where j > i

The caller answers for the value: it stands under a guard that somebody else keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.masks.expressions import Affine
from attnopt.masks.predicates import FALSE, TRUE, Conjunction, at_least_zero
from attnopt.masks.values import Select, Sum, Value, constant, narrowed

Form = Callable[[tuple[Affine, ...]], Value]
# A mask buffer of more elements than this is carried as data: comparing it would take longer than it saves.
LARGEST = 2**27


def closed_form(buffer: Tensor) -> Form | None:
    """The buffer's value as a function of its index, or None where it has no closed form that is known here."""
    if buffer.numel() == 0 or buffer.numel() > LARGEST or buffer.is_complex() or buffer.is_quantized:
        return None
    buffer = buffer.detach()
    if any(size != 1 for size in buffer.shape[:-2]):
        return None
    plane = buffer.reshape(buffer.shape[-2:] if buffer.ndim >= 2 else (1, buffer.numel()))
    first = plane[0, 0]
    if bool((plane == first).all()):
        held = number(first)
        return lambda index: held
    return counting(plane, buffer.ndim) or band(plane)


def number(element: Tensor) -> Value:
    value = element.item()
    if element.dtype == torch.bool:
        return TRUE if value else FALSE
    return constant(value) if element.dtype.is_floating_point else Affine((), int(value))


def counting(plane: Tensor, rank: int) -> Form | None:
    """``start + step * position`` along one dimension of a buffer of integers."""
    if plane.dtype == torch.bool or 1 not in plane.shape:
        return None
    line = plane.reshape(-1)
    start, step = line[0].item(), (line[1] - line[0]).item()
    if not float(start).is_integer() or not float(step).is_integer() or max(abs(start), abs(step)) > 2**53:
        return None
    expected = torch.arange(line.numel(), device=line.device, dtype=torch.float64) * step + start
    if not bool((line.double() == expected).all()):
        return None
    dim = -1 if plane.shape[0] == 1 else -2
    # A vector has a single dimension, the last.
    along = dim if rank >= 2 else -1
    return lambda index: index[along] * int(step) + int(start)


def band(plane: Tensor) -> Form | None:
    """Two values, one of them on a band ``low <= column - row <= high`` that may reach to the borders."""
    rows, columns = plane.shape
    low, high = plane.min(), plane.max()
    inner = plane == high
    if not bool((inner | (plane == low)).all()):
        return None
    # The band is of whichever value covers the main diagonal's corner; both are tried.
    for value, other, where in ((high, low, inner), (low, high, ~inner)):
        distance = torch.arange(columns, device=plane.device) - torch.arange(rows, device=plane.device)[:, None]
        held = distance[where]
        least, most = int(held.min()), int(held.max())
        if bool((where == ((distance >= least) & (distance <= most))).all()):
            lower = None if least == 1 - rows else least
            upper = None if most == columns - 1 else most
            return select_band(value, other, lower, upper)
    return None


def select_band(value: Tensor, other: Tensor, lower: int | None, upper: int | None) -> Form:
    on, off = value.item(), other.item()

    def form(index: tuple[Affine, ...]) -> Value:
        distance = index[-1] - index[-2]
        inside: Conjunction = TRUE
        if lower is not None:
            inside = inside & at_least_zero(distance - lower)
        if upper is not None:
            inside = inside & at_least_zero(distance * -1 + upper)
        if value.dtype == torch.bool:
            return inside if on else inside.inverted()
        if value.dtype.is_floating_point:
            return Select.of(inside, Sum.number(on), Sum.number(off))
        return narrowed(Select.of(inside, Affine((), int(on)), Affine((), int(off))))

    return form
